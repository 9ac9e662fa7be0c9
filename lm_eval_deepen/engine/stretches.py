"""Scoring without a main member: a text is divided where the tokens of all members end.

Between two such places lies a *stretch*. A member gives a stretch the product of its own tokens' probabilities, and
the ensemble gives it the weighted mean of the members'. No distribution is mapped into another vocabulary, and the
result is the same whichever member comes first. The law and its measured effect are in docs/relative-space.md.
"""

from __future__ import annotations

import logging
import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lm_eval_deepen.engine.base import EnsembleBase
from lm_eval_deepen.engine.prompt_loss import LOGITS_PER_CHUNK
from lm_eval_deepen.engine.prompts import require_text
from lm_eval_deepen.engine.scoring import FORWARDS_PER_ROUND, rounds
from lm_eval_deepen.errors import RequestError, VocabularyError
from lm_eval_deepen.member import Member
from lm_eval_deepen.member.chat import ChatPrompt
from lm_eval_deepen.member.tree import TokenTree
from lm_eval_deepen.member.walk import Walker
from lm_eval_deepen.relative.topk import argmax
from lm_eval_deepen.weighting.experts import Experts, posteriors

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StretchSpan:
    """A text to score, as the tokens of every member."""

    # the tokens of each active member, its prompt first; None where the member abstains
    paths: tuple[tuple[int, ...] | None, ...]
    # how many of these tokens come before each boundary [S + 1] of the S stretches; empty where the member abstains
    cuts: tuple[tuple[int, ...], ...]
    evidence: int = 0  # how many of the S stretches are part of the prompt: they move the weights and are not scored


@dataclass(frozen=True)
class StretchScore:
    """The score of one text."""

    logp: tuple[float, ...]  # natural-log probability of every scored stretch, given what comes before it
    # whether, at every scored stretch, members with more than half of the weight in force would have chosen all of
    # their own tokens
    greedy: bool
    weights: tuple[float, ...]  # the mean weight of every member over the scored stretches [M]

    @property
    def total(self) -> float:
        """The sum over the stretches, in nats."""
        return math.fsum(self.logp)


@dataclass(frozen=True)
class MemberText:
    """One member's tokens of a text."""

    head: tuple[int, ...]  # the tokens before the text: control tokens, or the prompt of a conversation
    ids: tuple[int, ...]  # the tokens of the text
    # the offset in the text, in bytes, at which each of `ids` ends; 0 for a prefix space on its own
    ends: tuple[int, ...]

    @classmethod
    def of(cls, member: Member, text: str, *, head: tuple[int, ...], opens: bool) -> MemberText | None:
        """Read a text behind the tokens `head`; None where the member's tokenizer cannot spell it.

        Where it opens a prompt, a tokenizer may put a prefix space.
        """
        codec = member.codec
        try:
            ids = codec.encode_prompt(text)[len(codec.automatic_prefix) :] if opens else codec.encode(text)
        except VocabularyError:
            return None
        lengths = [len(codec.vocab.pieces[token]) for token in ids]
        prefix_space = sum(lengths) - len(text.encode())
        if prefix_space not in (0, 1):
            return None
        ends, at = [], -prefix_space
        for length in lengths:
            at += length
            ends.append(at)
        return cls(head, tuple(ids), tuple(ends))

    def before(self, offset: int) -> int:
        """Return how many of `ids` end at `offset` or before it."""
        return bisect_right(self.ends, offset)

    def first(self, begin: int) -> int:
        """Return the first of `ids` of the text from `begin` on; a prefix space on its own stays."""
        return self.before(begin) if begin else 0

    def needs_prefix(self, begin: int, scored: int) -> bool:
        """Return whether nothing comes before `scored`, where scoring begins, in the text from `begin` on."""
        return not self.head and self.before(scored) == self.first(begin)

    def length(self, begin: int, scored: int, end: int) -> int:
        """Return how many tokens a forward pass takes in for the text from `begin` to `end`, head included."""
        head = len(self.head) + self.needs_prefix(begin, scored)
        return head + self.before(end) - self.first(begin) - 1


def boundaries(texts: Sequence[MemberText | None]) -> list[int]:
    """Return the offsets of a text at which the tokens of all members that take part end, 0 first."""
    shared: set[int] | None = None
    for text in texts:
        if text is not None:
            own = {0, *text.ends}
            shared = own if shared is None else shared & own
    return sorted(shared or ())


