"""The rows of a leaderboard as models around the same loaded members, and the cost of each."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pydantic.dataclasses
import torch
from lm_eval.models.utils import normalize_gen_kwargs
from pydantic import ConfigDict
from torch import Tensor

from lm_eval_deepen.config import EnsembleConfig, MemberConfig
from lm_eval_deepen.engine import Ensemble
from lm_eval_deepen.engine.ensemble import check_vocabularies, fuses
from lm_eval_deepen.engine.trace import Trace
from lm_eval_deepen.fusion._expert_rows import ExpertRows
from lm_eval_deepen.fusion.base import Fused, Fuser
from lm_eval_deepen.harness.distributed import Ranks
from lm_eval_deepen.harness.main_member import MainMemberView
from lm_eval_deepen.harness.model import DeepenLM
from lm_eval_deepen.harness.requests import RequestHandler, share_passes
from lm_eval_deepen.member import Member, load_member
from lm_eval_deepen.member.chat import distinct
from lm_eval_deepen.member.loading import check_loading, preview_vocabularies
from lm_eval_deepen.member.tokenizer_files import load_tokenizer
from lm_eval_deepen.pooling.base import scores_texts

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance


EXACT = ConfigDict(strict=True, allow_inf_nan=False)  # of what is read from files again


@pydantic.dataclasses.dataclass(frozen=True, config=EXACT)
class Cost:
    """What the answers to one task's requests took.

    Attributes:
        seconds: as if the row had run alone: of a shared pass, its time less the other rows' fusing.
        fusing: of these, in the row's own fusing.
        tokens: that the members forwarded, padding excluded.
        shared_by: how many rows shared the pass; 1: it ran alone.
    """

    seconds: float = 0.0
    fusing: float = 0.0
    tokens: int = 0
    shared_by: int = 1

    def __add__(self, other: Cost) -> Cost:
        """Return the sum; `shared_by` is the larger one."""
        return Cost(
            self.seconds + other.seconds,
            self.fusing + other.fusing,
            self.tokens + other.tokens,
            max(self.shared_by, other.shared_by),
        )


@dataclass(eq=False)
class TimedEnsemble(Ensemble):
    """An ensemble that adds up the seconds of its fusing."""

    fusing: float = 0.0

    @classmethod
    def of(cls, ensemble: Ensemble) -> TimedEnsemble:
        """Return the same ensemble, timed."""
        return cls(**{field.name: getattr(ensemble, field.name) for field in fields(Ensemble)})

    def fuse(self, *arguments: Any, **named: Any) -> Tensor:
        """Fuse rows; see `Ensemble.fuse`."""
        with self.timing():
            return super().fuse(*arguments, **named)

    def fuse_by_expert(self, *arguments: Any, **named: Any) -> ExpertRows:
        """Return rows under every expert, timed too; see `Ensemble.fuse_by_expert`."""
        with self.timing():
            return TimedRows(super().fuse_by_expert(*arguments, **named), self)

    def mix(self, logp: Sequence[Tensor], rows: ExpertRows, *arguments: Any, **named: Any) -> Tensor:
        """Return the experts' mixture; see `Ensemble.mix`."""
        with self.timing():
            return super().mix(logp, rows.rows if isinstance(rows, TimedRows) else rows, *arguments, **named)

    @contextmanager
    def timing(self) -> Iterator[None]:
        """Count what happens inside as fusing."""
        start = self._now()
        try:
            yield
        finally:
            self.fusing += self._now() - start

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # else the members' pending work would count as fusing
        return time.perf_counter()


