"""Workloads: multiple-choice questions and prompts as requests of the harness."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance

LETTERS = "ABCDE"
SHOTS = 8
Length = Callable[[str], int]


@dataclass(frozen=True)
class Scale:
    """How much is measured.

    Attributes:
        repeats: of every timed comparison.
        context: tokens of a few-shot context that differs from document to document.
        differing, fixed, zero, piqa: documents of the four scoring shapes.
        hf_differing, hf_fixed, hf_zero, hf_piqa: documents of them that `hf` is timed on.
        prompts, new_tokens: texts to generate at once, and tokens of each.
        unequal, longest: texts of unequal length, and the longest of them in tokens.
        hf_unequal: texts of these that `hf` is timed on.
        hf_single: texts of equal length that `hf` is timed on one by one, to find its faster batch size.
        third: documents and new tokens with a third member.
        steps: decoding steps whose parts are timed.
        drafted: repeats of generation with speculation, and of `hf` on unequal texts as if it could batch them.
        long_context: tokens of a context whose memory is measured.
        long_documents: contexts of this length that are scored; as many texts as the batch size are generated.
    """

    repeats: int = 3
    context: int = 500
    differing: int = 6
    fixed: int = 30
    zero: int = 60
    piqa: int = 60
    hf_differing: int = 2
    hf_fixed: int = 1
    hf_zero: int = 8
    hf_piqa: int = 8
    prompts: int = 8
    new_tokens: int = 32
    unequal: int = 32
    longest: int = 64
    hf_unequal: int = 4
    hf_single: int = 2
    third: int = 8
    steps: int = 16
    drafted: int = 2
    long_context: int = 2048
    long_documents: int = 2

    def full(self) -> Scale:
        """Return the same with `hf` timed on everything."""
        return replace(
            self,
            hf_differing=self.differing,
            hf_fixed=self.fixed,
            hf_zero=self.zero,
            hf_piqa=self.piqa,
            hf_unequal=self.unequal,
            hf_single=self.prompts,
        )


QUICK = Scale(
    repeats=2,
    context=120,
    differing=2,
    fixed=3,
    zero=3,
    piqa=3,
    hf_differing=1,
    hf_fixed=2,
    hf_zero=2,
    hf_piqa=2,
    prompts=2,
    new_tokens=4,
    unequal=4,
    longest=8,
    hf_unequal=2,
    third=2,
    steps=2,
    long_context=200,
)


@dataclass(frozen=True)
class Item:
    """A question with its options and the index of the right one."""

    question: str
    choices: tuple[str, ...]
    answer: int

    @property
    def prompt(self) -> str:
        """The question as the sample tasks of this project put it."""
        return f"Question: {self.question}\nAnswer:"

    @property
    def shot(self) -> str:
        """The question with its answer."""
        return f"{self.prompt} {self.choices[self.answer]}\n\n"


@dataclass(frozen=True)
class Source:
    """Questions: `kind` is ``samples`` of the benchmarks, or ``synthetic`` ones of about the same lengths."""

    kind: str
    arc_dev: tuple[Item, ...]
    arc: tuple[Item, ...]
    piqa: tuple[Item, ...]

    @classmethod
    def load(cls, folder: Path) -> Source:
        """Read the JSONL samples under `folder`; where there is no such folder, make questions up."""
        if not folder.is_dir():
            return cls.synthetic()
        arc, piqa = folder / "arc_challenge", folder / "piqa"
        return cls("samples", _read(arc / "dev.jsonl"), _read(arc / "test.jsonl"), _read(piqa / "test.jsonl"))

    @classmethod
    def synthetic(cls) -> Source:
        """Cut questions out of the documentation text that Python carries."""
        from pydoc_data.topics import topics

        words = re.findall(r"\w+[,.;]?", " ".join(text for _, text in sorted(topics.items())))
        draw = random.Random(0)
        kind = "synthetic"
        return cls(
            kind, _cut(words, draw, 300, 22, 4, 5), _cut(words, draw, 300, 22, 4, 5), _cut(words, draw, 300, 8, 2, 19)
        )


def _read(path: Path) -> tuple[Item, ...]:
    items = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        if not line.strip():
            continue
        row = json.loads(line)
        letters = [letter for letter in LETTERS if row.get(letter) is not None]
        choices = tuple(str(row[letter]).strip() for letter in letters)
        if all(choices):
            items.append(Item(row["question"], choices, letters.index(row["answer"])))
    return tuple(items)


def _cut(words: list[str], draw: random.Random, count: int, question: int, options: int, size: int) -> tuple[Item, ...]:
    """Return items whose questions and options have about so many words."""

    def text(mean: int) -> str:
        length = draw.randint((mean + 1) // 2, mean + mean // 2)
        start = draw.randrange(len(words) - length)
        return " ".join(words[start : start + length])

    return tuple(
        Item(f"{text(question)}?", tuple(text(size) for _ in range(options)), draw.randrange(options))
        for _ in range(count)
    )


@dataclass(frozen=True)
class Document:
    """One context and the continuations to score after it."""

    context: str
    continuations: tuple[str, ...]


@dataclass(frozen=True)
class Shape:
    """Documents to score, and those of them that `hf` is timed on."""

    name: str
    documents: tuple[Document, ...]
    timed: tuple[Document, ...]

    @classmethod
    def of(cls, name: str, documents: Sequence[Document], timed: int) -> Shape:
        """Choose `timed` documents evenly spaced by length, so that their mean length is about that of all."""
        order = sorted(documents, key=lambda document: len(document.context) + len("".join(document.continuations)))
        count = min(timed, len(order))
        return cls(name, tuple(documents), tuple(order[(2 * i + 1) * len(order) // (2 * count)] for i in range(count)))


def requests(kind: str, arguments: Sequence[tuple[Any, ...]]) -> list[Instance]:
    """Return one request of the harness per tuple of arguments."""
    return [
        Instance(request_type=kind, doc={}, arguments=args, idx=i, metadata=("cost", i, 1))  # type: ignore[arg-type]
        for i, args in enumerate(arguments)
    ]


def scoring(documents: Sequence[Document]) -> list[Instance]:
    """Return the loglikelihood requests of documents."""
    return requests("loglikelihood", [(d.context, text) for d in documents for text in d.continuations])


def generation(prompts: Sequence[str], lengths: Sequence[int], **choice: Any) -> list[Instance]:
    """Return generation requests without stop strings, each with its own number of new tokens; greedy by default."""
    pairs, settings = zip(prompts, lengths, strict=True), {"until": [], "do_sample": False, **choice}
    return requests("generate_until", [(p, {**settings, "max_gen_toks": n}) for p, n in pairs])


def shapes(source: Source, scale: Scale, length: Length) -> dict[str, Shape]:
    """Return the four scoring shapes; `length` counts the main member's tokens of a text."""
    head = "".join(item.shot for item in source.arc_dev[:SHOTS])
    fixed = [_document(item, head) for item in source.arc[: scale.fixed]]
    return {
        "arc_differing": Shape.of("arc_differing", differing(source, scale, length), scale.hf_differing),
        "arc_fixed": Shape.of("arc_fixed", fixed, scale.hf_fixed),
        "arc_zero": Shape.of("arc_zero", [_document(item) for item in source.arc[: scale.zero]], scale.hf_zero),
        "piqa": Shape.of("piqa", [_document(item) for item in source.piqa[: scale.piqa]], scale.hf_piqa),
    }


