"""Scores of continuations under the fused distribution.

The requests of a call form a tree of token prefixes per member; every node is forwarded once. Logits are
computed only where they are read, in chunks, and fused at once, so that no distribution is kept.
"""

from __future__ import annotations

import gc
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lm_eval_deepen.engine.base import EnsembleBase, FusionNotes
from lm_eval_deepen.engine.covers import Plan
from lm_eval_deepen.engine.evidence import evidence
from lm_eval_deepen.engine.places import Place, places
from lm_eval_deepen.engine.prompt_loss import LOGITS_PER_CHUNK, numbered, places_of, prompt_losses
from lm_eval_deepen.engine.prompts import Span
from lm_eval_deepen.engine.steps import Step, StepReader
from lm_eval_deepen.fusion._expert_rows import ExpertRows
from lm_eval_deepen.member import Member, Prompt
from lm_eval_deepen.member.tree import TokenTree, common_prefix
from lm_eval_deepen.member.walk import Walker
from lm_eval_deepen.relative.topk import argmax
from lm_eval_deepen.weighting.experts import posteriors

Reader = tuple[int, int, int]  # a span, a position in its target, the target token

FORWARDS_PER_ROUND = 8  # a kill loses the scores of at most a round


@dataclass
class SpanScore:
    """The score of one span."""

    logp: list[float] = field(default_factory=list)  # fused natural-log probability of every target token
    greedy: bool = True  # whether every target token's bytes are those of the most likely piece
    # natural-log probability that every expert gives the whole span [K]; where the weights learn
    by_expert: Tensor | None = None
    # what every member said at each target token, where the span is traced
    steps: dict[int, Step] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """The sum over the tokens, in nats."""
        return float(sum(self.logp))


@dataclass
class _Row:
    """One position to read, and who reads it."""

    place: Place
    prompts: int  # which of the round's prompts come before it, where weights depend on them
    readers: list[Reader] = field(default_factory=list)


class _Ledger:
    """What every expert of one ensemble gave to the tokens of some texts, for weights that learn.

    That does not depend on the posterior, so that tokens are looked up in any order and in any batch. The posterior at
    a place is the prior times what the experts gave to everything before it.
    """

    def __init__(self, priors: Mapping[int, Tensor], lengths: Mapping[int, int]) -> None:
        """Start with the log prior [K] and the number of tokens of every text."""
        self.priors = priors
        self.logp = {
            key: torch.zeros(count, len(priors[key]), dtype=torch.float64) for key, count in lengths.items()
        }  # [T, K] each
        self.latest = {key: (0, prior) for key, prior in priors.items()}  # a place, and the log posterior there

    def note(self, rows: ExpertRows, readers: Sequence[Sequence[Reader]]) -> None:
        """Look up the tokens that texts read off B rows under all experts: `readers` are those of every row."""
        wanted = [(at, reader) for at, own in enumerate(readers) for reader in own]
        index = torch.tensor([[at, token] for at, (_, _, token) in wanted])
        logp = rows.at(index[:, 0], index[:, 1]).cpu()  # [n, K]
        for values, (_, (key, position, _)) in zip(logp, wanted, strict=True):
            self.logp[key][position] = values

    def before(self, key: int, at: int) -> Tensor:
        """Return the log posterior [K] before token number `at` of a text, whose earlier tokens are noted."""
        done, log_posterior = self.latest[key]
        if at < done:
            done, log_posterior = 0, self.priors[key]
        if at > done:
            log_posterior = posteriors(log_posterior, self.logp[key][done:at].T)[0][-1]
        self.latest[key] = (at, log_posterior)
        return log_posterior

    def values(self, key: int) -> list[float]:
        """Return the mixture's natural-log probability of every token of a text."""
        return posteriors(self.priors[key], self.logp[key].T)[1].tolist()


