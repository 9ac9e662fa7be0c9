"""Every field of transformers' `GenerationConfig`, of a request or of a checkpoint: `hf`'s text, or refused by name.

Draws are made by a rule in both classes, so that sampled texts can be compared; a temperature has to be given to
sample, which `hf` insists on.
"""

from __future__ import annotations

import copy
import json
import math
import re
import shutil

import pytest
import torch
from generation_values import ANSWERED, DRAWN, REFUSED, VALUES
from harness import deepen, hf, requests
from transformers import GenerationConfig

from lm_eval_deepen.errors import RequestError
from lm_eval_deepen.member.generation import HONOURED, Asked

FIELDS = sorted(GenerationConfig().to_dict())
PLAIN = {"max_gen_toks": 6, "until": []}
SAMPLED = {**PLAIN, "do_sample": True, "temperature": 1.0}
LONG, SHORT = "The fox walked a b a b", "a"  # several tokens, and one
BOTH = {"forced_bos_token_id", "begin_suppress_tokens", "forced_eos_token_id", "no_repeat_ngram_size"}  # need both


def by_rule(probs, num_samples=1, replacement=False, *, generator=None):
    """Draw what lies at three fifths of the mass, in the order of the ids."""
    if not probs.isfinite().all():
        raise RuntimeError("probability tensor contains either `inf`, `nan` or element < 0")
    return (probs.cumsum(-1) < 0.6).sum(-1, keepdim=True).clamp(max=probs.shape[-1] - 1)


@pytest.fixture
def drawn_by_rule(monkeypatch):
    monkeypatch.setattr(torch, "multinomial", by_rule)


@pytest.fixture(scope="module")
def both(pico):
    """One member, and the harness's own class; a token of the text is one of the model's ends."""
    pair = deepen(pico["bytelevel"]), hf(pico["bytelevel"])
    prompt = torch.tensor([pair[1].tok_encode(LONG)])
    ids = pair[1].model.generate(prompt, max_new_tokens=6, do_sample=False)[0, prompt.shape[1] :].tolist()
    own = {**pair[1].model.generation_config.to_dict(), "eos_token_id": [0, ids[4]]}
    return *pair, ids[0], own


def ask(model, context, arguments):
    (text,) = model.generate_until(requests("generate_until", (context, copy.deepcopy(arguments))), disable_tqdm=True)
    return text


def outcome(model, context, arguments):
    config = model.model.config
    layers = config.num_hidden_layers
    try:
        return ask(model, context, arguments)
    except Exception as error:
        return error
    finally:
        config.num_hidden_layers = layers  # `assistant_early_exit` takes some off, and leaves them off where it fails


def configure(both, **changes):
    for model in both[:2]:
        config = model.model.generation_config = GenerationConfig.from_dict({**both[3], **changes})
        config._original_object_hash = hash(config)  # transformers 4 looks at what `from_pretrained` leaves
    both[0].adopt(both[0].ensemble)


def check(both, field, value, arguments, plain):
    """Ask both for texts; return whether one differs from that without the setting."""
    changed = False
    for context in plain:
        ours, theirs = (outcome(model, context, arguments) for model in both[:2])
        if isinstance(ours, RequestError):
            assert field in str(ours), "the message names the field"
            assert isinstance(theirs, Exception) or (field, value) in REFUSED, (value, ours)
        elif isinstance(theirs, Exception):
            assert isinstance(ours, str), ours
            assert field in ANSWERED or field == "temperature", (value, ours, theirs)
        else:
            assert ours == theirs, (value, context)
            changed |= ours != plain[context]
    return changed


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("place", ["request", "checkpoint"])
def test_every_field_has_the_effect_of_hf_or_is_refused_by_its_name(both, drawn_by_rule, place, field):
    base = SAMPLED if field in DRAWN else PLAIN
    if field == "encoder_no_repeat_ngram_size":  # what would be written is a word of the prompt
        base = {**base, "sequence_bias": [[both[0].tok_encode(" a"), 25.0]]}
    configure(both)
    plain = {context: ask(both[1], context, base) for context in (LONG, SHORT)[: 1 + (field in BOTH)]}
    changed = False
    for value in VALUES.get(field, VALUES["another"]):
        if value == "the first":
            value = [[both[2]]] if field == "bad_words_ids" else both[2]
        if place == "request":
            changed |= check(both, field, value, {**base, field: value}, plain)
            continue
        try:
            configure(both, **{field: value})
        except Exception:
            continue  # transformers does not load such a checkpoint
        changed |= check(both, field, value, base, plain)
        configure(both)
    # In a request `max_gen_toks` goes before `max_new_tokens`, which is another name of it.
    given_by_hflm = (
        {"do_sample", "temperature", "max_length"} if place == "checkpoint" else {"do_sample", "max_new_tokens"}
    )
    not_here = {"renormalize_logits", "remove_invalid_values", "watermarking_config"}  # the last: transformers 5 alone
    assert changed or field not in HONOURED - given_by_hflm - not_here, "no value tells the setting from none"


