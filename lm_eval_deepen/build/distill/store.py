"""The distributions of one source on a list of blocks, on disk: the k largest entries of each, six bytes an entry.

Blocks are written in groups, each file in one step, so that a run that was killed goes on with the next group. A folder
belongs to one source, text and number of entries; its name says which.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from lm_eval_deepen.errors import MatrixError, StorageError, one_line
from lm_eval_deepen.relative.files import CHECKSUM, content_hash, identity_hash
from lm_eval_deepen.storage import reason, used, write_json, write_tensors

log = logging.getLogger(__name__)

FORMAT = "lm-eval-deepen-distributions-1"
GROUP = 8  # blocks per file
HASH_LENGTH = 16

_open: WeakSet[DistributionStore] = WeakSet()  # of this process


@dataclass(frozen=True, eq=False)
class BlockRows:
    """A source's distributions at the S positions of a block."""

    ids: NDArray[np.int32]  # the most likely ids, the likeliest first [S, k] (int32)
    logp: NDArray[np.float16]  # their natural log-probabilities [S, k] (float16)
    nats: float  # what the source needs to predict the whole block

    @property
    def num_bytes(self) -> int:
        """Size of the entries."""
        return self.ids.nbytes + self.logp.nbytes


class DistributionStore:
    """The folder of one source's distributions."""

    def __init__(self, root: Path, name: str, identity: Mapping[str, Any], blocks: int) -> None:
        """Open the folder below `root` for a source's distributions on so many blocks, or make it.

        The source's name is part of the folder's, and so is a digest of all that decides the content (`identity`).

        Raises:
            MatrixError: a folder that cannot be written.
        """
        self.identity = {"format": FORMAT, "group": GROUP, **identity}
        slug = re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("._") or "source"
        self.folder = root / f"{slug[:60]}-{identity_hash(self.identity)[:HASH_LENGTH]}"
        self.blocks = blocks
        self._held: tuple[int, list[BlockRows]] = (-1, [])
        _use_open()
        _open.add(self)
        try:
            write_json(self.folder / "identity.json", self.identity, indent=1)
        except StorageError as error:
            raise MatrixError(
                f"folder {self.folder} cannot be written ({reason(error)}). Give another with store: or XDG_CACHE_HOME."
            ) from error

    def missing(self) -> list[list[int]]:
        """Return the groups of blocks without a file, or with a damaged one, each as indices of blocks."""
        groups = range(-(-self.blocks // GROUP))
        members = ([*range(g * GROUP, min((g + 1) * GROUP, self.blocks))] for g in groups)
        return [group for group in members if not self._is_there(self.number(group))]

    @staticmethod
    def number(group: Sequence[int]) -> int:
        """Return the number of a group from the indices of its blocks."""
        return group[0] // GROUP

    def _is_there(self, number: int) -> bool:
        if not self._path(number).exists():
            return False
        try:
            self._read(number)
        except MatrixError as error:
            log.warning("%s It is made anew now.", error)
            return False
        return True

    def write(self, group: Sequence[int], rows: Sequence[BlockRows]) -> None:
        """Write the blocks of a group in one step; raises StorageError where they cannot be written."""
        _use_open()
        tensors = {
            "ids": torch.from_numpy(np.concatenate([block.ids for block in rows])),
            "logp": torch.from_numpy(np.concatenate([block.logp for block in rows])),
            "counts": torch.tensor([len(block.ids) for block in rows]),
            "nats": torch.tensor([block.nats for block in rows], dtype=torch.float64),
        }
        write_tensors(self._path(self.number(group)), tensors, {CHECKSUM: content_hash(tensors, self.identity)})

    def block(self, index: int) -> BlockRows:
        """Return the distributions of one block; MatrixError for a file that is missing, or damaged by now."""
        number = index // GROUP
        if self._held[0] != number:
            self._held = (number, self._read(number))
        return self._held[1][index % GROUP]

    def occurring(self) -> list[int]:
        """Return every id that occurs, ascending."""
        ids: set[int] = set()
        for index in range(self.blocks):
            ids.update(np.unique(self.block(index).ids).tolist())
        return sorted(ids)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.safetensors"

    def _read(self, number: int) -> list[BlockRows]:
        path = self._path(number)
        try:
            with safe_open(path, framework="pt") as file:
                checksum = (file.metadata() or {}).get(CHECKSUM)
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise MatrixError(f"{path} cannot be read ({one_line(error)}).") from error
        if content_hash(tensors, self.identity) != checksum:
            raise MatrixError(f"{path} is damaged: its checksum differs.")
        used(path)
        edges = np.concatenate([[0], np.cumsum(tensors["counts"].numpy())])
        ids, logp, nats = (tensors[key].numpy() for key in ("ids", "logp", "nats"))
        pairs = zip(edges, edges[1:], nats, strict=False)
        return [BlockRows(ids[start:end], logp[start:end], float(own)) for start, end, own in pairs]


def _use_open() -> None:
    """Keep the sources that were read before: a full cache gives up what was not used for an hour."""
    for store in _open:
        used(store.folder)
