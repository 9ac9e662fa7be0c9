"""Item 24: processes of one launch give the single process's result, and none of them waits for ever.

The harness shards documents over ranks for models that ask for it. That changes randomly drawn few-shots, and
fails where a rank has no document, so `lm_eval_deepen.harness.distributed` shares the requests instead.
"""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate.commands import launch
from accelerate.commands.config import config_args
from harness import deepen, hf, requests
from installed import copy_harness
from lm_eval.api.model import CachingLM
from ports import free_port
from processes import PATIENCE_S, compact, job_of, left_of_group, log_of, reports, run_worker

from lm_eval_deepen.harness import distributed
from lm_eval_deepen.harness.distributed import Ranks
from lm_eval_deepen.harness.model import DeepenLM

TASKS = ["conf_choice", "conf_text", "conf_answer"]
FULL = {"tasks": TASKS, "num_fewshot": 2}
LISTS = [[["The fox", " jumps"], ["The fox", " walks"], ["café", " 🙂"]], [["Sofia is", " the capital"]]]
ACCELERATE_CONFIG = """
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_GPU
num_machines: 1
num_processes: 1
use_cpu: true
"""
HALF = ["half \ud83d", " a character"]
ONE = [["The quick brown", {"until": ["\n"], "max_gen_toks": 4}]]


def same(got, expected):
    """Compare JSON data, numbers with a tolerance: batches of another make-up round differently."""
    if isinstance(expected, dict):
        assert got.keys() == expected.keys()
        for key in expected:
            same(got[key], expected[key])
    elif isinstance(expected, list):
        assert len(got) == len(expected)
        for mine, other in zip(got, expected, strict=True):
            same(mine, other)
    elif isinstance(expected, float):
        assert got == pytest.approx(expected, rel=1e-4, abs=1e-4)
    else:
        assert got == expected


@pytest.fixture(scope="module")
def paths(pico):
    return [pico["bytelevel"], pico["metaspace"]]


@pytest.fixture(scope="module")
def single(paths, matrices):
    return deepen(*paths, batch_size=2, rows="embedding", matrix_dir=matrices)


@pytest.fixture(scope="module")
def killed(paths, single, matrices, task_folder, tmp_path_factory):
    """A run of two ranks with a response cache, one of which was killed at a random forward pass."""
    folder = tmp_path_factory.mktemp("killed")
    steps = [["run", "evaluate", {**FULL, "use_cache": str(folder / "responses")}]]
    job = job_of(folder, paths, task_folder, steps, rows="embedding", matrix_dir=matrices)
    job["die_at_forward"] = {"1": random.Random(3).randrange(10, 30)}
    return SimpleNamespace(job=job, ended=run_worker(job, ranks=2), answered=log_of(job, "run"))


@pytest.fixture(scope="module")
def ranks(paths, killed, task_folder, tmp_path_factory):
    """What two ranks report of one launch: runs, caches and errors in turn."""
    folder = tmp_path_factory.mktemp("ranks")
    CachingLM(hf(paths[0]), str(folder / "foreign_rank1.db")).loglikelihood(requests("loglikelihood", ("a", " b")))
    cached = killed.job["steps"][0][2]
    device = [
        {"name": "a", "pretrained": str(paths[0])},
        {"name": "b", "pretrained": str(paths[1]), "device": "cuda:1"},
    ]
    steps = [
        ["full", "evaluate", FULL],
        ["limit", "evaluate", {**FULL, "limit": 1}],
        ["own", "ask", ["loglikelihood", LISTS]],
        ["one", "ask", ["generate_until", [ONE, ONE]]],
        ["none", "ask", ["loglikelihood_rolling", [[], []]]],
        ["resumed", "evaluate", cached],
        ["again", "evaluate", cached],
        ["foreign", "evaluate", {**FULL, "use_cache": str(folder / "foreign")}],
        ["device", "load", [device]],
        ["aside", "ask", ["loglikelihood", [[*LISTS[0], HALF, [None, " x"]]] * 2]],
        ["own_aside", "ask", ["loglikelihood", [LISTS[0], [HALF, *LISTS[1]]]]],
        ["after", "ask", ["generate_until", [ONE, ONE]]],
    ]
    job = job_of(folder, paths, task_folder, steps, rows="embedding", matrix_dir=str(folder / "matrices"))
    ended = run_worker(job, ranks=2)
    return SimpleNamespace(job=job, ended=ended, reports=reports(folder, ended), folder=folder)