class StretchPrompter:
    """Turns request strings into texts divided into stretches."""

    def __init__(self, ensemble: EnsembleBase) -> None:
        """Read the ensemble's members."""
        self.ensemble = ensemble
        self.members: tuple[Member, ...] = ensemble.active
        if ensemble.selective is not None and "skip_when" not in ensemble.counters.told:
            ensemble.counters.told.add("skip_when")
            log.warning(
                "skip_when=%s is about fused steps: it changes the texts that method=%s generates, and no score, which "
                "is one of stretches.",
                ensemble.selective.when,
                ensemble.config.method,
            )

    def span(self, context: str, continuation: str) -> StretchSpan:
        """Return the text of a loglikelihood request.

        A continuation that merges with the context into one token is scored from the last boundary before it, as the
        harness scores the merged token of a single model.

        Raises:
            RequestError: no member can spell the text, or has room for the continuation.
        """
        require_text(context, "the context")
        require_text(continuation, "the continuation")
        if isinstance(context, ChatPrompt):
            return self._after_conversation(context, continuation)
        stripped = context.rstrip()
        continuation = context[len(stripped) :] + continuation
        context, bos = self._strip_bos(stripped)
        texts = []
        for member in self.members:
            codec = member.codec
            head = codec.automatic_prefix if context else codec.prefix_ids
            if bos and codec.opening.bos:
                head = (codec.opening.bos[0],)
            texts.append(MemberText.of(member, context + continuation, head=head, opens=True))
        return self._fit(texts, len(context.encode()))

    def rolling(self, text: str) -> list[StretchSpan]:
        """Return the windows of a text; every stretch is scored in one of them, after one stretch of context.

        Raises:
            RequestError: no member can spell the text, or a stretch of it outgrows the window of every member.
        """
        require_text(text, "the text")
        texts = [MemberText.of(m, text, head=m.codec.prefix_ids, opens=True) for m in self.members]
        while True:
            bounds, windows, first = boundaries(texts), [], 0
            while first < len(bounds) - 1:
                begin, scored, stop = bounds[max(0, first - 1)], bounds[first], first + 1
                while stop + 1 < len(bounds) and not self._outgrown(texts, begin, scored, bounds[stop + 1]):
                    stop += 1
                if outgrown := self._outgrown(texts, begin, scored, bounds[stop]):
                    break
                windows.append(self._cut(texts, begin, bounds[first : stop + 1], 0))
                first = stop
            else:
                self._require(texts, len(text.encode()))
                return windows
            texts = [None if m in outgrown else own for m, own in enumerate(texts)]

    def _strip_bos(self, text: str) -> tuple[str, bool]:
        """Return a text without the literal of some member's BOS token at its start, and whether there was one."""
        for member in self.members:
            rest, stripped = member.codec.strip_bos(text)
            if stripped:
                return rest, True
        return text, False

    def _after_conversation(self, context: ChatPrompt, continuation: str) -> StretchSpan:
        """Return a continuation of a conversation, which every member reads in its own template.

        Templates differ in their bytes, so that a conversation is no evidence for the weights.
        """
        if context.continued:
            context, spaces = context.split_spaces()
            continuation = spaces + continuation
        fallback = self.ensemble.config.chat_fallback
        prompts = [
            member.conversation(context, fallback) if m else member.rendered_prompt(context)
            for m, member in enumerate(self.members)
        ]
        pairs = zip(self.members, prompts, strict=True)
        texts = [
            MemberText.of(member, continuation, head=prompt.ids, opens=False) if prompt.spelt else None
            for member, prompt in pairs
        ]
        return self._fit(texts, 0)

    def _fit(self, texts: Sequence[MemberText | None], size: int) -> StretchSpan:
        """Return a text that is scored from the last boundary in its first `size` bytes on.

        It is cut on the left, at a boundary, until the window of every member holds it. A member whose window does
        not even hold what is scored abstains.
        """
        bounds = boundaries(texts)
        self._require(texts, size)
        start = max(offset for offset in bounds if offset <= size)
        outgrown = self._outgrown(texts, start, start, bounds[-1])
        if outgrown:
            return self._fit([None if m in outgrown else own for m, own in enumerate(texts)], size)
        begin = next(offset for offset in bounds if not self._outgrown(texts, offset, start, bounds[-1]))
        inside = [offset for offset in bounds if offset >= begin]
        at = inside.index(start)
        # A member without a BOS cannot score what comes first, so that the first stretch is no evidence.
        skipped = min(at, 1)
        return self._cut(texts, begin, inside[skipped:], at - skipped)

    def _outgrown(self, texts: Sequence[MemberText | None], begin: int, scored: int, end: int) -> set[int]:
        """Return the members whose windows are too short for a text from `begin` to `end`, scored from `scored` on."""
        return {
            m
            for m, (member, own) in enumerate(zip(self.members, texts, strict=True))
            if own is not None and own.length(begin, scored, end) > member.max_length
        }

    def _require(self, texts: Sequence[MemberText | None], size: int) -> None:
        if all(own is None for own in texts):
            raise RequestError(
                "no member can answer: each of them either cannot spell the text or has no room in its window for what "
                f"follows the first {size} bytes. Raise max_length, or score the text with loglikelihood_rolling."
            )

    def _cut(self, texts: Sequence[MemberText | None], begin: int, bounds: Sequence[int], evidence: int) -> StretchSpan:
        """Return the span that begins at the boundary `begin` and has stretches between `bounds`."""
        paths: list[tuple[int, ...] | None] = []
        cuts: list[tuple[int, ...]] = []
        for member, own in zip(self.members, texts, strict=True):
            if own is None:
                paths.append(None)
                cuts.append(())
                continue
            first = own.first(begin)
            head = member.codec.prefix_ids if own.needs_prefix(begin, bounds[0]) else own.head
            paths.append(head + own.ids[first : own.before(bounds[-1])])
            cuts.append(tuple(len(head) + own.before(offset) - first for offset in bounds))
        return StretchSpan(tuple(paths), tuple(cuts), evidence)


