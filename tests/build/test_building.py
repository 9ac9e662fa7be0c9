"""Built models: dispatch, provenance, what is kept of an interrupted build, texts, and the command."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import yaml
from harness import HARNESS_05
from lm_eval.api.samplers import FirstNSampler
from pico import CORPUS
from run_files import local_tasks
from safetensors.torch import save_file
from sibling_models import configured, family_of, merge_of, parsed, tensors, write_sibling

import lm_eval_deepen
from lm_eval_deepen.build import build, distill, read_build, texts
from lm_eval_deepen.build import merge as merging
from lm_eval_deepen.build import publish as making
from lm_eval_deepen.build.provenance import DamagedError, lineage
from lm_eval_deepen.build.weights import weights_sha256
from lm_eval_deepen.cli import main as cli
from lm_eval_deepen.engine.calibration import load_documents
from lm_eval_deepen.errors import ConfigError, DeepenError, StorageError
from lm_eval_deepen.harness.tasks import TaskSpec, load_tasks

CLM = {"method": "clm", "target": "base", "train_tokens": 100}


@pytest.fixture(scope="module")
def family(pico, tmp_path_factory):
    return family_of(pico["bytelevel"], tmp_path_factory.mktemp("family"))


@pytest.fixture
def trained(monkeypatch):
    """In place of training: copies the target, notes what it was called with."""
    calls = []

    def fake(recipe, out, members):
        calls.append((dict(recipe), dict(members)))
        write_sibling(Path(members[recipe["target"]]), out / "model", recipe["seed"])
        for path in (out / "model").iterdir():
            shutil.move(path, out / path.name)
        (out / "model").rmdir()
        return {"tokens_trained": recipe["train_tokens"], "held_out": {"bits_per_byte": 1.5}, "versions": {"x": "1"},
                "recipe": {"method": "clm", "warmup": 0.1}}  # fmt: skip

    monkeypatch.setattr(distill, "build", fake)
    return calls


@pytest.fixture
def averaged(monkeypatch):
    """In place of mergekit: the first model as it is."""

    def fake(recipe, out, members):
        merging.check_inputs(recipe, recipe.places(members))
        shutil.copytree(next(iter(recipe.places(members).values())), out, dirs_exist_ok=True)
        return {"tokens_trained": 0}

    monkeypatch.setattr(merging, "merge", fake)


def test_a_trained_model_is_what_distill_makes_of_the_recipe(family, tmp_path, trained):
    (tmp_path / "text.txt").write_text("one\n\ntwo\n")
    raw = {**CLM, "title": "t", "note": "n", "seed": 5, "text": "text.txt", "models": {"base": "org/other"}}
    found = build(parsed(raw, tmp_path), tmp_path / "out", {"base": family["base"], "s1": family["s1"]})
    [(recipe, members)] = trained
    assert recipe == {**CLM, "seed": 5, "text": [str(tmp_path / "text.txt")], "models": {"base": "org/other"}}
    assert members == {"base": family["base"]}  # --member stands above the recipe's own models
    assert found == json.loads((tmp_path / "out" / "provenance.json").read_text())
    weights = weights_sha256(tmp_path / "out")
    assert found["weights_sha256"] == weights and found["seed"] == 5 and found["method"] == "clm"
    assert found["trained"] == {weights: 100} and found["tokens_trained"] == 100
    assert found["held_out"] == {"bits_per_byte": 1.5} and found["settings"] == {"method": "clm", "warmup": 0.1}
    assert found["versions"]["lm_eval_deepen"] == lm_eval_deepen.__version__
    assert {"x", "torch", "transformers", "python"} <= found["versions"].keys()
    assert found["models"] == {"base": {"weights_sha256": weights_sha256(Path(family["base"]))}}
    assert str(tmp_path) not in json.dumps(found)


def test_bits_per_byte_are_those_of_the_model(family, tmp_path, averaged):
    from lm_eval_deepen.engine import Ensemble
    from lm_eval_deepen.engine.bits_per_byte import Reading
    from lm_eval_deepen.engine.calibration import default_text
    from lm_eval_deepen.harness.model import configure
    from lm_eval_deepen.tuning.comparison import own

    found = build(parsed(merge_of("linear", ["s1", "s2"], base=None), tmp_path), tmp_path / "out", family)
    documents = load_documents([default_text()])
    pair = configure({"pretrained": family["s1"], "members": [family["s1"], family["s2"]], "method": "gac"})
    bits = float(own(Reading.of(Ensemble.load(pair, "cpu"), documents, 1)).bits.sum())
    num_bytes = sum(document.num_bytes for document in documents)
    assert found["bits_per_byte"]["value"] == pytest.approx(bits / num_bytes, rel=1e-5)
    assert found["bits_per_byte"]["bytes"] == num_bytes


def test_documents_longer_than_a_context_are_measured_in_blocks(family, tmp_path):
    long = making.measured_bits(Path(family["s1"]))
    short = making.measured_bits(configured(Path(family["s1"]), tmp_path / "short", max_position_embeddings=64))
    assert short["bytes"] == long["bytes"] and short["value"] != long["value"] == pytest.approx(short["value"], rel=0.1)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(making, "measured_bits", lambda folder: {"value": 2.0, "text": "t"})


def test_every_training_is_counted_once(family, tmp_path, trained, averaged, quick):
    members = dict(family)
    for i in (0, 1):
        build(parsed({**CLM, "seed": i}, tmp_path), tmp_path / f"c{i}", members)
        members[f"c{i}"] = str(tmp_path / f"c{i}")
    build(parsed(merge_of("linear", ["c0", "c1"], base=None), tmp_path), tmp_path / "m", members)
    members["m"] = str(tmp_path / "m")
    found = build(parsed({**CLM, "target": "m", "train_tokens": 7}, tmp_path), tmp_path / "last", members)
    assert sum(lineage(members["m"]).values()) == 200
    assert sum(found["trained"].values()) == 207
    again = build(parsed(merge_of("linear", ["m", "c0"], base=None), tmp_path), tmp_path / "again", members)
    assert sum(again["trained"].values()) == 200 and again["tokens_trained"] == 0
    assert lineage(family["base"]) == lineage("org/model") == {}


def test_what_is_there_is_kept_and_what_is_other_is_refused(family, tmp_path, trained, quick):
    out = tmp_path / "out"
    first = build(parsed(CLM, tmp_path), out, family)
    assert build(parsed({**CLM, "title": "another title"}, tmp_path), out, family) == first and len(trained) == 1
    for raw, members in (
        ({**CLM, "seed": 1}, family),
        ({**CLM, "train_tokens": 101}, family),
        (CLM, {**family, "base": family["s1"]}),  # other weights by the same name
    ):
        with pytest.raises(ConfigError, match=r"out holds another model: clm of base, identity \w+, \w+ wanted"):
            build(parsed(raw, tmp_path), out, members)
    assert build(parsed({**CLM, "seed": 1}, tmp_path), out, family, redo=True)["seed"] == 1
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    with pytest.raises(ConfigError, match="full is not empty, and holds no built model"):
        build(parsed(CLM, tmp_path), tmp_path / "full", family)
    with pytest.raises(ConfigError, match="full is not empty, and holds no built model"):
        build(parsed(CLM, tmp_path), tmp_path / "full", family, redo=True)
    assert (tmp_path / "full" / "thesis.txt").exists()
    assert {path.name for path in tmp_path.iterdir() if "partial" in path.name} == set()


def test_a_model_never_replaces_what_it_is_made_from(family, tmp_path, trained, quick, monkeypatch):
    base = shutil.copytree(family["base"], tmp_path / "base")
    for redo in (False, True):
        with pytest.raises(ConfigError, match="base is the model 'base' that the recipe is made from"):
            build(parsed(CLM, tmp_path), base, {"base": str(base)}, redo=redo)
    assert tensors(base)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="is the current folder, which the model would replace"):
        build(parsed(CLM, tmp_path), Path("."), family)
    build(parsed(CLM, tmp_path), Path("here"), family)
    assert (tmp_path / "here" / "provenance.json").is_file()


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"method": "fusellm", "target": "x", "sources": ["y"], "fusoin": "avgce"}, "unknown key 'fusoin'.*'fusion'"),
        ({"method": "clm", "target": "x", "learning_rate": "fast"}, "learning_rate must be a number"),
        ({"method": "clm"}, "target is missing"),
        ({"method": "clm", "target": "x", "sources": ["y"]}, "'sources' is given"),
        ({"method": "clm", "target": "x", "metadata": 3}, "metadata must be a mapping"),
    ],
)
def test_a_training_is_checked_when_its_recipe_is_read(tmp_path, raw, message):
    with pytest.raises(ConfigError, match=f"recipe.yaml: .*{message}"):
        parsed(raw, tmp_path)


def test_models_of_the_hub_count_by_their_commit(tmp_path, monkeypatch):
    from lm_eval_deepen.build import provenance, recipe

    first = parsed({**CLM, "target": "org/model"}, tmp_path)
    unknown = first.identity({})  # there is no hub here
    monkeypatch.setattr(recipe, "commit_of", lambda place: "abc")
    known = first.identity({})
    monkeypatch.setattr(recipe, "commit_of", lambda place: "abd")
    assert len({unknown, known, first.identity({})}) == 3
    folder = tmp_path / "abd"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    monkeypatch.setattr(provenance, "snapshot_of", lambda place: folder)
    said = provenance.described("m", "org/model")
    assert said == {"pretrained": "org/model", "revision": "abd", "weights_sha256": weights_sha256(folder)}


def test_the_default_text_is_part_of_what_is_built(family, tmp_path, monkeypatch):
    from lm_eval_deepen.build.distill import corpus

    first = parsed(CLM, tmp_path).identity(family)
    monkeypatch.setattr(corpus, "neutral_documents", lambda: ["another Python's documentation"])
    assert parsed(CLM, tmp_path).identity(family) != first


def test_the_same_weights_elsewhere_are_the_same_model(family, tmp_path, pico):
    recipe = parsed(CLM, tmp_path)
    moved = shutil.copytree(pico["bytelevel"], tmp_path / "moved")
    assert recipe.identity(family) == recipe.identity({"base": str(moved)})
    assert recipe.identity(family) != recipe.identity({"base": "org/model"})
    elsewhere = parsed({**CLM, "models": {"base": "x/y"}, "device": "cpu"}, tmp_path)
    assert elsewhere.identity(family) == recipe.identity(family)
    (tmp_path / "a.txt").write_text("one\n")
    texts_ = parsed({**CLM, "text": "a.txt"}, tmp_path)
    before = texts_.identity(family)
    (tmp_path / "a.txt").write_text("two\n")
    assert texts_.identity(family) != before


def test_an_interrupted_training_is_taken_up_and_a_failed_merge_leaves_nothing(family, tmp_path, monkeypatch, quick):
    seen = []

    def killed(recipe, out, members):
        seen.append(sorted(path.name for path in out.iterdir() if not path.name.startswith(".")))
        (out / "checkpoint-1").mkdir(exist_ok=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(distill, "build", killed)
    out = tmp_path / "out"
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            build(parsed(CLM, tmp_path), out, family)
    assert seen == [[], ["checkpoint-1"]] and not out.exists()
    with pytest.raises(ConfigError, match="holds an unfinished training by another recipe .*--redo discards it"):
        build(parsed({**CLM, "seed": 1}, tmp_path), out, family)
    with pytest.raises(KeyboardInterrupt):
        build(parsed({**CLM, "seed": 1}, tmp_path), out, family, redo=True)
    assert seen[-1] == []

    def refused(recipe, out, members):
        (out / "model.safetensors").touch()
        raise ConfigError("no")

    monkeypatch.setattr(merging, "merge", refused)
    with pytest.raises(ConfigError, match="no"):
        build(parsed(merge_of("linear", ["s1", "s2"]), tmp_path), tmp_path / "merged", family)
    assert not list(tmp_path.glob(".merged.partial*"))


def test_two_processes_do_not_build_one_model(family, tmp_path, trained):
    from filelock import FileLock

    with FileLock(tmp_path / ".out.lock"), pytest.raises(ConfigError, match="out: another process builds this model"):
        build(parsed(CLM, tmp_path), tmp_path / "out", family)


def test_recipes_of_files(tmp_path):
    (tmp_path / "clm_a.yaml").write_text(yaml.safe_dump({**CLM, "seed": 3}))
    found = read_build(tmp_path / "clm_a.yaml", {"shard": [1, 3], "seed": 4})
    assert found.content["shard"] == [1, 3] and found.seed == 4 and found.models == ("base",)
    with pytest.raises(ConfigError, match="clm_b.yaml: no such file .* Did you mean 'clm_a.yaml'"):
        read_build(tmp_path / "clm_b.yaml")
    with pytest.raises(ConfigError, match="models must map names to folders or hub names; got"):
        parsed({**CLM, "models": ["base"]}, tmp_path).places({})


@pytest.mark.parametrize("method", ["clm", "fusellm"])
def test_what_distill_really_makes_is_taken(family, pico, tmp_path, method):
    (tmp_path / "text.txt").write_text("\n\n".join(line for line in CORPUS.splitlines() if line.strip()))
    raw = {"method": method, "target": "base", "text": "text.txt", "train_tokens": 60, "context_length": 32, "seed": 1,
           "batch_size": 2, "held_out": 0.3, "device": "cpu"}  # fmt: skip
    raw |= {"sources": ["other"], "store": str(tmp_path / "store")} if method == "fusellm" else {}
    found = build(parsed(raw, tmp_path), tmp_path / "out", {**family, "other": str(pico["metaspace"])})
    assert found["tokens_trained"] >= 60 and found["held_out"]["bits_per_byte"] > 0
    assert found["trained"] == {weights_sha256(tmp_path / "out"): found["tokens_trained"]}
    assert tensors(tmp_path / "out").keys() == tensors(Path(family["base"])).keys()
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".out")) == [".out.lock"]


# --- texts


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """The conformance tasks as tasks of the installation, one with its own validation split."""
    local_tasks(tmp_path)
    monkeypatch.setattr("lm_eval_deepen.harness.tasks.data_folder", lambda kind: tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def test_texts_that_are_not_there_are_told(tmp_path):
    for value, message in (
        ("none.txt", r"text: .*none.txt is no file; relative paths are read beside the recipe"),
        ([], r"text must be a file, task:NAME .*, or a list of these; got \[\]"),
        ([3], r"text must be a file, task:NAME .*, or a list of these; got \[3\]"),
    ):
        with pytest.raises(ConfigError, match=f"recipe.yaml: {message}"):
            parsed({**CLM, "text": value}, tmp_path).text_files()


def test_a_file_may_be_named_by_the_environment(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("x")
    monkeypatch.setenv("HERE", str(tmp_path))
    assert texts.files(["$HERE/a.txt"], Path("elsewhere"), "w") == [tmp_path / "a.txt"]


def with_a_split(tasks):
    """Adds `split_choice`, which has a validation split of its own."""
    rows = (tasks / "choice.jsonl").read_text().splitlines()[:2]
    (tasks / "dev.jsonl").write_text("\n".join(rows) + "\n")
    loader = tasks / "loader.py"
    more = '\ndef split(**_):\n    return {"test": rows("choice.jsonl"), "dev": rows("dev.jsonl")}\n'
    loader.write_text(loader.read_text() + more)
    own = (tasks / "conf_choice.yaml").read_text().replace("conf_choice", "split_choice")
    own = own.replace("loader.choice", "loader.split").replace("fewshot_split: fewshot", "validation_split: dev")
    (tasks / "split_choice.yaml").write_text(own)


def test_a_task_of_the_users_own_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "mine").mkdir()
    local_tasks(tmp_path / "mine")
    with_a_split(tmp_path / "mine")
    [path] = parsed({**CLM, "text": "task:split_choice", "include_path": "mine"}, tmp_path).text_files()
    assert "Answer: Paris" in path.read_text("utf-8")
    assert len(texts.task_hashes("split_choice", texts.TaskSource((str(tmp_path / "mine"),)))) == 2
    with pytest.raises(ConfigError, match=r"include_path: .*none is not a folder"):
        parsed({**CLM, "include_path": ["none"]}, tmp_path)
    plain, here = parsed(CLM, tmp_path), parsed({**CLM, "include_path": "mine"}, tmp_path)
    assert plain.sha256 == here.sha256  # where a task is found is no part of what is built; its text is


@pytest.mark.skipif(HARNESS_05, reason="harness 0.5 spells tasks of several contexts otherwise")
def test_texts_are_those_of_few_shots(tasks, tmp_path):
    """Also where the question is the number of one of several texts, and where all answers begin alike."""
    for name, data in (("blank", "blank"), ("prefixed", "choice")):
        more = f'\ndef {name}_split(**_):\n    return {{"test": rows("{data}.jsonl"), "dev": rows("{data}.jsonl")}}\n'
        (tasks / "loader.py").write_text((tasks / "loader.py").read_text() + more)
        own = (tasks / f"conf_{name}.yaml").read_text().replace(f"conf_{name}", f"split_{name}")
        own = own.replace(f"loader.{data}", f"loader.{name}_split").replace("fewshot_split: fewshot\n", "")
        (tasks / f"split_{name}.yaml").write_text(own + "validation_split: dev\nfewshot_split: dev\n")
        found = texts.task_texts(f"split_{name}")
        [loaded] = load_tasks([TaskSpec(task=f"split_{name}")])
        task = loaded.leaves[f"split_{name}"]
        task.sampler = FirstNSampler(task.sampler.df)
        few_shots = task.fewshot_context(task.eval_docs[2], 2)
        shown = few_shots if isinstance(few_shots, str) else few_shots[0]
        assert shown.startswith("".join(text + "\n\n" for text in found[:2]))
    assert found[0] == "What is the capital of France? The answer is Paris"


def test_a_task_is_trained_on_by_its_other_split(tasks, tmp_path, family, trained, monkeypatch):
    with_a_split(tasks)
    [path] = texts.files(["task:split_choice"], tmp_path, "w")
    found = [document.text for document in load_documents([path])]
    assert len(found) == 2 == len(texts.task_hashes("split_choice"))
    assert found[0] == "Question: What is the capital of France?\nAnswer: Paris"
    assert found[1] == "Question: How many days are there in a week?\nAnswer: seven"
    monkeypatch.setattr(making, "measured_bits", lambda folder: {})
    build(parsed({**CLM, "text": "task:split_choice"}, tmp_path), tmp_path / "c", family)
    again = build(parsed({**CLM, "target": "c"}, tmp_path), tmp_path / "d", {"c": str(tmp_path / "c")})
    assert again["trained_on_tasks"] == ["split_choice"]
    with pytest.raises(ConfigError, match="task:conf_choice: the task has no training split, nor a validation split"):
        texts.files(["task:conf_choice"], tmp_path, "w")


# --- the command


def test_the_command_builds_and_says_what(family, tmp_path, capsys, trained):
    (tmp_path / "clm.yaml").write_text(yaml.safe_dump(CLM))
    out = tmp_path / "out"
    command = ["make", str(tmp_path / "clm.yaml"), str(out), "--member", f"base={family['base']}"]
    assert cli.main([*command, "--set", "seed=2", "shard=[0, 2]"]) == 0
    told = capsys.readouterr()
    assert "clm of base, seed 2" in told.out and "100 tokens" in told.out and "bits per byte" in told.out
    assert trained[0][0]["shard"] == [0, 2] and tensors(out)
    assert cli.main([*command, "--set", "seed=3"]) == 2
    assert "holds another model" in capsys.readouterr().err
    assert cli.main([*command, "--set", "seed"]) == 2
    assert "--set takes KEY=VALUE; got 'seed'" in capsys.readouterr().err
    assert cli.main([*command, "--set", "seed=[1"]) == 2
    assert "--set seed is not valid YAML: line 2, column 1" in capsys.readouterr().err
    assert cli.main([*command, "--member", f"bsae={family['s1']}"]) == 2  # else the recipe's own place would be taken
    assert "--member bsae: unknown. Did you mean 'base'? Models of the recipe: base" in capsys.readouterr().err
    assert cli.main([*command[:-1], "base=./nosuch"]) == 2
    assert "model 'base' should be in ./nosuch, which is no folder" in capsys.readouterr().err


# --- damage


DAMAGED = {
    "a provenance of other bytes": lambda out: (out / "provenance.json").write_bytes(b"\xff\xfe\x00"),
    "an empty provenance": lambda out: (out / "provenance.json").write_text(""),
    "a provenance that was cut": lambda out: cut(out / "provenance.json"),
    "a provenance of another type": lambda out: (out / "provenance.json").write_text("[]"),
    "a provenance without its keys": lambda out: (out / "provenance.json").write_text("{}"),
    "a provenance with other values": lambda out: edit(out / "provenance.json", trained={"x": "many"}),
    "a provenance with another identity": lambda out: edit(out / "provenance.json", identity=None),
    "weights that are gone": lambda out: (out / "model.safetensors").unlink(),
    "weights that were cut": lambda out: cut(out / "model.safetensors"),
    "other weights": lambda out: save_file({k: v + 1 for k, v in tensors(out).items()}, out / "model.safetensors"),
}


def cut(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_model_is_an_error_that_redo_mends(kind, family, tmp_path, trained, quick):
    out, recipe = tmp_path / "out", parsed(CLM, tmp_path)
    whole = build(recipe, out, family)
    before = tensors(out)
    DAMAGED[kind](out)
    with pytest.raises(DamagedError, match="^(?!.*pydantic).* with --redo"):
        build(recipe, out, family)
    for repair in ({"mend": True}, {"redo": True}):
        if repair == {"redo": True}:
            DAMAGED["an empty provenance"](out)
        assert build(recipe, out, family, **repair) == whole and len(tensors(out)) == len(before)
        assert not [path for path in tmp_path.iterdir() if path.name.startswith(".out") and path.suffix != ".lock"]
    assert len(trained) == 3 and build(recipe, out, family) == whole and len(trained) == 3


@pytest.mark.parametrize("content", [b"", b"\xff\x00", b"[]", b'{"identity": 3, "trained": true}', b'{"identity": "x"'])
@pytest.mark.parametrize("begun", [True, False])
def test_a_damaged_mark_of_an_unfinished_build(content, begun, family, tmp_path, trained, quick):
    partial = tmp_path / ".out.partial"
    (partial / "checkpoint-1").mkdir(parents=True)
    if not begun:
        (partial / "checkpoint-1").rmdir()
    (partial / ".building.json").write_bytes(content)
    recipe = parsed(CLM, tmp_path)
    if begun:  # which may have taken hours
        with pytest.raises(ConfigError, match=r".building.json is damaged.*--redo discards it"):
            build(recipe, tmp_path / "out", family)
    assert build(recipe, tmp_path / "out", family, redo=begun)["method"] == "clm"
    assert not partial.exists()


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("moves", range(4))
def test_a_kill_while_the_new_model_takes_the_old_ones_place_loses_neither(
    moves, at_once, family, tmp_path, trained, quick, monkeypatch
):
    """A kill after so many moves: the finished model is not built again, the old one is there until it is."""
    out, old, new = tmp_path / "out", parsed(CLM, tmp_path), parsed({**CLM, "seed": 9}, tmp_path)
    first = build(old, out, family)
    if (child := os.fork()) == 0:
        done, real = iter(range(100)), os.rename

        def move(*places):
            os._exit(9) if Path(places[0]).name in ("out", ".out.old", ".out.partial") and next(done) == moves else 0
            real(*places)

        os.rename = move
        build(new, out, family, redo=True)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (9 if moves < 3 else 0)
    monkeypatch.setattr(distill, "build", lambda *a: pytest.fail("built again"))
    if moves < 2 and not at_once:
        with pytest.raises(ConfigError, match="out holds another model: clm of base.*--redo builds it again"):
            build(new, out, family)
        assert build(old, out, family) == first
    assert build(new, out, family, redo=moves < 2)["seed"] == 9
    assert build(new, out, family)["weights_sha256"] == weights_sha256(out) != first["weights_sha256"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".out")] == [".out.lock"]


def test_a_full_disk_leaves_nothing_of_a_merge(family, tmp_path, averaged, quick, monkeypatch):
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(StorageError, match="cannot be written .No space left on device"):
        build(parsed(merge_of("linear", ["s1", "s2"], base=None), tmp_path), tmp_path / "out", family)
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == [".out.lock"]


def full_disk(*arguments):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_model_without_finite_probabilities_is_refused(family, tmp_path, monkeypatch):
    def broken(recipe, out, members):
        shutil.copytree(members["base"], out, dirs_exist_ok=True)
        found = tensors(out)
        name = next(iter(found))
        found[name] = found[name] * float("nan")
        save_file(found, out / "model.safetensors", metadata={"format": "pt"})
        return {"tokens_trained": 1}

    monkeypatch.setattr(distill, "build", broken)
    with pytest.raises(DeepenError, match="NaN|no finite probabilities"):
        build(parsed(CLM, tmp_path), tmp_path / "out", family)
    assert not (tmp_path / "out").exists()
