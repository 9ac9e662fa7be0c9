"""The configuration of an ensemble: every key with its meaning, its fingerprint, its JSON form."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from typing_extensions import Self

from lm_eval_deepen.config.describe import Shown
from lm_eval_deepen.config.frozen import FrozenDict, thaw
from lm_eval_deepen.config.keys import Keys, to_number
from lm_eval_deepen.errors import ConfigError

DEFAULT_METHOD = "deepen"
# Arguments that say where and how a model is fetched and placed: they change no result.
PLACEMENT_KEYS = frozenset(
    "device device_map parallelize max_memory_per_gpu max_cpu_memory offload_folder tp_plan "
    "low_cpu_mem_usage cache_dir local_files_only token use_auth_token".split()
)
SECRET_KEYS = frozenset({"token", "use_auth_token"})  # never written to a result file
QUOTE = "quote it if it is a number"
SAVED = "save a model that is loaded already, and its tokenizer, with save_pretrained, and give the folder"


def _batch_size(value: Any) -> Any:
    """Return a positive number, ``auto`` or ``auto:N``, as `--model hf` takes them."""
    number = to_number(value)
    if number is not None and number.is_integer() and number >= 1:
        return int(number)
    if isinstance(value, str) and re.fullmatch(r"auto(:\d+(\.\d+)?)?", value):
        return value
    raise ValueError(value)


def _pattern(value: str) -> str:
    """Return a regular expression with one group."""
    try:
        groups = re.compile(value).groups
    except re.error as error:
        raise ConfigError(
            f"source_pattern {value!r} is no regular expression ({error}); correct it", key="source_pattern"
        ) from error
    if groups != 1:
        raise ConfigError(
            f"source_pattern {value!r} has {groups} groups; it needs one, which is the source text. "
            "Write other groups as (?:...)",
            key="source_pattern",
        )
    return value


def _as_written(value: Any) -> Any:
    """Return a bare ``off`` or ``on`` as it was written: YAML reads it as a truth value."""
    return {False: "off", True: "on"}[value] if isinstance(value, bool) else value


class Settings(Keys):
    """Keys of an ensemble that stand for themselves, beside its members and its method."""

    compat: Annotated[str | None, Shown(default="the options as given")] = Field(
        None, description="A named set of the method's options: `reference` is its paper's."
    )
    seed: int = Field(0, ge=0, description="Seeds whatever is drawn at random.")
    chat_fallback: Literal["error", "plain"] = Field(
        "error",
        description="What a member without a chat template does with a conversation: it is an error, or it reads the "
        "messages as plain text.",
    )
    matrix_dir: Annotated[str | None, Shown("the path of a folder", "the user's cache folder")] = Field(
        None, description="Where relative matrices and maps of vocabularies are kept."
    )
    batch_size: Annotated[
        int | str, AfterValidator(_batch_size), Shown("a whole number of at least 1, auto or auto:N")
    ] = Field(1, description="The number of texts that are decoded together; scoring packs tokens by itself.")
    max_batch_size: int = Field(64, ge=1, description="The largest batch that `batch_size: auto` takes.")
    speculate: Annotated[Literal["off", "lookup", "draft"], BeforeValidator(_as_written)] = Field(
        "off",
        description="Where greedy decoding takes drafts from, which it verifies: from repeated text, or from the "
        "smallest member. It changes no text.",
    )
    skip_when: Literal["never", "agree", "confident"] = Field(
        "never",
        description="Which steps are left to the main member: those where all members agree on the most likely piece, "
        "or those where the main member is confident.",
    )
    skip_above: float = Field(
        0.9, gt=0, le=1, description="The probability from which the main member is confident, for `skip_when`."
    )
    skip_check: bool = Field(
        False, description="Whether skipped steps are fused all the same, to count what skipping changes."
    )
    self_check: bool = Field(
        True,
        description="Whether the ensemble is measured on a small text before the first request. It changes no result.",
    )
    covers: Annotated[Literal["off", "on"], BeforeValidator(_as_written)] = Field(
        "off",
        description="Whether the other members are asked what follows where the main member's token ends inside one of "
        "theirs.",
    )
    evidence: Annotated[FrozenDict, Shown("a mapping, as `lm-eval-deepen tune` writes it")] = Field(
        FrozenDict(), description="What `lm-eval-deepen tune` measured: it is shown in results and changes nothing."
    )


class MemberKeys(Keys):
    """Keys of one member, beside the arguments that it is loaded with."""

    name: Annotated[str, Shown("non-empty text", "the end of `pretrained`", QUOTE)] = Field(
        "", min_length=1, pattern=r"\S", description="The member's name in messages and results, unique."
    )
    pretrained: Annotated[str, Shown("a hub name or a path, as text", remedy=f"{QUOTE}; {SAVED}")] = Field(
        pattern=r"\S", description="A model's hub name or folder, as `--model hf` takes it."
    )
    weight: Annotated[float | None, Shown(default="equal weights")] = Field(
        None, ge=0, description="The member's share. All members have one, or none has; they sum to 1."
    )
    temperature: float = Field(1.0, gt=0, description="Divides the member's logits before fusion.")
    hf_kwargs: FrozenDict = Field(FrozenDict(), description="Arguments handed to `from_pretrained` unchecked.")
    source_pattern: Annotated[
        Annotated[str, AfterValidator(_pattern)] | None, Shown("non-empty text", "the whole prompt")
    ] = Field(
        None,
        min_length=1,
        description="Of an encoder-decoder member: a regular expression with one group, whose last match in the prompt "
        "is what the encoder reads.",
    )
    source_language: Annotated[str | None, Shown("non-empty text")] = Field(
        None,
        min_length=1,
        description="Of an encoder-decoder member: the source's language, as its tokenizer names it.",
    )
    target_language: Annotated[str | None, Shown("non-empty text")] = Field(
        None, min_length=1, description="Of an encoder-decoder member: the language to be written, likewise."
    )

    allow_altered_tokenizer: bool = Field(
        False, description="Whether a tokenizer is taken as it was loaded where its own file says otherwise."
    )
    allow_missing_weights: bool = Field(
        False,
        description="Whether the model is loaded although its files lack weights of it, or hold them in another shape; "
        "these are random.",
    )
    allow_unexpected_weights: bool = Field(
        False, description="Whether the model is loaded although its files hold weights that it has no place for."
    )

    @property
    def source(self) -> dict[str, str]:
        """What is said of an encoder-decoder member's source, as the configuration spells it."""
        keys = ("source_language", "source_pattern", "target_language")
        return {key: value for key in keys if (value := getattr(self, key)) is not None}

    @property
    def allowed(self) -> dict[str, bool]:
        """What is allowed of the member that is an error otherwise."""
        return {key: True for key in ALLOWANCES if getattr(self, key)}


