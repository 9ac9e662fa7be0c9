"""Recipes: every shipped one is checked, a wrong field is named, and the harness takes them as they are."""

from __future__ import annotations

import re
from pathlib import Path

import lm_eval
import pytest
import yaml
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from lm_eval_deepen.config.files import read_ensemble_file
from lm_eval_deepen.config.recipes import RecipeKeys, shipped_recipes
from lm_eval_deepen.errors import ConfigError
from lm_eval_deepen.harness.ensemble_recipe import find_recipe, load_recipe
from lm_eval_deepen.harness.model import configure

ROOT = Path(__file__).resolve().parents[2]
FILES = list(shipped_recipes("ensemble").values())
PAPER = [path for path in FILES if path.name.startswith("deepen_")]
PAPER_MEMBERS = {
    "meta-llama/Llama-2-13b-hf", "mistralai/Mistral-7B-v0.1", "internlm/internlm-20b", "Skywork/Skywork-13B-base",
    "TigerResearch/tigerbot-13b-base-v2", "01-ai/Yi-6B", "Nanbeige/Nanbeige-16B-Base", "mistralai/Mixtral-8x7B-v0.1",
    "NousResearch/Llama-2-70b-hf", "facebook/nllb-200-distilled-600M",
}  # fmt: skip
GOOD = {
    "title": "a pair",
    "task": "deepen_nq",
    "members": [{"pretrained": "org/a", "weight": 0.5}, {"pretrained": "org/b", "weight": 0.5}],
    "method": "deepen",
    "expected": [{"task": "deepen_nq", "score": 31.5, "table": "1", "read_in": "somewhere"}],
}


def write(tmp_path: Path, **changes: object) -> Path:
    path = tmp_path / "recipe.yaml"
    content = {key: value for key, value in {**GOOD, **changes}.items() if value != "leave out"}
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


# --- what ships


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_shipped_recipe_is_sound(path: Path) -> None:
    raw = yaml.safe_load(path.read_text("utf-8"))
    recipe = load_recipe(path)
    assert "expected" in raw and recipe.title and recipe.task
    known = {file.stem for file in (ROOT / "task_configs").rglob("*.yaml")}
    assert set(recipe.task) <= known
    config = recipe.configure()
    assert len({member.name for member in config.members}) == len(config.members) >= 2
    assert raw["pretrained"] == config.members[0].pretrained
    assert sum(config.weights) == pytest.approx(1)
    # what `--model_args pretrained=FILE` gives
    assert configure({"pretrained": str(path)}) == config


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_the_papers_recipes_run_its_procedure_on_its_models(path: Path) -> None:
    recipe = load_recipe(path)
    config = recipe.configure()
    assert config.compat == "reference" and config.method == "deepen"
    assert config.options_dict()["learning_rate"] > 0
    assert {member.pretrained for member in config.members} <= PAPER_MEMBERS
    assert {task.removesuffix("_released") for task in recipe.task} == {entry.task for entry in recipe.expected}
    assert recipe.source and recipe.note
    for entry in recipe.expected:
        assert entry.table and entry.read_in and entry.score is not None and 0 < entry.score < 100
    count = path.stem.rpartition("_")[2]
    assert not count.isdigit() or len(config.members) == int(count)


def test_the_translator_reads_the_sentence_that_its_task_asks_about() -> None:
    """The recipe's pattern finds the last sentence of the task's prompt, examples or not."""
    recipe = find_recipe("deepen_llama2_13b_nllb_en_de")
    source = recipe.configure().members[1]
    assert source.source_pattern is not None
    prompt = "English: A dog.\nGerman: Ein Hund.\n\nEnglish: A cat, a bird.\nGerman:"
    assert re.findall(source.source_pattern, prompt)[-1] == "A cat, a bird."
    text = load_yaml(ROOT / "task_configs" / "deepen_paper" / f"{recipe.task[0]}.yaml")["doc_to_text"]
    assert re.findall(source.source_pattern, text.replace("{{source}}", "A cat.")) == ["A cat."]
    assert (source.source_language, source.target_language) == ("eng_Latn", "deu_Latn")


# --- reading them


