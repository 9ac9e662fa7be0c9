"""A leaderboard on Ray: the table of one process, also where a worker is killed in the middle."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from boards import executed, planned, write_recipe
from installed import without_packages
from run_files import local_tasks

from lm_eval_deepen.errors import ConfigError
from lm_eval_deepen.leaderboard import cluster
from lm_eval_deepen.leaderboard.table import measure, rendered


@pytest.fixture(scope="module")
def recipe(pico, tmp_path_factory):
    root = tmp_path_factory.mktemp("cluster")
    (root / "tasks").mkdir()
    local_tasks(root / "tasks")
    raw = {
        "kind": "leaderboard",
        "members": [
            {"name": "A", "pretrained": str(pico["bytelevel"])},
            {"name": "B", "pretrained": str(pico["metaspace"])},
        ],
        "common": {"matrix_dir": str(root / "matrices")},
        "grid": {"orders": ["A+B"], "methods": ["deepen", "gac"], "poolings": ["none", "logp-mean"]},
        "tasks": [{"task": "conf_choice", "metric": ["acc"]}],
        "include_path": str(root / "tasks"),
        "resamples": 100,
    }
    return write_recipe(root, raw)


def figures(todo, cells):
    """Return the table but for its times, and the samples of every cell."""
    table = json.loads(rendered(measure(todo, cells), "json"))
    for row in table["rows"]:
        row.pop("extra")  # seconds and tokens
    samples = {key: [line.samples for line in cell.runs().values()] for key, cell in cells.items()}
    values = {
        key: [[(s.doc_id, s.values) for s in one.by_filter[flt].values()] for one in found for flt in one.by_filter]
        for key, found in samples.items()
    }
    return table, values


@pytest.fixture(scope="module")
def in_one_process(recipe, tmp_path_factory):
    return figures(*executed(recipe, tmp_path_factory.mktemp("one")))


def test_groups_are_the_rows_of_the_same_members(recipe, tmp_path):
    groups = cluster.groups_of(planned(recipe, tmp_path))
    assert [group.members for group in groups] == [("A",), ("B",), ("A", "B")]
    together = [name for name, _ in groups[-1].keys]
    assert "A+B deepen" in together and "A+B gac" in together
    left = groups[-1].without({groups[-1].keys[0]: None})
    assert left.keys == groups[-1].keys[1:] and left.attempt == 2


def test_without_ray_the_extra_is_named(recipe, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'lm_eval_deepen\[ray\]'"):
        cluster.execute_on_ray(planned(recipe, tmp_path), cluster.LOCAL, "cpu", lambda text: None)


@pytest.fixture
def ray(monkeypatch, tmp_path_factory):
    found = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    places = [Path(__file__).resolve().parents[2], without_packages(tmp_path_factory.mktemp("pip"))]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, places)))
    found.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield found
    found.shutdown()


def workers() -> list[int]:
    """Return the processes that evaluate a group."""
    found = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"ray::evaluate_group" in place.read_bytes():
                found.append(int(place.parent.name))
        except OSError:
            continue
    return found


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="finds the worker in /proc")
def test_a_killed_worker_costs_its_unfinished_cells_alone(recipe, tmp_path, ray, in_one_process):
    todo = planned(recipe, tmp_path)
    told: list[str] = []

    def say(text: str) -> None:
        told.append(text)
        if "A+B deepen: conf_choice" in text:  # the first cell of its group; the others are to come
            for process in workers():
                os.kill(process, signal.SIGKILL)

    cells = cluster.execute_on_ray(todo, cluster.LOCAL, "cpu", say)
    assert any("died" in text and "go to another one" in text for text in told)
    assert sum("A+B deepen: conf_choice" in text for text in told) == 1
    assert figures(todo, cells) == in_one_process
    assert planned(recipe, tmp_path).missing == []
