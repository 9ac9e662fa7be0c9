"""An error reaches a person in one line: one cause, one remedy, and the nearest name of what was misspelt."""

from __future__ import annotations

import subprocess
import sys
import traceback
from pathlib import Path

import lm_eval
import lm_eval.__main__ as harness
import pytest
from installed import copy_harness
from lm_eval.tasks import TaskManager

from lm_eval_deepen.cli import main as cli
from lm_eval_deepen.config.recipes import KINDS, shipped_recipes
from lm_eval_deepen.errors import CacheError, ConfigError, DeepenError, RequestError
from lm_eval_deepen.harness.model import DeepenLM, configure

ROOT = Path(__file__).resolve().parents[2]
TASKS = ROOT / "task_configs" / "demo"
FILE = "kind: ensemble\nmembers: [org/a, org/b]\nmethod: gac\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ensemble.yaml").write_text(FILE)
    (tmp_path / "broken.yaml").write_text("kind: ensemble\nmembers: [a, b\nmethod: gac\n")
    (tmp_path / "wrong.yaml").write_text(FILE + "treshold: 0.5\n")
    return tmp_path


class Command:
    """What stands for the harness's parser, which reads thousands of task files before anything else."""

    def __init__(self, **arguments: object) -> None:
        self.arguments = arguments

    def parse_args(self) -> None:
        pass

    def execute(self, _: None) -> None:
        tasks = TaskManager(include_path=str(TASKS), include_defaults=False)
        lm_eval.simple_evaluate("deepen", tasks=["deepen_demo_short"], task_manager=tasks, limit=1, **self.arguments)


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the harness's command in this process to its end, as Python would; returns status and what was said."""

    def run(model_args: str, **more: object) -> tuple[int, str]:
        monkeypatch.setattr(harness, "HarnessCLI", lambda: Command(model_args=model_args, device="cpu", **more))
        monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
        try:
            harness.cli_evaluate()
        except DeepenError as error:
            capsys.readouterr()
            with pytest.raises(SystemExit) as stop:
                sys.excepthook(type(error), error, error.__traceback__)
            return int(str(stop.value.code)), capsys.readouterr().err
        raise AssertionError("nothing was refused")

    return run


# ---- under the harness's own command


@pytest.mark.parametrize(
    ("model_args", "told"),
    [
        ("pretrained=org/a,methd=gac", ["unknown key 'methd'", "Did you mean 'method'"]),
        ("pretrained=ensemble.yaml,methd=gac", ["unknown key 'methd'", "Did you mean 'method'"]),
        ("pretrained=ensemble.yaml,threshold=7", ["threshold must be a number above 0 and up to 1; got 7"]),
        ("pretrained=wrong.yaml", ["wrong.yaml: unknown key 'treshold'", "Did you mean 'threshold'"]),
        ("pretrained=wrong.yaml,method=unite", ["wrong.yaml: unknown key 'treshold'"]),
        ("pretrained=broken.yaml", ["broken.yaml is not valid YAML: line 3, column 7", "correct it"]),
        ("pretrained=ensembl.yaml", ["ensembl.yaml: no such file", "Did you mean 'ensemble.yaml'"]),
        ("pretrained=deepen_nq_22", ["'deepen_nq_22' is no shipped recipe", "Did you mean 'deepen_nq_2'"]),
        ("pretrained=merge_ties", ["of kind merge", "`lm-eval-deepen make` takes it"]),
        ("pretrained=org/no-such-model-here", ["'no-such-model-here'", "Check the path or hub name"]),
        ('{"pretrained": "org/a", "members": "org/a+org/b", "weights": [1, 1]}', ["sum to 2, not to 1", "0.5+0.5"]),
        ('{"pretrained": "org/a", "seed": 1, "seed": 2}', ["the key 'seed' twice"]),
    ],
)
def test_a_bad_argument_is_one_line_and_status_2(folder, run, model_args: str, told: list[str]) -> None:
    if "seed" in model_args:  # the harness itself reads JSON of the command line, where the last one wins
        with pytest.raises(ConfigError, match=told[0]):
            DeepenLM.create_from_arg_string(model_args)
        return
    status, said = run(model_args)
    assert status == 2 and said.startswith("error: ") and said.count("\n") == 1, said
    assert all(words in said for words in told), said
    if "ensemble.yaml," in model_args:
        assert "ensemble.yaml" not in said  # a key of the command line is no fault of the file


