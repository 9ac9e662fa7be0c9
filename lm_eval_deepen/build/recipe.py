"""The recipe of one built model: read, checked as far as files alone allow, and identified."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from lm_eval_deepen.build import merge_config, texts
from lm_eval_deepen.build.weights import commit_of, weights_sha256
from lm_eval_deepen.config import FrozenDict, Keys, Names
from lm_eval_deepen.config.errors import unknown_name
from lm_eval_deepen.config.frozen import thaw
from lm_eval_deepen.config.recipes import LARGEST_SEED, read_recipe, recipe_file
from lm_eval_deepen.errors import ConfigError, blamed, did_you_mean
from lm_eval_deepen.storage import sha256

MERGE_KEY = "merge_method"
TRAINED = ("clm", "fusellm")  # values of `method`: what lm_eval_deepen.build.distill makes
RANDOM = ("dare_ties", "dare_linear", "della", "della_linear")  # merges that draw at random
_PLACEMENT = frozenset({"models", "device", "store", "checkpoint_steps"})  # of a training: decide no weight
_TOKENIZER_WORDS = ("union", "base")  # values of mergekit's tokenizer_source that are no model


@dataclass(frozen=True)
class BuildRecipe:
    """One model to build."""

    source: str  # the file it was read from, or where it stands, for messages
    folder: Path  # where relative paths are read
    # what the method takes, as it was written: for a merge a configuration of mergekit, verbatim
    content: Mapping[str, Any]
    seed: int = 0  # of whatever is drawn at random
    title: str = ""  # one line
    note: str = ""  # what else to know
    tasks: texts.TaskSource = texts.ANYWHERE  # where the tasks are whose texts it may name

    @property
    def is_merge(self) -> bool:
        """Whether weights are merged; else a model is trained."""
        return MERGE_KEY in self.content

    @property
    def method(self) -> str:
        """Name of the method, of mergekit or of ours."""
        return str(self.content[MERGE_KEY if self.is_merge else "method"])

    @property
    def is_random(self) -> bool:
        """Whether a merge depends on its seed."""
        return self.is_merge and self.method in RANDOM

    @property
    def models(self) -> tuple[str, ...]:
        """The models it is made from, as they are spelt, in the order in which they stand there."""
        return self._named()

    @property
    def weighed(self) -> tuple[str, ...]:
        """Those of the models whose weights it is made from; of others it takes the tokenizer alone."""
        return self._named(tokenizers=False)

    def _named(self, tokenizers: bool = True) -> tuple[str, ...]:
        names: dict[str, None] = {}
        self._visit(names.setdefault, tokenizers)
        return tuple(names)

    @property
    def architecture_of(self) -> str:
        """The model whose architecture the built one has."""
        first = self.content.get("base_model") if self.is_merge else self.content.get("target")
        return str(first) if first in self.weighed else self.weighed[0]

    @property
    def texts(self) -> tuple[str, ...]:
        """What a model is trained on, as it is spelt; empty for a merge, and for the default text."""
        given = None if self.is_merge else self.content.get("text")
        return (given,) if isinstance(given, str) else tuple(map(str, given or ()))

    def located(self, members: Mapping[str, str]) -> dict[str, Any]:
        """Return the configuration of a merge with every model's name replaced by its place.

        A folder whose name mergekit would divide (at ``@`` and ``+``) is a mapping, as mergekit spells it out.
        """

        def spelt(name: str) -> Any:
            place = self.place(name, members)
            return {"model": {"path": place}} if os.path.isdir(place) and {*place} & {*"@+"} else place

        return self._visit(spelt)

    def text_files(self) -> list[Path]:
        """Return the files that a model is trained on; none where the recipe names none."""
        return texts.files(self.texts, self.folder, f"{self.source}: text", self.tasks)

    def places(self, members: Mapping[str, str]) -> dict[str, str]:
        """Return where every model is that it is made from, by the name it is spelt with.

        After `members` come the recipe's own `models` (of a trained model), folders beside the recipe, and the hub.
        """
        return {name: self.place(name, members) for name in self.models}

    def place(self, name: str, members: Mapping[str, str]) -> str:
        """Return where a model is: a folder, or a hub name.

        Raises:
            ConfigError: a name that looks like a folder, and is none, or like a misspelt member.
        """
        known = {**self._own_models, **members}
        place = known.get(name, name)
        for folder in (Path(place).expanduser(), self.folder / Path(place).expanduser()):
            if folder.is_dir():
                return os.path.normpath(folder)
        if name in known and place.startswith((".", "/", "~")):
            raise ConfigError(
                f"{self.source}: model {name!r} should be in {place}, which is no folder; correct the path"
            )
        if name not in known and (place.startswith((".", "/", "~")) or "/" not in place):
            listed = f" Members: {', '.join(known)}." if known else ""
            raise ConfigError(
                f"{self.source}: model {name!r} is no member, and no folder in {self.folder.absolute()}."
                f"{did_you_mean(name, known)}{listed} Say where it is with --member {name}=FOLDER, or give a hub name "
                "as ORGANISATION/MODEL"
            )
        return place

    @property
    def _own_models(self) -> Mapping[str, str]:
        models: Any = {} if self.is_merge else self.content.get("models") or {}
        if not isinstance(models, Mapping) or not all(isinstance(place, str) for place in models.values()):
            raise ConfigError(f"{self.source}: models must map names to folders or hub names; got {models!r}")
        return models

    def identity(self, members: Mapping[str, str], digests: Mapping[str, str] | None = None) -> str:
        """Return the SHA-256 hex digest of what decides the built weights.

        Models in folders count by their weights, texts by their content, models of the hub by their name, and those
        that are not built yet by their identities, which `digests` gives by name.
        """
        models: dict[str, str] = {}
        for name in self.models:
            if not (digest := (digests or {}).get(name)):
                place = self.place(name, members)
                here = os.path.isdir(place)
                digest = weights_sha256(Path(place)) if here else f"{place}@{commit_of(place) or 'unknown'}"
            models[name] = digest
        contents = [sha256(path) for path in self.text_files()]
        if not contents and not self.is_merge:
            from lm_eval_deepen.build.distill.corpus import neutral_documents, text_digest

            contents = [text_digest(neutral_documents())]  # it comes with Python, and differs between versions
        return self._digest(models=models, texts=contents)

    @property
    def sha256(self) -> str:
        """The SHA-256 hex digest of the recipe alone."""
        return self._digest()

    def _digest(self, **resolved: Any) -> str:
        """Return the digest of the keys that decide the weights, the seed, and what names stand for."""
        keys = {key: value for key, value in self.content.items() if self.is_merge or key not in _PLACEMENT}
        facts = {"recipe": keys, "seed": self.seed, **resolved}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def _visit(self, change: Callable[[str], Any], tokenizers: bool = True) -> dict[str, Any]:
        """Return a copy of the content with every spelt model replaced by what `change` returns.

        `tokenizers`: also those that give their tokenizer, or a token, alone.
        """

        def names_model(key: str, inside: str, value: str) -> bool:
            if not self.is_merge:
                return key in ("target", "sources") and not inside
            tokenizer = tokenizers and key in ("tokenizer_source", "source")  # of the whole tokenizer, or of one token
            return key in ("model", "base_model") or (tokenizer and value not in _TOKENIZER_WORDS)

        def visit(value: Any, key: str, inside: str) -> Any:
            if isinstance(value, str):
                return change(value) if names_model(key, inside, value) else value
            if isinstance(value, list):
                return [visit(item, key, inside) for item in value]
            if isinstance(value, Mapping):
                return {name: visit(item, name, key) for name, item in value.items()}
            return value

        return {key: visit(value, key, "") for key, value in self.content.items()}


class BuildKeys(Keys):
    """Keys of a model to build, in addition to those of the merge or the training."""

    kind: Literal["merge", "distill"] | None = Field(
        None, description="Whether weights are merged or a model is trained."
    )
    title: str = Field("", description="One line.")
    note: str = Field("", description="Other remarks.")
    seed: int = Field(0, ge=0, le=LARGEST_SEED, description="The seed of everything that is drawn at random.")
    include_path: Names = Field((), description="Folders with the tasks on whose texts the model is trained.")
    metadata: FrozenDict = Field(FrozenDict(), description="Metadata for these tasks.")


def read_build(recipe: str | Path, changes: Mapping[str, Any] | None = None, folder: Path | None = None) -> BuildRecipe:
    """Read the recipe of a built model.

    Keys in `changes` stand for those of the file; a relative path is read in `folder`, by default the current one.

    Raises:
        ConfigError: what is no recipe, by file and key.
    """
    path = recipe_file(str(recipe), folder)
    return parse_build(read_recipe(path, "merge", "distill"), str(path), path.parent, changes)


def parse_build(raw: Any, source: str, folder: Path, changes: Mapping[str, Any] | None = None) -> BuildRecipe:
    """Return the recipe that parsed YAML spells.

    Raises:
        ConfigError: it says neither how to merge nor how to train, or says both.
    """
    with blamed(source):
        if not isinstance(raw, Mapping):
            raise ConfigError(f"a recipe holds {MERGE_KEY}, or method; got {type(raw).__name__}")
        keys = {**raw, **(changes or {})}
        if (MERGE_KEY in keys) == ("method" in keys):
            raise ConfigError(
                f"give {MERGE_KEY}: linear, slerp, ties, ... (weights are merged), or method: {' or '.join(TRAINED)} "
                f"(a model is trained), and not both; got the keys {', '.join(map(str, keys)) or 'none'}",
                key="method", code="conflict",
            )  # fmt: skip
        if "method" in keys and keys["method"] not in TRAINED:
            problem = unknown_name("method", keys["method"], TRAINED)
            raise ConfigError(replace(problem, message=f"{problem.message}; merges are named by {MERGE_KEY}"))
        own = BuildKeys.read({key: value for key, value in keys.items() if key in BuildKeys.names()})
        folders = texts.task_folders(own.include_path, folder)
    recipe = BuildRecipe(
        source=source,
        folder=folder,
        content={key: value for key, value in keys.items() if key not in BuildKeys.names()},
        seed=own.seed,
        title=own.title,
        note=own.note,
        tasks=texts.TaskSource(folders, json.dumps(thaw(own.metadata), sort_keys=True)),
    )
    if recipe.is_merge:
        with blamed(source):
            merge_config.check(recipe.content, source)
    else:  # what no training can be made of is refused; its models and texts are looked for later
        from lm_eval_deepen.build.distill import DistillRecipe

        recipe._own_models  # noqa: B018  # refuses what is no mapping of names
        with blamed(source):
            DistillRecipe.read({**recipe.content, "seed": recipe.seed})
    return recipe