ALLOWANCES = tuple(name for name in MemberKeys.names() if name.startswith("allow_"))


class LoadingKeys(Keys):
    """Arguments that a member is loaded with and whose values are checked here; the others are left to the harness."""

    max_length: Annotated[int | None, Shown(default="the model's own")] = Field(
        None, ge=1, description="The longest text, in the member's tokens."
    )


class MemberConfig(MemberKeys):
    """One member of an ensemble, as it was understood: `name` and `weight` are there, and the weights sum to 1."""

    name: str
    weight: float = 1.0
    loading: FrozenDict = Field(
        FrozenDict(), description="Further arguments of the harness's `HFLM` and of `from_pretrained`."
    )

    def loading_dict(self) -> dict[str, Any]:
        """Return the loading arguments as plain data, without `pretrained` and `hf_kwargs`."""
        found: dict[str, Any] = thaw(self.loading)
        return found

    def hf_kwargs_dict(self) -> dict[str, Any]:
        """Return the unchecked ``from_pretrained`` arguments as plain data."""
        found: dict[str, Any] = thaw(self.hf_kwargs)
        return found

    def spelt(self, with_weight: bool = True) -> dict[str, Any]:
        """Return the member as the configuration spells it; access tokens are left out."""
        shown: dict[str, Any] = {"name": self.name, "pretrained": self.pretrained}
        shown |= {"weight": self.weight} if with_weight else {}
        shown |= {"temperature": self.temperature} | self.source | self.allowed | _without(self.loading, SECRET_KEYS)
        hidden = _without(self.hf_kwargs, SECRET_KEYS)
        return shown | ({"hf_kwargs": hidden} if hidden else {})


