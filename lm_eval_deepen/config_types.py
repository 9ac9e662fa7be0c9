"""The frozen configuration of an ensemble: what it holds, its fingerprint, its JSON form."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lm_eval_deepen.config_source import SourceConfig
from lm_eval_deepen.errors import ConfigError

ChatFallback = Literal["error", "plain"]
SkipWhen = Literal["never", "agree", "confident"]
Speculate = Literal["off", "lookup", "draft"]
Covers = Literal["off", "on"]

DEFAULT_METHOD = "deepen"
DEFAULT_SEED = 0
DEFAULT_CHAT_FALLBACK: ChatFallback = "error"
DEFAULT_TEMPERATURE = 1.0
DEFAULT_BATCH_SIZE = 1  # as `--model hf`
DEFAULT_SKIP_WHEN: SkipWhen = "never"
DEFAULT_SKIP_ABOVE = 0.9
DEFAULT_SPECULATE: Speculate = "off"
DEFAULT_COVERS: Covers = "off"
DEFAULT_MAX_BATCH_SIZE = 64  # as `--model hf`

# Arguments that say where and how a model is fetched and placed: they change no result.
PLACEMENT_KEYS = frozenset(
    "device device_map parallelize max_memory_per_gpu max_cpu_memory offload_folder tp_plan "
    "low_cpu_mem_usage cache_dir local_files_only token use_auth_token".split()
)
SECRET_KEYS = frozenset({"token", "use_auth_token"})  # never written to a result file


class FrozenDict(Mapping[str, Any]):
    """A hashable mapping, sorted by key, whose values are frozen as well."""

    __slots__ = ("_items",)

    def __init__(self, items: Mapping[str, Any] | None = None) -> None:
        """Freeze a copy of `items`; raises ConfigError as `freeze` does."""
        self._items = {key: freeze(value) for key, value in sorted((items or {}).items())}

    def __getitem__(self, key: str) -> Any:
        """Return the frozen value of `key`."""
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the keys, sorted."""
        return iter(self._items)

    def __len__(self) -> int:
        """Return the number of keys."""
        return len(self._items)

    def __hash__(self) -> int:
        """Hash the items; equal mappings have equal hashes."""
        return hash(tuple(self._items.items()))

    def __repr__(self) -> str:
        """Show the items."""
        return f"FrozenDict({self._items!r})"