@pytest.mark.parametrize("kind", [RequestError, CacheError])
def test_what_ends_a_run_later_is_told_alike(pico, run, monkeypatch, kind: type[DeepenError]) -> None:
    def fail(*_: object) -> None:
        raise kind("some document: it cannot be. Leave it out.")

    monkeypatch.setattr(DeepenLM, "generate_until", fail)
    status, said = run(f"pretrained={pico['bytelevel']}")
    assert (status, said) == (2, "error: some document: it cannot be. Leave it out.\n")


def test_a_program_gets_the_exception(folder) -> None:
    before = sys.excepthook
    with pytest.raises(ConfigError, match="unknown key 'methd'"):
        lm_eval.simple_evaluate(model="deepen", model_args="pretrained=org/a,methd=gac", tasks=["x"])
    assert sys.excepthook is before


def test_a_process_of_its_own_ends_so(folder) -> None:
    code = "from lm_eval_deepen._startup.registration import register; register()\nimport lm_eval.__main__ as main"
    code += "\nmain.cli_evaluate()"
    copy_harness(folder)  # where the process starts
    asked = "run --model deepen --model_args pretrained=org/a,methd=gac --tasks deepen_demo_short --include_path"
    command = [sys.executable, "-c", code, *asked.split(), str(TASKS)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr and ended.stderr.splitlines()[-1].startswith("error: unknown key 'methd'")


# ---- our own commands


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("leaderbord x", "Did you mean 'leaderboard'"),
        ("leaderboard x --lmit 3", "Did you mean '--limit'"),
        ("compare a b --metrc acc", "Did you mean '--metric'"),
        ("leaderboard x --format jsn", "Did you mean 'json'"),
        ("path recipe", "Did you mean 'recipes'"),
        ("bpb x --limit many", "--limit: many: must be a whole number of at least 1"),
        ("leaderboard x --limit 1.5", "a number of documents, or a share below 1"),
        ("gate --baseline a", "the following arguments are required: --candidate"),
        ("leaderboard a b", "b: one argument too many"),
        ("leaderboard leaderbord_siblings", "Did you mean 'leaderboard_siblings'"),
        ("leaderboard none.yaml", "none.yaml: no such file"),
        ("leaderboard deepen_nq_2", "`lm-eval-deepen inspect`"),
        ("make merge_tie out", "Did you mean 'merge_ties'"),
        ("make leaderboard_siblings out", "`lm-eval-deepen leaderboard` takes it"),
        ("make gpt2 out", "gpt2: no such recipe"),
        ("bpb smollm2_gemma", "Did you mean 'smollm2_gemma3'"),
        ("bpb merge_ties.yaml", "`lm-eval-deepen make` takes it"),
        ("tune clm_sibling", "`lm-eval-deepen make` takes it"),
        ("build pretrained=ensemble.yaml,methd=gac", "unknown key 'methd'. Did you mean 'method'"),
        ("build {", "the ensemble is not JSON"),
        ("leaderboard broken.yaml", "broken.yaml is not valid YAML: line 3, column 7"),
    ],
)
def test_a_misspelt_word_is_one_line_with_the_nearest(folder, capsys, arguments: str, told: str) -> None:
    try:
        status = cli.main(arguments.split())
    except SystemExit as stop:
        status = int(str(stop.code))
    said = capsys.readouterr().err
    assert status == 2 and said.startswith("error: ") and said.count("\n") == 1, said
    assert told in said, said


