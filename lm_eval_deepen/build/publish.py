"""Builds a model from its recipe. The folder appears in one step; long work can be resumed."""

from __future__ import annotations

import contextlib
import glob
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lm_eval_deepen.build import merge as merging
from lm_eval_deepen.build.provenance import FILE, DamagedError, finished, provenance
from lm_eval_deepen.build.recipe import BuildRecipe
from lm_eval_deepen.errors import ConfigError, MemberError, StorageError
from lm_eval_deepen.harness.distributed import Ranks
from lm_eval_deepen.storage import (
    is_settled,
    locked,
    make_folder,
    publish_folder,
    read_json,
    recover_folder,
    remove_file,
    remove_folder,
    write_json,
)

Say = Callable[[str], None]
_MARK = ".building.json"


def _refuse_others(out: Path) -> None:
    """Raise ConfigError for a folder that holds no built model, not even a damaged one."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; give a folder for the model")
    if out.is_dir() and not (out / FILE).is_file() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty, and holds no built model; give another folder, or empty it")


def build(
    recipe: BuildRecipe,
    out: Path,
    members: Mapping[str, str] | None = None,
    *,
    identity: str | None = None,
    redo: bool = False,
    mend: bool = False,
    wait: bool = False,
    say: Say = lambda text: None,
) -> dict[str, Any]:
    """Build the model of a recipe, unless it is there, and return its provenance.

    A model is written beside `out` and moved there when it is complete. What a killed training left there is taken
    up by the next call with the same recipe, and so is a model that was complete.

    Args:
        recipe: what to build.
        out: the model's folder.
        members: name -> folder or hub name of the models it is made from.
        identity: of the model, where the caller knows it already.
        redo: build again what is there.
        mend: build again what is damaged.
        wait: wait for another process that builds it, which is an error else.
        say: called with progress messages.

    Raises:
        DeepenError: a recipe that cannot be built; what was at `out` is there still.
    """
    members, out = dict(members or {}), Path(os.path.realpath(out))
    if out == Path.cwd():
        raise ConfigError(f"{out} is the current folder, which the model would replace; give a folder in it")
    for name, place in recipe.places(members).items():
        if Path(place).is_dir() and out == Path(place).resolve():
            raise ConfigError(f"{out} is the model {name!r} that the recipe is made from; give another folder")
    identity = identity or recipe.identity(members)
    partial, ranks = out.with_name(f".{out.name}.partial"), Ranks.of_launch()
    if ranks.count > 1 and recipe.is_merge:
        raise ConfigError("a merge is made by one process; start it without torchrun or accelerate launch")
    if ranks.index > 0:  # joins process 0 when it trains
        if ranks.gather(None)[0]:
            _made(recipe, partial, members)
        return {}
    with contextlib.ExitStack() as unless_begun:
        unless_begun.callback(ranks.gather, False)
        _refuse_others(out)
        if not redo and is_settled(out) and (record := _kept(out, identity, mend, say)) is not None:
            return record  # no lock: the folder may be one that is only read
        with _sole_builder(out, wait, say):
            recover_folder(out)
            if not redo and (record := _kept(out, identity, mend, say)) is not None:
                return record  # which a killed process had moved away
            try:
                content = finished(partial)  # one that was complete when its builder was killed
            except ConfigError:
                content = None
            if content is None or content["identity"] != identity:
                _claim(partial, recipe, identity, discard=redo or mend)
                say(f"building {out}: {recipe.method} of {', '.join(recipe.models)}")
                unless_begun.pop_all()
                ranks.gather(True)
                content = _finished(recipe, partial, members, identity)
            remove_file(partial / _MARK)
            publish_folder(partial, out)
    return content


@contextlib.contextmanager
def _sole_builder(out: Path, wait: bool, say: Say) -> Iterator[None]:
    """Hold the lock of a model's folder."""
    lock = out.with_name(f".{out.name}.lock")
    busy = ConfigError(f"{out}: another process builds this model; wait for it, or kill it")
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(locked(lock, busy))
        except ConfigError:
            if not wait:
                raise
            say(f"{out}: another process builds this model; waiting for it")
            held.enter_context(locked(lock))
        yield


def _kept(out: Path, identity: str, mend: bool, say: Say) -> dict[str, Any] | None:
    """Return the provenance of the model that is there; None where it is to be built."""
    _refuse_others(out)
    try:
        record = finished(out)
    except DamagedError as error:
        if not mend:
            raise
        say(f"{error}: so it is")
        return None
    if record is None:
        return None
    if record["identity"] != identity:
        raise ConfigError(
            f"{out} holds another model: {record['method']} of {', '.join(record['models']) or 'nothing'}, "
            f"identity {record['identity'][:12]}, {identity[:12]} wanted: recipe, seed, texts or the weights "
            "of its models changed. --redo builds it again; another folder keeps both"
        )
    say(f"{out}: is built already")
    return record


