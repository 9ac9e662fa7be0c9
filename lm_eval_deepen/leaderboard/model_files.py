"""Whether the files of a cell's models are those that it was evaluated with: a folder may hold another model since."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path

from lm_eval_deepen.config import MemberConfig

_PLACES = ("tokenizer", "peft", "delta")  # loading arguments that may name a folder, beside `pretrained`
# What decides a model's answers; logs, states of a training and pages about the model do not.
_DECIDING = (
    "*.safetensors", "pytorch_model*.bin", "adapter_model*.bin", "*.gguf", "config.json", "generation_config.json",
    "adapter_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt",
    "*.model", "chat_template*",
)  # fmt: skip
_PARTS, _PART = 64, 1 << 14  # of a large file, which are read: another training changes weights everywhere


def digests(members: Sequence[MemberConfig]) -> dict[str, str]:
    """Return digests of the files in the folders that members are loaded from, by folder; a hub name has none."""
    named = [place for one in members for place in (one.pretrained, *(one.loading.get(key) for key in _PLACES))]
    folders = [place for place in dict.fromkeys(named) if isinstance(place, str) and os.path.isdir(place)]
    found = {}
    for place in folders:
        paths = [path for path in Path(place).iterdir() if any(fnmatch(path.name, known) for known in _DECIDING)]
        stats = [(path, path.stat()) for path in sorted(paths) if path.is_file()]
        found[place] = _digest(tuple((path, stat.st_size, stat.st_mtime_ns) for path, stat in stats))
    return found


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
