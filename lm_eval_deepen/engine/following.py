"""Texts that are being generated, and one member taking them in: prompts prefilled as a tree, then a cache row each."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lm_eval_deepen.engine.base import EnsembleBase
from lm_eval_deepen.engine.covers import Plan
from lm_eval_deepen.engine.evidence import Read
from lm_eval_deepen.engine.prompt_loss import LOGITS_PER_CHUNK, numbered, places_of, prompt_losses
from lm_eval_deepen.engine.steps import Step
from lm_eval_deepen.member import Prompt
from lm_eval_deepen.member.cursor import TextCursor
from lm_eval_deepen.member.generation import Sampler
from lm_eval_deepen.member.kv_cache import Prefilled
from lm_eval_deepen.member.tree import TokenTree
from lm_eval_deepen.weighting.base import PromptLoss

TokenPrefix = tuple[int, ...]
# of every row, the token prefixes that are read, each of which begins with the one before; None where a member abstains
Routes = Sequence[Sequence[TokenPrefix | None]]


@dataclass(frozen=True)
class Job:
    """One text to generate."""

    prompts: tuple[Prompt, ...]  # one per active member, the main member first
    max_new: int  # most tokens of the main member to generate
    stops: tuple[str, ...] = ()  # strings that end the text
    sampler: Sampler = Sampler()  # how tokens are chosen
    generator: torch.Generator | None = None  # the row's own source of randomness, None for greedy decoding
    # the source of whose turn it is, where members take turns; the same for first samples of all prompts, for second
    # ones, and so on, so that the texts of a batch need the same member at a time
    turns: torch.Generator | None = None
    prefix_space: bool = False  # whether a space that begins the text is the main tokenizer's prefix space
    ends: frozenset[int] | None = None  # token ids that end the text; None for the main member's
    traced: bool = False  # whether the text comes with its steps


@dataclass
class Generation:
    """A finished text."""

    # the pieces chosen, the end-of-text token not included; those below the main member's vocabulary size are its
    # tokens, others are of the union vocabulary
    ids: list[int] = field(default_factory=list)
    data: bytes = b""  # their bytes; none where one member ran alone
    # fused natural-log probability of each piece that was chosen; NaN where members took turns
    logp: list[float] = field(default_factory=list)
    reason: str = ""  # ``eos``, ``stop`` or ``length``; ``refused`` where it could not be finished
    end: int | None = None  # the end-of-text token that was chosen, if one was
    refusal: str = ""  # why it could not be finished
    # what every member said at each of its pieces, and at its end of text, where that was asked for
    steps: list[Step] = field(default_factory=list)


class Follower:
    """One member following the rows of a batch."""

    def __init__(self, ensemble: EnsembleBase, m: int, first: Sequence[Prompt] = ()) -> None:
        """Follow with active member `m`; `first`: its prompts of the texts that begin together."""
        self.ensemble, self.m = ensemble, m
        self.member = ensemble.active[m]
        self.walker = self.member.runner.walker()
        self.cache = self.member.runner.rows(len(first), max((len(prompt.ids) for prompt in first), default=0))
        self.ready: deque[Prefilled] = deque()
        self.held: list[TokenPrefix] = []  # the tokens that each row took in last
        # distributions [V_m] of the last step, which covers may read in the next one
        self.kept: dict[TokenPrefix, Tensor] = {}

    def prefill(
        self,
        prompts: Sequence[Prompt],
        wanted: Sequence[Sequence[Read] | None] | None = None,
        then: Prompt | None = None,
    ) -> list[PromptLoss | None]:
        """Forward prompts, whose common beginnings are forwarded once, and keep them ready.

        Args:
            prompts: this member's. Where it cannot take one in, next to nothing stands in its place.
            wanted: its tokens of every prompt that are evidence (see `evidence`); None where weights do not depend on
                prompts, and nothing is returned.
            then: the prompt after these, which may begin like the last one; None where there is none.
        """
        paths = [self.ensemble.path(self.m, prompt, (), b"") or self.member.idle for prompt in prompts]
        tree, ends = TokenTree.of(paths)
        places = places_of(tree, prompts, wanted or [None] * len(prompts))
        at = numbered(node for own in places for node, _ in own or ())
        texts, states = self.walker.prefill(tree, ends, list(at))
        self.walker.forget(then.ids if then is not None else ())
        self.ready.extend(texts)
        if wanted is None:
            return []
        step = max(1, LOGITS_PER_CHUNK // self.member.vocab_size)
        powers = self.ensemble.experts.powers if self.ensemble.learns else (1.0,)
        return prompt_losses(self.member, places, states, at, step, powers)

    def admit(self, places: Sequence[int]) -> None:
        """Put the first prompts that are ready into these rows; a row behind the last one is new."""
        texts = [self.ready.popleft() for _ in places]
        self.cache.admit(texts, places)
        for at, text in zip(places, texts, strict=True):
            self.held[at : at + 1] = [text.tokens]

    def states(self, routes: Routes) -> Tensor:
        """Return the states [n, ...] at the ends of every row's paths; a member that abstains stays where it was."""
        sequences, reads = [], []
        for at, route in enumerate(routes):
            paths = [self.held[at] if path is None else path for path in route]
            self.held[at] = paths[-1]
            sequences.append(paths[-1])
            reads.append([len(path) for path in paths])
        return self.cache.advance(sequences, reads)

    def follow(self, routes: Routes) -> Tensor:
        """Return log-probabilities [n, V_m] at the ends of every row's paths; see `states`."""
        return self.member.logp(self.states(routes)).to(self.ensemble.device)

    def follow_covered(self, routes: Routes, plans: Sequence[Sequence[Plan | None]]) -> Tensor:
        """Return what comes next [n, V_m] in this member's pieces, the covers of `plans` counted; see `states`."""
        detours = self._detours(routes, plans)
        sequences, reads, ends = [], [], []
        for at, (route, own) in enumerate(zip(routes, plans, strict=True)):
            paths = [self.held[at] if path is None else path for path in route]
            self.held[at] = paths[-1]
            sequences.append(paths[-1])
            ends.append(paths)
            sources = _sources(own) - self.kept.keys() - detours.keys()
            reads.append(sorted({len(path) for path in paths} | {len(source) for source in sources}))
        states = self.cache.advance(sequences, reads)
        at_path = {pair: n for n, pair in enumerate((row, size) for row, sizes in enumerate(reads) for size in sizes)}
        logp = self.member.logp(states).to(self.ensemble.device)
        here = {sequences[row][:length]: logp[n] for (row, length), n in at_path.items()}
        known = self.kept | detours | here
        order = [at_path[row, len(path)] for row, paths in enumerate(ends) for path in paths]
        flat = [plan for own in plans for plan in own]
        out = self.ensemble.covers[self.m].rows(logp[order], flat, known.__getitem__)
        read = _sources(flat)
        latest = {path for paths in ends for path in paths}
        # a view would keep the rows of the whole step
        self.kept = {path: row.clone() if path in here else row for path, row in known.items() if path in read | latest}
        return out

    def _detours(self, routes: Routes, plans: Sequence[Sequence[Plan | None]]) -> dict[TokenPrefix, Tensor]:
        """Return the distributions [V_m] that covers read off the ways of the rows' own paths."""
        beside: dict[TokenPrefix, Tensor] = {}
        while True:
            sequences = list(self.held)
            for at, (route, own) in enumerate(zip(routes, plans, strict=True)):
                last = next((path for path in reversed(route) if path is not None), self.held[at])
                off = _sources(own) - self.kept.keys() - beside.keys()
                sequences[at] = min((source for source in off if last[: len(source)] != source), default=self.held[at])
            if sequences == self.held:
                return beside
            logp = self.member.logp(self.cache.advance(sequences)).to(self.ensemble.device)
            beside |= {path: row for path, row, held in zip(sequences, logp, self.held, strict=True) if path != held}
            self.held = sequences

    def logits(self, routes: Routes) -> Tensor:
        """Return logits [n, V_m] at the ends of every row's paths; see `states`."""
        return self.member.logits(self.states(routes)).to(self.ensemble.device)

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these rows."""
        if rows:
            self.cache.keep(rows)
        self.held = [self.held[row] for row in rows]


def _sources(plans: Sequence[Plan | None]) -> set[TokenPrefix]:
    return {cover.source for plan in plans if plan is not None for cover in plan.covers}


class GrowingPaths:
    """Every active member's tokens of one job's text: what `path_of` gives, reading again no more than a word."""

    def __init__(self, ensemble: EnsembleBase, job: Job) -> None:
        self.ensemble, self.job = ensemble, job
        self.text = b""  # what was taken in
        self.cursors: dict[int, TextCursor] = {}  # behind it, of members whose tokens follow from bytes

    def grow(self, data: bytes) -> None:
        """Take in a text, which begins with the one before, from the bytes of the main member's pieces."""
        text = text_after(self.job, data)
        if len(text) == len(self.text):
            return
        if not self.text:
            self.cursors = {}  # a prompt may end differently before the text that has begun
        for cursor in self.cursors.values():
            cursor.take(text[len(self.text) :])
        self.text = text

    def paths(self, ids: TokenPrefix, data: bytes) -> tuple[TokenPrefix | None, ...]:
        """Return every member's tokens for its prompt and a text that begins with what was taken in."""
        own = self.ensemble.is_own(ids)
        text = b"" if len(self.ensemble.active) == 1 else text_after(self.job, data)
        paths: list[TokenPrefix | None] = []
        for m, member in enumerate(self.ensemble.active):
            begins = bool(text) and not self.text  # by a draft: the prompt before it may end differently
            if begins or member.generates_only or (own and m in self.ensemble.siblings):
                paths.append(path_of(self.ensemble, m, self.job, ids, data))
                continue
            if m not in self.cursors:
                self.cursors[m] = TextCursor(member.codec, self.job.prompts[m].before(self.text))
                self.cursors[m].take(self.text)
            cursor = self.cursors[m]
            end = cursor.end(text[len(self.text) :])
            path = None if end is None else (*cursor.fixed[: end[0]], *end[1])
            paths.append(path if path is not None and member.fits(path) else None)
        return tuple(paths)