def _document(item: Item, head: str = "") -> Document:
    return Document(head + item.prompt, tuple(f" {choice}" for choice in item.choices))


def differing(source: Source, scale: Scale, length: Length) -> list[Document]:
    """Return documents of four options of about 6 tokens, with random few-shots up to `scale.context` tokens."""
    draw = random.Random(0)
    typical = [i for i in source.arc if len(i.choices) == 4 and 4 <= sum(map(length, i.choices)) / 4 <= 8]
    return [
        _document(item, fill(source, length, scale.context - length(item.prompt), draw))
        for item in typical[: scale.differing]
    ]


def fill(source: Source, length: Length, size: int, draw: random.Random) -> str:
    """Return random few-shots of about `size` tokens; joining them may change the count by a few."""
    text, left = "", size
    for item in draw.sample(source.arc_dev, len(source.arc_dev)) * (1 + size // 4096):
        if (cost := length(item.shot)) <= left:
            text, left = text + item.shot, left - cost
        if left < 12:
            break
    return text


def prompts(source: Source, count: int) -> list[str]:
    """Return questions to continue."""
    return [item.prompt for item in source.arc[-count:]]


def unequal_lengths(scale: Scale) -> list[int]:
    """Return lengths from 2 to the longest in even steps, shuffled."""
    steps = max(scale.unequal - 1, 1)
    lengths = [2 + round((scale.longest - 2) * i / steps) for i in range(scale.unequal)]
    random.Random(0).shuffle(lengths)
    return lengths
