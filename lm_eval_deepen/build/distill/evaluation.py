"""Bits per byte of held-out documents, and the difference of two builds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from lm_eval_deepen.build.distill.corpus import Tokens
from lm_eval_deepen.build.distill.teacher_logits import check_length, nats_of
from lm_eval_deepen.errors import ResultError
from lm_eval_deepen.member import Member
from lm_eval_deepen.results.statistics.intervals import Interval, paired_interval


def bits_of(member: Member, documents: Sequence[Sequence[Tokens]]) -> list[float]:
    """Return bits per document [D]: the sum over its blocks, each read from its start."""
    for blocks in documents:
        check_length(member, blocks)
    bits = []
    for blocks in tqdm(documents, desc=f"held out, {member.name}", unit="document"):
        bits.append(sum(nats_of(member, block) for block in blocks) / math.log(2))
    return bits


def interval(first: Sequence[float], second: Sequence[float], num_bytes: Sequence[int]) -> Interval:
    """Return the difference in bits per byte, second less first, with its 95 % interval over documents."""
    sizes = np.array(num_bytes, dtype=np.float64)
    before, after = (np.column_stack([np.array(bits, dtype=np.float64), sizes]) for bits in (first, second))
    return paired_interval(before, after, statistic=lambda means: means[..., 0] / means[..., 1])


def facts(base: Sequence[float], bits: Sequence[float], num_bytes: Sequence[int]) -> dict[str, Any]:
    """Return what a build reports of the held-out documents: bits per byte before and after, and per document."""
    change = interval(base, bits, num_bytes)
    total = sum(num_bytes)
    return {
        "documents": len(num_bytes),
        "bytes": total,
        "bits_per_byte": sum(bits) / total,
        "base_bits_per_byte": sum(base) / total,
        "change": change.estimate,
        "interval": [change.low, change.high],
        "bits": list(bits),
        "document_bytes": list(num_bytes),
    }


def difference(first: Mapping[str, Any], second: Mapping[str, Any]) -> Interval:
    """Return how many bits per byte the second of two builds needs more than the first, on the same documents.

    Raises:
        ResultError: the builds held out different documents.
    """
    digests = [result["held_out"]["text_sha256"] for result in (first, second)]
    if digests[0] != digests[1]:
        raise ResultError(
            f"the builds held out different documents ({digests[0][:12]} and {digests[1][:12]}), which cannot be "
            "paired; build both with the same text, held_out and context_length"
        )
    own, other = (result["held_out"] for result in (first, second))
    return interval(own["bits"], other["bits"], own["document_bytes"])
