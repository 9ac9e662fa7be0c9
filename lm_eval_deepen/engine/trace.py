"""Counts what fusion does while it runs. It changes no result."""

from __future__ import annotations

from collections import Counter
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
        self.rows, self.sat_out, self.outgrown = Counter[str](), Counter[str](), Counter[str]()
        self.drafts, self.selected, self.words, self.turns = (Counter[str]() for _ in range(4))
        self.pooled, self.without_answer, self.stretched, self.sums = (Counter[str]() for _ in range(4))
        self.maxima: dict[str, float] = {}
        self.near_ties: list[dict[str, Any]] = []
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
        shares = {f"weight {name}": weight for name, weight in zip(self.names, weights, strict=True)}
        self.stretched.update({"texts": 1, "stretches": count, **shares})
        self.sat_out.update({name: int(not here) for name, here in zip(self.names, present, strict=True)})

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
            self.sat_out.update(dict(zip(self.names, (~_at(present, steps)).sum(dim=0).tolist(), strict=True)))

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
        """Count fused rows [B, K] of the vocabulary `out` beside the members' own distributions [B, V_m].

        A member that takes no part in a row (`here` [B, M]; None for all) agrees with nobody. Where other rows of a
        step were not fused, `rows` (bool) says which of it these are.
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
                    self.sums.update({key: total})

        self._count(count)

    @classmethod
    def total(cls, traces: Sequence[Trace]) -> Trace:
        """Return the sums over the processes of a run, which have the same members."""
        total = cls(traces[0].names)
        for trace in traces:
            for name, counts in vars(trace).items():
                if isinstance(counts, Counter):
                    getattr(total, name).update(counts)
            total.near_ties += trace.near_ties
            for key, value in trace.maxima.items():
                total.maxima[key] = max(value, total.maxima.get(key, value))
        return total

    def summary(self) -> dict[str, Any]:
        """Return the counts, and means over the fused rows, for the results file."""
        fused, requests, texts = self.rows["fused"], self.pooled["requests"], self.stretched["texts"]
        optional: dict[str, dict[str, Any]] = {
            "speculation": {**self.drafts, "near_ties": self.near_ties} if self.drafts else {},
            "selective": self.selected,
            "sampled_by_turns": self.turns,
            "proposals": self.words,
            "steps_beyond_context": self.outgrown,
        }
        if requests:
            means = {f"mean_{key}": total / requests for key, total in self.pooled.items() if key != "requests"}
            absent = {"without_answer_of": dict(self.without_answer)} if self.without_answer else {}
            optional["pooled"] = {"requests": int(requests), **means, **absent}
        if texts:
            weights = {name: self.stretched[f"weight {name}"] / texts for name in self.names}
            stretches = {"texts": int(texts), "stretches": int(self.stretched["stretches"]), "mean_weights": weights}
            optional["scored_by_stretches"] = stretches
        sums = {
            key if key.startswith(COUNT) else f"mean_{key}": int(total) if key.startswith(COUNT) else total / fused
            for key, total in sorted(self.sums.items() if fused else ())
        }
        return {
            **{name: dict(counts) for name, counts in optional.items() if counts},
            "steps_fused": fused,
            "steps_skipped": self.rows["skipped"],
            "steps_sat_out": {name: self.sat_out[name] for name in self.names},
            "argmax_differs_from_main": self.rows["argmax_changed"] / fused if fused else None,
            "members_agree": self.rows["members_agree"] / fused if fused else None,
            **dict(sorted(self.maxima.items())),
            **sums,
        }


def _at(rows: Tensor, index: Tensor | None) -> Tensor:
    """Return some of the rows [B, ...], None for all."""
    return rows if index is None else rows[index.to(rows.device)]