def test_two_ranks_give_the_single_result(ranks, single, evaluate):
    """Few-shots are drawn at random, 5 and 3 documents do not divide by 2, and there are three request types."""
    expected = compact(evaluate(single, *TASKS, num_fewshot=2))
    first, second = (report["full"]["found"] for report in ranks.reports)
    assert second is None  # the harness writes results once
    same(first["results"], expected["results"])
    same(first["samples"], expected["samples"])
    assert [report["ranks"] for report in ranks.reports] == [[0, 2], [1, 2]]


def test_each_rank_forwards_its_share(ranks, single):
    forwards = [report["full"]["forwards"] for report in ranks.reports]
    assert min(forwards) > max(forwards) / 3


def test_diagnostics_are_sums_over_the_ranks(ranks):
    found = ranks.reports[0]["full"]["found"]["deepen"]
    own = [report["full"]["own"]["fused"] for report in ranks.reports]
    assert min(own) > 0 and found["steps_fused"] == sum(own)
    changed = sum(report["full"]["own"]["argmax_changed"] for report in ranks.reports)
    assert found["argmax_differs_from_main"] == pytest.approx(changed / sum(own))


def test_a_limit_below_the_number_of_ranks(ranks, single, evaluate):
    """One document for two ranks, the second of which has no request of two types."""
    expected = compact(evaluate(single, *TASKS, num_fewshot=2, limit=1))
    found = ranks.reports[0]["limit"]["found"]
    same(found["results"], expected["results"])
    same(found["samples"], expected["samples"])


def test_uneven_lists_one_request_and_none(ranks, single):
    for report, pairs in zip(ranks.reports, LISTS, strict=True):
        expected = single.loglikelihood(requests("loglikelihood", *map(tuple, pairs)))
        same(report["own"], [list(answer) for answer in expected])
        assert report["one"] == report["after"] == single.generate_until(requests("generate_until", tuple(ONE[0])))
        assert report["none"] == []


def test_a_matrix_is_built_by_one_rank(ranks):
    assert sorted(name for report in ranks.reports for name in report["built"]) == ["m0", "m1"]
    assert len(list((ranks.folder / "matrices").glob("*.safetensors"))) == 2


def test_only_the_first_rank_shows_progress(ranks):
    shown = ["Running loglikelihood requests: " in process.stderr for process in ranks.ended]
    assert shown == [True, False]


def test_the_ranks_part_before_the_interpreter_ends(ranks):
    """A thread of gloo that frees a tensor during finalization aborts the process, now and then, after its results."""
    assert left_of_group(ranks.folder, 2) == [{"group": False, "threads": []}] * 2


def test_a_killed_rank_ends_the_others(killed):
    """The survivor fails where it would wait, instead of hanging or reporting half a result."""
    first, second = (process.returncode for process in killed.ended)
    assert second == -signal.SIGKILL
    assert first not in (0, -signal.SIGKILL)
    assert killed.answered


def test_the_ranks_resume_from_what_all_of_them_had(killed, ranks, single, evaluate):
    """Whichever rank had an answer, no rank computes it again; then all of them hold everything."""
    before = [key for _, key in killed.answered]
    after = [key for _, key in log_of(ranks.job, "resumed")]
    assert before and after and not set(before) & set(after)
    assert {rank for rank, _ in log_of(ranks.job, "resumed")} == {0, 1}
    expected = compact(evaluate(single, *TASKS, num_fewshot=2))
    for label in ("resumed", "again"):
        found = ranks.reports[0][label]["found"]
        same(found["results"], expected["results"])
        same(found["samples"], expected["samples"])
    assert [report["again"]["forwards"] for report in ranks.reports] == [0, 0]
    assert log_of(ranks.job, "again") == []
    assert set(before) | set(after) == {key for _, key in log_of(ranks.job, "full")}


def test_no_request_is_answered_by_two_ranks(ranks):
    by_rank = [{key for rank, key in log_of(ranks.job, "full") if rank == own} for own in (0, 1)]
    assert by_rank[0] and by_rank[1] and not by_rank[0] & by_rank[1]


def test_a_foreign_cache_of_one_rank_is_refused_by_all(ranks):
    for report in ranks.reports:
        assert "CacheError" in report["foreign"]["error"] and "foreign_rank1.db" in report["foreign"]["error"]


def test_a_device_for_one_member_needs_a_single_process(ranks):
    for report in ranks.reports:
        assert "ConfigError" in report["device"]["error"]
        assert "member 'b' asks for device 'cuda:1', but 2 processes share this run" in report["device"]["error"]


