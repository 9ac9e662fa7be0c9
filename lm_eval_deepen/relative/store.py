"""The matrix store: a folder of relative matrices, each built once, on first use, verified on every load."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from lm_eval_deepen.errors import MatrixError, StorageError
from lm_eval_deepen.relative.files import FORMAT, MatrixInfo, describe, identity_hash, read_matrix, write_matrix
from lm_eval_deepen.relative.matrix import RelativeMatrix
from lm_eval_deepen.relative.member_view import MemberView
from lm_eval_deepen.relative.rows_from_bytes import NO_TOKENIZERS, Tokenizers, anchor_classes, class_matrix
from lm_eval_deepen.relative.rows_from_embeddings import MatrixSpec, build_matrix, described_rows, duplicates_apart
from lm_eval_deepen.storage import cache_folder, locked, make_folder, reason, used
from lm_eval_deepen.vocabulary.anchors import AnchorSet, anchor_ids, duplicates

HASH_LENGTH = 12  # hex digits of the identity in a file name; the whole identity is checked on load

_in_use: WeakValueDictionary[tuple[Any, ...], RelativeMatrix] = WeakValueDictionary()  # by file and identity


def default_folder() -> Path:
    """Return the folder of built matrices in the user's cache."""
    return cache_folder() / "matrices"


class MatrixStore:
    """Relative matrices by member, anchors and `MatrixSpec`.

    Args:
        folder: where matrix files are; None is `default_folder`.
        progress: show a progress bar while building.
    """

    def __init__(self, folder: Path | str | None = None, progress: bool = True) -> None:
        """Nothing is read or created before the first `get`."""
        self.folder = default_folder() if folder is None else Path(folder)
        self.progress = progress

    def identity(
        self, member: MemberView, anchors: AnchorSet, spec: MatrixSpec, tokenizers: Tokenizers = NO_TOKENIZERS
    ) -> dict[str, Any]:
        """Return everything that decides the content of a matrix."""
        common = {
            "format": FORMAT,
            "tokenizer": member.vocabulary.fingerprint,
            "anchors": anchors.fingerprint,
            "rows": spec.rows,
        }
        if spec.from_bytes:
            spelt = {"tokenizers": list(tokenizers.fingerprints)} if spec.pieces == "canonical" else {}
            return {**common, "pieces": spec.pieces, "dtype": "float16", **spelt}
        temperature = {"temperature": float(spec.temperature)} if spec.entropy is None else {"entropy": spec.entropy}
        # A matrix without such pieces is what it was before these shared a row.
        apart = duplicates_apart(member.vocabulary, frozenset(anchors.pieces), spec.rows)
        return {
            **common,
            "embedding": member.fingerprint(spec.embeddings),
            "normalization": spec.normalization,
            **temperature,
            "top_m": spec.top_m,
            "dtype": "float16" if spec.top_m else "float32",
            **({} if spec.pieces == "embedding" else {"pieces": spec.pieces}),
            **({"duplicates": "one row"} if apart else {}),
        }

    def path(
        self, member: MemberView, anchors: AnchorSet, spec: MatrixSpec, tokenizers: Tokenizers = NO_TOKENIZERS
    ) -> Path:
        """Return the file of a matrix, whether or not it exists."""
        return self._file(member.name, self.identity(member, anchors, spec, tokenizers))

    def _file(self, name: str, identity: Mapping[str, Any]) -> Path:
        """Return the file of an identity. A file that was made under another name is used."""
        short = identity_hash(identity)[:HASH_LENGTH]
        with explained(self.folder):
            existing = sorted(self.folder.glob(f"*-{short}.safetensors"))
        slug = re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("._") or "member"
        return existing[0] if existing else self.folder / f"{slug[:80]}-{short}.safetensors"

    def get(
        self, member: MemberView, anchors: AnchorSet, spec: MatrixSpec, tokenizers: Tokenizers = NO_TOKENIZERS
    ) -> RelativeMatrix:
        """Return a matrix; the tokenizers of all members are needed where rows are canonical.

        Raises:
            MatrixError: a matrix that cannot be built; else as `fetch`.
        """

        def build() -> tuple[RelativeMatrix, list[int]]:
            vocabulary = member.vocabulary
            ids = anchor_ids(vocabulary, anchors)
            if spec.from_bytes:
                spellers = tokenizers if spec.pieces == "canonical" else NO_TOKENIZERS
                classes = anchor_classes(vocabulary, anchors, spellers)
                return class_matrix(classes, described_rows(vocabulary, spec.rows), len(anchors)), ids
            rows, alike = member.load_rows(spec.embeddings), duplicates(vocabulary, anchors)
            return build_matrix(member.name, vocabulary, rows, ids, alike, spec, progress=self.progress), ids

        return self.fetch(member.name, self.identity(member, anchors, spec, tokenizers), build)[0]

    def info(
        self, member: MemberView, anchors: AnchorSet, spec: MatrixSpec, tokenizers: Tokenizers = NO_TOKENIZERS
    ) -> MatrixInfo:
        """Return what the file of a built matrix says of itself: size, dropped mass, build time, checksum."""
        return describe(self.path(member, anchors, spec, tokenizers))

    def fetch(
        self, name: str, identity: Mapping[str, Any], build: Callable[[], tuple[RelativeMatrix, list[int]]]
    ) -> tuple[RelativeMatrix, Path]:
        """Return a matrix and its file; where the file is missing, build it while other processes wait for it.

        Args:
            name: whose matrix it is, for the file's name and messages; it decides nothing.
            identity: everything that decides the content.
            build: returns the matrix, and the id of every anchor.

        Raises:
            MatrixError: a file that is damaged or was built for something else, or a folder that cannot be written.
        """
        path = self._file(name, identity)
        with explained(self.folder):
            exists = path.exists()
        if not exists:
            with contextlib.ExitStack() as stack:
                with explained(self.folder):
                    make_folder(self.folder)
                    stack.enter_context(locked(self.folder / f".{identity_hash(identity)[:HASH_LENGTH]}.lock"))
                path = self._file(name, identity)
                if not path.exists():  # else another process built it while this one waited
                    started = time.monotonic()
                    matrix, ids = build()
                    with explained(self.folder):
                        write_matrix(path, matrix, ids, identity, time.monotonic() - started)
        return read_once(path, identity, name), path


def read_once(path: Path, identity: Mapping[str, Any], member: str) -> RelativeMatrix:
    """Return the matrix of a file: one object in this process, while any fuser uses it and the file is the same.

    Arguments and errors as `read_matrix`.
    """
    with explained(path.parent):
        file = path.stat()
        key = (path.resolve(), file.st_ino, file.st_size, file.st_mtime_ns, identity_hash(identity))
    used(path)
    matrix = _in_use.get(key)
    if matrix is None:
        matrix = _in_use[key] = read_matrix(path, identity, member)
    return matrix


@contextlib.contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Turn what the file system refuses into an error that names the folder of matrices."""
    try:
        yield
    except (OSError, StorageError) as error:
        raise MatrixError(
            f"Matrix folder {folder} cannot be used ({reason(error)}). Give a folder that can be written, "
            "with matrix_dir or XDG_CACHE_HOME."
        ) from error
