"""Finished parts of a run, kept in a folder, so that a run that was stopped goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from costs.figures import Figure


class Parts:
    """One JSON file per part."""

    def __init__(self, folder: Path | None, about: Mapping[str, Any]) -> None:
        """Keep parts in `folder` (None: nowhere); a part of another run, `about` which differs, is not read."""
        self.folder, self.about = folder, json.loads(json.dumps(about))

    def read(self, name: str) -> list[Figure] | None:
        """Return the figures of a part that is there, None where it has to be measured."""
        path = self._path(name)
        if path is None or not path.exists():
            return None
        found = json.loads(path.read_text("utf-8"))
        if found["about"] != self.about:
            return None
        return [Figure(**figure) for figure in found["figures"]]

    def write(self, name: str, figures: Sequence[Figure]) -> None:
        """Keep a finished part: all of it or, if the run is stopped now, nothing."""
        path = self._path(name)
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        plain = [{key: value for key, value in figure.as_dict().items() if key != "verdict"} for figure in figures]
        draft = path.with_suffix(".part")
        draft.write_text(json.dumps({"about": self.about, "figures": plain}), "utf-8")
        os.replace(draft, path)

    def _path(self, name: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{name}.json"