def test_every_rank_raises_the_same_error_where_one_has_a_request_without_an_answer(ranks):
    """Also where each has requests of its own; all others are answered before, by the rank that has them."""
    for step, documents in (("aside", [3, 4]), ("own_aside", [0])):
        (first,), (second,) = ({report[step]["error"]} for report in ranks.reports)
        assert first == second and first.startswith("UnansweredError: ")
        assert [f"task 'task', document {document}: the context" in first for document in documents]
    assert len(log_of(ranks.job, "aside")) == len(LISTS[0])
    assert len(log_of(ranks.job, "own_aside")) == len(LISTS[0]) + len(LISTS[1])
    for report in ranks.reports:
        assert report["after"] == report["one"]  # nobody waits for ever


def test_shares_are_a_partition_that_keeps_contexts_together():
    arguments = [(f"context {index // 3}" + "x" * (index % 7), f" choice {index}") for index in range(50)]
    arguments += [("", "alone"), ("", "alone too"), (arguments[0][0], " again")]
    for whole in (False, True):
        shares = [Ranks(index, 4).share(arguments, whole) for index in range(4)]
        assert sorted(index for share in shares for index in share) == list(range(len(arguments)))
        assert max(map(len, shares)) - min(map(len, shares)) <= 4
        for context in {context for context, *_ in arguments} - (set() if whole else {""}):
            holders = {n for n, share in enumerate(shares) if any(arguments[i][0] == context for i in share)}
            assert len(holders) == 1
    assert [Ranks(index, 3).share(arguments[:1]) for index in range(3)] == [[0], [], []]


def test_sampled_repeats_do_not_depend_on_the_ranks():
    """A repeat of a context has a seed of its own, counted by the rank that has the context."""
    arguments = [(context, {"do_sample": True}) for context in ("a", "", "b", "", "a", "")]
    for share in (Ranks(index, 2).share(arguments, whole=True) for index in range(2)):
        for context in {arguments[index][0] for index in share}:
            assert [i for i in share if arguments[i][0] == context] == [
                i for i, (other, _) in enumerate(arguments) if other == context
            ]


def test_tensor_parallel_members_share_nothing(single, monkeypatch):
    """Every process runs every request: a collective over ranks would wait for requests that nobody skips."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(distributed, "PartialState", None)
    keys = {"tp_plan": "auto"}
    config = SimpleNamespace(members=[SimpleNamespace(name="a", loading_dict=lambda: keys)])
    ranks = Ranks.join(config)
    assert ranks == Ranks(0, 1, slices=2, slice=1) and not ranks.speaks and Ranks().speaks
    # in groups, which are the processes that follow each other, as on one node
    keys["tp_size"] = 2
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(distributed, "_store", lambda slices: None)
    for process in range(4):
        monkeypatch.setenv("RANK", str(process))
        ranks = Ranks.join(config)
        assert ranks == Ranks(process // 2, 2, slices=2, slice=process % 2) and ranks.process == process
        assert ranks.share([("a", "b"), ("c", "d")]) == [process // 2]


def test_a_launcher_that_starts_one_process_is_named(single, monkeypatch, caplog):
    """`accelerate launch --cpu --num_processes 2` starts one process, without a word."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with caplog.at_level(logging.WARNING):
        assert Ranks.join(single.ensemble_config) == Ranks(0, 1)
    assert "--multi_gpu" in caplog.text


@pytest.mark.parametrize("arguments", [{"parallelize": True}, {"device_map": "auto"}], ids=str)
def test_a_member_is_spread_as_by_hf(paths, single, matrices, tmp_path, monkeypatch, arguments):
    """Without a GPU, `parallelize` leaves nothing but the disk: weights are fetched when they are used."""
    monkeypatch.chdir(tmp_path)  # where `hf` puts what it offloads
    batch = requests("loglikelihood", ("The fox", " jumps"), ("café", " 🙂"))
    texts = requests("generate_until", *map(tuple, ONE))
    alone, theirs = deepen(paths[0], **arguments), hf(paths[0], **arguments)
    for got, expected in zip(alone.loglikelihood(batch), theirs.loglikelihood(batch), strict=True):
        assert got == pytest.approx(expected, abs=1e-4)
    assert alone.generate_until(texts) == theirs.generate_until(texts)
    members = [{"name": "m0", "pretrained": str(paths[0]), **arguments}, {"name": "m1", "pretrained": str(paths[1])}]
    own = str(tmp_path / "matrices")
    both = DeepenLM(str(paths[0]), members=members, device="cpu", rows="embedding", matrix_dir=own)
    for got, expected in zip(both.loglikelihood(batch), single.loglikelihood(batch), strict=True):
        assert got == pytest.approx(expected, abs=1e-4)
    assert both.generate_until(texts) == single.generate_until(texts)
    names = [sorted(file.name for file in Path(folder).glob("*.safetensors")) for folder in (matrices, own)]
    assert len(names[0]) == 2 and names[0] == names[1]  # a name holds the fingerprint of the embedding rows


