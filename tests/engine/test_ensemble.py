"""Several members: the fast paths against naive references, and the invariants of DESIGN.md."""

from __future__ import annotations

import gc
import itertools
import random
import weakref

import naive
import pytest
import torch
from harness import deepen, requests

from lm_eval_deepen.engine import scoring
from lm_eval_deepen.engine.following import Job
from lm_eval_deepen.engine.generation import generate
from lm_eval_deepen.engine.prompts import Prompter
from lm_eval_deepen.engine.scoring import score
from lm_eval_deepen.engine.windows import rolling_spans
from lm_eval_deepen.errors import MemberError, RequestError

CONTEXTS = ["The quick brown fox", "Question: What is 1 + 1?\nAnswer:", "café 中国", "walk", "", "ends\n"]
CHOICES = [" jumps over", "ing and talking", " 🙂 smile", "\n\n  indented", " </s> <|im_end|> text"]
LONG = "In 1969 the first people walked on the moon; über 中国 🙂 there were many. " * 4
ORDERS = [
    ("bytelevel", "metaspace"),
    ("metaspace", "bytelevel"),
    ("padded", "metaspace"),
    ("bytelevel", "padded"),
]


@pytest.fixture(scope="module", params=ORDERS, ids="+".join)
def model(request, pico, tmp_path_factory):
    return deepen(*(pico[name] for name in request.param), matrix_dir=str(tmp_path_factory.mktemp("matrices")))


@pytest.fixture(scope="module")
def trio(pico, tmp_path_factory):
    return deepen(
        *(pico[name] for name in ("metaspace", "padded", "bytelevel")),
        weights=[0.5, 0.3, 0.2],
        matrix_dir=str(tmp_path_factory.mktemp("matrices")),
        batch_size=3,
    )


def spans_of(model):
    prompter = Prompter(model.ensemble)
    return [prompter.span(*pair) for pair in itertools.product(CONTEXTS, CHOICES)]


def scores(model, spans, batch_size):
    found = dict(score(model.ensemble, spans, batch_size))
    return [found[i].logp for i in range(len(spans))]


