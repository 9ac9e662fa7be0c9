"""Weightings against slow references, and the contract that every registered one keeps."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path

import pytest
import torch
from dropped_in import dropped_in

from lm_eval_deepen.errors import ConfigError
from lm_eval_deepen.weighting import WEIGHTINGS
from lm_eval_deepen.weighting.adaptive import Adaptive
from lm_eval_deepen.weighting.base import PromptLoss, Weigher
from lm_eval_deepen.weighting.bayes import Bayes
from lm_eval_deepen.weighting.best_by_prompt import BestByPrompt
from lm_eval_deepen.weighting.confidence import Confidence
from lm_eval_deepen.weighting.explicit import Explicit
from lm_eval_deepen.weighting.knn import Knn
from lm_eval_deepen.weighting.perplexity import Perplexity

NAMES = sorted(WEIGHTINGS)
ROUTER = Path(tempfile.mkdtemp()) / "router.jsonl"
EXAMPLES = [("a cat", (1, 0, 0)), ("a dog", (1, 0, 1)), ("two and two", (0, 1, 1)), ("three and two", (0, 1, 0))]
ROUTER.write_text("".join(json.dumps({"prompt": p, "scores": s}) + "\n" for p, s in EXAMPLES))
REQUIRED = {"adaptive": {"dev_scores": (0.2, 0.6, 0.2)}, "knn": {"router": str(ROUTER)}}
CONFIGURED = torch.tensor([0.5, 0.3, 0.2])


def logps(count: int = 4, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.log_softmax(3 * torch.randn(count, size, generator=generator), 1) for size in (20, 50, 9)]


LOSSES = [
    [PromptLoss(12.0, 6, 30), PromptLoss(9.0, 5, 30), PromptLoss(30.0, 10, 30)],
    [PromptLoss(800.0, 100, 500), PromptLoss(790.0, 90, 500), PromptLoss(100.0, 100, 500)],
    [PromptLoss(0.0, 0, 0), PromptLoss(9.0, 5, 30), PromptLoss(30.0, 10, 30)],
]
BASE = torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.0, 0.4], [1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]])


@pytest.fixture(params=NAMES)
def options(request):
    return WEIGHTINGS[request.param].options(**REQUIRED.get(request.param, {}))


def test_the_issues_weightings_are_there() -> None:
    assert {"explicit", "uniform", "adaptive", "perplexity", "confidence"} <= set(NAMES)


def test_they_are_options_with_a_source_and_a_meaning_for_each(options) -> None:
    assert WEIGHTINGS[options.NAME].options is type(options) and options.KIND == "weighting"
    assert WEIGHTINGS[options.NAME].paper and type(options).__doc__
    assert all(field.description for field in type(options).model_fields.values())


def test_they_start_from_a_distribution(options) -> None:
    given = [0.5, 0.3, 0.2] if options.TAKES_WEIGHTS else None
    start = options.start(given, 3)
    assert len(start) == 3 and math.fsum(start) == pytest.approx(1) and min(start) >= 0
    assert given is None or start == given


def test_weights_are_distributions_and_who_sits_out_stays_out(options) -> None:
    weigher = options.build()
    if weigher is None:
        return
    learns = hasattr(weigher, "of_steps")
    assert isinstance(weigher, Weigher) and (weigher.reads_prompts or weigher.reads_steps or learns)
    requests = weigher.prepare(LOSSES, CONFIGURED)
    assert requests.shape == (3, 3) and requests.dtype == CONFIGURED.dtype
    rows = weigher.weights(logps(), BASE)
    assert rows.shape == BASE.shape and torch.equal(rows[BASE == 0], torch.zeros(int((BASE == 0).sum())))
    for found in (requests, rows):
        torch.testing.assert_close(found.sum(1), torch.ones(len(found)), atol=1e-6, rtol=0)
        assert (found >= 0).all()


def test_a_row_depends_on_itself_alone(options) -> None:
    weigher = options.build()
    if weigher is None:
        return
    whole, logp = weigher.weights(logps(), BASE), logps()
    requests = weigher.prepare(LOSSES, CONFIGURED)
    for n in range(4):
        one = weigher.weights([rows[n : n + 1] for rows in logp], BASE[n : n + 1])
        torch.testing.assert_close(one[0], whole[n], atol=1e-6, rtol=0)
    for n in range(3):
        assert torch.equal(weigher.prepare(LOSSES[n : n + 1], CONFIGURED)[0], requests[n])
    assert weigher.prepare([], CONFIGURED).shape == (0, 3)


@pytest.mark.parametrize("filler", [0.0, 3e4, -1e30, float("nan")])
def test_what_is_in_an_unused_row_does_not_count(options, filler: float) -> None:
    weigher = options.build()
    if weigher is None:
        return
    logp, other = logps(), logps()
    other[1][1], other[1][2], other[2][2] = filler, filler, filler
    assert torch.equal(weigher.weights(logp, BASE), weigher.weights(other, BASE))


# ---- each one


def test_adaptive_is_proportional_to_the_scores() -> None:
    assert Adaptive(dev_scores=(0.2, 0.6)).start(None, 2) == pytest.approx([0.25, 0.75])
    assert Adaptive(dev_scores=[1, 0]).dev_scores == (1, 0)
    with pytest.raises(ConfigError, match="dev_scores has 2 values for 3 members; give one per member"):
        Adaptive(dev_scores=(0.2, 0.6)).start(None, 3)


def test_best_by_prompt_gives_a_request_to_the_member_that_predicts_it_best() -> None:
    found = BestByPrompt().build().prepare(LOSSES, CONFIGURED)
    assert found.tolist() == [[0, 1, 0], [0, 0, 1], pytest.approx(CONFIGURED.tolist())]
    equal = [[PromptLoss(9.0, 3, 30), PromptLoss(9.0, 5, 30), PromptLoss(12.0, 1, 30)]]  # by bytes, not by tokens
    assert BestByPrompt().build().prepare(equal, CONFIGURED).tolist() == [[1, 0, 0]]
    sharp = Perplexity(loss_per="byte", loss_temperature=1e-4).build().prepare(LOSSES, CONFIGURED)
    torch.testing.assert_close(found, sharp)


def test_knn_gives_a_request_to_the_best_member_on_the_nearest_prompts(tmp_path) -> None:
    generator = torch.Generator().manual_seed(0)
    known, asked = torch.randn(4, 6, generator=generator), torch.randn(5, 6, generator=generator)
    for neighbours in (1, 2, 3):
        weigher = Knn(router=str(ROUTER), nearest=neighbours).build()
        weigher.learn(list(known))
        found = weigher.prepare([[PromptLoss(1.0, 1, 1, embedding=one)] * 3 for one in asked], CONFIGURED)
        for row, one in zip(found.tolist(), asked.double() - known.double().mean(0), strict=True):
            near = sorted(
                range(4), key=lambda n: -torch.cosine_similarity(known[n].double() - known.double().mean(0), one, dim=0)
            )
            means = [sum(EXAMPLES[n][1][m] for n in near[:neighbours]) / neighbours for m in range(3)]
            equals = [m for m in range(3) if means[m] == pytest.approx(max(means))]
            overall = [sum(scores[m] for _, scores in EXAMPLES) for m in range(3)]
            best = max(equals, key=lambda m: (overall[m], -m))
            assert row == [float(m == best) for m in range(3)]
    assert torch.equal(weigher.prepare([[PromptLoss(0.0, 0, 0)] * 3], CONFIGURED)[0], CONFIGURED)
    assert torch.equal(weigher.prepare([[PromptLoss(1.0, 1, 1, embedding=one)] * 2], CONFIGURED[:2])[0], CONFIGURED[:2])
    same = tmp_path / "elsewhere.jsonl"
    same.write_text(ROUTER.read_text())
    assert Knn(router=str(same)).identity() == Knn(router=str(ROUTER)).identity()
    with pytest.raises(ConfigError, match="has 3 scores a line for 2 members"):
        Knn(router=str(ROUTER)).start(None, 2)
    with pytest.raises(ConfigError, match="router .*none.jsonl"):
        Knn(router=str(tmp_path / "none.jsonl")).start(None, 3)
    same.write_text('{"prompt": "x"}\n')
    with pytest.raises(ConfigError, match=r'line 1: \{"prompt": text, "scores": \[numbers\]\} is needed'):
        Knn(router=str(same)).start(None, 3)
    for line in (
        '{"prompt": "a", "scores": [1, NaN, 0]}',
        '{"prompt": "a", "scores": "110"}',
        '{"prompt": 5, "scores": [1]}',
    ):
        same.write_text(line)
        with pytest.raises(ConfigError, match="line 1: .*numbers"):
            Knn(router=str(same)).start(None, 3)


def test_perplexity_is_a_softmax_of_minus_the_mean_loss() -> None:
    found = Perplexity().build().prepare(LOSSES, CONFIGURED)
    for row, members in zip(found[:2], LOSSES, strict=False):
        scores = [math.exp(-loss.nats / loss.tokens) for loss in members]
        assert row.tolist() == pytest.approx([score / sum(scores) for score in scores], abs=1e-6)
    assert torch.equal(found[2], CONFIGURED)  # a request without a prompt
    per_byte = Perplexity(loss_per="byte", loss_temperature=0.1).build().prepare(LOSSES[:1], CONFIGURED)[0]
    scores = [math.exp(-10 * loss.nats / loss.num_bytes) for loss in LOSSES[0]]
    assert per_byte.tolist() == pytest.approx([score / sum(scores) for score in scores], abs=1e-6)


def test_perplexity_stays_finite_on_hopeless_prompts() -> None:
    losses = [[PromptLoss(1e6, 10, 10), PromptLoss(2e6, 10, 10)]]
    assert Perplexity().build().prepare(losses, torch.tensor([0.5, 0.5]))[0].tolist() == [1.0, 0.0]
    for nats, weights in ((1.0, [0.0, 1.0]), (math.inf, [0.25, 0.75])):
        losses = [[PromptLoss(math.inf, 10, 10), PromptLoss(nats, 10, 10)]]
        assert Perplexity().build().prepare(losses, torch.tensor([0.25, 0.75]))[0].tolist() == weights


def test_confidence_is_a_softmax_of_minus_the_entropy() -> None:
    logp = logps()
    logp[0][0, :10] = -torch.inf
    logp[0][0] = torch.log_softmax(logp[0][0], 0)
    for temperature in (1.0, 0.2):
        found = Confidence(entropy_temperature=temperature).build().weights(logp, BASE)
        for n in range(4):
            scores = []
            for rows, prior in zip(logp, BASE[n].tolist(), strict=True):
                entropy = -sum(p * math.log(p) for p in rows[n].double().exp().tolist() if p)
                scores.append(prior * math.exp(-entropy / temperature))
            assert found[n].tolist() == pytest.approx([score / sum(scores) for score in scores], abs=1e-5)


def test_a_temperature_near_0_leaves_the_best_member_alone() -> None:
    logp = logps()
    found = Confidence(entropy_temperature=1e-44).build().weights(logp, BASE)
    entropy = torch.stack([-(rows.exp() * rows).sum(1) for rows in logp], 1).masked_fill(BASE == 0, torch.inf)
    assert torch.equal(found, torch.nn.functional.one_hot(entropy.argmin(1), 3).float())
    losses = Perplexity(loss_temperature=1e-320).build().prepare(LOSSES[:2], CONFIGURED)
    assert losses.tolist() == Perplexity(loss_temperature=1e-6).build().prepare(LOSSES[:2], CONFIGURED).tolist()
    assert sorted(losses[0].tolist()) == [0.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Adaptive(dev_scores=(0.0, 0.0)), "dev_scores are all zero .*use weighting=uniform"),
        (lambda: Adaptive(dev_scores=(0.5, -0.1)), "dev_scores must be numbers of 0 or more with a finite sum; got"),
        (
            lambda: Adaptive(dev_scores=(1e308, 1e308)),
            "dev_scores must be numbers of 0 or more with a finite sum; got",
        ),
        (lambda: Bayes(prior=(1e308, 1e308)), "prior must be numbers of 0 or more with a finite sum above 0; got"),
        (lambda: Adaptive(dev_scores=(0.5, float("nan"))), "dev_scores must be a list of finite numbers"),
        (lambda: Perplexity(loss_temperature=0.0), "loss_temperature must be a number above 0; got 0.0"),
        (lambda: Perplexity(loss_per="word"), "loss_per must be 'token' or 'byte'; got 'word'"),
        (lambda: Confidence(entropy_temperature=-1.0), "entropy_temperature must be a number above 0; got -1.0"),
        (lambda: Explicit().start(None, 2), "weighting=explicit needs weights for 2 members.*weighting=uniform"),
    ],
)
def test_bad_options_are_named(build, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build()


NEW = """
from typing import ClassVar
from lm_eval_deepen.config import Options
from lm_eval_deepen.weighting.base import weighting

@weighting("NAME", paper="none")
class New(Options):
    TAKES_WEIGHTS: ClassVar[bool] = False
"""


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (NEW.replace("NAME", "new"), None),
        ("import no_such_package", r"weighting file new_one\.py in .* cannot be imported"),
        ("x = 1", r"registers no weighting. Decorate .*@weighting"),
        (NEW.replace("NAME", "uniform"), "'uniform' is defined twice"),
    ],
)
def test_a_new_file_is_a_new_weighting(tmp_path, code: str, message: str | None) -> None:
    (tmp_path / "new_one.py").write_text(code)
    with dropped_in(WEIGHTINGS, tmp_path):
        if message is None:
            assert set(WEIGHTINGS) == {*NAMES, "new"}
        else:
            with pytest.raises(ConfigError, match=message):
                len(WEIGHTINGS)
