"""Counts what fusion does while it runs. It changes no result."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lm_eval_deepen.engine.selective import identity
from lm_eval_deepen.relative.topk import argmax
from lm_eval_deepen.vocabulary import ByteVocab

# How a statistic of a fusion method is put together over rows, by the beginning of its name; others are averaged.
MAXIMUM, COUNT = "max_", "rows_"


class Trace:
    """Sums over the fused rows of a run.

    A row is one distribution that was read: a scored position or a decoding step. What follows a drafted token that
    fell is neither.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.rows: Counter[str] = Counter()
        self.sat_out: Counter[str] = Counter()
        self.outgrown: Counter[str] = Counter()
        self.sums: dict[str, float] = defaultdict(float)
        self.maxima: dict[str, float] = {}
        self.drafts: Counter[str] = Counter()
        self.near_ties: list[dict[str, Any]] = []
        self.pooled: Counter[str] = Counter()
        self.without_answer: Counter[str] = Counter()
        self.selected: Counter[str] = Counter()
        self.stretched: dict[str, float] = defaultdict(float)
        self.words: Counter[str] = Counter()
        self.turns: Counter[str] = Counter()
        self.told: set[str] = set()  # warnings that are given once
        self._held: list[Callable[[Tensor | None], None]] | None = None

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Count no row before `settle` tells which are steps."""
        self._held = []
        try:
            yield
        finally:
            self._held = None

    def settle(self, steps: Sequence[bool]) -> None:
        """Count those of the rows held [B] that are steps."""
        held, self._held = self._held or (), []
        index = None if all(steps) else torch.tensor(steps).nonzero()[:, 0]
        for count in held:
            count(index)

    def _count(self, count: Callable[[Tensor | None], None]) -> None:
        """Count rows, given the indices of those that are steps, or None for all; later where they are held."""
        if self._held is None:
            count(None)
        else:
            self._held.append(count)

    def record_skipped(self, left: Tensor) -> None:
        """Count rows [B] (bool) that were left to the main member."""
        self._count(lambda steps: self.rows.update(skipped=int(_at(left, steps).sum())))

    def record_drafts(self, counts: Counter[str], near_ties: Sequence[dict[str, Any]]) -> None:
        """Count the steps, blocks, drafted and accepted tokens of a call, and steps that rounding may decide."""
        self.drafts.update(counts)
        self.near_ties.extend(near_ties)

    def record_selected(self, skipped: Tensor, checked: Tensor, changed: Tensor) -> None:
        """Count rows [B] (bool) skipped by choice, fused to check, and where that changes the likeliest piece."""
        own = {"skipped": skipped, "checked": checked, "changed": changed}
        self._count(lambda steps: self.selected.update({key: int(_at(rows, steps).sum()) for key, rows in own.items()}))

    def record_stretches(self, weights: Sequence[float], count: int, present: Sequence[bool]) -> None:
        """Count a text that was scored by stretches: its members' mean weights, and who abstained."""
        self.stretched["texts"] += 1
        self.stretched["stretches"] += count
        for name, weight, here in zip(self.names, weights, present, strict=True):
            self.stretched[f"weight {name}"] += weight
            self.sat_out[name] += not here

    def record_proposals(self, count: int) -> None:
        """Count a place of a text at which the members made so many different proposals, and one was written."""
        self.words.update(written=1, proposed=count)

    def record_pooled(self, stats: dict[str, float], missing: Sequence[str] = ()) -> None:
        """Count a request whose answers were combined, and the members that gave none."""
        self.pooled.update({"requests": 1.0, **stats})
        self.without_answer.update(missing)

    def record_present(self, present: Tensor) -> None:
        """Count the members [B, M] that could not follow a row's bytes."""

        def count(steps: Tensor | None) -> None:
            for name, out in zip(self.names, (~_at(present, steps)).sum(dim=0).tolist(), strict=True):
                self.sat_out[name] += out

        self._count(count)

    def record_outgrown(self, members: Sequence[int]) -> None:
        """Count the members that abstain from a row each because the text does not fit into their contexts."""
        self.outgrown.update(self.names[m] for m in members)

    def record_fused(
        self,
        logp: Sequence[Tensor],
        vocabs: Sequence[ByteVocab],
        fused: Tensor,
        out: ByteVocab,
        stats: dict[str, Tensor],
        here: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> None:
        """Count fused rows [B, K] beside the members' own distributions [B, V_m].

        Args:
            logp: the members'.
            vocabs: their vocabularies.
            fused: what was made of them.
            out: its vocabulary.
            stats: of the method, one value a row.
            here: which members took part in each row [B, M] (bool); None for all. Others agree with nobody.
            rows: which rows of a step these are (bool), where others of it were not fused; None for all.
        """
        takes_part = [[True] * len(logp)] * len(fused) if here is None else here.tolist()
        own = [argmax(rows).tolist() for rows in logp]
        changed, agree = [], []
        for row, best in enumerate(argmax(fused).tolist()):
            pieces = [identity(vocab, ids[row]) for vocab, ids in zip(vocabs, own, strict=True)]
            changed.append(identity(out, best) != pieces[0])
            said = {piece for piece, took in zip(pieces, takes_part[row], strict=True) if took}
            agree.append(len(said) == 1)
        compared = torch.tensor([changed, agree], dtype=torch.bool)
        values = torch.stack(list(stats.values())).double() if stats else None
        places = None if rows is None else rows.nonzero()[:, 0].cpu()

        def count(steps: Tensor | None) -> None:
            if steps is not None and places is not None:
                steps = torch.isin(places, steps).nonzero()[:, 0]
            told = _at(compared.T, steps)
            differ, same = told.sum(0).tolist()
            self.rows.update(fused=len(told), argmax_changed=differ, members_agree=same)
            if values is None or not len(told):
                return
            kept = _at(values.T, steps)
            for key, total, most in zip(stats, kept.sum(0).tolist(), kept.amax(0).tolist(), strict=True):
                if key.startswith(MAXIMUM):
                    self.maxima[key] = max(most, self.maxima.get(key, most))
                else:
                    self.sums[key] += total

        self._count(count)

    @classmethod
    def total(cls, traces: Sequence[Trace]) -> Trace:
        """Return the sums over the processes of a run, which have the same members."""
        total = cls(traces[0].names)
        for trace in traces:
            total.rows.update(trace.rows)
            total.sat_out.update(trace.sat_out)
            total.outgrown.update(trace.outgrown)
            total.record_drafts(trace.drafts, trace.near_ties)
            total.pooled.update(trace.pooled)
            total.without_answer.update(trace.without_answer)
            total.selected.update(trace.selected)
            total.words.update(trace.words)
            total.turns.update(trace.turns)
            for key, value in trace.stretched.items():
                total.stretched[key] += value
            for key, value in trace.sums.items():
                total.sums[key] += value
            for key, value in trace.maxima.items():
                total.maxima[key] = max(value, total.maxima.get(key, value))
        return total

    def summary(self) -> dict[str, Any]:
        """Return the counts, and means over the fused rows, for the results file."""
        fused = self.rows["fused"]
        share = {key: self.rows[key] / fused if fused else None for key in ("argmax_changed", "members_agree")}
        drafts = {"speculation": {**self.drafts, "near_ties": self.near_ties}} if self.drafts else {}
        count = self.pooled["requests"]
        means = {f"mean_{key}": self.pooled[key] / count for key in self.pooled if key != "requests"} if count else {}
        absent = {"without_answer_of": dict(self.without_answer)} if self.without_answer else {}
        pooled = {"pooled": {"requests": int(count), **means, **absent}} if count else {}
        selected = {"selective": dict(self.selected)} if self.selected else {}
        turns = {"sampled_by_turns": dict(self.turns)} if self.turns else {}
        sums: dict[str, float] = {}
        for key, value in sorted(self.sums.items()) if fused else ():
            if key.startswith(COUNT):
                sums[key] = int(value)
            else:
                sums[f"mean_{key}"] = value / fused
        stretched: dict[str, Any] = {}
        if texts := self.stretched["texts"]:
            weights = {name: self.stretched[f"weight {name}"] / texts for name in self.names}
            stretched = {"texts": int(texts), "stretches": int(self.stretched["stretches"]), "mean_weights": weights}
        return {
            **drafts,
            **pooled,
            **selected,
            **turns,
            **({"scored_by_stretches": stretched} if stretched else {}),
            **({"proposals": dict(self.words)} if self.words else {}),
            "steps_fused": fused,
            "steps_skipped": self.rows["skipped"],
            "steps_sat_out": {name: self.sat_out[name] for name in self.names},
            **({"steps_beyond_context": dict(self.outgrown)} if self.outgrown else {}),
            "argmax_differs_from_main": share["argmax_changed"],
            "members_agree": share["members_agree"],
            **dict(sorted(self.maxima.items())),
            **sums,
        }


def _at(rows: Tensor, index: Tensor | None) -> Tensor:
    """Return some of the rows [B, ...], None for all."""
    return rows if index is None else rows[index.to(rows.device)]