@pytest.mark.parametrize(
    ("recipe", "told"),
    [
        ("deepen_nq_22", "Did you mean 'deepen_nq_2'"),
        ("merge_ties.yaml", "`lm-eval-deepen make` takes it"),
        ("leaderboard_siblings", "`lm-eval-deepen leaderboard` takes it"),
        ("wrong.yaml", "wrong.yaml: unknown key 'treshold'"),
    ],
)
def test_inspect_says_it_as_a_problem(folder, capsys, recipe: str, told: str) -> None:
    assert cli.main(["inspect", recipe, "--no-tasks"]) == 1
    said = capsys.readouterr().out
    assert told in said and said.count("\n") == 2


def test_all_problems_of_a_file_are_told_at_once(folder) -> None:
    (folder / "many.yaml").write_text(
        "kind: ensemble\nmembers: [{pretrained: org/a, temperature: -1}, {pretrained: org/b, wieght: 1}]\n"
        "method: gac\nthreshold: 2\nseed: x\nutility: f1\n"
    )
    with pytest.raises(ConfigError) as found:
        configure({"pretrained": "many.yaml"})
    problems = found.value.problems
    assert {(one.key, one.code) for one in problems} == {
        ("members[0].temperature", "value"),
        ("members[1].wieght", "unknown_key"),
        ("threshold", "value"),
        ("seed", "value"),
        ("utility", "conflict"),
    }
    assert all(one.where[0] == "many.yaml" for one in problems)
    head, *lines = str(found.value).splitlines()
    assert head == "many.yaml: 5 problems:" and len(lines) == 5


# ---- recipes by name and kind


def test_every_shipped_recipe_says_its_kind_and_is_found_by_name_everywhere(folder) -> None:
    from lm_eval_deepen.build import read_build
    from lm_eval_deepen.config.recipes import find_recipe_file, recipe_file

    by_kind = {kind: shipped_recipes(kind) for kind in KINDS}
    assert sum(map(len, by_kind.values())) == len(shipped_recipes())
    for name, path in shipped_recipes().items():
        assert find_recipe_file(name) == find_recipe_file(f"{name}.yaml") == recipe_file(name) == path
    for name in by_kind["ensemble"]:
        assert configure({"pretrained": name}) == configure({"pretrained": f"{name}.yaml"})
    for name in (*by_kind["merge"], *by_kind["distill"]):
        assert read_build(name) == read_build(f"{name}.yaml")


@pytest.mark.parametrize("name", ["gpt2", "org/deepen_nq_22", "org/smollm2", "./here", "here", "distilgpt2"])
def test_what_is_no_recipes_name_is_a_model(folder, name: str) -> None:
    (folder / "here").mkdir()
    assert configure({"pretrained": name}).members[0].pretrained == name


def test_a_folder_of_the_name_of_a_recipe_is_a_model(folder) -> None:
    (folder / "smollm2_gemma3").mkdir()
    assert len(configure({"pretrained": "smollm2_gemma3"}).members) == 1
    (folder / "smollm2_gemma3").rmdir()
    assert len(configure({"pretrained": "smollm2_gemma3"}).members) == 2


def test_a_file_without_its_kind_loads_with_a_warning(folder, caplog) -> None:
    (folder / "old.yaml").write_text(FILE.partition("\n")[2])
    assert configure({"pretrained": "old.yaml"}) == configure({"pretrained": "ensemble.yaml"})
    configure({"pretrained": "old.yaml"})
    assert [record.getMessage() for record in caplog.records if "old.yaml" in record.getMessage()] == [
        "old.yaml does not say what it is: add `kind: ensemble` to it"
    ]
    (folder / "odd.yaml").write_text("kind: ensembel\nmembers: [a]\n")
    with pytest.raises(ConfigError, match="odd.yaml: kind 'ensembel' is unknown. Did you mean 'ensemble'"):
        configure({"pretrained": "odd.yaml"})


def test_the_help_of_an_exception_is_kept_for_programs(folder) -> None:
    with pytest.raises(ConfigError) as found:
        configure({"pretrained": "wrong.yaml"})
    assert "treshold" in "".join(traceback.format_exception(found.value))