def _finished(recipe: BuildRecipe, partial: Path, members: Mapping[str, str], identity: str) -> dict[str, Any]:
    """Build the model in its folder, with all that belongs to it; what no other call can take up is removed."""
    try:
        made = _made(recipe, partial, members)
        try:
            made = {**made, "bits_per_byte": measured_bits(partial)}
        except MemberError as error:
            lacking, told, _ = str(error).partition("; random values")
            if not (recipe.is_merge and told):
                raise
            lacking = lacking.replace(str(partial), "what mergekit made")
            raise ConfigError(
                f"{recipe.source}: the merge cannot be loaded ({lacking}). mergekit merges the tensors that it knows "
                "of an architecture, and these models have others, as biases. Distil them (method: fusellm), or fuse "
                "them at every step"
            ) from error
        content = provenance(recipe, identity, partial, members, made)
        write_json(partial / FILE, content)
    except BaseException:
        if not _resumable(partial):
            _discard(partial)
        raise
    return content


def _made(recipe: BuildRecipe, folder: Path, members: Mapping[str, str]) -> dict[str, Any]:
    if recipe.is_merge:
        return merging.merge(recipe, folder, members)
    from lm_eval_deepen.build import distill

    content = {**recipe.content, "seed": recipe.seed}
    if files := recipe.text_files():
        content["text"] = [str(path) for path in files]
    return dict(distill.build(content, folder, recipe.places(members)))


def _claim(partial: Path, recipe: BuildRecipe, identity: str, discard: bool) -> None:
    """Take up an unfinished training of the same model, or begin a build.

    An unfinished training of another model, or of who knows which, may have taken hours, and is an error.
    """
    if partial.exists() and not discard:
        theirs = _mark(partial)
        if theirs and theirs["identity"] == identity and theirs["trained"]:
            return
        if _resumable(partial):
            if theirs is None:
                raise ConfigError(
                    f"{partial / _MARK} is damaged: nobody can say what was begun there; --redo discards it"
                )
            raise ConfigError(
                f"{partial} holds an unfinished training by another recipe (identity {theirs['identity'][:12]}, "
                f"{identity[:12]} wanted); --redo discards it, and another folder keeps it"
            )
    _discard(partial)
    make_folder(partial)
    try:
        write_json(partial / _MARK, {"identity": identity, "trained": not recipe.is_merge}, indent=None)
    except BaseException:
        _discard(partial)
        raise


def _mark(partial: Path) -> dict[str, Any] | None:
    """Return what a begun build says of itself; empty where it says nothing, None where that is damaged."""
    if not (partial / _MARK).exists():
        return {}
    try:
        mark = read_json(partial / _MARK)
        right = isinstance(mark["identity"], str) and isinstance(mark["trained"], bool)
        return dict(mark) if right else None
    except (StorageError, LookupError, TypeError):
        return None


def _resumable(partial: Path) -> bool:
    """Return whether a build left something that the next one takes up: a training does, in or beside its folder."""
    mark = _mark(partial)
    if mark is not None and not mark.get("trained"):
        return False
    return len(_begun(partial)) > 1 or any(path.name != _MARK for path in partial.iterdir())


def _begun(partial: Path) -> list[Path]:
    return list(partial.parent.glob(f"{glob.escape(partial.name)}*"))


def _discard(partial: Path) -> None:
    for path in _begun(partial):
        remove_folder(path)


def measured_bits(folder: Path) -> dict[str, Any]:
    """Return the bits per byte of the text that ships, which no recipe trains on unless it says so.

    A document that is longer than the model's context is cut into blocks, each read from its start.

    Raises:
        ConfigError: the model gives no finite probabilities.
    """
    from lm_eval_deepen.build.distill.corpus import Tokens, blocks_of
    from lm_eval_deepen.build.distill.evaluation import bits_of
    from lm_eval_deepen.config import MemberConfig
    from lm_eval_deepen.engine.calibration import default_text, digest, load_documents
    from lm_eval_deepen.member import load_member

    documents = load_documents([default_text()])
    member = load_member(MemberConfig(name="built", pretrained=str(folder)), "cpu")
    codec = member.codec
    room = member.max_length - len(codec.prefix_ids) - codec.prefix_space
    blocks = [blocks_of(document.text, room, lambda text: len(codec.encode(text))) for document in documents]
    bits = sum(bits_of(member, [[Tokens.of(codec, block) for block in own] for own in blocks]))
    num_bytes = sum(document.num_bytes for document in documents)
    if not math.isfinite(bits):
        raise ConfigError("the model that was built gives no finite probabilities; correct the numbers of its recipe")
    about = {"text": default_text().name, "text_sha256": digest(documents)}
    return {**about, "bytes": num_bytes, "value": bits / num_bytes}
