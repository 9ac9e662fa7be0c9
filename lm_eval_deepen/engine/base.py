"""What every part of the engine asks of an ensemble: its members, their tokens, and one fused distribution a step.

`Ensemble` adds how it is loaded, and whole texts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lm_eval_deepen.config import EnsembleConfig
from lm_eval_deepen.engine.covers import CoverReader
from lm_eval_deepen.engine.selective import Selective, inside
from lm_eval_deepen.engine.trace import Trace
from lm_eval_deepen.errors import ConfigError, MemberError, RequestError
from lm_eval_deepen.fusion._events import Events
from lm_eval_deepen.fusion._expert_rows import ExpertRows, by_expert
from lm_eval_deepen.fusion.adafuse import AdaFuse
from lm_eval_deepen.fusion.base import Fuser
from lm_eval_deepen.member import Member, Prompt
from lm_eval_deepen.member.model_files import digests
from lm_eval_deepen.relative.topk import argmax
from lm_eval_deepen.vocabulary import ByteVocab
from lm_eval_deepen.weighting.base import PromptLoss, Weigher, checked
from lm_eval_deepen.weighting.bayes import Bayes, after_prompt
from lm_eval_deepen.weighting.experts import Experts

# Why a row is left to the main member.
ONE_MEMBER, ONE_WEIGHT, BY_METHOD = "one member", "all weight on the main member", "left by the method"


@dataclass
class FusionNotes:
    """What `EnsembleBase.fuse` did to B rows."""

    weights: Tensor = field(default_factory=lambda: torch.empty(0, 0))  # the members' weights in each row [B, M]
    # rows that were left to the main member [B] (bool), by the reason
    left: dict[str, Tensor] = field(default_factory=dict)

    def leave(self, reason: str, rows: Tensor) -> None:
        """Note that rows [B] (bool) are left for a reason; the first one counts."""
        self.left[reason] = rows & ~torch.stack(list(self.left.values())).any(0) if self.left else rows

    def reasons(self, count: int) -> list[str]:
        """Return why each of `count` rows was left, empty where it was fused."""
        told = [""] * count
        for reason, rows in self.left.items():
            for at in rows.nonzero()[:, 0].tolist():
                told[at] = reason
        return told


NORMALISED = 1e-3  # nats that a fused row may be off a sum of 1


@dataclass(eq=False)
class EnsembleBase:
    """Several members evaluated as one model."""

    config: EnsembleConfig  # what was asked for
    members: tuple[Member, ...]  # all members, the main member first
    fuser: Fuser | None  # None where fusion is skipped: one member, or all weight on the main member
    weights: Tensor  # one weight per member [M], fp32, sum 1
    counters: Trace  # what was counted while it ran
    weigher: Weigher | None = None  # what changes the weights by request or by step, None where they are constant
    selective: Selective | None = None  # which steps are left to the main member by choice, None where all are fused
    first_rows_checked: bool = False  # whether the first fused rows were seen to sum to 1

    @property
    def main(self) -> Member:
        """The member whose vocabulary is generated in."""
        return self.members[0]

    @property
    def active(self) -> tuple[Member, ...]:
        """The members that are run: all of them, or the main one where fusion is skipped."""
        return self.members if self.fuser else self.members[:1]

    @cached_property
    def vocabs(self) -> list[ByteVocab]:
        """What each member's tokens stand for."""
        return [member.codec.vocab.events for member in self.members]

    @cached_property
    def siblings(self) -> frozenset[int]:
        """Indices of active members with the main member's tokenizer: its tokens are their tokens."""
        if len(self.active) == 1:
            return frozenset({0})
        own = self.main.codec.identity
        return frozenset(m for m, member in enumerate(self.active) if member.codec.identity == own)

    def path(self, m: int, prompt: Prompt, main_ids: tuple[int, ...], data: bytes) -> tuple[int, ...] | None:
        """Return the tokens that active member `m` takes in; None where it abstains, as `outgrown` says why.

        A pure function of the text: whether a member abstains depends on no other text and on no step before.
        Arguments as `tokens`.
        """
        tokens = self.tokens(m, prompt, main_ids, data)
        return tokens if tokens is not None and (self.is_hf or self.active[m].fits(tokens)) else None

    def outgrown(self, m: int, prompt: Prompt, main_ids: tuple[int, ...], data: bytes) -> bool:
        """Return whether a text does not fit into the context of active member `m`; arguments as `tokens`."""
        tokens = self.tokens(m, prompt, main_ids, data)
        return tokens is not None and not self.active[m].fits(tokens)

    def tokens(self, m: int, prompt: Prompt, main_ids: tuple[int, ...], data: bytes) -> tuple[int, ...] | None:
        """Return the tokens of active member `m` for its prompt and the continuation after it, however many.

        The main member keeps the continuation as it was chosen, `main_ids`, for as long as all pieces are its own. The
        others encode its bytes `data` canonically: None where one cannot spell them.
        """
        if m in self.siblings and self.is_own(main_ids):
            return prompt.ids + main_ids
        return self.active[m].codec.follow(prompt, data)

    @property
    def is_hf(self) -> bool:
        """Whether one causal member runs alone, which answers as ``hf`` does."""
        return self.fuser is None and not self.main.generates_only

    def is_own(self, ids: Sequence[int]) -> bool:
        """Return whether chosen pieces are all of the main member, not of a union vocabulary."""
        return self.fuser is None or max(ids, default=0) < self.main.vocab_size

    def require_scoring(self) -> None:
        """Raise RequestError where a member, or the method, can score no given text, before anything is computed."""
        if self.by_words:
            raise RequestError(
                f"method={self.config.method} writes texts by words and has no probability of a given one, which "
                "loglikelihood and loglikelihood_rolling requests ask for. Evaluate tasks that generate, or choose "
                "another method; pooling=logp-mean ranks given texts as this method ranks words."
            )
        for member in self.active:
            if member.generates_only:
                raise RequestError(
                    f"member {member.name!r} is an encoder-decoder model, which takes part in generation only; "
                    "loglikelihood and loglikelihood_rolling requests have no answer from this ensemble. Evaluate "
                    "tasks that generate, or leave the member out."
                )

    @property
    def device(self) -> torch.device:
        """Where distributions are fused."""
        return self.main.runner.device

    @cached_property
    def experts(self) -> Experts:
        """The static ensembles that Bayes' rule weighs; with constant weights these alone.

        Where texts are scored by stretches, those of stretches are the experts of steps as well.
        """
        if not isinstance(self.weigher, Bayes):
            return Experts.static(self.weights)
        if self.by_stretches:
            return self.weigher.of_stretches(len(self.active))
        geometric = getattr(self.config.options, "HAS_GEOMETRIC", False)
        return self.weigher.of_steps(len(self.active), geometric=geometric)

    @cached_property
    def covers(self) -> dict[int, CoverReader]:
        """What reads the covers of each active member with a tokenizer of its own; empty with ``covers: off``."""
        if self.fuser is None or self.config.covers == "off" or self.main.generates_only:
            return {}
        codecs = [member.codec for member in self.active]
        return {
            m: CoverReader(codecs, m, member.max_length)
            for m, member in enumerate(self.active)
            if m not in self.siblings and not member.generates_only
        }

    @cached_property
    def turn_events(self) -> Events | None:
        """What members' tokens stand for, where steps are mixtures of the members' own distributions."""
        events: Callable[[], Events | None] = getattr(self.fuser, "events", lambda: None)
        return events()

    @property
    def learns(self) -> bool:
        """Whether the weights learn from the text itself."""
        return isinstance(self.weigher, Bayes)

    @property
    def by_stretches(self) -> bool:
        """Whether given texts are scored by stretches, without a main member."""
        return getattr(self.fuser, "by_stretches", False)

    @property
    def by_words(self) -> AdaFuse | None:
        """How texts are written by words; None where they are written by steps."""
        return getattr(self.fuser, "by_words", None)

    @property
    def reads_prompts(self) -> bool:
        """Whether a request's weights depend on its prompt."""
        return self.weigher is not None and self.weigher.reads_prompts

    @property
    def prompt_stretches(self) -> int | None:
        """How many of a prompt's last stretches its weights depend on; None for all of them."""
        if not isinstance(self.weigher, Bayes):
            return None
        return self.weigher.prompt_stretches if self.weigher.reads_prompts else 0

    def prompt_weights(self, losses: Sequence[Sequence[PromptLoss | None]], experts: Experts) -> Tensor:
        """Return the weights [R, M] of requests, from every active member's loss on their prompts.

        Where the ensemble `learns`, these are the log posteriors [R, K] of the `experts`. A member that cannot take in
        a prompt has no loss (None) and weight 0; the others' weights are those of the ensemble without it.
        """
        assert self.weigher is not None
        if self.learns:
            return torch.stack([after_prompt(experts, own) for own in losses])
        shares = torch.zeros(len(losses), len(self.active), dtype=self.weights.dtype)
        together: dict[tuple[int, ...], list[int]] = {}
        for row, own in enumerate(losses):
            together.setdefault(tuple(m for m, loss in enumerate(own) if loss is not None), []).append(row)
        for here, rows in together.items():
            known = [[loss for loss in losses[row] if loss is not None] for row in rows]
            configured = self.weights[list(here)]
            if len(here) < len(self.active) and configured.sum() > 0:
                configured = configured / configured.sum()
            given = self.weigher.prepare(known, configured)
            given = checked(str(self.config.weighting), given, shares.new_ones(len(rows), len(here)))
            shares[torch.tensor(rows)[:, None], torch.tensor(here)] = given.to(shares)
        return shares

    def inside(self, logp: Tensor, tokens: Iterable[Sequence[Sequence[int] | None]]) -> Tensor | None:
        """Return which members are inside one of their tokens [B, M] (bool); None where nothing asks for it.

        That is so where the main member's likeliest piece (of `logp` [B, V]) would be one token with bytes before it.
        `tokens` are, of every row, every active member's so far, or the last of them; None where it abstains.
        """
        if self.selective is None or self.selective.when != "safe":
            return None
        main = self.main.codec.vocab.events
        following = [b"" if token in main.eos else main.pieces[token] for token in argmax(logp).tolist()]
        # a member with the main member's tokenizer takes over its tokens
        others = [m for m in range(1, len(self.active)) if m not in self.siblings]
        is_inside = torch.zeros(len(logp), len(self.active), dtype=torch.bool)  # [B, M]
        for row, (own, more) in enumerate(zip(tokens, following, strict=True)):
            for m in others:
                if (path := own[m]) is not None:
                    is_inside[row, m] = inside(self.active[m].codec, path, more)
        return is_inside

    def fuse(
        self,
        logp: Sequence[Tensor],
        present: Tensor,
        base: Tensor | None = None,
        notes: FusionNotes | None = None,
        inside: Tensor | None = None,
    ) -> Tensor:
        """Return the ensemble's log-probabilities [B, K] from the active members' [B, V_m].

        Args:
            logp: one tensor per active member; a row of an absent member may hold anything finite.
            present: which members follow each row's bytes [B, M] (bool); the main member always does.
            base: the weights of each row's request [B, M]; by default the ensemble's.
            notes: where to note what was done, for a trace.
            inside: what `inside` gives.
        """
        if self.fuser is None:
            self.counters.record_skipped(torch.ones(len(logp[0]), dtype=torch.bool))
            if notes is not None:
                notes.weights = torch.ones(len(logp[0]), 1)
                notes.leave(ONE_MEMBER, torch.ones(len(logp[0]), dtype=torch.bool))
            return logp[0]
        self._check_rows(logp, present)
        weights = (self.weights if base is None else base).to(self.device) * present
        total = weights.sum(dim=1, keepdim=True)
        alone = torch.zeros_like(weights)
        alone[:, 0] = 1
        weights = torch.where(total > 0, weights / total.clamp_min(torch.finfo(total.dtype).tiny), alone)
        if self.weigher is not None and self.weigher.reads_steps:
            weights = checked(str(self.config.weighting), self.weigher.weights(logp, weights), weights)
        if notes is not None:
            notes.weights = weights
        with torch.inference_mode():
            left = self._skipped(self.fuser, logp, weights) | (weights[:, 0] == 1)
            if notes is not None:
                notes.leave(ONE_WEIGHT, weights[:, 0] == 1)
                notes.leave(BY_METHOD, left.clone())
            left |= (chosen := self._selected(logp, weights, ~left, inside))
            if notes is not None and self.selective is not None:
                notes.leave(f"skip_when={self.selective.when}", chosen)
            self.counters.record_skipped(left)
            if not bool(left.any()):
                return self._fused(self.fuser, logp, weights)
            out = logp[0].new_full((len(left), len(self.fuser.out_vocab)), -torch.inf)
            out[:, : logp[0].shape[1]] = logp[0]
            if not bool(left.all()):
                out[~left] = self._fused(self.fuser, [member[~left] for member in logp], weights[~left], ~left)
            return out

    def _check_rows(self, logp: Sequence[Tensor], present: Tensor) -> None:
        for member, rows in zip(self.members, logp, strict=True):
            check_row(member, rows)
        self.counters.record_present(present)

    def fuse_by_expert(self, logp: Sequence[Tensor], present: Tensor, inside: Tensor | None = None) -> ExpertRows:
        """Return rows under every expert; arguments as `fuse`. Only where the ensemble `learns`."""
        assert self.fuser is not None
        self._check_rows(logp, present)
        with torch.inference_mode():
            weights = self.experts.among(present).to(self.device)  # [B, K, M]
            mean = weights.mean(1).float()
            left = self._skipped(self.fuser, logp, mean)
            left |= self._selected(logp, mean, ~left, inside)
            some_left = left if bool(left.any()) else None
            return by_expert(self.fuser, logp, weights, self.experts, some_left, self._check_fused)

    def mix(
        self,
        logp: Sequence[Tensor],
        rows: ExpertRows,
        log_posterior: Tensor,
        present: Tensor,
        notes: FusionNotes | None = None,
    ) -> Tensor:
        """Return the mixture [B, K] of the experts under each row's log posterior, and count the rows.

        `rows` are what `fuse_by_expert` made of `logp`; the weights in the `notes` are the experts' mean.
        """
        assert self.fuser is not None
        with torch.inference_mode():
            fused = rows.mixed(log_posterior.to(self.device))
        left = getattr(rows, "left", None)
        if left is None:
            left = torch.zeros(len(log_posterior), dtype=torch.bool)
        if notes is not None:
            shares = log_posterior.double().exp().to(self.device)
            notes.weights = torch.einsum("bk,bkm->bm", shares, self.experts.among(present).to(self.device))
            notes.leave(ONE_WEIGHT, left & ~present[:, 1:].any(1).to(left.device))
            or_chosen = "" if self.selective is None else f", or skip_when={self.selective.when}"
            notes.leave(BY_METHOD + or_chosen, left)
        self.counters.record_skipped(left)
        if not bool(left.all()):
            kept = ~left if bool(left.any()) else slice(None)
            own, result = [member[kept] for member in logp], fused.logp[kept]
            self.counters.record_fused(
                own, self.vocabs, result, self.fuser.out_vocab, fused.stats, present[kept], ~left
            )
        return fused.logp

    def _selected(self, logp: Sequence[Tensor], weights: Tensor, fused: Tensor, inside: Tensor | None) -> Tensor:
        """Return which of the rows to be fused [B] are left to the main member by choice, and count them."""
        selective, fuser = self.selective, self.fuser
        if selective is None or fuser is None:
            return torch.zeros_like(fused)
        chosen = selective.rows(logp, weights, self.vocabs, inside) & fused
        changed = torch.zeros_like(chosen)
        if selective.check and bool(chosen.any()):
            own = [rows[chosen] for rows in logp]
            after = argmax(fuser.fuse(own, weights[chosen]).logp).tolist()
            pairs = zip(argmax(own[0]).tolist(), after, strict=True)
            other = [not self.same_piece(before, now) for before, now in pairs]
            changed[chosen] = torch.tensor(other, device=changed.device)
        self.counters.record_selected(chosen, chosen & selective.check, changed)
        return chosen

    def _skipped(self, fuser: Fuser, logp: Sequence[Tensor], weights: Tensor) -> Tensor:
        """Return the rows [B] (bool) that the method leaves to the main member."""
        left = fuser.skip(logp, weights)
        if left.dtype != torch.bool or left.shape != weights.shape[:1]:
            raise ConfigError(
                f"method={self.config.method} skips rows by a tensor of type {left.dtype} and shape "
                f"{tuple(left.shape)} for {len(weights)} rows; its skip must return torch.bool, one value for each row"
            )
        return left

    def _fused(self, fuser: Fuser, logp: Sequence[Tensor], weights: Tensor, rows: Tensor | None = None) -> Tensor:
        fused = fuser.fuse(logp, weights)
        self._check_fused(fused.logp, len(weights))
        self.counters.record_fused(logp, self.vocabs, fused.logp, fuser.out_vocab, fused.stats, weights > 0, rows)
        return fused.logp

    def _check_fused(self, logp: Tensor, count: int) -> None:
        """Raise ConfigError where a method gives other than `count` rows that sum to 1, which is asked of the first."""
        method = f"method={self.config.method} gives"
        shape = (count, len(self.pieces))
        if logp.shape != shape:
            got = tuple(logp.shape)
            raise ConfigError(f"{method} a tensor of {got} for {shape} rows and pieces of out_vocab; correct it")
        if logp.amax(dim=1).isnan().any():
            raise ConfigError(f"{method} log-probabilities that are no numbers; correct it")
        if not self.first_rows_checked:
            self.first_rows_checked = True
            off = float(torch.logsumexp(logp.double(), 1).abs().max())
            if not off < NORMALISED:
                raise ConfigError(f"{method} rows whose probabilities do not sum to 1 ({off:.3g} nats off); correct it")

    def same_piece(self, a: int, b: int) -> bool:
        """Return whether two ids of the fused distribution stand for the same text."""
        if a == b or self.fuser is None:
            return a == b
        pieces = self.fuser.out_vocab.pieces
        return bool(pieces[a]) and pieces[a] == pieces[b]

    @property
    def pieces(self) -> tuple[bytes, ...]:
        """The pieces [K] that fused distributions range over, as bytes; control pieces have none."""
        return self.main.codec.vocab.pieces if self.fuser is None else self.fuser.out_vocab.pieces

    def describe(self) -> dict[str, Any]:
        """Return members, fusion and counts for the results file."""
        described = [
            {
                "name": member.name,
                "pretrained": member.config.pretrained,
                "weight": member.config.weight,
                "revision": str(member.lm.revision),
                "files": digests([member.config]),
                "dtype": str(member.lm.model.dtype).removeprefix("torch."),
                "parameters": sum(p.numel() for p in member.lm.model.parameters()),
                "vocabulary": member.vocab_size,
                "max_length": member.max_length,
                "chat_template": member.has_chat_template,
            }
            for member in self.members
        ]
        # where pieces that the main member lacks share the normaliser
        is_bound = self.fuser is not None and len(self.fuser.out_vocab) > self.main.vocab_size
        return {
            "fingerprint": self.config.fingerprint(),
            "configuration": self.config.identity(),
            "method": self.config.method if self.fuser else "none (the main member alone)",
            "options": self.config.options_dict() if self.fuser else {},
            "weighting": self.config.weighting,
            "pooling": self.config.pooling,
            "members": described,
            **({"scores_are_lower_bounds": True} if is_bound else {}),
            **getattr(self.fuser, "facts", {}),
            **self.counters.summary(),
        }


def check_row(member: Member, logp: Tensor) -> None:
    """Raise MemberError where a member's log-probabilities [B, V_m] are no numbers."""
    if logp.amax(dim=1).isnan().any():  # NaN is larger than any number, and the maximum is vectorised
        raise MemberError(
            f"member {member.name!r} gave NaN log-probabilities. Load it in another dtype (float32 or bfloat16)."
        )
