"""`method: mixture`: texts scored by stretches, against a brute-force oracle, in every order of the members."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections import deque
from dataclasses import replace

import naive
import pytest
import torch
from harness import deepen, requests

from lm_eval_deepen.engine.drafts import Drafter, drafter
from lm_eval_deepen.engine.following import BatchRow, Job
from lm_eval_deepen.engine.generation import Decoder, generate
from lm_eval_deepen.engine.prompts import Prompter
from lm_eval_deepen.engine.sampling_by_turns import TurnDecoder
from lm_eval_deepen.engine.stretches import StretchPrompter, read_stretches, weigh, with_evidence
from lm_eval_deepen.errors import ConfigError, RequestError
from lm_eval_deepen.harness.model import DeepenLM
from lm_eval_deepen.member.chat import ChatPrompt
from lm_eval_deepen.weighting.experts import POWERS

CONTEXTS = ["The quick brown fox", "Question: What is 1 + 1?\nAnswer:", "café 中国", "walk", "", "ends\n", "Paris "]
CHOICES = [" jumps over", "ing and talking", " 🙂 smile", "\n\n  indented", " </s> <|im_end|> text"]
LONG = "In 1969 the first people walked on the moon; über 中国 🙂 there were many. " * 6
NAMES = ("bytelevel", "metaspace", "padded")
PAIRS = list(itertools.product(CONTEXTS, CHOICES))


@pytest.fixture(scope="module")
def make(pico, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("matrices"))

    def make(*names, **options):
        return deepen(*(pico[name] for name in names), method="mixture", matrix_dir=folder, **options)

    return make


def own_tokens(member, text: str, context: str):
    """Return a member's tokens before and of a text, and the offset at which each of the latter ends."""
    codec = member.codec
    head = codec.automatic_prefix if context else codec.prefix_ids
    ids = codec.encode_prompt(text)[len(codec.automatic_prefix) :]
    at = len(text.encode()) - len(codec.vocab.decode(ids))
    ends = []
    for token in ids:
        at += len(codec.vocab.pieces[token])
        ends.append(at)
    return head, ids, ends


def oracle(ensemble, context: str, continuation: str, weights) -> float:
    """Return log of the product over stretches of sum_m w_m P_m, one plain forward pass per token."""
    stripped = context.rstrip()
    continuation, context = context[len(stripped) :] + continuation, stripped
    text, size = context + continuation, len(context.encode())
    read = [own_tokens(member, text, context) for member in ensemble.active]
    common = sorted(set.intersection(*({0, *ends} for _, _, ends in read)))
    start = max(offset for offset in common if offset <= size)
    bounds = [offset for offset in common if offset >= start]
    for n, (member, (head, ids, ends)) in enumerate(zip(ensemble.active, read, strict=True)):
        if not head and ends[0] > start:  # something has to come before the first token that is scored
            read[n] = (member.codec.prefix_ids, ids, ends)
    total = 0.0
    for begin, end in itertools.pairwise(bounds):
        stretch = 0.0
        for weight, member, (head, ids, ends) in zip(weights, ensemble.active, read, strict=True):
            value = math.log(weight) if weight else -math.inf
            for n, token in enumerate(ids):
                if begin < ends[n] <= end:
                    value += float(naive.member_logp(member, (*head, *ids[:n]))[0, token])
            stretch += math.exp(value)
        total += math.log(stretch)
    return total


def scores(model, pairs, kind="loglikelihood"):
    return getattr(model, kind)(requests(kind, *pairs))


def test_scores_are_those_of_the_oracle(make):
    weights = [0.5, 0.2, 0.3]
    model = make(*NAMES, weights=weights)
    for (context, continuation), (got, _) in zip(PAIRS, scores(model, PAIRS), strict=True):
        assert got == pytest.approx(oracle(model.ensemble, context, continuation, weights), abs=2e-4)


