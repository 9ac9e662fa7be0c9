"""Fitting an ensemble's weights and learning rate to scores on documents that are not evaluated."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval_deepen.config import EnsembleConfig
from lm_eval_deepen.errors import ConfigError
from lm_eval_deepen.fusion.base import Fuser
from lm_eval_deepen.harness.model import configure
from lm_eval_deepen.harness.pooled import alone
from lm_eval_deepen.harness.tasks import LoadedTask
from lm_eval_deepen.leaderboard.execution import evaluate
from lm_eval_deepen.leaderboard.models import RowModel, load_members, share_by_members
from lm_eval_deepen.leaderboard.recipe import DEFAULT_SEEDS
from lm_eval_deepen.member import Member
from lm_eval_deepen.results.aggregation import to_number

RATES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3)
MOST_POINTS = 10_000  # of a grid of weights, each an evaluation
_TIE = 1e-9


@dataclass(frozen=True)
class ScoredCandidate:
    """An ensemble that was scored on the development split."""

    what: str  # how it differs from the others
    config: EnsembleConfig  # the ensemble
    scores: Mapping[str, float]  # by task; higher is better

    @property
    def mean(self) -> float:
        """What is maximised: the mean over tasks."""
        return sum(self.scores.values()) / len(self.scores)


def adaptive(alone: Mapping[str, Mapping[str, float]]) -> list[float]:
    """Return weights in proportion to the members' mean scores over tasks, as DeePEn-Adapt has them."""
    means = [sum(scores.values()) / len(scores) for scores in alone.values()]
    if min(means) < 0 or not any(means):
        raise ConfigError(
            f"--weights adaptive needs scores of which higher is better, one above 0; the members have {means}. Use "
            "--weights grid"
        )
    return [mean / sum(means) for mean in means]