@dataclass(frozen=True, eq=False)
class StretchReading:
    """What the members make of a text."""

    # each member's natural-log probability of every stretch [P, M, S], fp64, at each of P powers of its distributions;
    # -inf where it abstains
    logp: Tensor
    greedy: Tensor  # whether a member would have chosen all of its tokens in a stretch [M, S] (bool)
    present: Tensor  # the members that do not abstain [M] (bool)
    evidence: int = 0  # how many of the stretches are part of the prompt


def read_stretches(
    members: Sequence[Member], spans: Sequence[StretchSpan], nodes: int, powers: Sequence[float] = (1.0,)
) -> Iterator[tuple[int, StretchReading]]:
    """Read texts by every member, at some powers of its distributions; texts with a common beginning share it.

    Yields:
        The index of a text and what was read, as soon as its round is done.
    """
    walkers = [member.runner.walker(nodes) for member in members]
    # Rounds follow one member's tokens, whatever the order of the members: each of them then forwards the same batches,
    # and not even rounding depends on the order.
    first = min(range(len(members)), key=lambda m: [str(part) for part in members[m].codec.identity[:2]])
    firsts = [span.paths[first] or () for span in spans]
    for indices in rounds(firsts, [0] * len(spans), FORWARDS_PER_ROUND * nodes):
        chosen = [spans[i] for i in indices]
        columns = [_read(member, m, walkers[m], chosen, powers) for m, member in enumerate(members)]
        for i, span, *own in zip(indices, chosen, *columns, strict=True):
            logp, greedy = torch.stack([values for values, _ in own], dim=1), torch.stack([same for _, same in own])
            present = torch.tensor([path is not None for path in span.paths])
            yield i, StretchReading(logp, greedy, present, span.evidence)


def weigh(experts: Experts, reading: StretchReading) -> StretchScore:
    """Return the score of a text: of every stretch the weighted mean of the members' probabilities.

    The posterior of the experts is updated after every stretch; where weights are constant there is one expert.
    """
    prompt = reading.evidence
    weights = experts.among(reading.present[None])[0]  # [K, M]
    by_expert = torch.logsumexp(weights.log()[:, :, None] + reading.logp[experts.places_of_powers()], dim=1)  # [K, S]
    log_posterior, values = posteriors(experts.begun(by_expert[:, :prompt]), by_expert[:, prompt:])
    in_force = log_posterior[:-1].exp() @ weights  # [S, M]
    chosen = (in_force * reading.greedy.T[prompt:]).sum(1) > 0.5
    mean = in_force.mean(0) if len(in_force) else weights.mean(0)
    return StretchScore(tuple(values.tolist()), bool(chosen.all()), tuple(mean.tolist()))