@pytest.mark.parametrize("weighting", [None, "bayes"])
@pytest.mark.parametrize("kind", ["loglikelihood", "loglikelihood_rolling"])
def test_the_order_of_the_members_changes_nothing(make, kind, weighting):
    pairs = PAIRS if kind == "loglikelihood" else [(LONG,), ("walk",), ("",), ("中国 🙂",)]
    found = []
    for names in itertools.permutations(NAMES):
        found.append(scores(make(*names, weighting=weighting, max_length=64), pairs, kind))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            if kind == "loglikelihood":
                assert a[1] == b[1]
                a, b = a[0], b[0]
            assert a == pytest.approx(b, abs=1e-6)


def test_batches_and_order_of_requests_change_nothing(make):
    model = make("metaspace", "bytelevel", weighting="bayes")
    together = scores(model, PAIRS)
    for index in (0, 7, 20, 33):
        assert scores(model, [PAIRS[index]])[0][0] == pytest.approx(together[index][0], abs=1e-4)
    assert [s for s, _ in scores(model, PAIRS[::-1])][::-1] == pytest.approx([s for s, _ in together], abs=1e-4)


def test_a_rolling_text_is_the_sum_of_its_windows_stretches(make):
    """One long window gives what a plain pass over all tokens gives; short windows lose context, not stretches."""
    model = make("metaspace", "bytelevel", weights=[0.4, 0.6])
    (whole,) = scores(model, [("The dog walked away. " * 3,)], "loglikelihood_rolling")
    assert whole == pytest.approx(oracle(model.ensemble, "", "The dog walked away. " * 3, [0.4, 0.6]), abs=2e-4)
    short = make("metaspace", "bytelevel", weights=[0.4, 0.6], max_length=32)
    (cut,) = scores(short, [(LONG,)], "loglikelihood_rolling")
    assert math.isfinite(cut) and cut < 0


def test_all_weight_on_any_one_member_is_that_member(make):
    for at, name in enumerate(NAMES[:2]):
        weights = [0.0, 0.0]
        weights[at] = 1.0
        if at == 0:
            continue  # the first member alone is `hf` itself, which other tests compare
        model = make(*NAMES[:2], weights=weights)
        swapped = make(name, NAMES[0], weights=[1.0, 0.0], self_check=False)
        for (context, continuation), (got, _) in zip(PAIRS, scores(model, PAIRS), strict=True):
            assert got == pytest.approx(oracle(model.ensemble, context, continuation, weights), abs=2e-4)
        same = [i for i, (context, _) in enumerate(PAIRS) if context.startswith(("The", "Question"))]
        own = scores(swapped, [PAIRS[i] for i in same])
        found = scores(model, [PAIRS[i] for i in same])
        near = sum(a == pytest.approx(b, abs=2e-4) for (a, _), (b, _) in zip(own, found, strict=True))
        assert near >= len(same) // 2  # others split a merged token elsewhere


def test_left_truncation_keeps_the_same_text_in_every_member(make):
    model = make("metaspace", "padded", max_length=40)
    (value,) = scores(model, [(LONG, " the end")])
    assert math.isfinite(value[0])


@pytest.mark.parametrize("names", [("bytelevel", "metaspace"), ("padded", "bytelevel")], ids="+".join)
def test_no_window_is_longer_than_a_members_context(make, names):
    """With what has to come before the first token, and with a prefix space of its own."""
    model = make(*names, max_length=8, weights=[0.5, 0.5])
    prompter, read = StretchPrompter(model.ensemble), 0
    texts = [
        "﹏ b): ﹏ quick",
        "The quick brown fox",
        "  the 🙂 The",
        "zzqx indented \n\n def add(a, b):",
        "on the moon 1969",
    ]
    for context, continuation in itertools.product([*texts, ""], texts):
        spans = prompter.rolling(context + continuation)
        with contextlib.suppress(RequestError):
            spans.append(prompter.span(context, continuation))
        for path in (path for span in spans for path in span.paths if path is not None):
            read += len(path) == 9
            assert 1 < len(path) <= 9
    assert read > 20