def test_scoring_leaves_the_search_for_garbage_as_it_was(model, monkeypatch):
    """Old objects are left alone meanwhile, in whatever way it ends."""
    spans, before, inside = spans_of(model)[:2], gc.get_threshold(), []
    run = scoring._score_round

    def seen(*arguments):
        inside.append(gc.get_threshold())
        run(*arguments)

    monkeypatch.setattr(scoring, "_score_round", seen)
    scores(model, spans, 4)
    assert gc.get_threshold() == before and inside[0][:2] == before[:2]
    assert inside[0][2:] != before[2:] or before[2] == 0  # newer Pythons have no such threshold
    monkeypatch.setattr(scoring, "_score_round", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        scores(model, spans, 4)
    assert gc.get_threshold() == before


def test_scoring_equals_the_naive_reference(model):
    spans = spans_of(model)
    for span, got in zip(spans, scores(model, spans, 4), strict=True):
        assert got == pytest.approx(naive.score_span(model.ensemble, span), abs=2e-4)


def test_scoring_three_members_equals_the_naive_reference(trio):
    spans = spans_of(trio)[::3]
    for span, got in zip(spans, scores(trio, spans, 4), strict=True):
        assert got == pytest.approx(naive.score_span(trio.ensemble, span), abs=2e-4)


def test_five_members_run(pico, tmp_path):
    names = ["bytelevel", "metaspace", "padded", "bytelevel", "metaspace"]
    five = deepen(*(pico[name] for name in names), matrix_dir=str(tmp_path))
    spans = spans_of(five)[:4]
    for span, got in zip(spans, scores(five, spans, 4), strict=True):
        assert got == pytest.approx(naive.score_span(five.ensemble, span), abs=2e-4)


def test_batch_size_and_order_change_nothing(model):
    spans = spans_of(model)
    one = scores(model, spans, 1)
    order = list(range(len(spans)))
    random.Random(0).shuffle(order)
    shuffled = scores(model, [spans[i] for i in order], 8)
    for i, row in zip(order, shuffled, strict=True):
        assert row == pytest.approx(one[i], abs=1e-4)


def test_scores_do_not_depend_on_other_continuations(model):
    spans = spans_of(model)
    alone = scores(model, spans[:1], 8)
    assert scores(model, spans, 8)[0] == pytest.approx(alone[0], abs=1e-4)


def test_every_member_sees_the_same_bytes(model, monkeypatch):
    """After each member's own prompt the continuation bytes are identical after every step."""
    ensemble = model.ensemble
    for span in [*spans_of(model), *rolling_spans(ensemble, LONG)]:
        seen = b""
        for target in span.target:
            for member, prompt in zip(ensemble.active[1:], span.prompts[1:], strict=True):
                text = span.lead + seen[span.skip :]
                tokens = member.codec.follow(prompt, text)
                vocab = member.codec.vocab
                assert tokens is not None
                assert vocab.decode(tokens) == vocab.decode(prompt.head) + prompt.tail.encode() + text
                assert not any(token in vocab.control for token in tokens[len(prompt.head) :])
            seen += ensemble.main.codec.vocab.pieces[target]


def test_every_prompt_is_the_same_text(model):
    ensemble = model.ensemble
    for context in CONTEXTS:
        texts = set()
        for member, prompt in zip(ensemble.active, Prompter(ensemble).prompts(context, 8), strict=True):
            data = member.codec.vocab.decode(prompt.ids)
            texts.add(data[1:] if member.codec.prefix_space and data.startswith(b" ") else data)
        assert texts == {context.encode()}


def test_left_truncation_keeps_the_same_text(pico, tmp_path):
    short = deepen(pico["metaspace"], pico["bytelevel"], max_length=32, matrix_dir=str(tmp_path))
    prompts = Prompter(short.ensemble).prompts(LONG, 8)
    texts = [m.codec.vocab.decode(p.ids) for m, p in zip(short.ensemble.members, prompts, strict=True)]
    assert texts[0] == texts[1] and LONG.encode().endswith(texts[0]) and len(texts[0]) > 10
    assert all(len(p.ids) + 8 <= 32 for p in prompts)
    span = Prompter(short.ensemble).span(LONG, " moon")
    assert all(len(p.ids) <= 32 for p in span.prompts)


def test_rolling_windows_cover_the_text_once(model):
    ensemble = model.ensemble
    spans = rolling_spans(ensemble, LONG)
    data = b"".join(ensemble.main.codec.vocab.decode(span.target) for span in spans)
    assert data[spans[0].skip :] == LONG.encode()


@pytest.mark.parametrize("order", ORDERS[:2])
def test_rolling_in_short_windows_equals_the_naive_reference(pico, tmp_path, order):
    short = deepen(*(pico[name] for name in order), max_length=24, matrix_dir=str(tmp_path))
    spans = rolling_spans(short.ensemble, LONG[:120])
    assert len(spans) >= 3
    for span in spans:
        longest = span.lead + short.ensemble.main.codec.vocab.decode(span.target[:-1])[span.skip :]
        assert len(span.prompts[0].ids) + len(span.target) - 1 <= 24
        assert len(short.ensemble.members[1].codec.follow(span.prompts[1], longest)) <= 24
    expected = sum(sum(naive.score_span(short.ensemble, span)) for span in spans)
    (got,) = short.loglikelihood_rolling(requests("loglikelihood_rolling", (LONG[:120],)))
    assert got == pytest.approx(expected, abs=1e-3)


def test_generation_equals_the_naive_loop(model):
    jobs = [Job(Prompter(model.ensemble).prompts(context, 12), 12) for context in CONTEXTS]
    found = dict(generate(model.ensemble, jobs, 4))
    for index, context in enumerate(CONTEXTS):
        if context == "" and model.ensemble.main.codec.prefix_space:
            continue  # the host sets Job.prefix_space for this one
        ids, logp = naive.generate_ids(model, context, 12)
        assert found[index].ids == ids
        assert found[index].logp == pytest.approx(logp, abs=2e-4)


def test_a_generated_text_scores_the_sum_of_its_steps(trio):
    """Scoring the chosen tokens gives the log-probabilities that decoding saw."""
    prompter = Prompter(trio.ensemble)
    for context in CONTEXTS[:4]:
        prompts = prompter.prompts(context, 16)
        ((_, found),) = generate(trio.ensemble, [Job(prompts, 16)], 1)
        span = type(prompter.span("a", " b"))(prompts, tuple(found.ids))
        ((_, scored),) = score(trio.ensemble, [span], 1)
        assert scored.logp == pytest.approx(found.logp, abs=1e-3)


def test_generation_does_not_depend_on_the_batch(model):
    batch = requests("generate_until", *((c, {"until": ["e"], "max_gen_toks": 10}) for c in [*CONTEXTS, LONG]))
    together = model.generate_until(batch)
    for request, text in zip(batch, together, strict=True):
        assert model.generate_until([request]) == [text]


@pytest.mark.parametrize("family", ["bytelevel", "metaspace"])
def test_identical_members_are_the_single_member(pico, tmp_path, family):
    single = deepen(pico[family])
    twin = deepen(pico[family], pico[family], matrix_dir=str(tmp_path))
    pairs = list(itertools.product(CONTEXTS, CHOICES[:4]))  # `hf` parses the literals of the fifth
    # `hf` feeds a context that merges with its continuation twice; several members never see text twice
    split = [Prompter(model.ensemble) for model in (single, twin)]
    pairs = [pair for pair in pairs if len({prompter.span(*pair).target for prompter in split}) == 1]
    assert len(pairs) >= 18
    batch = requests("loglikelihood", *pairs)
    for got, expected in zip(twin.loglikelihood(batch), single.loglikelihood(batch), strict=True):
        assert got[0] == pytest.approx(expected[0], abs=1e-3)
        assert got[1] == expected[1]
    batch = requests("generate_until", *((c, {"until": [], "max_gen_toks": 12}) for c in CONTEXTS))
    assert twin.generate_until(batch) == single.generate_until(batch)


def test_identical_members_with_padded_rows_renormalise_without_them(pico, tmp_path):
    twin = deepen(pico["padded"], pico["padded"], matrix_dir=str(tmp_path))
    logp = twin.ensemble.next_logp("The quick brown fox").logp
    vocab = twin.ensemble.main.codec.vocab
    own = naive.member_logp(twin.ensemble.main, twin.ensemble.main.codec.prompt("The quick brown fox").ids)[0]
    unused = sorted(vocab.unused)
    assert len(unused) == 37 and torch.isinf(logp[unused]).all()
    own[unused] = -torch.inf
    assert torch.allclose(logp.exp(), torch.softmax(own, dim=-1), atol=1e-5)


def test_the_other_member_changes_the_result(model):
    logp = model.ensemble.next_logp("The quick brown fox").logp
    main = naive.member_logp(model.ensemble.main, Prompter(model.ensemble).prompts("The quick brown fox")[0].ids)[0]
    assert float((logp.exp() - main.exp()).abs().max()) > 1e-3
    assert float(logp.exp().sum()) == pytest.approx(1, abs=1e-4)


def test_a_member_that_raises_fails_the_run(model, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model.ensemble.members[1].runner, "body", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        model.loglikelihood(requests("loglikelihood", ("The fox", " jumps")))


def test_a_member_that_gives_nan_fails_the_run(model, monkeypatch):
    member = model.ensemble.members[1]
    nan = lambda states: torch.full((len(states), member.vocab_size), torch.nan)  # noqa: E731
    monkeypatch.setattr(member, "logp", nan)
    with pytest.raises(MemberError, match="m1.*NaN"):
        model.loglikelihood(requests("loglikelihood", ("The fox", " jumps")))


def test_requests_that_cannot_fit_are_clear_errors(model):
    with pytest.raises(RequestError, match="does not fit into the context of 512"):
        model.loglikelihood(requests("loglikelihood", ("a", " word" * 600)))
    with pytest.raises(RequestError, match="max_gen_toks=512 leaves no room"):
        model.generate_until(requests("generate_until", ("a", {"max_gen_toks": 512})))
    with pytest.raises(RequestError, match="num_beams=2 is not supported"):
        model.generate_until(requests("generate_until", ("a", {"num_beams": 2})))


def test_the_package_gives_ensembles_without_the_harness(pico, tmp_path):
    """The README's two lines, from configuration to a distribution."""
    import lm_eval_deepen

    paths = [str(pico["bytelevel"]), str(pico["metaspace"])]
    config = lm_eval_deepen.configure({"pretrained": paths[0], "members": paths, "matrix_dir": str(tmp_path)})
    logp = lm_eval_deepen.Ensemble.load(config, "cpu").next_logp("The capital of France is").logp
    assert float(logp.exp().sum()) == pytest.approx(1, abs=1e-4)
    with pytest.raises(AttributeError, match="no attribute 'ensemble'"):
        lm_eval_deepen.ensemble  # noqa: B018


def test_the_ensemble_before_is_freed_when_the_next_one_loads(pico):
    """Models hold themselves in circles, so that only a search for garbage frees them."""
    gc.collect()
    gc.disable()
    try:
        before = weakref.ref(deepen(pico["bytelevel"]).ensemble.main.lm.model)
        assert before() is not None  # else there is nothing to show
        deepen(pico["bytelevel"])
        assert before() is None
    finally:
        gc.enable()
