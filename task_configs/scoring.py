"""Answer scoring shared by the short-answer and arithmetic tasks of this folder (standard library only)."""

import re
import string
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
# "10-12" holds 10 and 12, not 10 and -12: a minus sign counts only where no word or bracket ends before it.
_NUMBER = re.compile(r"(?:(?<![\w)])(-)\$?)?(\d+(?:,\d{3}(?!\d))+(?:\.\d+)?|\d+(?:\.\d+)?|(?<!\d)\.\d+)")


def normalise(text: str) -> str:
    """Lower case, without punctuation, English articles and surplus whitespace.

    Source: the answer normalisation of SQuAD's evaluation script, which Natural Questions and TriviaQA share.
    """
    plain = text.lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", plain).split())


def matches_any(prediction: str, answers: Iterable[str]) -> bool:
    """Whether the first line of `prediction` equals one of `answers` after normalisation."""
    lines = prediction.strip().splitlines()
    said = normalise(lines[0]) if lines else ""
    return said != "" and any(said == normalise(answer) for answer in answers)


def last_number(text: str) -> Decimal | None:
    """The last number written in `text`, or None where there is none.

    Thousands separators and currency signs are dropped, so "$1,200.50" is 1200.5; the full stop that
    ends a sentence is no part of the number.
    """
    found = _NUMBER.findall(text)
    if not found:
        return None
    sign, digits = found[-1]
    value = Decimal(digits.replace(",", ""))
    return -value if sign else value


def score_short_answer(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """`process_results` of the short-answer tasks: exact match with any of `doc["answers"]`."""
    return {"exact_match": float(matches_any(results[0], doc["answers"]))}


def score_last_number(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """`process_results` of the arithmetic task: reply and reference end in the same number."""
    expected = last_number(doc["answer"])
    if expected is None:
        raise ValueError(f"answer: no number in the reference {doc['answer']!r}; every row must end in its result")
    return {"exact_match": float(last_number(results[0]) == expected)}