def test_recipe_keys_are_no_ensemble_keys(tmp_path: Path) -> None:
    path = write(tmp_path, source="a paper", note="a note", harness={"apply_chat_template": True})
    assert not {*RecipeKeys.names(), "kind"} & read_ensemble_file(path).keys()
    recipe = load_recipe(path)
    assert recipe.task == ("deepen_nq",)
    assert recipe.expected[0].score == 31.5
    assert recipe.harness.given() == {"apply_chat_template": True}
    assert (recipe.source, recipe.note) == ("a paper", "a note")
    assert configure({"pretrained": str(path)}).weights == (0.5, 0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expcted": []}, r"recipe\.yaml: unknown key 'expcted'\. Did you mean 'expected'\?"),
        ({"metod": "deepen"}, r"recipe\.yaml: unknown key 'metod'\. Did you mean 'method'\?"),
        ({"learning_rat": 1}, r"unknown key 'learning_rat'\. Did you mean 'learning_rate'\?"),
        ({"harness": {"apply_chat_templat": True}}, r"harness: unknown key .* Did you mean 'apply_chat_template'\?"),
        ({"expected": [{"task": "deepen_nq", "scor": 1}]}, r"expected\[0\]: unknown key 'scor'\. Did you mean 'score'"),
        ({"expected": [{"task": "deepen_mq", "note": "x"}]}, r"task must be one of the recipe's \(deepen_nq\)"),
        ({"expected": [{"task": "deepen_nq", "score": 1}]}, r"expected\[0\]: a score needs read_in"),
        ({"expected": [{"task": "deepen_nq"}]}, r"expected\[0\]: without a score, a note must say why"),
        ({"expected": [{"task": "deepen_nq", "score": "x", "read_in": "y"}]}, r"expected\[0\]: score must be a number"),
        ({"expected": {"task": "deepen_nq"}}, "expected must be a list with one entry for each published score"),
        ({"expected": ["deepen_nq"]}, r"expected\[0\] must be a mapping with task, score"),
        ({"task": 3}, "task must be a name or a list of names"),
        ({"harness": []}, "") ,
        ({"members": [{"pretrained": "org/a", "wieght": 1}]}, r"unknown key 'wieght'\. Did you mean 'weight'\?"),
        ({"compat": "reference", "inverse": "em"}, "compat=reference sets inverse"),
    ],
)  # fmt: skip
def test_what_a_recipe_must_not_say(tmp_path: Path, changes: dict, message: str) -> None:
    if not message:  # an empty value stands for nothing
        assert load_recipe(write(tmp_path, **changes)).harness.given() == {}
        return
    with pytest.raises(ConfigError, match=message):
        load_recipe(write(tmp_path, **changes))


def test_a_recipe_is_found_by_file_by_name_and_inline(tmp_path: Path) -> None:
    path = write(tmp_path)
    assert find_recipe(str(path)).title == "a pair"
    (tmp_path / "lr=0.1").mkdir()
    assert find_recipe(str(write(tmp_path / "lr=0.1"))).title == "a pair"  # a file, though its path has a =
    shipped = find_recipe("deepen_nq_4")
    assert shipped == find_recipe("deepen_nq_4.yaml") == load_recipe(ROOT / "matrices" / "deepen_nq_4.yaml")
    changed = find_recipe(f"pretrained={path},weights=0.25+0.75")
    assert (changed.task, changed.configure().weights) == (("deepen_nq",), (0.25, 0.75))
    assert find_recipe("org/model").configure().members[0].pretrained == "org/model"
    assert find_recipe('{"pretrained": "a", "members": ["a", "b"]}').configure().weights == (0.5, 0.5)
    assert find_recipe("pretrained=a,members=a+b,method=gac").configure().method == "gac"
    with pytest.raises(ConfigError, match=r"deepen_nq_44\.yaml: no such file .* Did you mean 'deepen_nq_4'\?"):
        find_recipe("deepen_nq_44.yaml")


def test_an_instruct_recipe_runs_with_each_members_own_rendering(tmp_path: Path, pico: dict[str, Path]) -> None:
    """As instruct_smollm2_gemma3_base: one member has a chat template, the other reads plain text."""
    shipped = find_recipe("instruct_smollm2_gemma3_base")
    members = [{"pretrained": str(pico[name])} for name in ("bytelevel", "metaspace")]
    keys = {"chat_fallback": shipped.arguments["chat_fallback"], "harness": shipped.harness.given()}
    path = write(tmp_path, members=members, task="deepen_demo_short", expected="leave out", self_check=False, **keys)
    recipe = load_recipe(path)
    results = lm_eval.simple_evaluate(
        model="deepen",
        model_args={"pretrained": str(path), "matrix_dir": str(tmp_path)},
        tasks=list(recipe.task),
        task_manager=TaskManager(include_path=str(ROOT / "task_configs"), include_defaults=False),
        device="cpu",
        limit=2,
        num_fewshot=1,
        bootstrap_iters=0,
        **recipe.harness.given(),
    )
    assert results is not None and results["n-samples"]["deepen_demo_short"]["effective"] == 2
    assert results["config"]["deepen"]["members"][1]["chat_template"] is False
    without = write(tmp_path, members=members, task="deepen_demo_short", expected="leave out")
    assert load_recipe(without).configure().chat_fallback == "error"


def test_a_member_may_be_read_from_elsewhere(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path))
    config = recipe.configure({"b": str(tmp_path)})
    assert [member.pretrained for member in config.members] == ["org/a", str(tmp_path)]
    assert [member.name for member in config.members] == ["a", "b"]
    with pytest.raises(ConfigError, match="--member bb: unknown.* Members: a, b"):
        recipe.configure({"bb": "x"})
