"""The training text: its documents, the held-out ones, and the blocks that every model reads from their start."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lm_eval_deepen.engine.bits_per_byte import Document
from lm_eval_deepen.engine.calibration import digest, load_documents
from lm_eval_deepen.errors import ConfigError
from lm_eval_deepen.vocabulary import safe_segments
from lm_eval_deepen.vocabulary.round_trip import require_exact

if TYPE_CHECKING:
    from lm_eval_deepen.build.distill.recipe import DistillRecipe
    from lm_eval_deepen.member import TextCodec

SHORTEST_PARAGRAPH = 80
SHORTEST_DOCUMENT = 200
MARKUP = (" ", "*", "=", "|", "+", "-")


@dataclass(frozen=True)
class Corpus:
    """Documents to train on and documents held out; no document occurs twice."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Tokens:
    """A block as one model reads it."""

    prefix: tuple[int, ...]  # control tokens that the text is conditioned on
    ids: tuple[int, ...]  # the tokens of the text [T]
    # bytes of the text before each of them [T]: what has been read when token i is predicted. -1 for the first one of a
    # tokenizer that puts a space before a text
    ends: NDArray[np.int64]

    @classmethod
    def of(cls, codec: TextCodec, text: str) -> Tokens:
        """Encode a block; raises VocabularyError where the tokens do not spell the text."""
        ids = codec.encode_prompt(text)[len(codec.automatic_prefix) :]
        require_exact(codec.vocab, codec.opened(text), ids, name=codec.name)
        sizes = np.array([len(codec.vocab.pieces[token]) for token in ids], dtype=np.int64)
        ends = np.cumsum(sizes) - sizes
        return cls(codec.prefix_ids, ids, ends - (int(sizes.sum()) - len(text.encode())))

    def within(self, longest: int) -> Tokens:
        """Return the beginning of the block that a context of so many tokens has room for."""
        room = longest - len(self.prefix)
        return self if len(self.ids) <= room else Tokens(self.prefix, self.ids[:room], self.ends[:room])

    def num_bytes(self, pieces: Sequence[bytes]) -> int:
        """Return how many bytes of the text the tokens spell; `pieces` are those of the vocabulary."""
        return int(self.ends[-1]) + len(pieces[self.ids[-1]])


def neutral_documents() -> list[str]:
    """Return prose from Python's own documentation, one document per topic, no paragraph twice."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ConfigError("recipe: this Python has no pydoc_data, the default text; give text: FILES") from error
    seen: set[str] = set()
    documents = []
    for name in sorted(topics):
        kept = []
        for paragraph in topics[name].split("\n\n"):
            text = " ".join(paragraph.split())
            marked = any(line.startswith(MARKUP) or "::=" in line for line in paragraph.splitlines())
            if not marked and len(text) >= SHORTEST_PARAGRAPH and text not in seen:
                seen.add(text)
                kept.append(text)
        document = "\n\n".join(kept)
        if len(document) >= SHORTEST_DOCUMENT:
            documents.append(document)
    return documents


def read_corpus(recipe: DistillRecipe) -> Corpus:
    """Return the documents of a recipe: what is held out depends on the documents alone, not on shard or seed.

    Raises:
        ConfigError: too few documents to hold some out and to train on the shard, or one that follows a context.
        RequestError: a file that cannot be read.
    """
    documents = load_documents(recipe.text) if recipe.text else [Document(text) for text in neutral_documents()]
    if after := next((document for document in documents if document.context), None):
        raise ConfigError(
            f"recipe: a document of text, {after.text[:40]!r}, has a context, {after.context[:40]!r}, and a training "
            "reads whole texts; put the context into text, or take it out",
            key="text",
        )
    texts = list(dict.fromkeys(document.text for document in documents))
    ranked = sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())
    apart = set(ranked[: max(1, round(recipe.held_out * len(texts)))])
    rest = [text for text in texts if text not in apart]
    index, count = recipe.shard
    train = rest[index::count]
    if not train:
        raise ConfigError(
            f"recipe: {len(texts)} documents, {len(apart)} of them held out, leave none for shard {index} of {count}; "
            "give more text, fewer shards or a smaller held_out"
        )
    return Corpus(tuple(train), tuple(text for text in texts if text in apart))


def blocks_of(text: str, limit: int, count: Callable[[str], int]) -> Iterator[str]:
    """Split a document into blocks of at most `limit` tokens, which join to the document.

    They end before the space after a word; a word longer than a block is cut anywhere. `count` gives the tokens of a
    text that is read on its own.
    """
    held = ""
    sizes = lru_cache(None)(count)  # words recur
    used = 0
    for segment in safe_segments(text):
        size = sizes(segment)
        if held and used + size > limit:
            yield from _halved(held, limit, count)
            held, used = "", 0
        held, used = held + segment, used + size
    if held:
        yield from _halved(held, limit, count)


def _halved(text: str, limit: int, count: Callable[[str], int]) -> Iterator[str]:
    if count(text) <= limit or len(text) == 1:
        yield text
        return
    middle = len(text) // 2
    for part in (text[:middle], text[middle:]):
        yield from _halved(part, limit, count)


def training_order(sizes: Sequence[int], tokens: int | None, seed: int) -> list[int]:
    """Return indices of blocks [n], in the order of training: shuffled passes until `tokens` are reached, or one.

    `sizes` are the tokens to predict in every block.
    """
    generator = np.random.default_rng(seed)
    order: list[int] = []
    total = 0
    while not order or (tokens is not None and total < tokens):
        for index in generator.permutation(len(sizes)).tolist():
            if tokens is not None and total >= tokens:
                break
            order.append(index)
            total += sizes[index]
    return order


@dataclass(frozen=True)
class Text:
    """The corpus as blocks of the target."""

    corpus: Corpus  # the documents
    train: tuple[str, ...]  # blocks of text to train on
    held_out: tuple[tuple[str, ...], ...]  # blocks of every held-out document
    order: tuple[int, ...]  # indices of training blocks, in the order of training
    tokens: int  # tokens of the target that are trained on, repetitions included

    @property
    def used(self) -> list[int]:
        """Indices of the blocks that are trained on, ascending."""
        return sorted(set(self.order))

    @property
    def sizes(self) -> list[int]:
        """Bytes of the held-out documents."""
        return [len(document.encode()) for document in self.corpus.held_out]

    @property
    def held_out_digest(self) -> str:
        """Hex SHA-256 of the held-out blocks."""
        return text_digest([block for blocks in self.held_out for block in blocks])


def cut(recipe: DistillRecipe, corpus: Corpus, codec: TextCodec) -> Text:
    """Cut the documents into blocks of the target; sources do not matter, so that the control reads the same."""

    def count(text: str) -> int:
        return len(codec.encode(text))

    limit = recipe.context_length - 1 - codec.prefix_space  # a space in front may be a token of its own
    train = tuple(block for text in corpus.train for block in blocks_of(text, limit, count))
    held_out = tuple(tuple(blocks_of(text, limit, count)) for text in corpus.held_out)
    sizes = [len(Tokens.of(codec, block).ids) for block in train]
    order = tuple(training_order(sizes, recipe.train_tokens, recipe.seed))
    return Text(corpus, train, held_out, order, sum(sizes[i] for i in order))


def text_digest(texts: Sequence[str]) -> str:
    """Return the hex SHA-256 of texts, in order."""
    return digest([Document(text) for text in texts])
