"""What a recipe for `lm_eval_deepen.distill` says, checked before any model is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from lm_eval_deepen.config_options import MAX_SEED, whole_number
from lm_eval_deepen.errors import ConfigError, did_you_mean

METHODS = ("fusellm", "clm")
FUSIONS = ("mince", "avgce")
ALIGNMENTS = ("bytes", "dtw")
TAILS = ("rest", "renormalised")
ABOUT = frozenset({"title", "note", "source", "models"})  # for people and for whoever resolves names
FUSELLM_KEYS = frozenset({"sources", "clm_weight", "fusion", "alignment", "top_k", "tail"})
REQUIRED = {"fusellm": ("target", "sources"), "clm": ("target",)}


@dataclass(frozen=True)
class DistillRecipe:
    """One build.

    Attributes:
        method: ``fusellm``, or ``clm``: the same training without sources, the control.
        target: the model that is trained, by its name in the recipe.
        sources: whose distributions it learns; the target itself, as it is before training, may be among them, as
            in the paper. Only for ``fusellm``, as are the keys from `clm_weight` to `tail`.
        text: text files (documents separated by blank lines, or JSON lines with ``text``); none takes the neutral
            text of Python's own documentation.
        held_out: share of the documents that is never trained on, by any shard or seed.
        shard: (i, n): train on every n-th of the other documents, from the i-th on.
        train_tokens: tokens of the target to predict; passes over the text are repeated. None: one pass.
        seed: of the order of the blocks.
        learning_rate: of AdamW, at its peak.
        warmup: share of the steps in which it rises from 0; it falls to 0 along a cosine.
        weight_decay: of AdamW.
        batch_size: blocks per step.
        context_length: tokens of the target per block, at most.
        checkpoint_steps: a checkpoint every so many steps; None: five in all.
        device: where models run; None takes the first accelerator, else the CPU.
        clm_weight: lambda of the loss, lambda * CLM + (1 - lambda) * fusion (section 3.1; 0.9 in the paper).
        fusion: ``mince``: the source that predicts a block best; ``avgce``: all, weighted by how well they do.
        alignment: ``bytes``: positions with equal contexts; ``dtw``: the paper's dynamic time warping.
        top_k: entries kept of a source's distribution, six bytes each.
        tail: what stands for the others: ``rest``, one event with their mass, or ``renormalised``, nothing.
        store: folder of distributions and of the target's own bits per byte; None: the user's cache folder.
    """

    method: str
    target: str
    sources: tuple[str, ...] = ()
    text: tuple[str, ...] = ()
    held_out: float = 0.2
    shard: tuple[int, int] = (0, 1)
    train_tokens: int | None = None
    seed: int = 0
    learning_rate: float = 1e-5
    warmup: float = 0.1
    weight_decay: float = 0.0
    batch_size: int = 4
    context_length: int = 256
    checkpoint_steps: int | None = None
    device: str | None = None
    clm_weight: float = 0.9
    fusion: str = "mince"
    alignment: str = "bytes"
    top_k: int = 10
    tail: str = "rest"
    store: str | None = None

    @classmethod
    def parse(cls, raw: Mapping[str, Any], members: Mapping[str, str]) -> DistillRecipe:
        """Check a recipe and return it with its defaults.

        Args:
            raw: the keys of the recipe; `ABOUT` are for others.
            members: model names that the recipe may use.

        Raises:
            ConfigError: an unknown, missing or impossible key or value, or a model that is not among `members`.
        """
        known = [field.name for field in fields(cls)]
        given = {key: value for key, value in raw.items() if key not in ABOUT and value is not None}
        for key in given:
            if key not in known:
                raise ConfigError(f"recipe: unknown key {key!r}.{did_you_mean(str(key), known)} Known: {_list(known)}")
        method = _choice("method", given.get("method"), METHODS)
        if method == "clm" and (foreign := sorted(FUSELLM_KEYS & set(given))):
            raise ConfigError(
                f"recipe: method clm trains on text alone, but {foreign[0]!r} is given; remove it, or use "
                "method fusellm"
            )
        for key in REQUIRED[method]:
            if not given.get(key):
                raise ConfigError(f"recipe: method {method} needs {key!r}, named as in models: {_list(members)}")
        values = {**given, "method": method} | ({"clm_weight": 1.0} if method == "clm" else {})
        return cls(**_typed(values, members))

    def to_dict(self) -> dict[str, Any]:
        """Return every key of the recipe, defaults included, as plain data."""
        found = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        return {key: found[key] for key in found if self.method == "fusellm" or key not in FUSELLM_KEYS}

    def identity(self) -> dict[str, Any]:
        """Return the keys that decide the result; `build` adds what the names and files stand for."""
        apart = {"target", "sources", "text", "store", "device", "checkpoint_steps"}
        return {key: value for key, value in self.to_dict().items() if key not in apart}


def _typed(values: dict[str, Any], members: Mapping[str, str]) -> dict[str, Any]:
    """Return the values with their types and ranges checked."""
    found = dict(values)
    found["target"] = _member("target", values["target"], members)
    found["sources"] = tuple(_member("sources", name, members) for name in _names("sources", values.get("sources", ())))
    if len(set(found["sources"])) < len(found["sources"]):
        raise ConfigError(f"recipe: sources {_list(found['sources'])} name a model twice; name each once")
    found["text"] = tuple(_names("text", values.get("text", ())))
    for name in found["text"]:
        path = Path(name).expanduser()
        if not path.is_file():
            raise ConfigError(f"recipe: text {name!r} is no file (looked in {path.absolute().parent})")
    for key, allowed in (("fusion", FUSIONS), ("alignment", ALIGNMENTS), ("tail", TAILS)):
        if key in values:
            _choice(key, values[key], allowed)
    for key in ("train_tokens", "batch_size", "context_length", "checkpoint_steps", "top_k"):
        if key in values:
            found[key] = _whole(key, values[key], 1)
    if "seed" in values:
        found["seed"] = whole_number(values["seed"], "recipe: seed", 0, MAX_SEED)
    for key, low, high in (
        ("held_out", 0.0, 0.9), ("warmup", 0.0, 1.0), ("weight_decay", 0.0, 10.0), ("clm_weight", 0.0, 1.0),
        ("learning_rate", 0.0, 1.0),
    ):  # fmt: skip
        if key in values:
            found[key] = _number(key, values[key], low, high)
    if found.get("learning_rate") == 0 or found.get("held_out") == 0:
        key = "learning_rate" if found.get("learning_rate") == 0 else "held_out"
        raise ConfigError(f"recipe: {key} must be above 0; got 0")
    found["shard"] = _shard(values.get("shard", (0, 1)))
    for key in ("device", "store"):
        if key in values and not isinstance(values[key], str):
            raise ConfigError(f"recipe: {key} must be a text; got {values[key]!r}")
    return found


def _list(names: Any) -> str:
    return ", ".join(map(str, names)) or "none"


def _choice(key: str, value: Any, allowed: Sequence[str]) -> str:
    if value not in allowed:
        raise ConfigError(f"recipe: {key} {value!r} is not one of {_list(allowed)}.{did_you_mean(str(value), allowed)}")
    return str(value)


def _member(key: str, name: Any, members: Mapping[str, str]) -> str:
    if not isinstance(name, str) or name not in members:
        raise ConfigError(f"recipe: {key} {name!r} is not among its models: {_list(members)}."
                          f"{did_you_mean(str(name), members)}")  # fmt: skip
    return str(name)


def _names(key: str, value: Any) -> list[str]:
    found = [value] if isinstance(value, (str, Path)) else value
    if not isinstance(found, (list, tuple)) or not all(isinstance(name, (str, Path)) for name in found):
        raise ConfigError(f"recipe: {key} must be a name or a list of names; got {value!r}")
    return [str(name) for name in found]


def _whole(key: str, value: Any, low: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ConfigError(f"recipe: {key} must be a whole number of at least {low}; got {value!r}")
    return value


def _number(key: str, value: Any, low: float, high: float) -> float:
    try:  # YAML 1.1 reads 1e-5 as a text
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not low <= number <= high:
        raise ConfigError(f"recipe: {key} must be a number from {low:g} to {high:g}; got {value!r}")
    return number


def _shard(value: Any) -> tuple[int, int]:
    whole = isinstance(value, (list, tuple)) and len(value) == 2
    if not whole or any(isinstance(n, bool) or not isinstance(n, int) for n in value) or not 0 <= value[0] < value[1]:
        raise ConfigError(f"recipe: shard must be [i, n] with 0 <= i < n; got {value!r}")
    return value[0], value[1]
