"""Scoring of the letter tasks (standard library only)."""

from collections.abc import Mapping, Sequence
from typing import Any


def score_letter(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """`process_results`: the one generated token is the letter of the right option."""
    return {"exact_match": float(results[0].strip() == doc["answer"])}
