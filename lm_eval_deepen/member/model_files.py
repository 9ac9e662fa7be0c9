"""Whether models are those that something was evaluated with: a folder, or a hub name, may hold another one since."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file, extract_commit_hash

from lm_eval_deepen.config import MemberConfig

_WHERE = ("revision", "cache_dir", "token", "local_files_only", "subfolder")
_PLACES = ("tokenizer", "peft", "delta")  # loading arguments that may name a folder, beside `pretrained`
# What decides a model's answers; logs, states of a training and pages about the model do not.
_DECIDING = (
    "*.safetensors", "pytorch_model*.bin", "adapter_model*.bin", "*.gguf", "config.json", "generation_config.json",
    "adapter_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt",
    "*.model", "chat_template*",
)  # fmt: skip
_PARTS, _PART = 64, 1 << 14  # of a large file, which are read: another training changes weights everywhere


def digests(members: Sequence[MemberConfig]) -> dict[str, str]:
    """Return what tells the models that members are loaded from, by folder or hub name, as far as it is known.

    Of a folder it is a digest of its files; of a hub name the commit that would be loaded now.
    """
    hub = {}
    for member in members:
        if commit := _commit(member):
            revision = member.loading.get("revision")
            hub[f"{member.pretrained}@{revision}" if revision else member.pretrained] = commit
    named = [place for one in members for place in (one.pretrained, *(one.loading.get(key) for key in _PLACES))]
    folders = [place for place in dict.fromkeys(named) if isinstance(place, str) and os.path.isdir(place)]
    found = {}
    for place in folders:
        paths = [path for path in Path(place).iterdir() if any(fnmatch(path.name, known) for known in _DECIDING)]
        stats = [(path, path.stat()) for path in sorted(paths) if path.is_file()]
        found[place] = _digest(tuple((path, stat.st_size, stat.st_mtime_ns) for path, stat in stats))
    return {**hub, **found}


def changed(now: Mapping[str, str], then: Any) -> str:
    """Return the models of `now` that are others than `then`, which may lack some or be none; empty for none."""
    known = then if isinstance(then, Mapping) else {}
    return " and ".join(place for place, digest in now.items() if known.get(place, digest) != digest)


def _commit(member: MemberConfig) -> str | None:
    """Return the commit of a hub name, None of a folder, or where neither the hub nor the cache knows it."""
    if os.path.isdir(member.pretrained):
        return None
    asked = {key: member.loading[key] for key in _WHERE if key in member.loading}
    with suppress(Exception):  # whatever keeps a model from being found is said where it is loaded
        path = cached_file(member.pretrained, "config.json", **asked)
        return extract_commit_hash(path, None)
    return None


@lru_cache(maxsize=256)
def _digest(files: tuple[tuple[Path, int, int], ...]) -> str:
    """Return the digest of some files with their sizes and times."""
    digest = hashlib.sha256()
    for path, size, _ in files:
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for part in range(_PARTS):
                file.seek(part * max(0, size - _PART) // (_PARTS - 1))
                digest.update(file.read(_PART))
                if size <= _PART:
                    break
    return digest.hexdigest()
