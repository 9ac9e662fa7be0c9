"""Tokenizers rewritten to encode text and nothing else.

A member's continuation must be tokens of exactly the continuation's bytes. A tokenizer as shipped adds
control tokens and a prefix space, and reads special-token text as control; the rewrite does none of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any

from lm_eval_deepen.errors import SpellingError
from lm_eval_deepen.vocabulary.byte_vocab import ByteVocab
from lm_eval_deepen.vocabulary.round_trip import is_exact, require_exact
from lm_eval_deepen.vocabulary.tokenizer_json import (
    BYTE_PIECE,
    model_pieces,
    read_decoder,
    split_merge,
    stages,
    unknown_id,
)

# They change a text only at its ends (prefix space, stripping), or only a text that is not NFC.
DROPPED_NORMALIZERS = frozenset({"Prepend", "Strip", "NFC"})
# A Unicode noncharacter and a space: occurs in no document, and space marks leave no space to match.
UNREACHABLE = "\ufdd0 "


def text_only_spec(
    spec: Mapping[str, Any],
    *,
    control: Iterable[int] = (),
    text: Iterable[int] = (),
    size: int | None = None,
    name: str = "tokenizer",
) -> dict[str, Any]:
    """Rewrite a ``tokenizer.json`` so that it encodes pure text; ids stay what they are.

    No post-processor (BOS), prefix space, truncation, padding or BPE dropout; added tokens do not swallow
    the spaces beside them; NFC normalisation is left out (it changes only text that is not NFC, and that
    has bytes of its own). Control pieces are renamed to what no text contains and merges into them (or
    into ``<0xNN>``) removed: a Unigram model, ``ignore_merges`` or a stray merge would otherwise read
    their literal text as control even with ``encode_special_tokens``. The same is done to pieces without a
    logit, so that a text with one is spelt with others. An added token whose content has other bytes than its
    piece (the newline's "\u010a" in the byte alphabet) is matched no more; its piece still is.

    Args:
        spec: the parsed ``tokenizer.json``. It is not changed; unchanged parts are shared with the result.
        control: ids of further control pieces that the file does not mark as special.
        text: ids that are text for all that; see `text_pieces`.
        size: number of ids that the model can be given; None for all.
        name: the member's name, for messages.

    Raises:
        VocabularyError: the tokenizer's family has no exact byte mapping.
    """
    pieces, decoder = model_pieces(spec, name=name), read_decoder(spec, name=name)
    added = [dict(token) for token in spec.get("added_tokens") or ()]
    contents = pieces | {token["id"]: token["content"] for token in added}
    ids = {*control, *(token["id"] for token in added if token["special"])}
    unknown = unknown_id(spec)
    if unknown is not None:
        ids.add(unknown)
    ids -= set(text)
    ids |= {i for i in contents if size is not None and i >= size}
    renamed = {contents[i]: UNREACHABLE + contents[i] for i in ids if i in contents}
    if decoder.byte_level:
        # not those that are a piece of the model, and whose content has other bytes than the piece
        added = [
            token
            for token in added
            if token["id"] in ids
            or token["id"] not in pieces
            or decoder.bytes_of(pieces[token["id"]]) == token["content"].encode()
        ]
    for token in added:
        token["special"] = token["id"] in ids
        token["content"] = renamed.get(token["content"], token["content"])
        token["lstrip"] = token["rstrip"] = False
    return {
        **spec,
        "truncation": None,
        "padding": None,
        "post_processor": None,
        "added_tokens": added,
        **without_prefix_space(spec, DROPPED_NORMALIZERS),
        "model": _text_only_model(spec["model"], renamed, decoder.byte_fallback),
    }


def without_prefix_space(spec: Mapping[str, Any], dropped: Container[str] = ("Prepend",)) -> dict[str, Any]:
    """Return the normalizer and the pre-tokenizer of a ``tokenizer.json`` without the prefix space that they add.

    `dropped`: the kinds of steps of the normalizer that are left out.
    """
    kept = [step for step in stages(spec.get("normalizer"), "normalizers") if step["type"] not in dropped]
    steps = stages(spec.get("pre_tokenizer"), "pretokenizers")
    for step in steps:
        if step["type"] == "ByteLevel":
            step["add_prefix_space"] = False
        elif step["type"] == "Metaspace":
            step["prepend_scheme"] = "never"
            step.pop("add_prefix_space", None)  # older files: contradicts the scheme
    return {
        "normalizer": {"type": "Sequence", "normalizers": kept} if kept else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps} if steps else None,
    }


def _text_only_model(model: Mapping[str, Any], renamed: Mapping[str, str], bytewise: bool) -> dict[str, Any]:
    if model["type"] == "Unigram":
        return {**model, "vocab": [[renamed.get(piece, piece), score] for piece, score in model["vocab"]]}

    def keeps(merge: str | Sequence[str]) -> bool:
        left, right = split_merge(merge)
        whole = left + right
        if left in renamed or right in renamed or whole in renamed:
            return False
        return not (bytewise and whole.startswith("<0x") and BYTE_PIECE.fullmatch(whole))

    return {
        **model,
        "dropout": None,
        "unk_token": renamed.get(model["unk_token"], model["unk_token"]) if model.get("unk_token") else None,
        "vocab": {renamed.get(piece, piece): i for piece, i in model["vocab"].items()},
        "merges": [merge for merge in model["merges"] if keeps(merge)],
    }


def reads_alike(rewritten: Mapping[str, Any], spec: Mapping[str, Any]) -> bool:
    """Return whether a model gives every text that added tokens leave the tokens of what `text_only_spec` made of it.

    BPE begins with single characters and bytes and reaches a longer piece by merges alone, so pieces that were renamed
    are out of reach where no merge was removed. The added tokens must have the ids that the model has for them.
    """
    ours, theirs = rewritten["model"], spec["model"]
    if theirs["type"] != "BPE" or theirs.get("ignore_merges") or theirs.get("dropout"):
        return False
    if len(ours["merges"]) != len(theirs["merges"]):  # the unknown token has the same id under its new name
        return False
    if any(len(piece) == 1 or BYTE_PIECE.fullmatch(piece) for piece in theirs["vocab"].keys() - ours["vocab"].keys()):
        return False
    added = [token for token in rewritten["added_tokens"] if not token["special"]]
    return all(theirs["vocab"].get(token["content"]) == token["id"] for token in added)


def exact_encoder(
    spec: Mapping[str, Any], vocab: ByteVocab, encode: Callable[[str], Sequence[int]], *, name: str
) -> Callable[[str], list[int]]:
    """Wrap an encoder (see `text_only_spec`) so that every text gives tokens of exactly its own bytes, or an error.

    Two kinds of text defeat a SentencePiece-style tokenizer: a literal space mark ("▁") comes back as a
    space, and a literal ``<0x0A>`` may be taken for that byte. The first is spelt with byte pieces, the
    second encoded in two parts. The result stays a pure function of the text.

    `spec`: the original ``tokenizer.json``; of its model the type and ``byte_fallback``.
    """
    marks = read_decoder(spec, name=name).space_marks
    literal_mark = "".join(f"({re.escape(mark)})|" for mark in marks)
    traps = re.compile(literal_mark + r"(?<=<0)(?=x[0-9A-Fa-f]{2}>)")

    def spell(mark: str) -> Sequence[int]:
        ids = vocab.spell(mark.encode())
        if ids is None:
            raise SpellingError(
                f"member {name!r}: the text has the character {mark!r} (U+{ord(mark[0]):04X}), which its "
                "tokenizer reads as a space, and it has no byte pieces to spell it. Leave this member out, "
                "or replace the character in the text."
            )
        return ids

    def run(text: str) -> list[int]:
        ids = list(encode(text))
        if not is_exact(vocab, text.encode(), ids):
            parts = filter(None, traps.split(text))
            ids = [i for part in parts for i in (spell(part) if part in marks else encode(part))]
            require_exact(vocab, text, ids, name=name)
        return ids

    return run