def score(ensemble: EnsembleBase, spans: Sequence[Span], nodes: int) -> Iterator[tuple[int, SpanScore]]:
    """Score spans, those with a common beginning one after the other; a member forwards `nodes` tokens at once.

    Yields:
        The index of a span and its score, as soon as its round is done.
    """
    for index, (only,) in score_together([ensemble], spans, nodes):
        yield index, only


def score_together(
    ensembles: Sequence[EnsembleBase], spans: Sequence[Span], nodes: int
) -> Iterator[tuple[int, list[SpanScore]]]:
    """Score spans by several ensembles of the same active members, which share their forward passes and logits.

    Yields:
        The index of a span and its score by every ensemble, as soon as its round is done.
    """
    walkers = [member.runner.walker(nodes) for member in ensembles[0].active]
    firsts, further = [span.prompts[0].ids for span in spans], [len(span.target) for span in spans]
    for indices in rounds(firsts, further, FORWARDS_PER_ROUND * nodes):
        with _new_garbage_alone():
            trees = [TokenTree() for _ in walkers]
            rows, prompts = _rows(ensembles, spans, indices, trees)
            results = [{i: SpanScore([0.0] * len(spans[i].target)) for i in indices} for _ in ensembles]
            traced = {i for i in indices if spans[i].traced}
            _score_round(ensembles, walkers, trees, rows, prompts, results, traced)
        yield from ((i, [scores[i] for scores in results]) for i in indices)


