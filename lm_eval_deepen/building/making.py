"""Builds a model from its recipe into a folder: in one step for whoever looks, resumable for what takes long."""

from __future__ import annotations

import glob
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lm_eval_deepen.building import merging
from lm_eval_deepen.building.provenance import provenance, read_provenance, write_provenance
from lm_eval_deepen.building.recipe import BuildRecipe
from lm_eval_deepen.errors import ConfigError

Say = Callable[[str], None]
_MARK = ".building.json"


def is_built(out: Path, identity: str, redo: bool = False) -> bool:
    """Return whether a folder holds the model of that identity, and it is not to be built again.

    Raises:
        ConfigError: it holds something else; with `redo`, something that was not built.
    """
    found = read_provenance(out)
    if found is None:
        if out.is_dir() and any(out.iterdir()):
            raise ConfigError(f"{out} is not empty, and holds no built model; give another folder, or empty it")
        if out.exists() and not out.is_dir():
            raise ConfigError(f"{out} is a file; give a folder for the model")
        return False
    if redo:
        return False
    if found.get("identity") != identity:
        raise ConfigError(
            f"{out} holds another model: {found.get('method')} of {', '.join(found.get('models', {})) or 'nothing'}, "
            f"identity {str(found.get('identity'))[:12]}, {identity[:12]} wanted: recipe, seed, texts or the weights "
            "of its models changed. --redo builds it again; another folder keeps both"
        )
    return True


def build(
    recipe: BuildRecipe,
    out: Path,
    members: Mapping[str, str] | None = None,
    *,
    identity: str | None = None,
    redo: bool = False,
    say: Say = lambda text: None,
) -> dict[str, Any]:
    """Build the model of a recipe, unless it is there, and return its provenance.

    A model is written beside `out` and moved there when it is complete. What a killed training left there is taken
    up by the next call with the same recipe.

    Args:
        recipe: what to build.
        out: the model's folder.
        members: name -> folder or hub name of the models it is made from.
        identity: of the model, where the caller knows it already.
        redo: build again what is there.
        say: told what is going on.

    Raises:
        DeepenError: a recipe that cannot be built; nothing is left at `out`.
    """
    members, out = dict(members or {}), Path(os.path.abspath(out))
    if out == Path.cwd():
        raise ConfigError(f"{out} is the current folder, which the model would replace; give a folder in it")
    for name, place in recipe.places(members).items():
        if Path(place).is_dir() and out.resolve() == Path(place).resolve():
            raise ConfigError(f"{out} is the model {name!r} that the recipe is made from; give another folder")
    identity = identity or recipe.identity(members)
    if is_built(out, identity, redo):
        say(f"{out}: is built already")
        found = read_provenance(out)
        assert found is not None  # is_built has read it
        return found
    partial = out.with_name(f".{out.name}.partial")
    with _locked(out):
        _claim(partial, recipe, identity, redo)
        say(f"building {out}: {recipe.method} of {', '.join(recipe.models)}")
        try:
            made = _made(recipe, partial, members)
        except BaseException:
            if not _resumable(partial):
                _discard(partial)
            raise
        made = {**made, "bits_per_byte": _bits_per_byte(partial)}
        content = provenance(recipe, identity, partial, members, made)
        write_provenance(partial, content)
        (partial / _MARK).unlink()
        if out.exists():
            shutil.rmtree(out)
        os.replace(partial, out)
    return content


def _made(recipe: BuildRecipe, folder: Path, members: Mapping[str, str]) -> dict[str, Any]:
    if recipe.is_merge:
        return merging.merge(recipe, folder, members)
    from lm_eval_deepen import distill

    content = {**recipe.content, "seed": recipe.seed}
    if files := recipe.text_files():
        content["text"] = [str(path) for path in files]
    return dict(distill.build(content, folder, recipe.places(members)))


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out.with_name(f".{out.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ConfigError(f"{out}: another process builds this model; wait for it, or kill it") from error
    with lock:
        yield


def _claim(partial: Path, recipe: BuildRecipe, identity: str, redo: bool) -> None:
    """Take up an unfinished training of the same model, or begin a build.

    Raises:
        ConfigError: an unfinished training of another model, which may have taken hours.
    """
    mark = partial / _MARK
    if partial.exists():
        theirs = json.loads(mark.read_text("utf-8")) if mark.is_file() else {}
        same = theirs.get("identity") == identity
        if same and theirs.get("trained") and not redo:
            return
        if theirs.get("trained") and not same and not redo and _resumable(partial):
            raise ConfigError(
                f"{partial} holds an unfinished training by another recipe (identity "
                f"{str(theirs.get('identity'))[:12]}, {identity[:12]} wanted); --redo discards it, and another folder "
                "keeps it"
            )
        _discard(partial)
    partial.mkdir()
    mark.write_text(json.dumps({"identity": identity, "trained": not recipe.is_merge}) + "\n", "utf-8")


def _resumable(partial: Path) -> bool:
    """Return whether a build left something that the next one takes up: a training does, in or beside its folder."""
    mark = partial / _MARK
    if not (mark.is_file() and json.loads(mark.read_text("utf-8"))["trained"]):
        return False
    return len(_begun(partial)) > 1 or any(path.name != _MARK for path in partial.iterdir())


def _begun(partial: Path) -> list[Path]:
    return sorted(partial.parent.glob(f"{glob.escape(partial.name)}*"))


def _discard(partial: Path) -> None:
    for path in _begun(partial):
        shutil.rmtree(path)


def _bits_per_byte(folder: Path) -> dict[str, Any]:
    """Return the bits per byte of the text that ships, which no recipe trains on unless it says so."""
    from lm_eval_deepen.config_types import MemberConfig
    from lm_eval_deepen.distill.corpus import Tokens
    from lm_eval_deepen.distill.evaluation import bits_of
    from lm_eval_deepen.engine.texts import default_text, digest, load_documents
    from lm_eval_deepen.member import Member

    documents = load_documents([default_text()])
    member = Member.load(MemberConfig("built", str(folder), 1.0), "cpu")
    bits = sum(bits_of(member, [[Tokens.of(member.codec, document.text)] for document in documents]))
    num_bytes = sum(document.num_bytes for document in documents)
    return {"text": default_text().name, "text_sha256": digest(documents), "bytes": num_bytes,
            "value": bits / num_bytes}  # fmt: skip