def freeze(value: Any) -> Any:
    """Return a hashable copy of plain data: mappings, sequences, text, numbers, booleans, None.

    Paths become text, and a torch dtype its name, which is how the harness spells them.

    Raises:
        ConfigError: for any other object, which has no stable fingerprint.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise ConfigError(f"key {key!r} of {dict(value)!r} is not text; quote it")
        return FrozenDict(value)
    if isinstance(value, (list, tuple)):
        return tuple(freeze(item) for item in value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if str(value).startswith("torch."):
        return str(value).removeprefix("torch.")
    raise ConfigError(
        f"a value of type {type(value).__name__} ({str(value)[:60]!r}) cannot be part of a configuration; "
        "give text, numbers, true/false, lists or mappings of these"
    )


def thaw(value: Any) -> Any:
    """Return frozen data as plain dicts and lists."""
    if isinstance(value, Mapping):
        return {key: thaw(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [thaw(item) for item in value]
    return value


@dataclass(frozen=True)
class MemberConfig:
    """One member of an ensemble.

    Attributes:
        name: unique in the ensemble; for messages and result files.
        pretrained: hub name or folder, as `--model hf` takes it.
        weight: share of the member, >= 0; the ensemble's weights sum to 1.
        temperature: > 0; divides the member's logits before fusion.
        loading: further arguments of the harness's ``HFLM`` and of ``from_pretrained``.
        hf_kwargs: arguments handed to ``from_pretrained`` unchecked.
        source: what an encoder-decoder member reads.
        allow_altered_tokenizer: whether a tokenizer is taken as it was loaded, where its file says otherwise.
    """

    name: str
    pretrained: str
    weight: float
    temperature: float = DEFAULT_TEMPERATURE
    loading: FrozenDict = field(default_factory=FrozenDict)
    hf_kwargs: FrozenDict = field(default_factory=FrozenDict)
    source: SourceConfig = SourceConfig()
    allow_altered_tokenizer: bool = False

    def loading_dict(self) -> dict[str, Any]:
        """Return the loading arguments as plain data, without `pretrained` and `hf_kwargs`."""
        return thaw(self.loading)

    def hf_kwargs_dict(self) -> dict[str, Any]:
        """Return the unchecked ``from_pretrained`` arguments as plain data."""
        return thaw(self.hf_kwargs)

    def to_dict(self, with_weight: bool = True) -> dict[str, Any]:
        """Return the member as the configuration spells it; access tokens are left out."""
        shown: dict[str, Any] = {"name": self.name, "pretrained": self.pretrained}
        shown |= {"weight": self.weight} if with_weight else {}
        shown |= {"temperature": self.temperature} | self.source.to_dict() | _without(self.loading, SECRET_KEYS)
        shown |= {"allow_altered_tokenizer": True} if self.allow_altered_tokenizer else {}
        hidden = _without(self.hf_kwargs, SECRET_KEYS)
        return shown | ({"hf_kwargs": hidden} if hidden else {})


@dataclass(frozen=True)
class EnsembleConfig:
    """A validated ensemble: members, method and options.

    Attributes:
        members: the main member first.
        method: name of the fusion method.
        options: every option of the method, defaults filled in.
        weighting: where the weights come from; None where they are given, or equal.
        weighting_options: every option of the weighting.
        weights_change: whether the weighting changes them while a run goes on.
        weights_computed: whether the weighting makes them from nothing that is given.
        pooling: how the members' own answers are combined; None where their steps are fused.
        pooling_options: every option of the pooling method.
        compat: name of the expanded compatibility profile, or None.
        seed: seeds whatever is drawn at random.
        chat_fallback: what a member without a chat template does with a conversation: ``error`` or ``plain``.
        matrix_dir: folder of relative matrices, or None for the user's cache.
        batch_size: a positive number, ``auto`` or ``auto:N``.
        max_batch_size: limit of ``auto``.
        speculate: where drafts of greedy texts come from: ``off``, ``lookup`` or ``draft``; changes no text.
        skip_when: which steps are left to the main member: where all members ``agree`` on the most likely piece,
            or where it is ``confident``.
        skip_above: the probability from which the main member is confident.
        skip_check: whether skipped steps are fused all the same, to count what skipping changes; changes no result.
        self_check: whether an evaluation measures the ensemble on a small text first; changes no result.
        evidence: what a search for these options measured, for the results file.
        covers: whether other members are asked what follows where the main token ends inside one of theirs.
    """

    members: tuple[MemberConfig, ...]
    method: str = DEFAULT_METHOD
    options: FrozenDict = field(default_factory=FrozenDict)
    weighting: str | None = None
    weighting_options: FrozenDict = field(default_factory=FrozenDict)
    weights_change: bool = False
    weights_computed: bool = False
    pooling: str | None = None
    pooling_options: FrozenDict = field(default_factory=FrozenDict)
    compat: str | None = None
    seed: int = DEFAULT_SEED
    chat_fallback: ChatFallback = DEFAULT_CHAT_FALLBACK
    matrix_dir: str | None = None
    batch_size: int | str = DEFAULT_BATCH_SIZE
    max_batch_size: int = DEFAULT_MAX_BATCH_SIZE
    speculate: Speculate = DEFAULT_SPECULATE
    skip_when: SkipWhen = DEFAULT_SKIP_WHEN
    skip_above: float = DEFAULT_SKIP_ABOVE
    skip_check: bool = False
    self_check: bool = True
    evidence: FrozenDict = field(default_factory=FrozenDict)
    covers: Covers = DEFAULT_COVERS

    @property
    def weights(self) -> tuple[float, ...]:
        """Weights of the members, summing to 1."""
        return tuple(member.weight for member in self.members)

    def options_dict(self) -> dict[str, Any]:
        """Return the method's options, by the names of its dataclass fields."""
        return thaw(self.options)

    @property
    def fuses_steps(self) -> bool:
        """Whether the method is used: there is no pooling, or the fused ensemble takes part in it."""
        return self.pooling is None or bool(self.pooling_options.get("with_fused", False))

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
                **member.source.to_dict(),
                **({"allow_altered_tokenizer": True} if member.allow_altered_tokenizer else {}),
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
        if self.weights_change:  # else the members' weights say all
            facts["weighting"] = {"name": self.weighting, **thaw(self.weighting_options)}
        if self.skip_when != DEFAULT_SKIP_WHEN:
            facts["skip"] = [self.skip_when, self.skip_above if self.skip_when == "confident" else None]
        if self.covers == "on":
            facts["covers"] = "on"
        if self.pooling is not None:
            facts["pooling"] = {"name": self.pooling, **thaw(self.pooling_options)}
        canonical = json.dumps(facts, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as JSON data, in the nested spelling: parsing it gives an equal one.

        Access tokens are left out.
        """
        shown: dict[str, Any] = {
            "pretrained": self.members[0].pretrained,
            "members": [member.to_dict(with_weight=not self.weights_computed) for member in self.members],
            **({"method": self.method, **self.options_dict()} if self.fuses_steps else {}),
            **thaw(self.weighting_options),
            **thaw(self.pooling_options),
            "seed": self.seed,
            "chat_fallback": self.chat_fallback,
            "batch_size": self.batch_size,
            "max_batch_size": self.max_batch_size,
            "speculate": self.speculate,
            "skip_when": self.skip_when,
            "skip_above": self.skip_above,
            "skip_check": self.skip_check,
            "self_check": self.self_check,
            "covers": self.covers,
        }
        for key in ("weighting", "pooling", "compat"):
            if getattr(self, key) is not None:
                shown[key] = getattr(self, key)
        if self.evidence:
            shown["evidence"] = thaw(self.evidence)
        if self.matrix_dir is not None:
            shown["matrix_dir"] = self.matrix_dir
        return shown


def _without(items: Mapping[str, Any], keys: frozenset[str]) -> dict[str, Any]:
    """Return plain data of `items` without `keys`."""
    return {key: thaw(value) for key, value in items.items() if key not in keys}
