"""The recipe of a training, checked before any model is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator
from typing_extensions import Self

from lm_eval_deepen.config import Keys, Names, Shown
from lm_eval_deepen.config.recipes import LARGEST_SEED
from lm_eval_deepen.errors import ConfigError, Problems, did_you_mean

METHODS = ("fusellm", "clm")
# Keys that came when there were models already: at their defaults they are no part of what tells builds apart.
LATER = ("adam_betas", "precision", "gradient_checkpointing")
ABOUT = frozenset({"title", "note", "source", "models"})  # for people and for whoever resolves names
FUSELLM_KEYS = frozenset({"sources", "clm_weight", "fusion", "alignment", "top_k", "tail"})


def _shard(value: tuple[int, ...]) -> tuple[int, ...]:
    if len(value) != 2 or not 0 <= value[0] < value[1]:
        raise ValueError(value)
    return value


def _betas(value: tuple[float, ...]) -> tuple[float, ...]:
    if len(value) != 2 or not all(0 <= beta < 1 for beta in value):
        raise ValueError(value)
    return value


class DistillRecipe(Keys):
    """Keys of one training. `sources` and the keys from `clm_weight` to `tail` are only for `method: fusellm`."""

    method: Literal["fusellm", "clm"] = Field(
        description="`fusellm`, or `clm`: the same training without sources, the control."
    )
    target: str = Field(min_length=1, description="The model that is trained, by its name in the recipe.")
    sources: Names = Field(
        (),
        description="The models whose distributions the target learns. The target itself, as it is before training, "
        "may be among them, as in the paper.",
    )
    text: Annotated[Names, Shown("a file, task:NAME (a task's training split), or a list of these")] = Field(
        (),
        min_length=1,
        description="Text files (documents separated by blank lines, or JSON lines with `text`). Without any, the "
        "text is prose of Python's own documentation.",
    )
    held_out: float = Field(
        0.2, gt=0, le=0.9, description="The share of the documents on which no shard and no seed is trained."
    )
    shard: Annotated[tuple[int, ...], AfterValidator(_shard), Shown("[i, n] with 0 <= i < n")] = Field(
        (0, 1), description="The training text is every n-th of the other documents, from the i-th on."
    )
    train_tokens: Annotated[int | None, Shown(default="one pass")] = Field(
        None,
        ge=1,
        description="The number of tokens of the target to predict. If the text has fewer, it is read again.",
    )
    seed: int = Field(0, ge=0, le=LARGEST_SEED, description="The seed of the order of the blocks.")
    learning_rate: float = Field(1e-5, gt=0, le=1, description="The learning rate of AdamW at its peak.")
    warmup: float = Field(
        0.1,
        ge=0,
        le=1,
        description="The share of the steps in which the learning rate rises; then it falls along a cosine.",
    )
    weight_decay: float = Field(0.0, ge=0, le=10, description="The weight decay of AdamW.")
    adam_betas: Annotated[tuple[float, ...], AfterValidator(_betas), Shown("two numbers from 0 to below 1")] = Field(
        (0.9, 0.999), description="The decay rates of AdamW's two means."
    )
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="The precision of the target's computations; its weights are kept in float32."
    )
    gradient_checkpointing: bool = Field(False, description="Whether activations are computed again to save memory.")
    batch_size: int = Field(4, ge=1, description="The number of blocks in a step, of all processes together.")
    context_length: int = Field(256, ge=1, description="The largest number of the target's tokens in a block.")
    checkpoint_steps: Annotated[int | None, Shown(default="five in all")] = Field(
        None, ge=1, description="The number of steps between two checkpoints."
    )
    device: Annotated[str | None, Shown(default="the first accelerator, else the CPU")] = Field(
        None, description="The device of the models. If several GPUs are visible, training takes the first."
    )
    clm_weight: float = Field(
        0.9, ge=0, le=1, description="The lambda of the loss, lambda * CLM + (1 - lambda) * fusion (section 3.1)."
    )
    fusion: Literal["mince", "avgce"] = Field(
        "mince",
        description="The sources from which a block is learnt: `mince` takes the one that predicts it best, `avgce` "
        "takes all, weighted by how well they predict it.",
    )
    alignment: Literal["bytes", "dtw"] = Field(
        "bytes",
        description="How positions are paired: `bytes` pairs those with equal contexts, `dtw` is the paper's dynamic "
        "time warping.",
    )
    top_k: int = Field(10, ge=1, description="The number of entries kept of a source's distribution, six bytes each.")
    tail: Literal["rest", "renormalised"] = Field(
        "rest",
        description="What replaces the other entries: `rest` is one event with their mass, `renormalised` is nothing.",
    )
    store: Annotated[str | None, Shown(default="the user's cache folder")] = Field(
        None, description="The folder for distributions, and for the target's own bits per byte."
    )

    @classmethod
    def read(cls, raw: Any, what: str = "this") -> Self:
        """Return the keys of a mapping but those of `ABOUT`, which are for others; see `Keys.read`."""
        return super().read({key: value for key, value in raw.items() if key not in ABOUT}, what)

    @classmethod
    def parse(cls, raw: Mapping[str, Any], members: Mapping[str, str]) -> DistillRecipe:
        """Check a recipe that may use these models, and return it with its defaults.

        Raises:
            ConfigError: unknown, missing or impossible keys and values, or a model that is not among `members`.
        """
        recipe, problems = cls.read(raw), Problems()
        for key, names in (("target", [recipe.target]), ("sources", recipe.sources)):
            for name in names:
                if name not in members:
                    listed = ", ".join(members) or "none"
                    near = did_you_mean(name, members)
                    problems.add(f"{key} {name!r} is not among its models: {listed}.{near}", key, "unknown_name")
        for name in recipe.text:
            if not Path(name).expanduser().is_file():
                looked = Path(name).expanduser().absolute().parent
                problems.add(f"text {name!r} is no file (looked in {looked})", "text", "value")
        problems.refuse()
        return recipe.replace(clm_weight=1.0) if recipe.method == "clm" else recipe

    @model_validator(mode="after")
    def _agree(self) -> Self:
        """Refuse keys that the method has no use for."""
        foreign = sorted(FUSELLM_KEYS & self.model_fields_set)
        if self.method == "clm" and foreign:
            raise ConfigError(
                f"method clm trains on text alone, but {foreign[0]!r} is given; remove it, or use method fusellm",
                key=foreign[0], code="conflict",
            )  # fmt: skip
        kind, _, index = (self.device or "").partition(":")
        if index.strip("0"):  # `transformers.Trainer` takes none but the first
            raise ConfigError(
                f"device {self.device}: a training takes the first {kind} device that is visible. Give {kind}:0, and "
                "let the program see the other one first: CUDA_VISIBLE_DEVICES and its like",
                key="device", code="value",
            )  # fmt: skip
        if self.method == "fusellm" and not self.sources:
            raise ConfigError("method fusellm needs 'sources', named as in models", key="sources", code="missing")
        if len(set(self.sources)) < len(self.sources):
            raise ConfigError(
                f"sources {', '.join(self.sources)} name a model twice; name each once", key="sources", code="value"
            )
        return self

    def to_dict(self) -> dict[str, Any]:
        """Return every key of the recipe, defaults included, as plain data."""
        keys = super().to_dict()
        return {key: keys[key] for key in keys if self.method == "fusellm" or key not in FUSELLM_KEYS}

    def identity(self) -> dict[str, Any]:
        """Return the keys that decide the result; `build` adds what the names and files stand for."""
        apart = {"target", "sources", "text", "store", "device", "checkpoint_steps"}
        fields, keys = type(self).model_fields, self.to_dict()
        apart |= {key for key in LATER if getattr(self, key) == fields[key].default}
        return {key: value for key, value in keys.items() if key not in apart}
