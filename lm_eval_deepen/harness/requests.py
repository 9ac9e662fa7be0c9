"""Answers to the three request types by one ensemble, request by request as they are finished."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lm_eval_deepen.engine import Ensemble
from lm_eval_deepen.engine.following import Job
from lm_eval_deepen.engine.memory import nodes_per_forward
from lm_eval_deepen.engine.prompts import Span
from lm_eval_deepen.engine.scoring import FORWARDS_PER_ROUND, SpanScore, score_together, total
from lm_eval_deepen.engine.stretches import StretchPrompter, StretchSpan, joined, read_stretches, weighed, with_evidence
from lm_eval_deepen.engine.texts import Texts
from lm_eval_deepen.engine.trace import Trace
from lm_eval_deepen.engine.windows import rolling_spans
from lm_eval_deepen.harness.distributed import Ranks
from lm_eval_deepen.harness.main_member import MainMemberView
from lm_eval_deepen.harness.step_files import StepFiles
from lm_eval_deepen.harness.unanswered import SetAside, attempt
from lm_eval_deepen.member.chat import distinct

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

Answers = Iterator[tuple[int, Any]]
T = TypeVar("T")


class RequestHandler(MainMemberView):
    """Turns requests into spans and jobs for the engine, and what it finds into answers.

    Attributes:
        texts: makes jobs of prompts, and texts of what is generated.
        peers: models around the same members that score in one pass, this one among them (see `share_passes`).
        known: answers that a peer's pass gave already, by task, type and arguments of the request.
    """

    ranks: Ranks  # the processes that share the requests
    traces: list[Trace]  # of all of them
    findings: dict[str, Any] | None = None  # of the self-check
    results_in: Path | None = None  # where the harness writes, once it has asked for something
    step_files: StepFiles | None = None  # where the steps of traced requests are written; None where nothing is traced

    def adopt(self, ensemble: Ensemble) -> None:
        """Answer by this ensemble."""
        self.ensemble_config, self.ensemble = ensemble.config, ensemble
        self.texts = Texts(ensemble)
        self.peers: list[RequestHandler] = [self]
        self.known: dict[tuple[str | None, str, tuple], Any] = {}

    def answers(self, kind: str, requests: Sequence[Instance], repeats: Counter[tuple] | None = None) -> Answers:
        """Yield the index of every request and its answer, as soon as it is there.

        In the place of an answer that cannot be given is a `SetAside`; these come first. `repeats` counts what was
        sampled before (see `Texts.job`), where a call's requests come in several parts.
        """
        self.check_kind(kind)
        repeats = Counter() if repeats is None else repeats
        owners: list[int] = []
        prepared: list[Any] = []
        for index, request in enumerate(requests):
            if kind != "generate_until" and (key := (request.task_name, kind, distinct(request.args))) in self.known:
                yield index, self.known[key]
                continue
            made = self.prepare(kind, request, repeats)
            if isinstance(made, SetAside):
                yield index, made
                continue
            owners.append(index)
            prepared.append(made if self.step_files is None else self.step_files.mark(request, made))
        if self.step_files is not None:
            self.step_files.announce(kind, [requests[index] for index in owners], prepared)
        kinds: dict[str, Callable[..., Answers]] = {
            "loglikelihood": self._loglikelihood,
            "loglikelihood_rolling": self._rolling,
            "generate_until": self._generate,
        }
        answer_all = kinds[kind]
        if kind != "generate_until" and self.ensemble.by_stretches:
            answer_all = partial(self._by_stretches, kind)
        for at, answer in answer_all([requests[index] for index in owners], prepared):
            yield owners[at], answer

    def check_kind(self, kind: str) -> None:
        """Raise RequestError where this ensemble has no answer to any request of a type."""
        if kind != "generate_until":
            self.ensemble.require_scoring()
        elif self.texts.prompter.solo:
            self.ensemble.main.check_generation()

    def prepare(self, kind: str, request: Instance, repeats: Counter[tuple] | None = None) -> Any:
        """Return what the engine needs for a request, or a `SetAside` where it has no honest answer.

        `repeats` counts what was sampled before (see `Texts.job`).
        """
        if kind == "generate_until":
            before = Counter() if repeats is None else repeats
            return attempt(self.texts.job, *request.args, before, request.task_name)
        stretches = StretchPrompter(self.ensemble) if self.ensemble.by_stretches else None
        if kind == "loglikelihood":
            return attempt(self.texts.prompter.span if stretches is None else stretches.span, *request.args)
        text = request.args[-1]  # harness 0.5 puts an empty context before it
        if stretches is not None:
            return attempt(stretches.rolling, text)
        return attempt(rolling_spans, self.ensemble, text)

    def _tell_peers(self, kind: str, request: Instance, answers: Sequence[Any]) -> Any:
        """Leave the peers their answers and return our own."""
        for peer, answer in zip(self.peers, answers, strict=True):
            if peer is not self:
                peer.known[request.task_name, kind, distinct(request.args)] = answer
        return answers[self.peers.index(self)]

    def _loglikelihood(self, requests: Sequence[Instance], spans: Sequence[Span]) -> Answers:
        for index, scores in self._score(spans):
            if self.step_files is not None:
                self.step_files.add_scores(index, scores, scores[0].total)
            answers = [(score.total, score.greedy) for score in scores]
            yield index, self._tell_peers("loglikelihood", requests[index], answers)

    def _rolling(self, requests: Sequence[Instance], texts: Sequence[Sequence[Span]]) -> Answers:
        yield from ((index, 0.0) for index, text in enumerate(texts) if not text)
        spans = [span for text in texts for span in text]
        owners = [index for index, text in enumerate(texts) for _ in text]
        for index, windows in _whole(self._score(spans, list(accumulate(map(len, texts)))), owners):
            columns = list(zip(*windows, strict=True))
            totals = [total(peer.ensemble, own) for peer, own in zip(self.peers, columns, strict=True)]
            if self.step_files is not None:
                self.step_files.add_scores(index, columns[0], totals[0])
            yield index, self._tell_peers("loglikelihood_rolling", requests[index], totals)

    def _by_stretches(self, kind: str, requests: Sequence[Instance], prepared: Sequence[Any]) -> Answers:
        """Score texts by stretches; a text may have several windows, and none where it is empty."""
        texts: Sequence[Sequence[StretchSpan]] = [[one] for one in prepared] if kind == "loglikelihood" else prepared
        yield from ((index, 0.0) for index, text in enumerate(texts) if not text)
        last = max(peer.ensemble.prompt_stretches or 0 for peer in self.peers)
        windows = [with_evidence(window, last) for text in texts for window in text]
        owners = [index for index, text in enumerate(texts) for _ in text]
        nodes = nodes_per_forward(self.ensemble, self.texts.batch(1))
        powers = max((peer.ensemble.experts.powers for peer in self.peers), key=len)
        for index, own in _whole(read_stretches(self.ensemble.active, windows, nodes, powers), owners):
            reading = own[0] if len(own) == 1 else joined(own)
            scores = [weighed(peer.ensemble, reading) for peer in self.peers]
            answers = [(one.total, one.greedy) if kind == "loglikelihood" else one.total for one in scores]
            yield index, self._tell_peers(kind, requests[index], answers)

    def _score(self, spans: Sequence[Span], ends: Sequence[int] = ()) -> Iterator[tuple[int, list[SpanScore]]]:
        """Score spans, in rounds that finish whole texts where `ends` tells how many spans end each of them."""
        lengths = [len(span.prompts[0].ids) + len(span.target) for span in spans]
        longest = max(lengths, default=1)
        nodes = nodes_per_forward(self.ensemble, self.texts.batch(longest) * longest)
        ensembles = [peer.ensemble for peer in self.peers]
        start = 0
        for end in [*ends, len(spans)]:
            if sum(lengths[start:end]) < FORWARDS_PER_ROUND * nodes and end < len(spans):
                continue
            for index, scores in score_together(ensembles, spans[start:end], nodes):
                yield start + index, scores
            start = end

    def _generate(self, requests: Sequence[Instance], prepared: Sequence[tuple[Job, list[str]]]) -> Answers:
        jobs, stops = [job for job, _ in prepared], [until for _, until in prepared]
        names = [{"task": one.task_name, "doc_id": one.doc_id, "request": one.idx} for one in requests]
        for index, generation in self.texts.generations(jobs, names):
            if self.step_files is not None:
                self.step_files.add_text(index, generation)
            yield (
                index,
                SetAside(generation.refusal) if generation.refusal else self.texts.finished(generation, stops[index]),
            )


def _whole(found: Iterable[tuple[int, T]], owners: Sequence[int]) -> Iterator[tuple[int, list[T]]]:
    """Yield the windows of every text, in order, once all are there: they come in any order, each with its place."""
    left = Counter(owners)
    windows: dict[int, dict[int, T]] = defaultdict(dict)
    for at, window in found:
        index = owners[at]
        windows[index][at] = window
        left[index] -= 1
        if not left[index]:
            own = windows.pop(index)
            yield index, [own[place] for place in sorted(own)]


def share_passes(models: Sequence[RequestHandler]) -> None:
    """Make models around the same members score in one pass: what one is asked, all answer.

    They differ in method, options or weights. Each keeps the answers that it was not asked for yet.

    Raises:
        ValueError: models whose members, or whose prompts, differ, or of which only some score by stretches.
    """
    shapes = {
        (tuple(map(id, model.ensemble.active)), model.ensemble_config.chat_fallback, model.ensemble.by_stretches)
        for model in models
    }
    if len(shapes) > 1:
        raise ValueError(
            "models that share passes must run the same loaded members, in the same order and the same way"
        )
    for model in models:
        model.peers = list(models)
