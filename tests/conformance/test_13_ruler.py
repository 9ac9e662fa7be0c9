"""Item 13 on a task of the harness as it is: RULER's synthetic needle in a haystack, which needs no download."""

from __future__ import annotations

import multiprocessing
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import lm_eval
import pytest
from harness import HARNESS_05, deepen, hf
from lm_eval.tasks import TaskManager

TASK = "niah_single_1"
LENGTH = 600  # tokens of the main member: from 5 sentences on, of which the generator of 0.4.12 takes no fewer
CONTEXT = 768  # rotary positions have no end
PATIENCE_S = 120


@pytest.fixture
def words(monkeypatch):
    """Few words to make needles of: the harness multiplies its lists to ten million, which takes long and stays."""
    nltk = pytest.importorskip("nltk")
    monkeypatch.setattr(nltk.data, "find", lambda *_, **__: None)  # else it is fetched, to split sentences elsewhere
    wonderwords = ModuleType("wonderwords")
    categories = {"nouns": ["fox", "dog", "forest"], "adjectives": ["quick", "lazy"], "verbs": ["walk"]}
    wonderwords.RandomWord = lambda: SimpleNamespace(_categories=categories)
    monkeypatch.setitem(sys.modules, "wonderwords", wonderwords)
    yield
    for name in [name for name in sys.modules if name.startswith("lm_eval.tasks.ruler.")]:
        del sys.modules[name]


def must_end(generate):
    """Try in a process of its own what may never end: 0.4.12 goes on shortening what has its shortest length."""
    child = multiprocessing.get_context("fork").Process(target=generate, daemon=True)
    child.start()
    child.join(PATIENCE_S)
    if child.is_alive():
        child.kill()
        pytest.fail(f"the harness's generator of texts of {LENGTH} tokens did not end in {PATIENCE_S} s")


@pytest.fixture
def needle(pico, words):
    """Evaluate a model on the task, whose 500 needles are drawn once, or each time from the same seed."""
    metadata = {"max_seq_lengths": [LENGTH], "tokenizer": str(pico["bytelevel"])}
    folder = str(Path(lm_eval.__file__).parent / "tasks" / "ruler")
    manager = TaskManager(include_path=folder, include_defaults=False, metadata=metadata)
    must_end(lambda: manager.load([TASK]))
    task = TASK if HARNESS_05 else manager.load([TASK])["tasks"][TASK]

    def run(model):
        found = lm_eval.simple_evaluate(model=model, tasks=[task], task_manager=manager, limit=2, bootstrap_iters=0)
        assert found["results"][TASK][f"{LENGTH},none"] in (0.0, 0.5, 1.0)
        return [(sample["arguments"], sample["resps"]) for sample in found["samples"][TASK]]

    return run


def test_13_a_ruler_task_gives_the_answers_of_hf_and_runs_with_two_members(needle, pico, tmp_path):
    theirs = needle(hf(pico["bytelevel"], max_length=CONTEXT))
    assert needle(deepen(pico["bytelevel"], batch_size=2, max_length=CONTEXT)) == theirs
    pair = (pico["bytelevel"], pico["metaspace"])
    both = needle(deepen(*pair, batch_size=2, matrix_dir=str(tmp_path), max_length=CONTEXT))
    assert [arguments for arguments, _ in both] == [arguments for arguments, _ in theirs]
    assert [answer for _, answer in both] != [answer for _, answer in theirs]