class Search:
    """Staged: weights first, then the learning rate under the best ones; members are loaded once.

    Attributes:
        log: every candidate that was scored, in order.
        alone: the members' own scores by task.
    """

    def __init__(
        self,
        config: EnsembleConfig,
        tasks: Sequence[LoadedTask],
        metric: str | None,
        device: str | None,
        say: Callable[[str], None],
    ) -> None:
        self.config, self.tasks, self.metric, self.say = config, tasks, metric, say
        names = [member.name for member in config.members]
        loaded = load_members(config.members, [(config, names)], device)
        self.members: list[Member] = [loaded[name] for name in names]
        self.fusers: dict[tuple, Fuser] = {}
        self.log: list[ScoredCandidate] = []
        self.columns: dict[str, str] = {}
        self.signs: dict[str, int] = {}  # of the scores that are maximised, by task: -1 where lower is better

    def run(self, weights: str, step: float, rates: Sequence[float] | None, first: str = "as given") -> ScoredCandidate:
        """Return the best candidate; with `adaptive` and `keep`, of the learning rates alone.

        `first` is what the weights of the configuration are called.

        Raises:
            ConfigError: a step that makes no grid, learning rates that nothing takes.
        """
        single = [
            self._score([(config.members[0].name, config)], [member])[0]
            for config, member in zip(alone(self.config), self.members, strict=True)
        ]
        self.alone = {one.what: one.scores for one in single}
        candidates = [] if weights == "adaptive" else [(first, self.config)]  # of equals, even weights would win
        if weights in ("both", "adaptive"):
            candidates.append(("adaptive weights", self._with_weights(adaptive(self.alone))))
        for point in simplex(len(self.members), step) if weights in ("both", "grid") else ():
            candidates.append((f"weights {'/'.join(f'{weight:.3g}' for weight in point)}", self._with_weights(point)))
        best = self._best(candidates)
        tried = self._rated(best, rates)
        return self._best(tried, first=best) if tried else best

    def _with_weights(self, weights: Sequence[float]) -> EnsembleConfig:
        members = zip(self.config.members, weights, strict=True)
        return self.config.replace(members=tuple(member.replace(weight=weight) for member, weight in members))

    def _rated(self, best: ScoredCandidate, rates: Sequence[float] | None) -> list[tuple[str, EnsembleConfig]]:
        """Return the best weights with other learning rates, where the method takes one."""
        candidates = []
        for rate in rates or RATES:
            try:
                config = configure({**best.config.to_dict(), "learning_rate": rate})
            except ConfigError:
                if rates:
                    raise
                return []
            candidates.append((f"{best.what}, learning rate {rate:g}", config))
        return candidates

    def _best(
        self, tried: Sequence[tuple[str, EnsembleConfig]], first: ScoredCandidate | None = None
    ) -> ScoredCandidate:
        """Score candidates, print them, and return the best; of equals the one with the most even weights."""
        scored = self._score(tried, self.members)
        self.log += scored
        for one in scored:
            told = "  ".join(f"{task} {score:.4f}" for task, score in one.scores.items())
            self.say(f"{one.what:40} {one.mean:.4f}  {told}")
        scored = [first, *scored] if first is not None else scored
        top = max(one.mean for one in scored)
        equals = [one for one in scored if one.mean >= top - _TIE]
        return min(equals, key=lambda one: sum(weight**2 for weight in one.config.weights))

    def _score(self, tried: Sequence[tuple[str, EnsembleConfig]], members: Sequence[Member]) -> list[ScoredCandidate]:
        """Score candidates, which share the members' passes."""
        models = [RowModel.build(config.replace(self_check=False), members, self.fusers) for _, config in tried]
        share_by_members(models)
        scores: list[dict[str, float]] = [{} for _ in models]
        for task in self.tasks:
            for model, own in zip(models, scores, strict=True):
                own.update(self._evaluate(model, task))
        return [ScoredCandidate(what, config, own) for (what, config), own in zip(tried, scores, strict=True)]

    def _evaluate(self, model: RowModel, task: LoadedTask) -> dict[str, float]:
        """Return the score of every task of a column, negative where lower is better."""
        model.begin(task.name)
        results = evaluate(model, task, DEFAULT_SEEDS)
        scores = {}
        for name in task.leaves:
            column = self._column(results["results"][name], name)
            self.columns[name] = column
            self.signs[name] = -1 if results["higher_is_better"][name].get(column.partition(",")[0]) is False else 1
            if (score := to_number(results["results"][name][column])) is None:
                raise ConfigError(
                    f"task {name!r}: {column} is no finite number on the development split; give --metric"
                )
            scores[name] = self.signs[name] * score
        return scores

    def _column(self, values: Mapping[str, Any], task: str) -> str:
        columns = [key for key in values if "," in key and not key.partition(",")[0].endswith("_stderr")]
        if self.metric is None:
            return columns[0]
        for column in columns:
            if self.metric in (column, column.partition(",")[0]):
                return column
        raise ConfigError(f"--metric {self.metric}: task {task!r} has {', '.join(columns)}")


def simplex(count: int, step: float) -> list[tuple[float, ...]]:
    """Return the points with `count` positive coordinates, multiples of `step`, that sum to 1.

    Raises:
        ConfigError: a step that does not divide 1, or that leaves no point.
    """
    parts = round(1 / step) if step > 0 else 0
    if parts < count or abs(parts * step - 1) > _TIE:
        raise ConfigError(f"--weight-step must divide 1 into at least {count} parts; got {step}")
    if math.comb(parts - 1, count - 1) > MOST_POINTS:
        raise ConfigError(
            f"--weight-step {step:g} makes a grid of more than {MOST_POINTS:,} weights; give a larger one"
        )
    cuts = itertools.combinations(range(1, parts), count - 1)  # of a line of `parts`, between which the shares lie
    points = [[b - a for a, b in itertools.pairwise((0, *cut))] for cut in cuts]
    return [(*(k / parts for k in point), 1 - sum(point) / parts) for point in points]