def test_nothing_after_nothing_is_certain(make):
    model = make("metaspace", "bytelevel", weights=[0.5, 0.5])
    assert scores(model, [("", ""), ("walk", "")]) == [(0.0, True), (0.0, True)]


def test_weights_by_prompt_or_step_are_refused(pico):
    for weighting in ("perplexity", "best_by_prompt", "confidence"):
        with pytest.raises(ConfigError, match=f"weighting={weighting} makes weights by prompt or step, and method=mix"):
            deepen(pico["bytelevel"], pico["metaspace"], method="mixture", weighting=weighting)


def test_bayes_needs_at_most_log2_k_bits_more_than_its_best_expert(make):
    for names in [("bytelevel", "metaspace"), NAMES]:
        model = make(*names, weighting="bayes")
        experts = model.ensemble.experts
        bound = math.log(len(experts))
        learned = [score for score, _ in scores(model, PAIRS[:20:2])]
        each = []
        for row in experts.weights.tolist():
            if max(row) == 1.0 and row[0] == 1.0:
                continue  # the first member alone would be `hf`, with its own rules for requests
            each.append([score for score, _ in scores(make(*names, weights=row), PAIRS[:20:2])])
        best = torch.tensor(each).max(0).values
        assert bool((torch.tensor(learned) >= best - bound - 1e-4).all())


def test_five_members_have_the_bound_and_no_order(pico, tmp_path):
    """Three tokenizers, two of the models twice at other temperatures: by stretches and, for the bound, at steps."""
    members = [
        {"name": f"m{n}", "pretrained": str(pico[name]), "temperature": temperature}
        for n, (name, temperature) in enumerate(zip([*NAMES, "metaspace", "bytelevel"], (1, 1, 1, 2, 0.5), strict=True))
    ]

    def model(order, method, **options):
        chosen = [members[n] for n in order]
        given = {"method": method, "matrix_dir": str(tmp_path), "device": "cpu", "self_check": False, **options}
        return DeepenLM(chosen[0]["pretrained"], members=chosen, **given)

    pairs = PAIRS[:6]
    for method in ("mixture", "deepen"):
        learned = model(range(5), method)
        experts = learned.ensemble.experts
        assert len(experts) > 15
        learned = torch.tensor([score for score, _ in scores(learned, pairs)])
        for weights in [(0.2,) * 5, (0.0, 1.0, 0.0, 0.0, 0.0), (0.0, 0.5, 0.0, 0.0, 0.5)]:
            static = torch.tensor([score for score, _ in scores(model(range(5), method, weights=list(weights)), pairs)])
            assert bool((learned >= static - math.log(len(experts)) - 1e-3).all()), (method, weights)
        if method == "mixture":
            for order in ([4, 3, 2, 1, 0], [2, 0, 4, 1, 3]):
                again = model(order, method)
                again = torch.tensor([score for score, _ in scores(again, pairs)])
                torch.testing.assert_close(again, learned, atol=1e-6, rtol=1e-6)


def test_evidence_from_the_prompt_moves_the_weights(make):
    context = "The quick brown fox jumps over the lazy dog. The dog did not mind,"
    pair = [(context, " and the fox walked away")]
    plain = scores(make("bytelevel", "metaspace", weighting="bayes", learn_from="continuation"), pair)[0][0]
    moved = scores(make("bytelevel", "metaspace", weighting="bayes", learn_from="prompt"), pair)[0][0]
    assert plain != pytest.approx(moved, abs=1e-6)


