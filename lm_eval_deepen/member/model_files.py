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

_LOADED = ("revision", "cache_dir", "token", "local_files_only")
# Loading arguments that name a folder or a repository, and those that `HFLM` looks for it with.
_PLACES = {
    "pretrained": (*_LOADED, "subfolder"), "tokenizer": ("revision", "subfolder"),
    "peft": ("revision",), "delta": _LOADED,
}  # fmt: skip
_TELLING = ("config.json", "adapter_config.json", "tokenizer_config.json", "tokenizer.json")  # a repository has one
# What decides a model's answers; logs, states of a training and pages about the model do not.
_DECIDING = (
    "*.safetensors", "pytorch_model*.bin", "adapter_model*.bin", "*.gguf", "config.json", "generation_config.json",
    "adapter_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt",
    "*.model", "*.spm", "tekken.json", "chat_template*", "*.py",
)  # fmt: skip
_PARTS, _PART = 64, 1 << 14  # of a large file, which are read: another training changes weights everywhere


def digests(members: Sequence[MemberConfig]) -> dict[str, str]:
    """Return what tells the models that members are loaded from, by folder or hub name, as far as it is known.

    Of a folder it is a digest of its files; of a hub name the commit that would be loaded now.
    """
    by_place = {}
    for member in members:
        given = {**member.loading_dict(), **member.hf_kwargs_dict(), "pretrained": member.pretrained}
        for key, passed in _PLACES.items():
            place, asked = given.get(key), {name: given[name] for name in passed if given.get(name) is not None}
            if not isinstance(place, str):
                continue
            if os.path.isdir(place):
                folder = os.path.join(place, asked["subfolder"]) if asked.get("subfolder") else place
                paths = [path for path in Path(folder).glob("*") if any(fnmatch(path.name, own) for own in _DECIDING)]
                stats = [(path, path.stat()) for path in sorted(paths) if path.is_file()]
                by_place[folder] = _digest(tuple((path, stat.st_size, stat.st_mtime_ns) for path, stat in stats))
            elif commit := _commit(place, asked, [given["gguf_file"]] if given.get("gguf_file") else []):
                by_place[f"{place}@{asked['revision']}" if asked.get("revision") else place] = commit
    return by_place


def changed(now: Mapping[str, str], then: Any) -> str:
    """Return the models of `now` that are others than `then`, which may lack some or be none; empty for none."""
    known = then if isinstance(then, Mapping) else {}
    return " and ".join(place for place, digest in now.items() if known.get(place, digest) != digest)


def _commit(name: str, asked: Mapping[str, Any], more: Sequence[str]) -> str | None:
    """Return the commit of a hub name, None where neither the hub nor the cache knows it."""
    for file in (*_TELLING, *more):
        with suppress(Exception):  # whatever keeps a model from being found is said where it is loaded
            if commit := extract_commit_hash(cached_file(name, file, **asked), None):
                return str(commit)
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