class EnsembleConfig(Settings):
    """A configuration that was understood: whatever uses it finds the members and the options as they were built.

    Attributes:
        members: the main member first.
        options: of the fusion method; what fuses is built from them.
        weighting_options: of what makes the weights; None where they are given, or equal.
        pooling_options: of how the members' own answers are combined; None where their steps are fused.
    """

    members: tuple[MemberConfig, ...]
    options: Any  # what they can do is said where they are registered, in layers above this one
    weighting_options: Any = None
    pooling_options: Any = None

    @model_validator(mode="after")
    def _has_effect(self) -> Self:
        """Refuse keys that exclude each other, and a weighting or a pooling that has nothing to work on."""
        if self.compat == "reference" and self.covers == "on":
            raise ConfigError(
                "covers=on is no part of a method as it was published; remove covers, or remove compat=reference",
                key="covers", code="conflict",
            )  # fmt: skip
        alone = len(self.members) == 1
        if self.weights_change and alone:
            raise ConfigError(
                f"weighting={self.weighting} has nothing to weigh: there is one member; remove weighting",
                key="weighting", code="conflict",
            )  # fmt: skip
        if self.pooling is not None and alone:
            raise ConfigError(
                f"pooling={self.pooling} has nothing to combine: there is one member; remove pooling",
                key="pooling", code="conflict",
            )  # fmt: skip
        if self.pooling is not None and self.weights_change:
            raise ConfigError(
                f"weighting={self.weighting} weighs fused steps, and pooling={self.pooling} combines whole answers; "
                "remove one of the two, or give constant weights",
                key="weighting", code="conflict",
            )  # fmt: skip
        return self

    @property
    def method(self) -> str:
        """Name of the fusion method."""
        return str(self.options.NAME)

    @property
    def weighting(self) -> str | None:
        """Name of what makes the weights; None where they are given, or equal."""
        return self.weighting_options.NAME if self.weighting_options is not None else None

    @property
    def pooling(self) -> str | None:
        """Name of what combines whole answers; None where steps are fused."""
        return self.pooling_options.NAME if self.pooling_options is not None else None

    @property
    def weights(self) -> tuple[float, ...]:
        """Weights of the members, summing to 1."""
        return tuple(member.weight for member in self.members)

    @property
    def weights_change(self) -> bool:
        """Whether the weighting changes the weights while a run goes on."""
        return self.weighting_options is not None and self.weighting_options.build() is not None

    @property
    def weights_computed(self) -> bool:
        """Whether the weighting computes the weights, so that none may be given."""
        return self.weighting_options is not None and not self.weighting_options.TAKES_WEIGHTS

    @property
    def fuses_steps(self) -> bool:
        """Whether the method is used: there is no pooling, or the fused ensemble takes part in it."""
        return self.pooling_options is None or bool(getattr(self.pooling_options, "with_fused", False))

    def options_dict(self) -> dict[str, Any]:
        """Return the method's options as plain data."""
        found: dict[str, Any] = self.options.to_dict()
        return found

    def fingerprint(self) -> str:
        """Return the SHA-256 hex digest of everything that influences results.

        Left out: member names, batch sizes, where matrices are kept, and `PLACEMENT_KEYS`.
        """
        members = [
            {
                "pretrained": member.pretrained,
                "weight": member.weight,
                "temperature": member.temperature,
                "loading": _without({**member.loading, **member.hf_kwargs}, PLACEMENT_KEYS),
                **member.source,
                **member.allowed,
            }
            for member in self.members
        ]
        facts: dict[str, Any] = {
            "members": members,
            "method": self.method,
            "options": self.options_dict(),
            "compat": self.compat,
            "seed": self.seed,
            "chat_fallback": self.chat_fallback,
        }
        if self.weighting_options is not None and self.weights_change:  # else the members' weights say all
            facts["weighting"] = {"name": self.weighting, **self.weighting_options.to_dict()}
        if self.skip_when != "never":
            facts["skip"] = [self.skip_when, self.skip_above if self.skip_when == "confident" else None]
        if self.covers == "on":
            facts["covers"] = "on"
        if self.pooling_options is not None:
            facts["pooling"] = {"name": self.pooling, **self.pooling_options.to_dict()}
        canonical = json.dumps(facts, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as JSON data, in the nested spelling: parsing it gives an equal one.

        Access tokens are left out.
        """
        shown: dict[str, Any] = {
            "pretrained": self.members[0].pretrained,
            "members": [member.spelt(with_weight=not self.weights_computed) for member in self.members],
        }
        if self.fuses_steps:
            shown |= {"method": self.method, **self.options.to_dict()}
        for kind, options in (("weighting", self.weighting_options), ("pooling", self.pooling_options)):
            if options is not None:
                shown |= {kind: options.NAME, **options.to_dict()}
        settings = {name: thaw(getattr(self, name)) for name in Settings.names()}
        return shown | {key: value for key, value in settings.items() if value not in (None, {})}


def _without(items: Mapping[str, Any], keys: frozenset[str]) -> dict[str, Any]:
    """Return plain data of `items` without `keys`."""
    return {key: thaw(value) for key, value in items.items() if key not in keys}