@dataclass
class BatchRow:
    """A text that is being written."""

    index: int  # of its job
    job: Job  # what to generate
    out: Generation = field(default_factory=Generation)  # the continuation so far
    # its members' weights [M]; the experts' log posterior [K] where weights learn from the text
    weights: Tensor | None = None
    paths: GrowingPaths | None = None  # its members' tokens while it grows


def path_of(ensemble: EnsembleBase, m: int, job: Job, ids: TokenPrefix, data: bytes) -> TokenPrefix | None:
    """Return the tokens of active member `m` for a job's prompt and its text so far, as `Ensemble.path`."""
    text = text_after(job, data)
    return ensemble.path(m, job.prompts[m].before(text), ids, text)


def text_after(job: Job, data: bytes) -> bytes:
    """Return the text that stands after a job's prompt, from the bytes of the main member's pieces."""
    return data[1:] if job.prefix_space and data[:1] == b" " else data


def piece_of(ensemble: EnsembleBase, token: int) -> bytes:
    """Return the bytes of a chosen piece; none where one member runs alone, which needs no bytes."""
    return b"" if ensemble.fuser is None else ensemble.fuser.out_vocab.pieces[token]


def text_of(ensemble: EnsembleBase, ids: Sequence[int], data: bytes) -> str:
    """Return a text so far as the main member decodes its tokens; from bytes where a piece is not one of its own."""
    if ensemble.is_own(ids):
        return ensemble.main.lm.tok_decode(ids, skip_special_tokens=False)
    return text_of_bytes(ensemble, data)


def text_of_bytes(ensemble: EnsembleBase, data: bytes) -> str:
    """Return a text with a piece that the main member lacks, without a first space where its decoder drops that."""
    main = ensemble.main
    if data[:1] == b" " and not main.lm.tok_decode(main.codec.encode(" "), skip_special_tokens=False):
        data = data[1:]
    return data.decode(errors="replace")