@pytest.mark.parametrize("options", [{}, {"prior": [5, 0, 1, 1, 1, 0, 0, 0, 0, 4]}], ids=["uniform", "prior"])
@pytest.mark.parametrize(("learn_from", "speculate"), [("continuation", "off"), ("prompt", "lookup")])
def test_generation_follows_the_law_that_scores_where_every_stretch_is_a_token(make, learn_from, speculate, options):
    """Members with one tokenizer: a step is a stretch, under the same experts, powers of members among them."""
    model = make("bytelevel", "bytelevel", weighting="bayes", learn_from=learn_from, **options)
    ensemble = model.ensemble
    ensemble.members[1].config = ensemble.members[1].config.replace(temperature=0.4)
    for member in ensemble.members:  # a step keeps the main member's control pieces, and a stretch knows none
        vocab, plain = member.codec.vocab, member.runner.logits
        away = torch.zeros(member.vocab_size)
        away[[*(vocab.control - set(vocab.eos)), *vocab.unused]] = -60.0
        member.runner.logits = lambda states, plain=plain, away=away: plain(states) + away
    contexts = [CONTEXTS[1], "walk", "", LONG.strip()]
    jobs = [Job(Prompter(ensemble).prompts(context, 6), 6) for context in contexts]
    given = [StretchPrompter(ensemble).span(context, "") for context in contexts]
    for index, text in generate(ensemble, jobs, 2, drafter(speculate)):
        span = with_evidence(given[index], ensemble.prompt_stretches)
        paths = tuple((*path, *text.ids) for path in span.paths)
        cuts = tuple((*own, *range(own[-1] + 1, own[-1] + len(text.ids) + 1)) for own in span.cuts)
        ((_, reading),) = read_stretches(ensemble.active, [replace(span, paths=paths, cuts=cuts)], 64, POWERS)
        assert text.logp == pytest.approx(weigh(ensemble.experts, reading).logp, abs=2e-4)


@pytest.mark.parametrize("sampling", ["fused", "member"])
@pytest.mark.parametrize("names", [("bytelevel", "metaspace"), ("metaspace", "padded", "bytelevel")], ids="+".join)
def test_what_a_prompt_teaches_is_the_same_in_generation_and_scoring(make, names, sampling):
    options = {
        "learn_from": "prompt",
        "prompt_stretches": 5,
        "prior_share": 0.1,
        "sampling": sampling,
        "chat_fallback": "plain",
    }
    model = make(*names, weighting="bayes", **options)
    ensemble = model.ensemble
    prompter, kind = StretchPrompter(ensemble), Decoder if sampling == "fused" else TurnDecoder
    chat = ChatPrompt(CONTEXTS[1], [{"role": "user", "content": CONTEXTS[1]}], True)
    for context in [*CONTEXTS[:4], LONG.strip(), chat]:
        row = BatchRow(0, Job(Prompter(ensemble).prompts(context), 1))
        kind(ensemble, deque([row]), 1, Drafter()).refill()
        span = with_evidence(prompter.span(context, ""), 5)
        ((_, reading),) = read_stretches(ensemble.active, [span], 64, ensemble.experts.powers)
        weights = ensemble.experts.weights.log()[:, :, None]
        given = torch.logsumexp(weights + reading.logp[ensemble.experts.places_of_powers()], dim=1)
        torch.testing.assert_close(row.weights, ensemble.experts.begun(given), atol=1e-4, rtol=1e-4)
        assert (span.evidence == 5) is (context is not chat and context != "walk")


def test_steps_are_skipped_in_generation_and_scores_say_that_they_have_none(make, caplog):
    plain, skipping = (
        make("bytelevel", "metaspace", weights=[0.1, 0.9], skip_when=when) for when in ("never", "agree")
    )
    asked = [("The quick brown fox", {"until": [], "max_gen_toks": 4})]
    skipping.ensemble.selective = replace(skipping.ensemble.selective, when="confident", above=1e-9)
    assert scores(skipping, asked, "generate_until") != scores(plain, asked, "generate_until")
    assert skipping.ensemble.counters.selected["skipped"] and not caplog.text
    assert scores(skipping, PAIRS[:3]) == scores(plain, PAIRS[:3])
    assert caplog.text.count("it changes the texts that method=mixture generates, and no score") == 1
