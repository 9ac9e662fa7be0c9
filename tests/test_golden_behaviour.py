"""What people rely on stays as it is: fingerprints, identities, the keys of results, and what every command takes."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).with_name("golden_behaviour")
IDENTITIES = ("configurations", "recipes", "leaderboards", "builds", "matrices")


def writer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("golden_behaviour_write", FOLDER / "write.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module


WRITER = writer()


def plain(found: object) -> object:
    return json.loads(json.dumps(found))


@pytest.mark.parametrize("name", IDENTITIES)
def test_fingerprints_and_identities_are_those_of_finished_results(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change here makes finished cells, built models and matrices void: is that meant?"""
    monkeypatch.delenv("LM_EVAL_DEEPEN_DATA", raising=False)
    frozen, found = WRITER.read(name), plain(WRITER.WRITERS[name]())
    assert found.keys() == frozen.keys()
    for case in frozen:
        assert found[case] == frozen[case], case


def test_every_key_of_the_results_is_still_there(pico: dict[str, Path]) -> None:
    """New keys are welcome; whoever reads results finds the old ones."""
    found = WRITER.results(pico)
    gone = {case: sorted(set(keys) - set(found[case])) for case, keys in WRITER.read("results").items()}
    assert gone == dict.fromkeys(gone, [])


def test_every_command_takes_what_it_took() -> None:
    """Meant to change? ``python tests/golden_behaviour/write.py help`` writes it anew."""
    frozen, found = WRITER.read("help"), plain(WRITER.help_texts())
    assert found.keys() == frozen.keys()
    for command in frozen:
        assert found[command] == frozen[command], command
