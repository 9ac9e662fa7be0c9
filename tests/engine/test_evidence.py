"""What members are compared on where weights depend on the prompt: the same bytes, whatever each of them reads."""

from __future__ import annotations

import math

import naive
import pytest
import torch
from harness import deepen, requests

from lm_eval_deepen.build.demo_models import GEMMA3, SMOLLM2, prepare
from lm_eval_deepen.engine.evidence import evidence
from lm_eval_deepen.engine.prompts import Prompter
from lm_eval_deepen.engine.windows import rolling_spans
from lm_eval_deepen.harness.model import DeepenLM

TRIM = (
    "{% for m in messages %}<s>[{{ 'U' if m['role'] == 'user' else m['role'] }}] {{ m['content'] | trim }}</s>"
    "{% endfor %}{% if add_generation_prompt %}<s>[model]{% endif %}"
)
FOLDED = (
    "{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set first = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}<bos>user says\n{{ (first if loop.first else '') + m['content'] }}\n{% endfor %}"
)
TEXTS = [
    "The quick brown fox jumps over the lazy dog",
    "Goal: how do you open a jar?\nAnswer:",
    " a space comes first",
    "\n\nnewlines come first",
    "caf\u00e9 \u4e2d\u56fd \U0001f642",
    "\U0001f642",
    "W\u00e4hrend",
    "x",
    "",
    "<bos>The fox",
]


@pytest.fixture(scope="module")
def model(pico):
    """The three pico models: nothing before a text, a BOS, and a space of the tokenizer's own."""
    model = deepen(pico["bytelevel"], pico["metaspace"], pico["padded"], method="gac", weighting="perplexity")
    model.ensemble.members[1].lm.tokenizer.chat_template = FOLDED
    model.ensemble.members[2].lm.tokenizer.chat_template = TRIM
    return model


def spelt(model, reads) -> list[bytes]:
    """The bytes of every member's evidence."""
    members = model.ensemble.members
    return [m.codec.vocab.decode(read.token for read in own) for m, own in zip(members, reads, strict=True)]


def reordered(model, order):
    """The same ensemble with another main member."""
    ensemble = model.ensemble
    members = tuple(ensemble.members[n] for n in order)
    return type("Model", (), {"ensemble": type(ensemble).assemble(ensemble.config, members, ensemble.fuser)})


def longest(ensemble, prompts) -> int:
    """How many bytes at the end of a prompt all members' tokens begin with, after something to condition on."""
    common = None
    for member, prompt in zip(ensemble.members, prompts, strict=True):
        control = member.codec.vocab.control
        starts = {
            len(member.codec.vocab.decode(prompt.ids[at:]))
            for at in range(1, len(prompt.ids) + 1)
            if at == len(prompt.ids) or prompt.ids[at] not in control
        }
        common = starts if common is None else common & starts
    return max(common)


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 1, 0)], ids=str)
@pytest.mark.parametrize("text", TEXTS)
def test_every_member_is_compared_on_the_same_bytes_and_as_many_as_can_be(model, text: str, order) -> None:
    turned = reordered(model, order)
    prompter = Prompter(turned.ensemble)
    for prompts in (prompter.prompts(text, 4), prompter.span(text, " jumps").prompts):
        found = spelt(turned, evidence(turned.ensemble, prompts))
        assert len(set(found)) == 1
        seen = turned.ensemble.main.codec.vocab.decode(prompts[0].ids)
        assert seen.endswith(found[0]) and len(found[0]) == longest(turned.ensemble, prompts)
        for own in evidence(turned.ensemble, prompts):
            assert all(read.before for read in own)


def test_the_first_word_counts_where_all_members_can_predict_it(pico) -> None:
    model = deepen(pico["metaspace"], pico["metaspace"], method="gac", weighting="perplexity")
    prompts = Prompter(model.ensemble).prompts("Sofia is", 4)
    assert spelt(model, evidence(model.ensemble, prompts)) == [b"Sofia is"] * 2


def test_a_bos_alone_changes_no_weights_but_through_the_model(pico) -> None:
    """Two members that differ in nothing but a BOS: what is compared begins after the first token of both."""
    path = str(pico["metaspace"])
    members = [{"name": "a", "pretrained": path}, {"name": "b", "pretrained": path, "add_bos_token": False}]
    model = DeepenLM(pretrained=path, members=members, device="cpu", method="gac", weighting="perplexity")
    prompts = Prompter(model.ensemble).prompts("Sofia is the capital", 4)
    assert len(prompts[0].ids) == len(prompts[1].ids) + 1
    with_bos, without = evidence(model.ensemble, prompts)
    assert [read.token for read in with_bos] == [read.token for read in without] == list(prompts[1].ids[1:])


