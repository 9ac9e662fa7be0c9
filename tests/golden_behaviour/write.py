"""Write what must not change unnoticed: fingerprints, identities, the keys of results, and what every command takes.

    python tests/golden_behaviour/write.py [NAME ...]     # names of the JSON files beside this one; all by default

Fingerprints and identities decide whether finished results and built files are used again: a change there makes
people's work void, and needs a reason in the change log. The others may change on purpose; write the file again then.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER), str(FOLDER.parent)]

from cases import FILES, INLINE, MAPPINGS, MATRICES  # noqa: E402
from lm_eval.utils import simple_parse_args_string  # noqa: E402

from lm_eval_deepen.config import EnsembleConfig  # noqa: E402
from lm_eval_deepen.config.recipes import shipped_recipes  # noqa: E402
from lm_eval_deepen.harness.model import configure  # noqa: E402

DIGESTS = ("0" * 64, "1" * 64, "2" * 64, "3" * 64, "4" * 64)  # of models that recipes name


def configurations() -> dict[str, Any]:
    """Return fingerprint and JSON form of every configuration of `cases`, by spelling."""
    return {
        "mapping": {name: _facts(configure(dict(keys))) for name, keys in MAPPINGS.items()},
        "inline": {name: _facts(configure(simple_parse_args_string(text))) for name, text in INLINE.items()},
        "file": {name: _facts(_from_file(*case)) for name, case in FILES.items()},
    }


def recipes() -> dict[str, Any]:
    """Return fingerprint and JSON form of every shipped ensemble."""
    from lm_eval_deepen.harness.ensemble_recipe import load_recipe

    found = {}
    for path in shipped_recipes("ensemble").values():
        recipe = load_recipe(path)
        harness = {"harness": recipe.harness.given()} if recipe.harness.given() else {}
        found[path.name] = {**_facts(recipe.configure()), "title": recipe.title, "tasks": list(recipe.task), **harness}
    return found


def leaderboards() -> dict[str, Any]:
    """Return what every shipped leaderboard is made of, and the fingerprints of its rows and cells."""
    from lm_eval_deepen.leaderboard import cells
    from lm_eval_deepen.leaderboard.recipe import read_recipe

    class Task:
        """A column, as far as a cell's identity asks it."""

        identity = {"task": "a task", "tasks": {}}

    found = {}
    for path in shipped_recipes("leaderboard").values():
        recipe = read_recipe(path)
        built = {name: one.sha256 for name, one in recipe.builds.recipes.items()}
        rows = {}
        for row in recipe.rows:
            own = {name: built[name] for name in row.members if name in built}
            rows[row.name] = {
                "fingerprint": row.config.fingerprint(),
                "members": list(row.members),
                "folder": row.slug,
                "group": row.group,
                "cell": cells.fingerprint(cells.identity(row, Task, recipe.seeds, own)),  # type: ignore[arg-type]
            }
        found[path.name] = {
            "title": recipe.title,
            "members": [member.name for member in recipe.members],
            "rows": rows,
            "tasks": [task.to_dict() for task in recipe.tasks],
            "seeds": list(recipe.seeds),
            "alpha": recipe.alpha,
            "resamples": recipe.resamples,
            "notes": list(recipe.notes),
            "builds": built,
            "controls": dict(recipe.builds.controls),
        }
    return found


def builds() -> dict[str, Any]:
    """Return the identities of every shipped model to build, and what a training's keys come to."""
    from lm_eval_deepen.build import read_build
    from lm_eval_deepen.build.distill import DistillRecipe

    found = {}
    for kind in ("merge", "distill"):
        for path in shipped_recipes(kind).values():
            recipe = read_build(path)
            facts: dict[str, Any] = {"recipe": recipe.sha256, "models": list(recipe.models), "seed": recipe.seed}
            if recipe.is_merge:
                facts["identity"] = recipe.identity({}, dict(zip(recipe.models, DIGESTS, strict=False)))
            else:
                content = {**recipe.content, "seed": recipe.seed, "text": None}
                training = DistillRecipe.parse(content, dict.fromkeys(recipe.models, ""))
                facts |= {"training": training.to_dict(), "identity": training.identity()}
            found[path.name] = facts
    return found