def weighed(ensemble: EnsembleBase, reading: StretchReading) -> StretchScore:
    """Return the score of a text that an ensemble has read by stretches, and count it."""
    score = weigh(ensemble.experts, reading)
    ensemble.counters.record_stretches(score.weights, len(score.logp), reading.present.tolist())
    return score


def joined(readings: Sequence[StretchReading]) -> StretchReading:
    """Return the windows of one text as one reading."""
    logp, greedy = (torch.cat([getattr(part, name) for part in readings], dim=-1) for name in ("logp", "greedy"))
    return StretchReading(logp, greedy, readings[0].present, readings[0].evidence)


def with_evidence(span: StretchSpan, last: int) -> StretchSpan:
    """Return a text with the last stretches of its prompt alone."""
    kept = min(span.evidence, last)
    return replace(span, cuts=tuple(own[span.evidence - kept :] for own in span.cuts), evidence=kept)


def _read(
    member: Member, m: int, walker: Walker, spans: Sequence[StretchSpan], powers: Sequence[float]
) -> list[tuple[Tensor, Tensor]]:
    """Return what one member makes of every text.

    Returns:
        Per text, the natural-log probability of every stretch at every power [P, S] (fp64), and whether the member
        would have chosen all of its tokens [S] (bool); -inf and False where the member abstains.
    """
    tree = TokenTree()
    ways: list[list[int]] = []  # per text, the node before each of its tokens from the first boundary on
    targets: dict[int, dict[int, tuple[list[float], bool]]] = {}
    for span in spans:
        path, cuts = span.paths[m], span.cuts[m]
        if path is None or cuts[0] == len(path):  # nothing of it is read
            ways.append([])
            continue
        way = list(tree.way_up(tree.add(path[:-1])))[::-1]
        ways.append(way[cuts[0] - 1 :])
        for node, token in zip(ways[-1], path[cuts[0] :], strict=True):
            targets.setdefault(node, {})[token] = ([], False)
    read = list(targets)
    if read:
        states = walker.read(tree, read)
        step = max(1, LOGITS_PER_CHUNK // member.vocab_size)
        for start in range(0, len(read), step):
            _look_up(member, member.logp(states[start : start + step]), read[start : start + step], targets, powers)
    scores = []
    for span, way in zip(spans, ways, strict=True):
        path, cuts = span.paths[m], span.cuts[m]
        if path is None:
            count = max(len(own) for own in span.cuts) - 1
            nothing = torch.full((len(powers), count), -torch.inf, dtype=torch.float64)
            scores.append((nothing, torch.zeros(count, dtype=torch.bool)))
            continue
        tokens = [targets[node][token] for node, token in zip(way, path[cuts[0] :], strict=True)]
        parts = [tokens[a - cuts[0] : b - cuts[0]] for a, b in zip(cuts, cuts[1:], strict=False)]
        sums = [[math.fsum(values[p] for values, _ in part) for part in parts] for p in range(len(powers))]
        logp = torch.tensor(sums, dtype=torch.float64).reshape(len(powers), len(parts))
        scores.append((logp, torch.tensor([all(same for _, same in part) for part in parts], dtype=torch.bool)))
    return scores


def _look_up(
    member: Member,
    logp: Tensor,
    nodes: Sequence[int],
    targets: dict[int, dict[int, tuple[list[float], bool]]],
    powers: Sequence[float],
) -> None:
    """Read the log-probabilities of targets at every power off rows [n, V], and whether each is the likeliest piece."""
    pieces = member.codec.vocab.pieces
    pairs = [(row, token) for row, node in enumerate(nodes) for token in targets[node]]
    index = torch.tensor(pairs, device=logp.device)
    own = logp[index[:, 0], index[:, 1]]
    columns = []
    for power in powers:
        totals = 0.0 if power == 1 else torch.logsumexp(power * logp, dim=1)[index[:, 0]]
        columns.append((power * own - totals).tolist())
    best = argmax(logp).tolist()
    for value, (row, token) in zip(map(list, zip(*columns, strict=True)), pairs, strict=True):
        same = best[row] == token or (bool(pieces[token]) and pieces[best[row]] == pieces[token])
        targets[nodes[row]][token] = (value, same)
