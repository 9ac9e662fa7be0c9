"""What takes long to find out of a large tokenizer or model, kept in the cache folder by the content it was read from.

A kept file's name is a digest of that content. Its first line is a digest of this package's code and the libraries'
versions, and one of the rest: a damaged file, or one that other code made, is made again.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import tokenizers
import torch
import transformers

from lm_eval_deepen.errors import StorageError
from lm_eval_deepen.storage import cache_folder, used, write_bytes

log = logging.getLogger(__name__)

LARGE = 1 << 20  # characters of a tokenizer's JSON; a smaller one is read faster than a file
CODE = (Path(__file__).parent, Path(__file__).parent.parent / "vocabulary")

_digests: WeakKeyDictionary[Any, tuple[str, str, int]] = WeakKeyDictionary()


def content_of(tokenizer: tokenizers.Tokenizer) -> tuple[str, int]:
    """Return a hex digest of a tokenizer's JSON, and the JSON's length.

    Writing it takes as long as reading it. So it is written again only where something has changed that can: the model
    of a tokenizer that was read cannot.
    """
    parts = (tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.post_processor, tokenizer.decoder)
    added = {i: repr(token) for i, token in tokenizer.get_added_tokens_decoder().items()}
    model = tokenizer.model
    settings = {key: repr(getattr(model, key, None)) for key in ("dropout", "unk_token", "byte_fallback", "unk_id")}
    state = repr((
        [part.__getstate__() if part is not None else None for part in parts],
        added, tokenizer.truncation, tokenizer.padding, tokenizer.encode_special_tokens, settings,
    ))  # fmt: skip
    with suppress(TypeError):  # tokenizers before 0.23 cannot be referred to weakly: theirs are written every time
        if (known := _digests.get(tokenizer)) is not None and known[0] == state:
            return known[1:]
    written = tokenizer.to_str().encode()
    known = (state, hashlib.sha256(written).hexdigest(), len(written))
    with suppress(TypeError):
        _digests[tokenizer] = known
    return known[1:]


def kept(kind: str, decides: Sequence[Any], make: Callable[[], bytes], length: int) -> bytes:
    """Return what `make` returns, from the cache folder where it is there.

    Args:
        kind: what it is, for the file's name.
        decides: all that the result is a function of, as JSON takes it.
        make: makes it.
        length: of the tokenizer's JSON, in characters.
    """
    if length < LARGE:
        return make()
    body = find(f"tokenizers/{kind}", decides)
    if body is None:
        keep(f"tokenizers/{kind}", decides, body := make())
    return body


def find(kind: str, decides: Sequence[Any]) -> bytes | None:
    """Return what was kept; None where it is not there, damaged, or of other code.

    Args:
        kind: its folder in the cache folder, and how the file's name begins.
        decides: all that it is a function of, as JSON takes it.
    """
    try:
        path = _path(kind, decides)
        seal, _, body = path.read_bytes().partition(b"\n")
    except (OSError, StorageError):  # a folder that cannot be read costs time alone
        return None
    if seal == _seal(body):
        used(path)
        return body
    if seal.startswith(code().encode()) or b" " not in seal:
        log.warning("%s is damaged; it is made again.", path)
    return None


def keep(kind: str, decides: Sequence[Any], body: bytes) -> None:
    """Keep what `find` returns then, where the cache folder can be written."""
    with suppress(StorageError):
        write_bytes(_path(kind, decides), _seal(body) + b"\n" + body)


def _path(kind: str, decides: Sequence[Any]) -> Path:
    return cache_folder() / f"{kind}-{hashlib.sha256(json.dumps(decides).encode()).hexdigest()}"


def _seal(body: bytes) -> bytes:
    return f"{code()} {hashlib.sha256(body).hexdigest()}".encode()


@cache
def code() -> str:
    """Return a hex digest of the code that reads tokenizers and checks models, and of the libraries' versions."""
    digest = hashlib.sha256(repr((tokenizers.__version__, torch.__version__, transformers.__version__)).encode())
    for folder in CODE:
        for path in sorted(folder.glob("*.py")):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