@contextmanager
def _new_garbage_alone() -> Iterator[None]:
    """Let the search for cyclic garbage leave old objects alone: a long text has many, and each would be seen often."""
    before = gc.get_threshold()
    gc.set_threshold(before[0], before[1], 2**30)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _score_round(
    ensembles: Sequence[EnsembleBase],
    walkers: Sequence[Walker],
    trees: Sequence[TokenTree],
    rows: list[_Row],
    prompts: Sequence[tuple[Prompt, ...]],
    results: list[dict[int, SpanScore]],
    traced: set[int],
) -> None:
    members, device = ensembles[0].active, ensembles[0].device
    reads_prompts = any(ensemble.reads_prompts for ensemble in ensembles)
    prompts = prompts if reads_prompts else []
    lasts = [ensemble.prompt_stretches for ensemble in ensembles if ensemble.reads_prompts]
    last = None if None in lasts else max((n for n in lasts if n is not None), default=None)
    by_prompt = [evidence(ensembles[0], own, last) for own in prompts]
    covers = next((ensemble.covers for ensemble in ensembles if ensemble.covers), {})
    plans = {m: [row.place.plan(reader, trees, m) for row in rows] for m, reader in covers.items()}
    wanted = [
        places_of(tree, [own[m] for own in prompts], [reads[m] for reads in by_prompt]) for m, tree in enumerate(trees)
    ]
    nodes = [[row.place.nodes[m] for row in rows] for m in range(len(members))]
    given = zip(members, walkers, trees, nodes, wanted, strict=True)
    passes = [_Pass(*own, plans.get(m)) for m, own in enumerate(given)]
    step = max(1, LOGITS_PER_CHUNK // sum(member.vocab_size for member in members))
    bases: list[Sequence[Tensor] | None] = [None] * len(ensembles)  # the weights [M] under each of the prompts
    if prompts:
        columns = [prompt_losses(own.member, own.wanted, own.states, own.at, step) for own in passes]
        losses = list(zip(*columns, strict=True))
        bases = [list(e.prompt_weights(losses, e.experts)) if e.reads_prompts else None for e in ensembles]
    for ensemble in ensembles:
        ensemble.counters.record_outgrown([m for row in rows for m in row.place.outgrown])
    ledgers: list[_Ledger | None] = []
    for ensemble, base, result in zip(ensembles, bases, results, strict=True):
        if not ensemble.learns:
            ledgers.append(None)
            continue
        # spans start with the prior, or with what their prompts made of it
        priors: dict[int, Tensor] = dict.fromkeys(result, ensemble.experts.log_prior)
        if base is not None:
            for row in rows:
                priors |= {index: base[row.prompts] for index, _, _ in row.readers}
        ledgers.append(_Ledger(priors, {index: len(score.logp) for index, score in result.items()}))
    tracers = [StepReader(ensemble) for ensemble in ensembles]
    any_raw = not all(ensemble.covers for ensemble in ensembles)
    for start in range(0, len(rows), step):
        chunk = range(start, min(start + step, len(rows)))
        raw = [own.logp(chunk).to(device) for own in passes]
        covered = [
            covers[m].rows(own.clone() if any_raw else own, plans[m][start : chunk.stop], passes[m].look_up)
            if m in covers
            else own
            for m, own in enumerate(raw)
        ]
        present = torch.tensor([[own.nodes[i] is not None for own in passes] for i in chunk], device=device)
        here = rows[start : chunk.stop]
        seen = [(at, reader) for at, row in enumerate(here) for reader in row.readers if reader[0] in traced]
        for ensemble, base, ledger, result, tracer in zip(ensembles, bases, ledgers, results, tracers, strict=True):
            logp = covered if ensemble.covers else raw
            notes = FusionNotes() if seen else None
            inside = ensemble.inside(logp[0], (row.place.last(trees) for row in here))
            if ledger is None:
                weights = None if base is None else torch.stack([base[row.prompts] for row in here])
                fused = ensemble.fuse(logp, present, weights, notes, inside)
            else:
                by_expert = ensemble.fuse_by_expert(logp, present, inside)
                ledger.note(by_expert, [row.readers for row in here])
                # Rows with the same prompts and paths have the same bytes before them, whoever reads them.
                log_posterior = torch.stack([ledger.before(*row.readers[0][:2]) for row in here])
                fused = ensemble.mix(logp, by_expert, log_posterior, present, notes)
            _read(ensemble, fused, here, result)
            if notes is not None:
                targets = [target for _, (_, _, target) in seen]
                steps = tracer.read([at for at, _ in seen], targets, logp, present, fused, notes)
                for (_, (span, position, _)), one in zip(seen, steps, strict=True):
                    result[span].steps[position] = one
        for own in passes:
            own.done()
    for ledger, result in zip(ledgers, results, strict=True):
        if ledger is not None:
            for key, score in result.items():
                score.logp, score.by_expert = ledger.values(key), ledger.logp[key].sum(0)


def rounds(paths: Sequence[tuple[int, ...]], further: Sequence[int], size: int) -> Iterator[list[int]]:
    """Yield indices of texts whose trees have about `size` nodes in one member, sorted by its tokens.

    A walker goes on from the way it visited last, so that a beginning shared by two rounds is not forwarded again. The
    member's tokens of a text begin with its `paths`, and `further` ones are its own.
    """
    indices: list[int] = []
    nodes = 0
    before: tuple[int, ...] = ()
    for index in sorted(range(len(paths)), key=lambda index: paths[index]):
        added = len(paths[index]) - common_prefix(before, paths[index]) + further[index]
        if indices and nodes + added > size:
            yield indices
            indices, nodes = [], 0
        indices.append(index)
        nodes += added
        before = paths[index]
    if indices:
        yield indices


def _rows(
    ensembles: Sequence[EnsembleBase], spans: Sequence[Span], indices: Sequence[int], trees: Sequence[TokenTree]
) -> tuple[list[_Row], list[tuple[Prompt, ...]]]:
    """Return the distinct positions that spans read, told apart by their prompts where weights depend on these.

    Returns:
        The positions, whose tokens are added to the members' trees, and the prompts that tell them apart.
    """
    rows: dict[tuple, _Row] = {}
    by_prompt = any(ensemble.reads_prompts or ensemble.learns for ensemble in ensembles)
    covered = any(ensemble.covers for ensemble in ensembles)
    numbers: dict[tuple[Prompt, ...], int] = {}
    for index in indices:
        span = spans[index]
        number = numbers.setdefault(span.prompts, len(numbers)) if by_prompt and span.target else 0
        for at, (target, place) in enumerate(zip(span.target, places(ensembles[0], span, trees, covered), strict=True)):
            row = rows.setdefault((place.nodes, place.back, number), _Row(place, number))
            row.readers.append((index, at, target))
    return list(rows.values()), list(numbers)


class _Pass:
    """One member's pass over the rows of a round: a state for each node of its tree that is read."""

    def __init__(
        self,
        member: Member,
        walker: Walker,
        tree: TokenTree,
        nodes: Sequence[int | None],
        wanted: Sequence[Sequence[tuple[int, int]] | None],
        plans: Sequence[Plan | None] | None,
    ) -> None:
        self.member, self.nodes, self.wanted = member, nodes, wanted
        self.plans = plans or [None] * len(nodes)
        self.left = Counter(cover.source for plan in self.plans if plan is not None for cover in plan.covers)
        self.at = numbered([*self.nodes, *(node for own in wanted for node, _ in own or ()), *self.left])
        self.here: dict[int, Tensor] = {}  # the rows [V] of the chunk in hand
        self.kept: dict[int, Tensor] = {}  # rows of earlier chunks that covers of later ones read
        self.states = walker.read(tree, list(self.at)) if self.at else torch.empty(0)  # [n, ...]

    def logp(self, chunk: range) -> Tensor:
        """Return log-probabilities [B, V_m] for a chunk of rows; uniform where the member abstains."""
        nodes = [self.nodes[i] for i in chunk]
        own = [node for node in nodes if node is not None]
        # the places that covers of the chunk read and that are neither in it nor known from before
        plans = [plan for i in chunk if (plan := self.plans[i]) is not None]
        asked = dict.fromkeys(cover.source for plan in plans for cover in plan.covers)
        read = {*own, *self.kept}
        sources = [node for node in asked if node not in read]
        size = self.member.vocab_size
        if not own:
            return torch.full((len(nodes), size), -math.log(size), device=self.member.runner.device)
        rows = self.member.logp(self.states[[self.at[node] for node in (*own, *sources)]])
        if self.left:
            self.here = dict(zip([*own, *sources], rows, strict=True))
            self.left.subtract(cover.source for plan in plans for cover in plan.covers)
            self.kept |= {node: row.clone() for node, row in self.here.items() if self.left[node] > 0}
        if len(own) == len(nodes):
            return rows[: len(own)]
        logp = rows.new_full((len(nodes), size), -math.log(size))
        logp[[at for at, node in enumerate(nodes) if node is not None]] = rows[: len(own)]
        return logp

    def look_up(self, node: int) -> Tensor:
        """Return the log-probabilities [V_m] after a node, for a cover of the chunk in hand."""
        return self.here[node] if node in self.here else self.kept[node]

    def done(self) -> None:
        """Forget the rows of a chunk that covers of later ones do not read."""
        self.kept = {node: row for node, row in self.kept.items() if self.left[node] > 0}
        self.here = {}


def _read(ensemble: EnsembleBase, logp: Tensor, rows: Sequence[_Row], results: dict[int, SpanScore]) -> None:
    """Read the targets off fused rows [B, K]."""
    best = argmax(logp).tolist()
    readers = [(at, reader) for at, row in enumerate(rows) for reader in row.readers]
    index = torch.tensor([[at, target] for at, (_, _, target) in readers], device=logp.device)
    values = logp[index[:, 0], index[:, 1]].tolist()
    for value, (at, (span, position, target)) in zip(values, readers, strict=True):
        results[span].logp[position] = value
        results[span].greedy &= ensemble.same_piece(best[at], target)


def total(ensemble: EnsembleBase, windows: Sequence[SpanScore]) -> float:
    """Return the natural-log probability of a text from the scores of its windows; weights learn across them."""
    if not ensemble.learns:
        return float(sum(score.total for score in windows))
    evidence = torch.stack([score.by_expert for score in windows if score.by_expert is not None], dim=1)
    return float(posteriors(ensemble.experts.log_prior, evidence)[1].sum())
