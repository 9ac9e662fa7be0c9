"""Bits per byte: one pass of the members over some documents, which then answers for any fusion of them.

Kept are states, not distributions: n x d numbers. Logits are computed again, in chunks, for all the variants that
are asked for at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from lm_eval_deepen.engine.covers import Plan
from lm_eval_deepen.engine.ensemble import Ensemble
from lm_eval_deepen.engine.places import Place, places
from lm_eval_deepen.engine.prompt_loss import LOGITS_PER_CHUNK, numbered
from lm_eval_deepen.engine.prompts import Prompter
from lm_eval_deepen.engine.stretches import StretchPrompter, joined, read_stretches, weigh, with_evidence
from lm_eval_deepen.engine.trace import Trace
from lm_eval_deepen.engine.windows import rolling_spans
from lm_eval_deepen.errors import RequestError
from lm_eval_deepen.member.runner import NODES_PER_FORWARD
from lm_eval_deepen.member.tree import TokenTree
from lm_eval_deepen.weighting.experts import posteriors

SHOWN = 20  # documents that an error lists


@dataclass(frozen=True)
class Document:
    """A text to predict, and what it follows."""

    text: str  # what is predicted
    context: str = ""  # what comes before it; conditioned on alone

    @property
    def num_bytes(self) -> int:
        """Length of the text in UTF-8."""
        return len(self.text.encode())


@dataclass(frozen=True)
class Variant:
    """An ensemble of the same members in the same order, and the temperature of each of them."""

    ensemble: Ensemble
    temperatures: tuple[float, ...]

    @classmethod
    def of(cls, ensemble: Ensemble) -> Variant:
        """Return the ensemble as it is configured, with a trace of its own."""
        return cls(quiet(ensemble), tuple(member.config.temperature for member in ensemble.members))


def quiet(ensemble: Ensemble) -> Ensemble:
    """Return the ensemble with a trace of its own: what is measured is not counted as evaluated."""
    return replace(ensemble, counters=Trace([member.name for member in ensemble.members]))


@dataclass(frozen=True)
class Position:
    """A token that is scored."""

    document: int  # index of its document
    target: int  # the main member's token
    left: int  # bytes of the document after it
    place: Place  # where it is, in every member's tree of token prefixes
    # every member's covers there, None where it has none (see `lm_eval_deepen.engine.covers`)
    plans: tuple[Plan | None, ...] = ()


@dataclass(frozen=True, eq=False)
class Reading:
    """The members' states at every scored token of some documents, cut as the main member cuts them."""

    ensemble: Ensemble  # the members, the main member first
    documents: tuple[Document, ...]  # what was read
    positions: tuple[Position, ...]  # the n scored tokens, in the order of the text
    trees: tuple[TokenTree, ...]  # every member's token prefixes
    states: tuple[Tensor, ...]  # every member's states [n_m, ...]
    # of every member, the row of `states` of each node that positions or their covers read
    rows: tuple[Mapping[int, int], ...]

    @classmethod
    def of(cls, ensemble: Ensemble, documents: Sequence[Document], members: int | None = None) -> Reading:
        """Read documents by the first so many members; control tokens are conditioned on, never scored.

        Raises:
            RequestError: an ensemble that does not fuse steps, weights that depend on prompts (with ``learn_from:
                prompt``, on the contexts that documents have), or a document without text.
        """
        ensemble.require_scoring()
        if len(ensemble.active) < 2:
            raise RequestError(
                "bits per byte compare members with their ensemble: give at least two members, not all weight on "
                "the main one, and a method that fuses steps."
            )
        if ensemble.reads_prompts and not ensemble.learns:
            raise RequestError(
                f"weighting {ensemble.config.weighting!r} depends on each request's prompt, which a text to predict "
                "has not. Measure with constant weights: leave weighting out."
            )
        if ensemble.reads_prompts and any(document.context for document in documents):
            raise RequestError(
                "learn_from 'prompt' begins with what a document's context teaches, which bits per byte do not read. "
                "Measure with learn_from=continuation, or documents without context."
            )
        trees = tuple(TokenTree() for _ in ensemble.active)
        positions = _positions(ensemble, documents, trees)
        states, rows = [], []
        for m, member in enumerate(ensemble.active[:members]):
            sources = [cover.source for p in positions if (plan := p.plans[m]) is not None for cover in plan.covers]
            at = numbered([*(p.place.nodes[m] for p in positions), *sources])
            states.append(member.runner.walker().read(trees[m], list(at)) if at else torch.empty(0))
            rows.append(at)
        return cls(ensemble, tuple(documents), tuple(positions), trees, tuple(states), tuple(rows))

    def logp(self, variants: Sequence[Variant]) -> Tensor:
        """Return the log-probability of every scored token under every variant [variants, n], in nats."""
        parts_of: list[list[Tensor]] = [[] for _ in variants]
        for part, raw, index, present, target in self._chunks():
            rows = len(part)
            everything = torch.arange(rows, device=target.device)
            cool: dict[tuple[int, float], Tensor] = {}  # by member and temperature: most variants share them
            covered: dict[tuple[int, float], Tensor] = {}
            for variant, parts in zip(variants, parts_of, strict=True):
                wanted = list(enumerate(variant.temperatures))
                for m, t in wanted:
                    if (m, t) not in cool:
                        cool[m, t] = cooled(raw[m], t)
                logp = [cool[key][:rows] for key in wanted]
                for m, reader in variant.ensemble.covers.items():
                    key = wanted[m]
                    if key not in covered:
                        plans = [self.positions[i].plans[m] for i in part]
                        rows_of = partial(look_up, cool[key], index[m])
                        covered[key] = reader.rows(logp[m].clone(), plans, rows_of)
                    logp[m] = covered[key]
                inside = variant.ensemble.inside(logp[0], (self.positions[i].place.last(self.trees) for i in part))
                if variant.ensemble.learns:  # what experts give does not depend on the weights, which are learnt below
                    parts.append(variant.ensemble.fuse_by_expert(logp, present, inside).at(everything, target).cpu())
                else:
                    parts.append(variant.ensemble.fuse(logp, present, inside=inside)[everything, target].cpu())
        pairs = zip(variants, map(torch.cat, parts_of), strict=True)
        return torch.stack([self._learnt(v.ensemble, part) if v.ensemble.learns else part for v, part in pairs])

    def _learnt(self, ensemble: Ensemble, by_expert: Tensor) -> Tensor:
        """Return the mixture's log-probability of every token [n] from the experts' [n, K], document by document."""
        owner = torch.tensor([p.document for p in self.positions])
        values = torch.empty(len(owner), dtype=torch.float64)
        for document in owner.unique().tolist():
            mine = owner == document
            values[mine] = posteriors(ensemble.experts.log_prior, by_expert[mine].T)[1]
        return values.float()

    def own_logp(self, temperatures: Sequence[float]) -> Tensor:
        """Return the main member's own log-probability of every token at every temperature [T, n], in nats."""
        parts = [
            torch.stack(
                [cooled(raw[0], t)[torch.arange(len(part), device=target.device), target] for t in temperatures]
            )
            for part, raw, _, _, target in self._chunks(members=1)
        ]
        return torch.cat(parts, dim=1).cpu()

    def bits(self, logp: Tensor) -> Tensor:
        """Return bits per document [..., D] (fp64) from log-probabilities of the tokens [..., n]."""
        owner = torch.tensor([p.document for p in self.positions])
        bits = torch.zeros(*logp.shape[:-1], len(self.documents), dtype=torch.float64)
        return bits.index_add_(-1, owner, -logp.double() / math.log(2))

    def _chunks(
        self, members: int | None = None
    ) -> Iterator[tuple[range, list[Tensor], list[dict[int, int]], Tensor, Tensor]]:
        """Yield b positions, log-probabilities at temperature 1, presence [b, M] and targets [b].

        A member's rows [b + s, V_m] are those of the positions, then s more at places that their covers read; which
        row is whose, by node, comes with them.
        """
        active = self.ensemble.active[:members]
        device = self.ensemble.device
        step = max(1, LOGITS_PER_CHUNK // sum(member.vocab_size for member in active))
        for start in range(0, len(self.positions), step):
            part = range(start, min(start + step, len(self.positions)))
            raw, present, index = [], [], []
            for m, member in enumerate(active):
                nodes = [self.positions[i].place.nodes[m] for i in part]
                present.append(torch.tensor([node is not None for node in nodes]))
                plans = [plan for i in part if (plan := self.positions[i].plans[m]) is not None]
                here = {node: at for at, node in enumerate(nodes) if node is not None}
                for source in (cover.source for plan in plans for cover in plan.covers):
                    if source not in here:
                        here[source] = len(nodes)
                        nodes.append(source)
                index.append(here)
                if len(self.states[m]):
                    rows = torch.tensor([0 if node is None else self.rows[m][node] for node in nodes])
                    raw.append(member.runner.logp(self.states[m][rows.to(self.states[m].device)], 1.0).to(device))
                else:  # it takes in no text of any document
                    raw.append(torch.full((len(part), member.vocab_size), -math.log(member.vocab_size), device=device))
            target = torch.tensor([self.positions[i].target for i in part], device=device)
            yield part, raw, index, torch.stack(present, dim=1).to(device), target


def ensemble_bits(reading: Reading, ensemble: Ensemble) -> Tensor:
    """Return bits per document [D] (fp64) of an ensemble of a reading's members, by the law that scores its requests.

    Where that is one of stretches, the documents are read again: each member's own tokens count.
    """
    if not ensemble.by_stretches:
        return reading.bits(reading.logp([Variant.of(ensemble)]))[0]
    prompter, experts = StretchPrompter(ensemble), ensemble.experts
    texts = [
        [prompter.span(document.context, document.text)] if document.context else prompter.rolling(document.text)
        for document in reading.documents
    ]
    spans = [with_evidence(span, ensemble.prompt_stretches or 0) for text in texts for span in text]
    readings = dict(read_stretches(ensemble.active, spans, NODES_PER_FORWARD, experts.powers))
    windows = iter(readings[at] for at in range(len(spans)))
    scores = [weigh(experts, joined([next(windows) for _ in text])) for text in texts]
    return torch.tensor([-score.total / math.log(2) for score in scores], dtype=torch.float64)


def look_up(rows: Tensor, index: Mapping[int, int], node: int) -> Tensor:
    """Return log-probabilities [V] at a node, off rows [b, V]."""
    return rows[index[node]]


def cooled(logp: Tensor, temperature: float) -> Tensor:
    """Return log-probabilities [b, V] at a temperature from those at 1."""
    return logp if temperature == 1 else torch.log_softmax(logp / temperature, dim=-1)


def _positions(ensemble: Ensemble, documents: Sequence[Document], trees: Sequence[TokenTree]) -> list[Position]:
    """Return the positions of all documents, or raise one RequestError that names every document without any."""
    prompter, pieces = Prompter(ensemble), ensemble.main.codec.vocab.pieces
    positions: list[Position] = []
    refused: list[str] = []
    for index, document in enumerate(documents):
        try:
            if not document.text.strip():
                raise RequestError("it has no text to predict; leave it out.")
            if document.context:
                spans = [prompter.span(document.context, document.text)]
            else:
                spans = rolling_spans(ensemble, document.text)
            left = sum(len(pieces[token]) for span in spans for token in span.target) - spans[0].skip
            for span in spans:
                for at, (token, place) in enumerate(zip(span.target, places(ensemble, span, trees), strict=True)):
                    left -= len(pieces[token]) - (span.skip if at == 0 and span is spans[0] else 0)
                    positions.append(Position(index, token, left, place))
        except RequestError as error:
            refused.append(f"document {index}: {error}")
    if refused:
        listed = [*refused[:SHOWN], *([f"and {len(refused) - SHOWN} more"] if len(refused) > SHOWN else [])]
        raise RequestError("\n  ".join([f"{len(refused)} of {len(documents)} documents cannot be read:", *listed]))
    # All places of texts come into the trees before those of covers, which may be beyond a text.
    covers = ensemble.covers.items()
    plans = [{m: p.place.plan(reader, trees, m) for m, reader in covers} for p in positions]
    return [
        replace(p, plans=tuple(own.get(m) for m in range(len(trees)))) for p, own in zip(positions, plans, strict=True)
    ]
