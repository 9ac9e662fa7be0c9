"""All keys of an ensemble: our own, the options of methods and the like, and loading arguments."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from lm_eval_deepen.config.errors import unknown_key
from lm_eval_deepen.config.registry import Registry
from lm_eval_deepen.config.schema import Composition, MemberKeys, Settings
from lm_eval_deepen.errors import Problem

ENSEMBLE_KEYS = frozenset({*Composition.names(), *Settings.names()})
MEMBER_KEYS = frozenset(MemberKeys.names())
# Arguments of `from_pretrained` that are accepted without `hf_kwargs`.
FROM_PRETRAINED_KEYS = frozenset(
    "attn_implementation cache_dir code_revision device_map experts_implementation load_in_4bit load_in_8bit "
    "local_files_only low_cpu_mem_usage quantization_config token use_safetensors variant".split()
)
PATH_KEYS = ("pretrained", "tokenizer", "peft", "delta")  # arguments that may name a local folder
_REMEDY = "Correct it, or pass an argument of from_pretrained inside hf_kwargs"


@dataclass(frozen=True)
class Catalogue:
    """What ensembles are made of."""

    loading: frozenset[str]  # names of the arguments that a member is loaded with
    # the registries of methods, weightings and poolings, by the key that chooses from them
    kinds: Mapping[str, Registry]

    @cached_property
    def loading_keys(self) -> frozenset[str]:
        """The arguments that a member is loaded with and that are no keys of ours."""
        return (self.loading | FROM_PRETRAINED_KEYS) - {"self", "kwargs"} - ENSEMBLE_KEYS - MEMBER_KEYS

    def owners(self) -> dict[str, tuple[str, list[str]]]:
        """Return the kind that an option belongs to, and the names of those that have it.

        Raises:
            TypeError: an option with the name of another key: keys are flat.
        """
        known: dict[str, tuple[str, list[str]]] = {}
        for kind, registry in self.kinds.items():
            for name, entry in registry.items():
                if clash := sorted({*entry.options.names()} & (ENSEMBLE_KEYS | MEMBER_KEYS)):
                    raise TypeError(f"{kind} {name!r}: options {clash} are keys of the ensemble; rename them")
                for option in entry.options.names():
                    owner, names = known.setdefault(option, (kind, []))
                    if owner != kind:
                        raise TypeError(f"{kind} {name!r}: option {option!r} is one of a {owner} as well; rename it")
                    names.append(name)
        return known

    def keys(self) -> frozenset[str]:
        """Return every key that an ensemble may have."""
        return frozenset({*ENSEMBLE_KEYS, *MEMBER_KEYS, *self.loading_keys, *self.owners()})

    def unknown(self, key: str, further: Iterable[str] = ()) -> Problem:
        """Return what is said about a key that no ensemble has; `further` are others that it may be meant for."""
        return unknown_key(key, self.keys().union(further), _REMEDY)

    def not_of_a_member(self, key: str) -> Problem:
        """Return what is said about a key inside a member that no member takes."""
        if key in ENSEMBLE_KEYS:
            return Problem(f"{key} belongs beside members, not inside a member", key, "misplaced")
        if key in (owners := self.owners()):
            kind, names = owners[key]
            said = f"{key} is an option of {kind} {names[0]!r}; give it beside members"
            return Problem(said, key, "misplaced")
        return unknown_key(key, MEMBER_KEYS | self.loading_keys, _REMEDY)
