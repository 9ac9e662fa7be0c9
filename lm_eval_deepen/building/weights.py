"""What identifies the weights of a model folder."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

from lm_eval_deepen.errors import ConfigError

PATTERNS = ("*.safetensors", "pytorch_model*.bin", "*.gguf")


def weights_sha256(folder: Path) -> str:
    """Return the SHA-256 hex digest of a folder's weight files, in the order of their names.

    Raises:
        ConfigError: there are none.
    """
    for pattern in PATTERNS:
        files = sorted(folder.glob(pattern))
        if files:
            digests = [_file_sha256(file, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
            return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    raise ConfigError(
        f"{folder} holds no weights ({', '.join(PATTERNS)}); give the folder of a model, as save_pretrained writes it"
    )


@lru_cache(maxsize=256)
def _file_sha256(path: Path, size: int, changed: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