def matrices() -> dict[str, Any]:
    """Return the file names of relative matrices and of maps between vocabularies, of three synthetic members."""
    from tensor_worlds import trio

    from lm_eval_deepen.fusion import METHODS
    from lm_eval_deepen.relative.store import MatrixStore

    members = trio()
    names = [member.name for member in members]
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for case, options in MATRICES.items():
            method = METHODS["deepen"].options(**options)
            anchors = method.check([member.vocabulary for member in members], names)
            store, spec = MatrixStore(folder), method.matrix_spec()
            found[case] = [store.path(member, anchors, spec).name for member in members]
    for name in ("eva", "mined", "unite"):
        with tempfile.TemporaryDirectory() as folder:
            METHODS[name].options().build(members, MatrixStore(folder, progress=False))
            found[name] = sorted(path.name for path in Path(folder).glob("*.safetensors"))
    return found


def results(pico: Mapping[str, Path] | None = None) -> dict[str, Any]:
    """Return the keys under ``deepen`` in the results of some ensembles of pico models."""
    from harness import deepen, requests
    from pico import build_pico

    with tempfile.TemporaryDirectory() as folder:
        models = pico or build_pico(Path(folder) / "pico")
        one, two = models["bytelevel"], models["metaspace"]
        found = {}
        for name, paths, options in (
            ("one member", [one], {}),
            ("deepen", [one, two], {"self_check": True}),
            ("deepen, embedding", [one, two], {"rows": "embedding", "skip_when": "agree", "skip_check": True}),
            ("gac", [one, two], {"method": "gac"}),
            ("eva", [one, two], {"method": "eva", "similarity_floor": 0.0}),
            ("unite, perplexity", [one, two], {"method": "unite", "weighting": "perplexity"}),
            ("logp-mean", [one, two], {"pooling": "logp-mean", "evidence": {"objective": "bpb"}}),
        ):
            model = deepen(*paths, **{"matrix_dir": str(Path(folder) / "matrices"), **options})
            model.loglikelihood(requests("loglikelihood", ("The quick brown", " fox")), disable_tqdm=True)
            found[name] = sorted(_keys(model.get_model_info()["deepen"]))
    return found


def help_texts() -> dict[str, Any]:
    """Return what every command takes: its arguments with choices, defaults and help; wording apart from layout."""
    import importlib

    from lm_eval_deepen.cli import main as cli

    found: dict[str, Any] = {}
    for name, (module, summary) in cli.COMMANDS.items():
        found[name] = {"summary": summary}
        if name != "run":
            command = importlib.import_module(module)
            parser = argparse.ArgumentParser(prog=name)
            command.add_arguments(parser)
            found[name] |= {"about": command.HELP, "arguments": [_argument(action) for action in parser._actions[1:]]}
    return found


WRITERS: dict[str, Callable[[], dict[str, Any]]] = {
    "configurations": configurations,
    "recipes": recipes,
    "leaderboards": leaderboards,
    "builds": builds,
    "matrices": matrices,
    "results": results,
    "help": help_texts,
}


def _facts(config: EnsembleConfig) -> dict[str, Any]:
    return {"fingerprint": config.fingerprint(), "config": json.loads(json.dumps(config.to_dict()))}


def _from_file(text: str, beside: Mapping[str, Any]) -> EnsembleConfig:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ensemble.yaml"
        path.write_text(text, "utf-8")
        return configure({"pretrained": str(path), **beside})


def _keys(value: Any, path: str = "") -> Iterator[str]:
    """Yield the paths of all values; the entries of a list have one path, and so have members by name."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            name = Path(key).name  # of a model's folder; they are written to a temporary one
            yield from _keys(inner, f"{path}.{name}" if path else name)
    elif isinstance(value, list) and any(isinstance(inner, Mapping) for inner in value):
        yield from {key for inner in value for key in _keys(inner, f"{path}[]")}
    else:
        yield path


def _argument(action: argparse.Action) -> dict[str, Any]:
    choices = None if action.choices is None else list(action.choices)
    default = str(action.default) if isinstance(action.default, Path) else action.default
    shown = {"nargs": action.nargs, "choices": choices, "default": default, "metavar": action.metavar}
    return {
        "names": list(action.option_strings) or [action.dest],
        **{key: value for key, value in shown.items() if value not in (None, [])},
        "help": action.help,
    }


def read(name: str) -> dict[str, Any]:
    """Return a frozen file."""
    found: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text("utf-8"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[*WRITERS, []], default=[])
    for name in parser.parse_args().names or WRITERS:
        text = json.dumps(WRITERS[name](), indent=1, ensure_ascii=False, sort_keys=True)
        (FOLDER / f"{name}.json").write_text(text + "\n", "utf-8")
        print(f"{name}.json: {len(text)} characters")


if __name__ == "__main__":
    main()
