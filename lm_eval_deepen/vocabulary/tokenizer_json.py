"""Byte vocabularies from the ``tokenizer.json`` of a fast tokenizer.

A piece's bytes are what the tokenizer's own decoder makes of it: the GPT-2 byte alphabet for a
``ByteLevel`` decoder; the space mark and ``<0xNN>`` pieces for SentencePiece-style decoders.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval_deepen.errors import VocabularyError
from lm_eval_deepen.vocabulary.byte_vocab import ByteVocab

LITERAL = re.compile(r"[^\\.^$*+?()\[\]{}|]+")  # a regular expression that matches itself alone
BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
REMEDY = (
    "Use a checkpoint whose tokenizer maps to bytes exactly: byte-level BPE, or SentencePiece-style BPE or Unigram "
    "(space mark, byte fallback)."
)


def _byte_alphabet() -> dict[str, int]:
    """Return the 256 characters that byte-level BPE spells bytes with (GPT-2's ``bytes_to_unicode``)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


BYTE_ALPHABET = _byte_alphabet()


@dataclass(frozen=True)
class PieceDecoder:
    """What a tokenizer's decoder makes of one piece."""

    byte_level: bool  # pieces are spelt in the GPT-2 byte alphabet
    # string replacements applied to every piece, in order, such as ``("▁", " ")``
    replaces: tuple[tuple[str, str], ...]
    byte_fallback: bool  # ``<0xNN>`` pieces are single bytes

    def bytes_of(self, piece: str, *, added: bool = False) -> bytes:
        """Return the bytes of one piece.

        A token that is `added` outside the model's vocabulary is matched in the raw text: it is never spelt in the
        byte alphabet.
        """
        if self.byte_fallback and (match := BYTE_PIECE.fullmatch(piece)):
            return bytes([int(match[1], 16)])
        for old, new in self.replaces:
            piece = piece.replace(old, new)
        if self.byte_level and not added:
            try:
                return bytes([BYTE_ALPHABET[character] for character in piece])
            except KeyError:  # as the library's decoder: one foreign character, and the piece is plain text
                return piece.encode()
        return piece.encode()

    @property
    def space_marks(self) -> tuple[str, ...]:
        """Return the strings that stand for a space: as text of their own they cannot be spelt directly."""
        return tuple(old for old, new in self.replaces if new == " ")


def stages(part: Mapping[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """Return the steps of a normalizer, pre-tokenizer or decoder in order, those of a ``Sequence`` under its `key`."""
    if part is None:
        return []
    if part.get("type") == "Sequence":
        return [step for inner in part[key] for step in stages(inner, key)]
    return [dict(part)]


def read_decoder(spec: Mapping[str, Any], *, name: str) -> PieceDecoder:
    """Return the byte decoder of a ``tokenizer.json``.

    A step after ``Fuse`` (or ``ByteLevel``, which joins the pieces too) sees the whole text. It is understood where it
    does to a text what it does to each piece: the replacement of a single character. What it does to the two ends of
    a text is no matter of pieces.

    Raises:
        VocabularyError: the decoder has a step whose effect on one piece is not known exactly.
    """
    byte_level = byte_fallback = fused = False
    replaces: list[tuple[str, str]] = []
    steps = stages(spec.get("decoder"), "decoders")
    unknown = None if steps else "no decoder"
    for step in steps:
        kind = step.get("type")
        replaced = _replacement(step, fused)
        if kind == "ByteLevel":
            byte_level = fused = True
        elif kind == "ByteFallback":
            byte_fallback = True
        elif kind == "Fuse":
            fused = True
        elif replaced is not None and not (fused and (byte_level or len(replaced[0]) > 1)):
            replaces.append(replaced)
        elif not (kind == "Strip" and (fused or not (step["start"] or step["stop"]))):
            unknown = unknown or f"decoder step {kind!r}"
    if unknown:
        raise VocabularyError(
            f"member {name!r}: the tokenizer ({spec['model'].get('type')}, {unknown}) has no known exact mapping of "
            f"pieces to bytes. {REMEDY}"
        )
    # The encoder decides what a piece means: it emits <0xNN> for a byte even where the decoder is silent.
    byte_fallback = byte_fallback or bool(spec["model"].get("byte_fallback"))
    return PieceDecoder(byte_level, tuple(replaces), byte_fallback)


def _replacement(step: Mapping[str, Any], fused: bool) -> tuple[str, str] | None:
    """Return what a decoder step replaces and by what, None where it is no replacement of a fixed string."""
    if step.get("type") == "Metaspace":  # it deletes the marks of the first piece: after ``Fuse``, all marks
        deletes = fused and step.get("prepend_scheme", "always") != "never"
        return None if deletes else (step.get("replacement", "\u2581"), " ")
    if step.get("type") != "Replace":
        return None
    pattern = step["pattern"]
    if "String" in pattern:
        return pattern["String"], step["content"]
    pattern_is_literal = LITERAL.fullmatch(pattern["Regex"])
    return (pattern["Regex"], step["content"]) if pattern_is_literal else None


def model_pieces(spec: Mapping[str, Any], *, name: str) -> dict[int, str]:
    """Return the pieces of the tokenizer's model by id, without added tokens.

    Raises VocabularyError where the model is not BPE or Unigram, or marks word ends and continuations.
    """
    model = spec["model"]
    kind = model.get("type")
    if kind == "Unigram":
        return {i: piece for i, (piece, _) in enumerate(model["vocab"])}
    if kind != "BPE":
        raise VocabularyError(
            f"member {name!r}: a tokenizer of type {kind!r} cannot be mapped to bytes exactly "
            f"(its pieces do not keep the spaces between words). {REMEDY}"
        )
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise VocabularyError(
                f"member {name!r}: a BPE tokenizer with {key} {model[key]!r} cannot be mapped to bytes "
                f"exactly. {REMEDY}"
            )
    return {i: piece for piece, i in model["vocab"].items()}


def unknown_id(spec: Mapping[str, Any]) -> int | None:
    """Return the id of the tokenizer's unknown token, None where it has none."""
    model = spec["model"]
    if "unk_id" in model:
        return model["unk_id"]
    token = model.get("unk_token")
    if token is None or token in model["vocab"]:
        return None if token is None else model["vocab"][token]
    return next((added["id"] for added in spec.get("added_tokens") or () if added["content"] == token), None)


def text_pieces(spec: Mapping[str, Any], ids: Iterable[int]) -> frozenset[int]:
    """Return those of some ids that are text in a ``tokenizer.json``, whatever role they have (padding, end of text).

    A piece is text where the file lists it as an added token that is not special, or where the model itself spells
    text with it: as a piece for a single character or byte, which no other piece could replace, whatever the file
    says of it; or as a longer piece that merges make, or that has a probability, unless the file marks it as special.
    The file's marks count, not those that loading it has added.
    """
    model = spec["model"]
    marks = {token["id"]: bool(token["special"]) for token in spec.get("added_tokens") or ()}
    unigram = model.get("type") == "Unigram"
    wanted = set(ids)
    if unigram:
        pieces = {i: model["vocab"][i][0] for i in wanted if 0 <= i < len(model["vocab"])}
    else:
        pieces = {i: piece for piece, i in model["vocab"].items() if i in wanted}
    single = {i for i, piece in pieces.items() if len(piece) == 1 or BYTE_PIECE.fullmatch(piece)}
    left = wanted - single - marks.keys()
    if unigram:  # control pieces are exported with score 0, all others with a log-probability
        made = {i for i in left if i in pieces and model["vocab"][i][1] < 0}
    else:
        products = {"".join(split_merge(merge)) for merge in model.get("merges", ())} if left else set()
        made = {i for i in left if pieces.get(i) in products}
    return frozenset(single | made | {i for i in wanted if marks.get(i) is False})


def split_merge(merge: str | Sequence[str]) -> tuple[str, str]:
    """Return the two pieces of a merge, which older files write as one string."""
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left, right


def byte_vocab_from_json(
    spec: Mapping[str, Any],
    *,
    size: int,
    eos: Sequence[int],
    extra_control: Iterable[int] = (),
    text: Iterable[int] = (),
    known: int | None = None,
    name: str,
) -> ByteVocab:
    """Map every token id of a fast tokenizer to bytes.

    Special added tokens, the unknown token, `eos` and `extra_control` are control pieces and carry no
    bytes, nor does a token with empty content. Added tokens that are not special are text. Ids without a
    token (padded embedding rows, holes) are unused. A token whose id is `size` or more has no logit and is
    left out: the model can neither produce it nor, in general, be given it, and `text_only_spec` takes it
    out of the tokenizer.

    Args:
        spec: the parsed ``tokenizer.json`` (``json.loads(tokenizer.to_str())``).
        size: number of logits of the model; ids from 0 to size - 1.
        eos: ids that end a text, in the order of the model's configuration.
        extra_control: further ids that carry no text (padding token and the like).
        text: ids that are text for all that; see `text_pieces`.
        known: number of ids that the model can be given; those from here to `size` are unused. None for all.
        name: the member's name, for messages.

    Raises:
        VocabularyError: the tokenizer's family has no exact byte mapping, or an EOS id has no logit.
    """
    pieces_of = model_pieces(spec, name=name)
    decoder = read_decoder(spec, name=name)
    eos = tuple(dict.fromkeys(eos))
    outside = [i for i in eos if not 0 <= i < size]
    if outside:
        raise VocabularyError(
            f"member {name!r}: end-of-text id {outside[0]} has no logit (the model has {size}). Correct "
            "eos_token_id in the model's config or generation config."
        )
    pieces = {i: decoder.bytes_of(piece) for i, piece in pieces_of.items()}
    control = {*eos, *extra_control}
    for token in spec.get("added_tokens") or ():
        if token["special"]:
            control.add(token["id"])
        if token["id"] not in pieces_of:
            pieces[token["id"]] = decoder.bytes_of(token["content"], added=True)
    unknown = unknown_id(spec)
    if unknown is not None:
        control.add(unknown)
    control -= set(text)
    control |= {i for i, piece in pieces.items() if not piece}
    if known is not None and known < size:
        pieces = {i: piece for i, piece in pieces.items() if i < known}
        control = {i for i in control if i < known or i in eos}
    control = {i for i in control if 0 <= i < size}
    unused = frozenset(i for i in range(size) if i not in pieces and i not in control)
    fallback = frozenset(
        i
        for i, piece in pieces_of.items()
        if i < size and i not in control and decoder.byte_fallback and BYTE_PIECE.fullmatch(piece)
    )
    return ByteVocab(
        pieces=tuple(b"" if i in control else pieces.get(i, b"") for i in range(size)),
        control=frozenset(control),
        unused=unused,
        eos=eos,
        byte_fallback=fallback,
    )
