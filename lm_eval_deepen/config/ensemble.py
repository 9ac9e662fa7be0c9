"""The parsed configuration of an ensemble, with its fingerprint and its JSON form."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import Field, model_validator
from typing_extensions import Self

from lm_eval_deepen.config.errors import conflict
from lm_eval_deepen.config.frozen import FrozenDict, thaw
from lm_eval_deepen.config.schema import MemberKeys, Settings

# Arguments that say where and how a model is fetched and placed: they change no result.
PLACEMENT_KEYS = frozenset(
    "device device_map parallelize max_memory_per_gpu max_cpu_memory offload_folder tp_plan tp_size "
    "low_cpu_mem_usage cache_dir local_files_only token use_auth_token".split()
)
SECRET_KEYS = frozenset({"token", "use_auth_token"})  # never written to a result file


class MemberConfig(MemberKeys):
    """One member of an ensemble, as it was understood: `name` and `weight` are there, and the weights sum to 1."""

    name: str
    weight: float = 1.0
    loading: FrozenDict = Field(
        FrozenDict(), description="Further arguments of the harness's `HFLM` and of `from_pretrained`."
    )

    def loading_dict(self) -> dict[str, Any]:
        """Return the loading arguments as plain data, without `pretrained` and `hf_kwargs`."""
        return dict(thaw(self.loading))

    def hf_kwargs_dict(self) -> dict[str, Any]:
        """Return the unchecked ``from_pretrained`` arguments as plain data."""
        return dict(thaw(self.hf_kwargs))

    def spelt(self, with_weight: bool = True) -> dict[str, Any]:
        """Return the member as the configuration spells it; access tokens are left out."""
        shown: dict[str, Any] = {"name": self.name, "pretrained": self.pretrained}
        shown |= {"weight": self.weight} if with_weight else {}
        shown |= {"temperature": self.temperature} | self.source | self.allowed | _without(self.loading, SECRET_KEYS)
        hidden = _without(self.hf_kwargs, SECRET_KEYS)
        return shown | ({"hf_kwargs": hidden} if hidden else {})


class EnsembleConfig(Settings):
    """A configuration that was understood: whatever uses it finds the members and the options as they were built."""

    members: tuple[MemberConfig, ...]  # the main member first
    # of the fusion method; what fuses is built from them
    options: Any  # what they can do is said where they are registered, in layers above this one
    weighting_options: Any = None  # of what makes the weights; None where they are given, or equal
    pooling_options: Any = None  # of how the members' own answers are combined; None where their steps are fused

    @model_validator(mode="after")
    def _has_effect(self) -> Self:
        """Refuse keys that exclude each other, and a weighting or a pooling that has nothing to work on."""
        for key, is_one, said in _CONFLICTS:
            if is_one(self):
                raise conflict(key, said.format(self))
        exponents = getattr(self.options, "average", "linear")
        unequal = self.weights_change or len({weight for weight in self.weights if weight}) > 1
        if isinstance(exponents, tuple) and len(exponents) > 1 and unequal and self.pooling is None:
            key = "weights" if self.weighting is None else "weighting"
            raise conflict(
                key,
                f"{key} has no effect beside average={list(exponents)}, whose exponents say how much each member "
                f"counts; remove {key}",
            )
        for key, unset in _OF_STEPS.items():
            value = getattr(self, key)
            by_prompt = key == "weighting" and value not in ("bayes", "confidence")
            if self.writes_by_words and value not in (unset, None) and not by_prompt:
                said = f"{key}={value} is about single steps, and method={self.method} writes whole words"
                raise conflict(key, f"{said}; remove {key}")
        with_fused = self.pooling is None or getattr(self.pooling_options, "with_fused", False)
        for key in ("skip_when", "covers", "sampling") if not with_fused and not self.alone else ():
            value = getattr(self, key)
            if value != _OF_STEPS[key] and (key == "sampling" or not self.fuses_steps):
                said = (
                    f"{key}={value} is about fused steps, and pooling={self.pooling} combines the members' own answers"
                )
                raise conflict(key, f"{said}; remove {key}")
        for options in (self.options, self.weighting_options):
            if options is not None:
                options.check_members(len(self.members), self.options)
        return self

    @property
    def alone(self) -> bool:
        """Whether there is one member: what is said of fused steps has no effect."""
        return len(self.members) == 1

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
        """Whether the method is used: there is no pooling, or it needs the fused ensemble."""
        return self.pooling_options is None or bool(self.pooling_options.uses_fused)

    @property
    def writes_by_words(self) -> bool:
        """Whether several members write texts by words: no steps of theirs are fused, and no given text is scored."""
        return not self.alone and bool(getattr(self.options, "BY_WORDS", False))

    def options_dict(self) -> dict[str, Any]:
        """Return the method's options as plain data."""
        return dict(self.options.to_dict())

    def fingerprint(self) -> str:
        """Return the SHA-256 hex digest of `identity`."""
        canonical = json.dumps(self.identity(), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def identity(self) -> dict[str, Any]:
        """Return everything that influences results, as JSON data.

        Left out: member names, batch sizes, where matrices are kept, and `PLACEMENT_KEYS`, access tokens among them.
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
            facts["weighting"] = {"name": self.weighting, **self.weighting_options.identity()}
        if self.skip_when != "never":
            facts["skip"] = [self.skip_when, self.skip_above if self.skip_when == "confident" else None]
        if self.covers == "on":
            facts["covers"] = "on"
        if self.sampling != "fused":
            facts["sampling"] = self.sampling
        if self.pooling_options is not None:
            facts["pooling"] = {"name": self.pooling, **self.pooling_options.to_dict()}
        return facts

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


_OF_STEPS = {
    "speculate": "off", "skip_when": "never", "covers": "off", "trace": None, "weighting": None, "sampling": "fused",
}  # fmt: skip
# The key that is one too many, when it is, and what is said then.
_CONFLICTS: tuple[tuple[str, Callable[[EnsembleConfig], bool], str], ...] = (
    ("covers", lambda c: c.compat == "reference" and c.covers == "on",
     "covers=on is not part of the published method; remove covers, or remove compat=reference"),
    ("skip_check", lambda c: c.skip_check and c.skip_when == "never",
     "skip_check counts what skipping changes, and nothing is skipped; set skip_when"),
    ("skip_above", lambda c: c.skip_above != Settings.model_fields["skip_above"].default and c.skip_when != "confident",
     "skip_above={0.skip_above} is for skip_when=confident, got skip_when={0.skip_when}; remove it, or set "
     "skip_when=confident"),
    ("weighting", lambda c: c.weights_change and c.alone,
     "weighting={0.weighting} has nothing to weigh: there is one member; remove weighting"),
    ("trace_dir", lambda c: c.trace_dir is not None and c.trace is None,
     "trace_dir says where traces are written, and trace is not set; set trace=true"),
    ("sampling", lambda c: c.trace is not None and c.sampling == "member" and not c.alone,
     "sampling=member asks one member at a time, and trace={0.trace} shows what all members said at each step; remove "
     "one of the two"),
    ("trace", lambda c: c.trace is not None and c.pooling is not None,
     "trace={0.trace} follows fused steps, and pooling={0.pooling} combines whole answers; remove trace"),
    ("average", lambda c: c.weighting == "bayes" and getattr(c.options, "average", "linear") != "linear",
     "average={0.options.average} has no effect beside weighting=bayes, whose experts average both ways; remove "
     "average, or give constant weights"),
    ("weighting",
     lambda c: getattr(c.options, "BY_STRETCHES", False) and c.weights_change and c.weighting != "bayes",
     "weighting={0.weighting} makes weights by prompt or step, and method={0.method} scores stretches, under constant "
     "weights or those of weighting=bayes; remove weighting"),
    ("pooling", lambda c: c.pooling is not None and c.alone,
     "pooling={0.pooling} has nothing to combine: there is one member; remove pooling"),
    ("weighting", lambda c: c.pooling is not None and c.weights_change,
     "weighting={0.weighting} weighs fused steps, and pooling={0.pooling} combines whole answers; remove one of the "
     "two, or give constant weights"),
)  # fmt: skip


def _without(items: Mapping[str, Any], keys: frozenset[str]) -> dict[str, Any]:
    """Return plain data of `items` without `keys`."""
    return {key: thaw(value) for key, value in items.items() if key not in keys}
