"""`lm-eval-deepen build` on pico models: what it makes, and what it says where there is nothing to make."""

import re
from pathlib import Path

import pytest

from lm_eval_deepen.cli import main as cli


def built(pico: dict[str, Path], folder: Path, capsys: pytest.CaptureFixture[str], options: str) -> list[str]:
    arguments = f"pretrained={pico['bytelevel']},members={pico['bytelevel']}+{pico['metaspace']},{options}"
    assert cli.main(["build", arguments, "--matrix-dir", str(folder)]) == 0
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("method", ["deepen", "unite", "mined", "eva"])
def test_every_file_that_a_method_keeps_has_a_line(
    method: str, pico: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    head, *lines = built(pico, tmp_path, capsys, f"method={method}")
    assert str(tmp_path) in head
    named = {match[1] for line in lines if (match := re.search(r"MB.*, (\S+\.safetensors)$", line))}
    assert named == {path.name for path in tmp_path.glob("*.safetensors")}
    assert named


def test_a_method_without_files_says_so(pico: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert built(pico, tmp_path, capsys, "method=gac") == [
        "nothing to build: method gac keeps no file for these members"
    ]
    assert not list(tmp_path.iterdir())
