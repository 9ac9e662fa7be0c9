"""Digests that identify the weights of a model folder."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

from lm_eval_deepen.errors import ConfigError
from lm_eval_deepen.storage import sha256

PATTERNS = ("*.safetensors", "pytorch_model*.bin", "*.gguf")


def weights_sha256(folder: Path) -> str:
    """Return the SHA-256 hex digest of a folder's weight files, in the order of their names; ConfigError for none."""
    for pattern in PATTERNS:
        files = sorted(folder.glob(pattern))
        if files:
            digests = [_file_sha256(file, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
            return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    raise ConfigError(
        f"{folder} holds no weights ({', '.join(PATTERNS)}); give the folder of a model, as save_pretrained writes it"
    )


def hub_file(place: str, name: str) -> Path:
    """Return a file of a model on the hub; raises whatever the hub's client does where it cannot be had."""
    from huggingface_hub import hf_hub_download

    repository, _, revision = place.partition("+")[0].partition("@")
    return Path(hf_hub_download(repository, name, revision=revision or None))


@lru_cache(maxsize=256)
def snapshot_of(place: str) -> Path | None:
    """Return the folder in the hub's cache with a model's configuration; None where it cannot be had.

    Its name is the commit.
    """
    try:
        return hub_file(place, "config.json").parent
    except Exception:  # loading the model says what is wrong; who only asks what there is to do needs no hub
        return None


def commit_of(place: str) -> str | None:
    """Return the commit of a model on the hub; None where it cannot be had."""
    folder = snapshot_of(place)
    return None if folder is None else folder.name


@lru_cache(maxsize=256)
def _file_sha256(path: Path, size: int, changed: int) -> str:
    return sha256(path)