@pytest.mark.parametrize("penalty", [0.9, 1.1, 1.3])
def test_a_penalty_acts_on_the_logits_of_one_member(pico, penalty):
    """Not on log-probabilities: what it does depends on where the zero lies."""
    pairs = [("Question: What is the largest planet?\nAnswer:", {"max_gen_toks": 16, "repetition_penalty": penalty})]
    for family in ("bytelevel", "metaspace", "padded"):
        batch = requests("generate_until", *pairs)
        assert deepen(pico[family]).generate_until(batch) == hf(pico[family]).generate_until(batch)


@pytest.fixture
def ended(pico, tmp_path):
    """Return a model whose files say where a text ends, and pieces that its text contains."""

    def make(generation, config=None, tokenizer=None):
        folder = tmp_path / f"model{len(list(tmp_path.iterdir()))}"
        shutil.copytree(pico["bytelevel"], folder)
        for name, ids in (("generation_config.json", generation), ("config.json", config)):
            found = json.loads((folder / name).read_text())
            found |= {"eos_token_id": ids} if ids is not None else {}
            (folder / name).write_text(json.dumps(found))
        return folder

    model = hf(pico["bytelevel"])
    prompt = torch.tensor([model.tok_encode(LONG)])
    return make, model.model.generate(prompt, max_new_tokens=9, do_sample=False)[0, prompt.shape[1] :].tolist()


def test_a_text_ends_where_the_generation_config_says_alone(ended, pico):
    """The model config's end counts only where that names none; a piece that is no special token stays in the text."""
    make, ids = ended
    arguments = {"until": [], "max_gen_toks": 9}
    free = ask(hf(pico["bytelevel"]), LONG, arguments)
    at = next(i for i in range(3, 8) if ids[i] not in ids[:i])
    for generation, config in ((0, [0, ids[at]]), ([0, ids[at]], 0), (ids[at], ids[1]), (5, None)):
        folder = make(generation, config)
        ours, theirs = deepen(folder), hf(folder)
        text = ask(ours, LONG, arguments)
        assert text == ask(theirs, LONG, arguments)
        ends = ids[at] in ([generation] if isinstance(generation, int) else generation)
        expected = ours.tok_decode(ids[: at + 1])
        assert text == (expected if ends else free) and len(expected) < len(free)
        named = {generation} if isinstance(generation, int) else set(generation)
        assert set(ours.ensemble.main.eos_ids) == named | {0}, "with several members, too"


