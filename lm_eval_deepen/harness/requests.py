"""Answers to the three request types by one ensemble, request by request as they are finished."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.models.utils import handle_stop_sequences, postprocess_generated_text

from lm_eval_deepen.engine import Ensemble
from lm_eval_deepen.engine.drafts import drafter
from lm_eval_deepen.engine.encoder_decoder import require_scoring
from lm_eval_deepen.engine.generation import Generation, Job, generate
from lm_eval_deepen.engine.memory import nodes_per_forward, safe_batch
from lm_eval_deepen.engine.prompts import Prompter, Span
from lm_eval_deepen.engine.scoring import FORWARDS_PER_ROUND, SpanScore, score_together
from lm_eval_deepen.engine.stretches import (
    StretchPrompter,
    StretchReading,
    StretchScore,
    StretchSpan,
    joined,
    read_stretches,
    without_evidence,
)
from lm_eval_deepen.engine.windows import rolling_spans
from lm_eval_deepen.harness.main_member import MainMemberView
from lm_eval_deepen.harness.step_files import StepFiles
from lm_eval_deepen.harness.unanswered import SetAside, attempt
from lm_eval_deepen.member.encoder_decoder_runner import divide
from lm_eval_deepen.member.generation import Asked, Settings
from lm_eval_deepen.member.runner import base_model
from lm_eval_deepen.member.sampling import row_generator

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

Answers = Iterator[tuple[int, Any]]


class RequestHandler(MainMemberView):
    """Turns requests into spans and jobs for the engine, and what it finds into answers.

    Attributes:
        peers: models around the same members that score in one pass, this one among them (see `share_passes`).
        known: answers that a peer's pass gave already, until they are asked for.
        step_files: where the steps of traced requests are written; None where nothing is traced.
    """

    step_files: StepFiles | None = None

    def adopt(self, ensemble: Ensemble) -> None:
        """Answer by this ensemble."""
        self.ensemble_config, self.ensemble = ensemble.config, ensemble
        self._prompter = Prompter(ensemble)
        main, solo = ensemble.main, self._prompter.solo
        self._settings = Settings(base_model(main.lm.model), main.name, None if solo else main.eos_ids)
        self.peers: list[RequestHandler] = [self]
        self.known: dict[tuple[str, tuple], Any] = {}

    def answers(self, kind: str, requests: Sequence[Instance]) -> Answers:
        """Yield the index of every request and its answer, as soon as it is there.

        In the place of an answer that cannot be given is a `SetAside`; these come first.
        """
        self.check_kind(kind)
        repeats: Counter[str] = Counter()
        owners: list[int] = []
        prepared: list[Any] = []
        for index, request in enumerate(requests):
            if kind != "generate_until" and (kind, request.args) in self.known:
                yield index, self.known[kind, request.args]
                continue
            made = self.prepare(kind, request, repeats)
            if isinstance(made, SetAside):
                yield index, made
                continue
            owners.append(index)
            prepared.append(made if self.step_files is None else self.step_files.mark(request, made))
        if self.step_files is not None:
            self.step_files.announce(kind, prepared)
        kinds: dict[str, Callable[..., Answers]] = {
            "loglikelihood": self._loglikelihood,
            "loglikelihood_rolling": self._rolling,
            "generate_until": self._generate,
        }
        for at, found in kinds[kind]([requests[index] for index in owners], prepared):
            yield owners[at], found

    def check_kind(self, kind: str) -> None:
        """Raise RequestError where this ensemble has no answer to any request of a type."""
        if kind != "generate_until":
            require_scoring(self.ensemble)
        elif self._prompter.solo:
            self.ensemble.main.check_generation()

    def prepare(self, kind: str, request: Instance, repeats: Counter[str] | None = None) -> Any:
        """Return what the engine needs for a request, or a `SetAside` where it has no honest answer.

        Args:
            kind: its type.
            request: the request.
            repeats: how often each context was sampled before.
        """
        stretches = StretchPrompter(self.ensemble) if self.ensemble.by_stretches else None
        if kind == "loglikelihood":
            return attempt(self._prompter.span if stretches is None else stretches.span, *request.args)
        if kind == "loglikelihood_rolling":
            text = request.args[-1]  # harness 0.5 puts an empty context before it
            if stretches is not None:
                return attempt(stretches.rolling, text)
            return attempt(rolling_spans, self.ensemble, text)
        return attempt(self._job, *request.args, Counter() if repeats is None else repeats)

    def _tell_peers(self, kind: str, request: Instance, answers: Sequence[Any]) -> Any:
        """Leave the peers their answers and return our own."""
        for peer, answer in zip(self.peers, answers, strict=True):
            if peer is not self:
                peer.known[kind, request.args] = answer
        return answers[self.peers.index(self)]

    def _loglikelihood(self, requests: Sequence[Instance], spans: Sequence[Any]) -> Answers:
        if self.ensemble.by_stretches:
            for index, weighed in self._score_stretches([[span] for span in spans]):
                answers = [(score.total, score.greedy) for score in weighed]
                yield index, self._tell_peers("loglikelihood", requests[index], answers)
            return
        for index, found in self._score(spans):
            if self.step_files is not None:
                self.step_files.add_scores(requests[index], found)
            answers = [(score.total, score.greedy) for score in found]
            yield index, self._tell_peers("loglikelihood", requests[index], answers)

    def _rolling(self, requests: Sequence[Instance], texts: Sequence[Sequence[Any]]) -> Answers:
        if self.ensemble.by_stretches:
            for index, weighed in self._score_stretches(texts):
                own = [score.total for score in weighed]
                yield index, self._tell_peers("loglikelihood_rolling", requests[index], own)
            return
        owners: list[int] = []
        spans: list[Span] = []
        ends: list[int] = []
        for index, found in enumerate(texts):
            spans += found
            owners += [index] * len(found)
            ends.append(len(spans))
            if not found:
                yield index, 0.0
        left = Counter(owners)
        windows: list[list[list[SpanScore]]] = [[] for _ in requests]
        places: list[list[int]] = [[] for _ in requests]
        for at, scores in self._score(spans, ends):
            index = owners[at]
            places[index].append(at)
            windows[index].append(scores)
            left[index] -= 1
            if not left[index]:
                if self.step_files is not None:
                    in_order = sorted(zip(places[index], windows[index], strict=True), key=lambda pair: pair[0])
                    self.step_files.add_scores(requests[index], [found[0] for _, found in in_order])
                columns = zip(self.peers, zip(*windows[index], strict=True), strict=True)
                totals = [peer.ensemble.total(own) for peer, own in columns]
                yield index, self._tell_peers("loglikelihood_rolling", requests[index], totals)

    def _score_stretches(self, texts: Sequence[Sequence[StretchSpan]]) -> Iterator[tuple[int, list[StretchScore]]]:
        """Score texts by stretches; a text may have several windows, and none where it is empty."""
        learns = any(peer.ensemble.reads_prompts for peer in self.peers)
        windows = [window if learns else without_evidence(window) for text in texts for window in text]
        owners = [index for index, text in enumerate(texts) for _ in text]
        nothing = StretchScore((), True, tuple(self.ensemble.weights.tolist()))
        yield from ((index, [nothing] * len(self.peers)) for index, text in enumerate(texts) if not text)
        left = Counter(owners)
        found: dict[int, StretchReading] = {}
        nodes = nodes_per_forward(self.ensemble, self._batch(1))
        powers = max((peer.ensemble.stretch_experts.powers for peer in self.peers), key=len)
        for at, reading in read_stretches(self.ensemble.active, windows, nodes, powers):
            found[at] = reading
            index = owners[at]
            left[index] -= 1
            if not left[index]:
                own = [found.pop(i) for i, owner in enumerate(owners) if owner == index]
                reading = own[0] if len(own) == 1 else joined(own)
                yield index, [peer.ensemble.weighed(reading) for peer in self.peers]

    def _score(self, spans: Sequence[Span], ends: Sequence[int] = ()) -> Iterator[tuple[int, list[SpanScore]]]:
        """Score spans, in rounds that finish whole texts where `ends` tells how many spans end each of them."""
        lengths = [len(span.prompts[0].ids) + len(span.target) for span in spans]
        longest = max(lengths, default=1)
        nodes = nodes_per_forward(self.ensemble, self._batch(longest) * longest)
        ensembles = [peer.ensemble for peer in self.peers]
        start = 0
        for end in [*ends, len(spans)]:
            if sum(lengths[start:end]) < FORWARDS_PER_ROUND * nodes and end < len(spans):
                continue
            for index, found in score_together(ensembles, spans[start:end], nodes):
                yield start + index, found
            start = end

    def _generate(self, requests: Sequence[Instance], prepared: Sequence[tuple[Job, list[str]]]) -> Answers:
        jobs, stops = [job for job, _ in prepared], [until for _, until in prepared]
        most = self.ensemble.main.max_length  # a text ends where the main member's context does
        size = self._batch(max((min(len(job.prompts[0].ids) + job.max_new, most) for job in jobs), default=1))
        drafts = drafter(self.ensemble_config.speculate)
        for index, found in generate(self.ensemble, jobs, size, drafts):
            if self.step_files is not None:
                self.step_files.add_text(requests[index], found)
            yield index, SetAside(found.refusal) if found.refusal else self._text(found, stops[index])
        self.ensemble.counters.record_drafts(drafts.counts, drafts.near_ties)

    def _batch(self, longest: int) -> int:
        """Return the batch size for texts of at most `longest` tokens; ``auto`` asks the memory model."""
        size = self.ensemble_config.batch_size
        if isinstance(size, int):
            return size
        return safe_batch(self.ensemble, longest, self.ensemble_config.max_batch_size)

    def _job(self, context: str, arguments: dict, repeats: Counter[str]) -> tuple[Job, list[str]]:
        asked = Asked.read(arguments, self.max_gen_toks)
        eos = None if self.eot_token_id is None else self.tok_decode([self.eot_token_id], skip_special_tokens=False)
        until = handle_stop_sequences(asked.until, eos=eos)
        prompts = self._prompter.prompts(context, asked.max_gen_toks)
        source, tokens = divide(prompts[0].ids)
        plan = self._settings.plan(asked, tokens, source)
        generator = None
        if plan.sampler.do_sample:
            repeats[context] += 1
            generator = row_generator(torch.initial_seed(), context, str(repeats[context]))
        prefix_space = not self._prompter.solo and not context and self.ensemble.main.codec.prefix_space
        stops = tuple(stop for stop in until if stop)
        return Job(prompts, plan.max_new, stops, plan.sampler, generator, prefix_space, plan.ends), until

    def _text(self, found: Generation, until: list[str]) -> str:
        """Return a generation as ``hf`` presents it: stop strings and thinking removed.

        One member's end of text stays in the text where it is no special token, as in ``hf``.
        """
        ids, end = found.ids, self._main.think_end_token
        if self._prompter.solo and found.end is not None:
            ids = [*ids, found.end]
        if isinstance(end, int) and end in ids:
            ids = ids[len(ids) - ids[::-1].index(end) :]
        text = self.tok_decode(ids) if self.ensemble.is_own(ids) else found.data.decode(errors="replace")
        if isinstance(end, int):
            text = text.lstrip()
        return postprocess_generated_text(text, stop=until, think_end_token=end if isinstance(end, str) else None)


def share_passes(models: Sequence[RequestHandler]) -> None:
    """Make models around the same members score in one pass: what one is asked, all answer.

    They differ in method, options or weights. Each keeps the answers that it was not asked for yet.

    Raises:
        ValueError: models whose members, or whose prompts, differ.
    """
    shapes = {(tuple(map(id, model.ensemble.active)), model.ensemble_config.chat_fallback) for model in models}
    if len(shapes) > 1:
        raise ValueError("models that share passes must run the same loaded members, in the same order")
    for model in models:
        model.peers = list(models)