@dataclass
class TimedRows:
    """Rows under several experts, whose look-ups count as fusing of an ensemble."""

    rows: ExpertRows
    ensemble: TimedEnsemble

    def at(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """Return every expert's log-probability of a token in a row; see `ExpertRows.at`."""
        with self.ensemble.timing():
            return self.rows.at(rows, tokens)

    def mixed(self, log_posterior: Tensor) -> Fused:
        """Return the experts' mixture; see `ExpertRows.mixed`."""
        with self.ensemble.timing():
            return self.rows.mixed(log_posterior)


class RowModel(DeepenLM):
    """The model of a row: remembers its answers for rows that pool them, and counts what they took.

    Attributes:
        task: name of the task at hand.
        costs: by task.
        drawn: tasks with answers that are drawn at random, for each row that asks.
    """

    ensemble: TimedEnsemble

    @classmethod
    def build(cls, config: EnsembleConfig, members: Sequence[Member], fusers: MutableMapping[tuple, Fuser]) -> RowModel:
        """Return a row's model around loaded members, the main one first; rows with other weights share a fuser."""
        key = (*map(id, members), config.method, config.options, config.matrix_dir)
        model = cls.__new__(cls)
        MainMemberView.__init__(model)
        ensemble = Ensemble.assemble(config, members, fusers.get(key))
        if ensemble.fuser is not None:
            fusers[key] = ensemble.fuser
        model._adopt(ensemble, Ranks())
        return model

    def adopt(self, ensemble: Ensemble) -> None:
        """Answer by this ensemble."""
        super().adopt(TimedEnsemble.of(ensemble))
        self.task = ""
        self.costs: dict[str, Cost] = {}
        self.drawn: set[str] = set()
        self._remembered: dict[tuple[str | None, str, str] | None, Any] = {}

    @property
    def answerers(self) -> list[RowModel]:
        """The models whose answers this row gives: itself, or those that it pools, and itself where it scores them."""
        if self.pool is None:
            return [self]
        models = [*self.pool.answerers, *([self] if scores_texts(self.pool.method) else [])]
        return [model for model in models if isinstance(model, RowModel)]

    def begin(self, task: str) -> None:
        """Take up a task: what is counted from here on is of this one."""
        for model in {id(model): model for model in (self, *self.answerers)}.values():
            model.task = task
            if task in model.drawn:  # drawn anew for every row: none pays for another's
                model.costs.pop(task, None)
                model.drawn.remove(task)
            model.ensemble.counters = Trace(model.ensemble.counters.names)
            model.traces = [model.ensemble.counters]
        if self.pool is not None:
            self.pool.counters = self.ensemble.counters

    def pool_from(self, models: Sequence[RowModel]) -> None:
        """Pool the answers of these models, one per answerer, rather than of models of our own."""
        assert self.pool is not None and len(models) == len(self.pool.answerers)
        self.pool.answerers = list(models)

    def cost(self, task: str) -> Cost:
        """Return what the answers to a task took, those of the models that are pooled included."""
        return sum((model.costs.get(task, Cost()) for model in self.answerers), Cost())

    def _answer(self, kind: str, requests: list[Instance], disable_tqdm: bool) -> list[Any]:
        return super()._answer(kind, requests, True)  # the bar of a leaderboard counts cells

    def answers(
        self, kind: str, requests: Sequence[Instance], repeats: Counter[tuple] | None = None
    ) -> Iterator[tuple[int, Any]]:
        """Yield the index of every request and its answer; what was answered before is remembered."""
        left = []
        for index, request in enumerate(requests):
            key = self._key(kind, request)
            if key in self._remembered:
                yield index, self._remembered[key]
            else:
                left.append(index)
        if not left:
            return
        before = self._readings()
        for at, answer in super().answers(kind, [requests[index] for index in left], repeats):
            key = self._key(kind, requests[left[at]])
            if key is None:
                self.drawn.add(self.task)
            else:
                self._remembered[key] = answer
            yield left[at], answer
        now = self._readings()
        seconds, tokens = now[0] - before[0], now[1] - before[1]
        fusing = {key: value - before[2][key] for key, value in now[2].items()}
        sharing: Sequence[RequestHandler] = self.peers if kind != "generate_until" and tokens else [self]
        total = sum(fusing[id(peer)] for peer in sharing)
        for peer in sharing:
            assert isinstance(peer, RowModel)
            own = fusing[id(peer)]
            spent = Cost(seconds - total + own, own, tokens, len(sharing))
            peer.costs[self.task] = peer.costs.get(self.task, Cost()) + spent

    def _key(self, kind: str, request: Instance) -> tuple[str | None, str, str] | None:
        """Return what identifies a request; None for one whose answer is drawn at random, or that is set aside.

        The task is part of it: a task costs as much as it costs alone, whatever others ask.
        """
        try:
            *texts, last = request.args
            if kind == "generate_until":
                if normalize_gen_kwargs(last, self.max_gen_toks).get("do_sample"):
                    return None
                last = json.dumps(last, sort_keys=True)
            return request.task_name, kind, json.dumps([*distinct(texts), last])
        except (AttributeError, TypeError, ValueError):  # answering it says what is wrong with it
            return None

    def _readings(self) -> tuple[float, int, dict[int, float]]:
        runners = {id(member.runner): member.runner for member in self.ensemble.active}
        tokens = sum(runner.forwarded for runner in runners.values())
        return time.perf_counter(), tokens, {id(peer): getattr(peer.ensemble, "fusing", 0.0) for peer in self.peers}


def load_members(
    members: Sequence[MemberConfig],
    ensembles: Sequence[tuple[EnsembleConfig, Sequence[str]]],
    device: str | None,
) -> dict[str, Member]:
    """Load each checkpoint once, after what can be refused without weights was checked; return the members by name.

    Members that are loaded alike from one place, under several names or with other temperatures, share their model,
    its tokenizer and its vocabulary. `ensembles` are the configurations that will be built around them, each with the
    names of its members. Members that name no device load on `device`.

    Raises:
        DeepenError: a member that cannot be loaded, or vocabularies that a row's method cannot use.
    """
    if members:  # none where only built models are left to evaluate, which are loaded one by one
        check_loading(tuple(members), device)
    first: dict[MemberConfig, MemberConfig] = {}  # of the members that are loaded alike
    same = {member.name: first.setdefault(_loaded(member), member) for member in members}
    tokenizers = {member.name: load_tokenizer(member) for member in first.values()}
    fused = [(config, [same[name] for name in names]) for config, names in ensembles if fuses(config)]
    needed = {member.name for _, own in fused for member in own}
    read = {m.name: preview_vocabularies([m], [tokenizers[m.name]]) for m in first.values() if m.name in needed}
    for config, own in fused:
        check_vocabularies(config, [vocabulary for member in own for vocabulary in read[member.name]])
    loaded = {}
    for member in first.values():
        loaded[member.name] = load_member(member, device, tokenizers.pop(member.name))
        if member.name in needed and list(same.values()).count(member) > 1:
            loaded[member.name].codec  # noqa: B018  # read before it is shared
    return {member.name: loaded[same[member.name].name].named(member) for member in members}


def _loaded(member: MemberConfig) -> MemberConfig:
    """Return a member as far as it decides what is loaded."""
    place = Path(member.pretrained).expanduser()
    pretrained = str(place.resolve()) if place.exists() else member.pretrained
    return member.replace(name="", weight=1.0, temperature=1.0, pretrained=pretrained)


def share_by_members(models: Sequence[RowModel]) -> None:
    """Let models of step fusion that run the same members in the same order score in one pass.

    Those whose weights depend on prompts share one of their own: they need the head at every position of a prompt,
    which may take longer than all the rest, and what a row costs would be lost in it. So do those that score by
    stretches, which read other positions, and those that only write.
    """
    groups: dict[tuple, list[RowModel]] = {}
    for model in models:
        if model.pool is None:
            ensemble = model.ensemble
            by = (ensemble.by_stretches, ensemble.by_words is not None)
            how = (model.ensemble_config.chat_fallback, ensemble.reads_prompts, *by)
            key = (*map(id, ensemble.active), *how)
            groups.setdefault(key, []).append(model)
        else:
            share_passes([model])
    for group in groups.values():
        share_passes(group)