@pytest.mark.parametrize("family", ["bytelevel", "padded"])
def test_a_checkpoints_length_goes_before_a_requests_and_past_max_length(pico, family):
    """Whichever is longer; past the positions that the model was made for, a text is refused."""
    ours, theirs = deepen(pico[family], max_length=24, batch_size=4), hf(pico[family], max_length=24)
    for model in (ours, theirs):
        model.model.generation_config.max_new_tokens = 30
        model.model.generation_config.eos_token_id = None
    ours.adopt(ours.ensemble)
    asks = ({"max_gen_toks": 3}, {"max_gen_toks": 20}, {"max_length": 13, "max_gen_toks": 8}, {"max_gen_toks": 5})
    texts = ours.generate_until(requests("generate_until", *((LONG * 2, {"until": [], **asked}) for asked in asks)))
    assert texts == [ask(theirs, LONG * 2, {"until": [], **asked}) for asked in asks]
    ours.model.generation_config.max_new_tokens = 600
    ours.adopt(ours.ensemble)
    with pytest.raises(RequestError, match="513 tokens, more than the 512 that member 'm0' was made for.*max_new_tok"):
        ask(ours, LONG, {"until": [], "max_gen_toks": 3})


BAD_REQUESTS = [
    ({"until": None}, "until=None.*text or a list of texts"),
    ({"until": 5}, "until=5.*text or a list"),
    ({"until": ["a", 5]}, r"until=\['a', 5\].*text or a list"),
    ({"max_gen_toks": math.nan}, "max_gen_toks=nan.*whole number"),
    ({"max_gen_toks": math.inf}, "max_gen_toks=inf.*whole number"),
    ({"max_new_tokens": "many"}, "max_new_tokens='many'.*whole number"),
    ({"max_gen_toks": -1}, "max_gen_toks=-1.*1 or more"),
    ({"max_tokens": 0}, "max_tokens=0.*1 or more"),
    ({"max_gen_toks": 10**9}, "max_gen_toks=1000000000.*leaves no room"),
    ({"max_length": 2}, "max_length=2 leaves no token"),
    ({"max_length": "9"}, "max_length='9'.*whole number"),
    ({"temperature": "0.7"}, "temperature='0.7' must be a number.*without quotes"),
    ({"temperature": None}, "temperature=None must be a number"),
    ({"temperature": 1e-40}, "temperature=1e-40.*no finite numbers"),
    ({"do_sample": True, "temperature": 0.0}, "temperature=0.0"),
    ({"do_sample": "false", "temperature": 0.7}, "do_sample='false' must be true or false"),
    ({"do_sample": "true"}, "do_sample='true' must be true or false"),
    ({"do_sample": True, "temperature": 1.0, "top_p": -1.0}, "top_p=-1.0"),
    ({"repetition_penalty": 0.0}, "repetition_penalty=0.0.*strictly positive"),
    ({"bad_words_ids": [[99999]]}, "bad_words_ids=.*99999"),
    ({"repetition_penalti": 1.2}, "Did you mean 'repetition_penalty'"),
    ("greedy", "must be a mapping"),
]


@pytest.fixture(scope="module")
def pair(pico, tmp_path_factory):
    return deepen(pico["bytelevel"], pico["metaspace"], matrix_dir=str(tmp_path_factory.mktemp("matrices")))


@pytest.mark.parametrize(("arguments", "words"), BAD_REQUESTS, ids=str)
def test_a_bad_argument_is_named_with_its_value_before_anything_is_generated(both, pair, arguments, words):
    configure(both)
    for model in (both[0], pair):
        with pytest.raises(RequestError, match=words):
            ask(model, LONG, arguments)


def test_a_text_that_nothing_is_left_to_draw_for_stops_no_other(pair):
    impossible = {**SAMPLED, "suppress_tokens": list(range(400))}
    batch = requests("generate_until", (LONG, impossible), (LONG, PLAIN), (SHORT, impossible))
    answers = dict(pair.answers("generate_until", batch))
    assert answers[1] == ask(pair, LONG, PLAIN)
    for index in (0, 2):
        assert re.search("suppress_tokens.*leave no distribution", answers[index].reason)
    with pytest.raises(RequestError, match="suppress_tokens.*leave no distribution"):
        pair.generate_until(batch)


# --- several members: scores are log(K p)

MULTIPLY = [
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.6},
    {"encoder_repetition_penalty": 3.0},
    {"exponential_decay_length_penalty": [1, 1.6]},
    {"repetition_penalty": 1.2, "no_repeat_ngram_size": 2, "sequence_bias": [[[260], 2.0]]},
]