@pytest.fixture
def launcher_of(monkeypatch, tmp_path):
    """Which of its launchers `accelerate launch` would use, and for how many processes."""
    config = tmp_path / "accelerate" / "default_config.yaml"
    config.parent.mkdir()
    for kind in ("cuda", "xpu"):
        monkeypatch.setattr(f"torch.{kind}.device_count", lambda: 0)
    for module in (launch, config_args):
        monkeypatch.setattr(module, "default_config_file", str(config))

    def chosen(*flags, distributed_type=None):
        config.unlink(missing_ok=True)
        if distributed_type is not None:
            config.write_text(ACCELERATE_CONFIG.replace("MULTI_GPU", distributed_type))
        found = []
        for name in ("simple_launcher", "multi_gpu_launcher"):
            monkeypatch.setattr(launch, name, lambda args, name=name: found.append((name, args.num_processes)))
        launch.launch_command(launch.launch_command_parser().parse_args([*flags, "-m", "lm_eval"]))
        return found[0]

    return chosen


def test_accelerate_launch_starts_two_processes_without_a_gpu(launcher_of):
    """By a flag, or by its config file; `--cpu` and MULTI_CPU start one, which is warned of."""
    document = (Path(__file__).resolve().parents[2] / "docs" / "conformance.md").read_text()
    assert textwrap.indent(ACCELERATE_CONFIG.strip(), "    ") in document
    two = ("--num_processes", "2")
    assert launcher_of(*two, distributed_type="MULTI_GPU") == ("multi_gpu_launcher", 2)
    assert launcher_of("--multi_gpu", *two) == ("multi_gpu_launcher", 2)
    assert launcher_of(*two) == launcher_of("--cpu", *two) == ("simple_launcher", 2)
    assert launcher_of(*two, distributed_type="MULTI_CPU") == ("simple_launcher", 2)


def test_accelerate_launch_num_processes_2_gives_the_single_result(
    paths, single, matrices, evaluate, task_folder, tmp_path, read_results
):
    members = [{"name": f"m{index}", "pretrained": str(path)} for index, path in enumerate(paths)]
    model_args = {"pretrained": str(paths[0]), "members": members, "batch_size": 2}
    model_args |= {"rows": "embedding", "matrix_dir": matrices}
    copy_harness(tmp_path / "lib")
    found_in = os.pathsep.join([str(tmp_path / "lib"), *filter(None, [os.environ.get("PYTHONPATH")])])
    home = tmp_path / "home"
    (home / "accelerate").mkdir(parents=True)
    (home / "accelerate" / "default_config.yaml").write_text(ACCELERATE_CONFIG)
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"]
    launcher += ["--main_process_port", str(free_port())]
    command = ["-m", "lm_eval", "run", "--model", "deepen", "--model_args", json.dumps(model_args)]
    command += ["--tasks", "conf_choice", "--num_fewshot", "1", "--limit", "3", "--device", "cpu"]
    command += ["--include_path", str(task_folder), "--output_path", str(tmp_path / "out"), "--log_samples"]
    process = subprocess.run(
        [*launcher, *command],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HOME": str(home), "PYTHONPATH": found_in},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    results, samples = read_results(tmp_path / "out")
    expected = compact(evaluate(single, "conf_choice", num_fewshot=1, limit=3))
    got = {key: value for key, value in results["results"]["conf_choice"].items() if "stderr" not in key}
    same(got, {key: value for key, value in expected["results"]["conf_choice"].items() if "stderr" not in key})
    assert [row["doc_id"] for row in samples] == [0, 1, 2]
    assert [row["prompt_hash"] for row in samples] == [row["prompt_hash"] for row in expected["samples"]["conf_choice"]]
    assert results["config"]["deepen"]["steps_fused"] > 0