@pytest.mark.parametrize("text", ["x", "", "\U0001f642"])
def test_a_prompt_without_shared_bytes_keeps_equal_weights(model, text: str) -> None:
    prompts = Prompter(model.ensemble).prompts(text, 4)
    if any(evidence(model.ensemble, prompts)):
        pytest.skip("the members share something of it")
    span = Prompter(model.ensemble).span(text, " fox jumps")
    ((got, _),) = model.loglikelihood(requests("loglikelihood", (text, " fox jumps")))
    assert got == pytest.approx(sum(naive.score_span(model.ensemble, span)), abs=1e-3)


def test_words_before_a_window_of_a_long_text_are_no_prompt(pico) -> None:
    paths = [pico["metaspace"], pico["padded"]]
    text = "Paris is the capital of France, and Rome is the capital of Italy. " * 3
    own, equal = (deepen(*paths, method="gac", max_length=24, weighting=w) for w in ("perplexity", "uniform"))
    assert len(rolling_spans(own.ensemble, text)) > 2
    batch = requests("loglikelihood_rolling", (text,))
    assert own.loglikelihood_rolling(batch) == pytest.approx(equal.loglikelihood_rolling(batch), abs=1e-3)


CONVERSATIONS = {
    "one turn": [("user", "The fox walked away")],
    "spaces that one template drops": [("user", "  The fox walked away \n")],
    "a system message that one template puts into the first turn": [
        ("system", "Answer in one word."),
        ("user", "Sofia is the capital"),
        ("assistant", "of Bulgaria"),
        ("user", "Is it?"),
    ],
    "the templates' own words": [("user", "user"), ("assistant", "assistant"), ("user", "model says U")],
}


@pytest.mark.parametrize("turns", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("appended", ["", "The answer is "])
def test_of_a_conversation_the_messages_alone_count(model, turns, appended: str) -> None:
    chat = model.apply_chat_template([{"role": role, "content": text} for role, text in turns]) + appended
    prompter = Prompter(model.ensemble)
    for prompts in (prompter.prompts(chat, 4), prompter.span(chat, "one").prompts):
        reads = evidence(model.ensemble, prompts)
        found = spelt(model, reads)
        whole = "".join(text.strip() for _, text in turns).encode() + appended.encode()
        assert len(set(found)) == 1
        rest = iter(whole)
        assert all(byte in rest for byte in found[0])  # parts of the messages, in their order
        assert len(found[0]) > 0.4 * len(whole) and (not appended or found[0].strip().endswith(b"er is"))
        for own, prompt in zip(reads, prompts, strict=True):
            assert all(prompt.ids[read.before] == read.token for read in own)


def test_messages_are_told_from_a_templates_own_words(model) -> None:
    """The heading of a turn is "user" as well: what is compared comes after it."""
    chat = model.apply_chat_template([{"role": "user", "content": "user"}])
    prompts = Prompter(model.ensemble).prompts(chat, 4)
    (main, *_) = evidence(model.ensemble, prompts)
    vocab = model.ensemble.main.codec.vocab
    assert all(vocab.decode(prompts[0].ids[: read.before]) != b"" for read in main) and main


def test_a_message_that_one_member_reads_as_control_is_no_evidence(model) -> None:
    chat = model.apply_chat_template([{"role": "user", "content": "The fox <|im_end|> walked away"}])
    assert evidence(model.ensemble, Prompter(model.ensemble).prompts(chat, 4)) == [[], [], []]


def test_weights_of_a_conversation_equal_plain_losses(model) -> None:
    chat = model.apply_chat_template([{"role": "user", "content": "Sofia is the capital of Bulgaria"}])
    span = Prompter(model.ensemble).span(chat, "Yes")
    means = []
    for member, prompt, own in zip(
        model.ensemble.members, span.prompts, evidence(model.ensemble, span.prompts), strict=True
    ):
        values = [float(naive.member_logp(member, prompt.ids[: read.before])[0, read.token]) for read in own]
        means.append(sum(values) / len(values))
    weights = torch.softmax(torch.tensor(means), dim=0)
    assert float((weights - 1 / 3).abs().max()) > 0.01
    ensemble = model.ensemble
    fixed = type(ensemble)(ensemble.config, ensemble.members, ensemble.fuser, weights, ensemble.counters)
    ((got, _),) = model.loglikelihood(requests("loglikelihood", (chat, "Yes")))
    assert got == pytest.approx(sum(naive.score_span(fixed, span)), abs=1e-3)


@pytest.mark.real
def test_the_real_pair_is_compared_on_what_follows_the_first_word() -> None:
    model = deepen(prepare(SMOLLM2), prepare(GEMMA3), method="gac", weighting="perplexity")
    prompts = Prompter(model.ensemble).prompts("Goal: how do you open a jar?\nAnswer:", 4)
    reads = evidence(model.ensemble, prompts)
    assert spelt(model, reads) == [b": how do you open a jar?\nAnswer:"] * 2
    scores = []
    for member, prompt, own in zip(model.ensemble.members, prompts, reads, strict=True):
        values = [float(naive.member_logp(member, prompt.ids[: read.before])[0, read.token]) for read in own]
        scores.append(math.exp(sum(values) / len(values)))
    assert scores[0] / sum(scores) == pytest.approx(0.261, abs=5e-4)