@pytest.mark.parametrize("settings", MULTIPLY, ids=str)
def test_what_settings_do_to_a_fused_distribution_depends_on_no_shift(pair, settings):
    """And what multiplies acts on log(K p), the others as on logits."""
    torch.manual_seed(4)
    prompt = pair.tok_encode(LONG)
    asked = Asked.read({**PLAIN, **settings}, 256)
    sampler = pair.texts.settings.plan(asked, prompt).sampler
    seen = torch.tensor([[*prompt, 17, 300, 17]])
    logp = torch.log_softmax(3 * torch.randn(1, 400), dim=-1)
    made = [torch.softmax(sampler.processors(seen, logp + shift), dim=-1) for shift in (0.0, 9.5, -40.0)]
    for other in made[1:]:
        torch.testing.assert_close(other, made[0], atol=1e-5, rtol=1e-4)
    if len(settings) == 1:
        expected = (logp + math.log(400))[0]
        touched = {"repetition_penalty": seen[0], "encoder_repetition_penalty": torch.tensor(prompt)}
        for token in set(touched.get(next(iter(settings)), torch.tensor(pair.ensemble.main.eos_ids)).tolist()):
            score = expected[token]
            if "exponential_decay_length_penalty" in settings:
                expected[token] = score + score.abs() * (1.6**2 - 1)
            else:
                penalty = settings.get("repetition_penalty") or 1 / settings["encoder_repetition_penalty"]
                expected[token] = score * penalty if score < 0 else score / penalty
        torch.testing.assert_close(made[0][0], torch.softmax(expected, dim=-1), atol=1e-6, rtol=1e-4)


def test_texts_of_several_members_depend_on_no_shift_of_their_logits(pair, pico, monkeypatch):
    arguments = {"until": [], "max_gen_toks": 12, "repetition_penalty": 1.9}
    alone = deepen(pico["bytelevel"])
    rewarded = {**arguments, "repetition_penalty": 0.8}
    before = [ask(pair, LONG, arguments), ask(alone, LONG, rewarded)]
    for member in (*pair.ensemble.members, alone.ensemble.main):
        plain = member.runner.logits
        monkeypatch.setattr(member.runner, "logits", lambda states, plain=plain: plain(states) + 9.5)
    after = [ask(pair, LONG, arguments), ask(alone, LONG, rewarded)]
    assert before[0] == after[0] != ask(pair, LONG, {"until": [], "max_gen_toks": 12})
    assert before[1] != after[1], "one member's penalties act on its own logits, as in hf"


@pytest.mark.parametrize("field", ["eos_token_id", "guidance_scale", "watermarking_config"])
def test_what_belongs_to_one_model_is_refused_with_several(pair, field):
    value = {"eos_token_id": 5, "guidance_scale": 1.5, "watermarking_config": {"bias": 2.0}}[field]
    with pytest.raises(RequestError, match=f"{field}=.*not supported with several members"):
        ask(pair, LONG, {**PLAIN, field: value})


def test_several_members_honour_what_one_honours(pair):
    """Token ids are the main member's; no member's own generation config counts."""
    free = ask(pair, LONG, PLAIN)
    ids = pair.tok_encode(free, add_special_tokens=False)
    pair.ensemble.main.lm.model.generation_config.repetition_penalty = 5.0
    pair.adopt(pair.ensemble)
    assert ask(pair, LONG, PLAIN) == free
    for settings in ({"suppress_tokens": ids[:1]}, {"bad_words_ids": [ids[:1]]}, {"forced_eos_token_id": 270}):
        assert ask(pair, LONG, {**PLAIN, **settings}) != free
    assert ask(pair, LONG, {**PLAIN, "sequence_bias": {(0,): 99.0}}) == ""
    assert ask(pair, LONG, {**PLAIN, "sequence_bias": {(0,): 99.0}, "min_new_tokens": 6}) == free
