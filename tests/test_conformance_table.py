"""docs/conformance.md lists what the conformance suite holds."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def maker():
    spec = importlib.util.spec_from_file_location("make_table", ROOT / "tests" / "conformance" / "make_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_document_is_up_to_date(maker):
    assert maker.main(["--check"]) == 0, "run python tests/conformance/make_table.py"


def test_a_stale_document_is_found_and_only_its_table_is_written(maker, tmp_path, monkeypatch, capsys):
    stale = tmp_path / "conformance.md"
    stale.write_text(maker.filled(maker.DOCUMENT.read_text(), "| old |"))
    monkeypatch.setattr(maker, "DOCUMENT", stale)
    assert maker.main(["--check"]) == 1 and "is stale" in capsys.readouterr().err
    assert maker.main([]) == 0 and maker.main(["--check"]) == 0
    assert stale.read_text() == (ROOT / "docs" / "conformance.md").read_text()
    stale.write_text("no marks")
    with pytest.raises(ValueError, match="lacks the marks"):
        maker.main([])


def test_every_item_has_a_test_and_every_test_an_item(maker, tmp_path):
    assert all(maker.tests_by_item(maker.HERE).values())
    (tmp_path / "test_numberless.py").write_text("def test_nothing(): pass\n")
    with pytest.raises(ValueError, match="test_numberless.py: neither its name nor test_nothing begins with"):
        maker.tests_by_item(tmp_path)
    (tmp_path / "test_numberless.py").write_text("def test_01_something(): pass\n")
    with pytest.raises(ValueError, match="no test shows item 02, 03"):
        maker.tests_by_item(tmp_path)
