"""Counts what fusion does while it runs. It changes no result."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
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

    A row is one distribution that was read: a scored position or a decoding step.
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

    def record_skipped(self, count: int) -> None:
        """Count rows that were left to the main member."""
        self.rows["skipped"] += count

    def record_drafts(self, counts: Counter[str], near_ties: Sequence[dict[str, Any]]) -> None:
        """Count the steps, blocks, drafted and accepted tokens of a call, and steps that rounding may decide."""
        self.drafts.update(counts)
        self.near_ties.extend(near_ties)

    def record_selected(self, skipped: int, checked: int, changed: int) -> None:
        """Count rows skipped by choice, those that were fused to check, and where that changes the likeliest piece."""
        self.selected.update(skipped=skipped, checked=checked, changed=changed)

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
        for name, out in zip(self.names, (~present).sum(dim=0).tolist(), strict=True):
            self.sat_out[name] += out

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
    ) -> None:
        """Count fused rows [B, K] beside the members' own distributions [B, V_m].

        Args:
            logp: the members'.
            vocabs: their vocabularies.
            fused: what was made of them.
            out: its vocabulary.
            stats: of the method, one value a row.
            here: which members took part in each row [B, M] (bool); None for all. Others agree with nobody.
        """
        takes_part = [[True] * len(logp)] * len(fused) if here is None else here.tolist()
        own = [argmax(rows).tolist() for rows in logp]
        chosen = argmax(fused).tolist()
        self.rows["fused"] += len(chosen)
        for row, best in enumerate(chosen):
            pieces = [identity(vocab, ids[row]) for vocab, ids in zip(vocabs, own, strict=True)]
            self.rows["argmax_changed"] += identity(out, best) != pieces[0]
            said = {piece for piece, took in zip(pieces, takes_part[row], strict=True) if took}
            self.rows["members_agree"] += len(said) == 1
        if not stats or not chosen:
            return
        values = torch.stack(list(stats.values())).double()
        for key, total, most in zip(stats, values.sum(1).tolist(), values.amax(1).tolist(), strict=True):
            if key.startswith(MAXIMUM):
                self.maxima[key] = max(most, self.maxima.get(key, most))
            else:
                self.sums[key] += total

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
