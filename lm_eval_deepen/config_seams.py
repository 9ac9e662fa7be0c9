"""Keys of the three seams: the fusion method, the weighting and the pooling of an ensemble, and their options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval_deepen.config_options import build_options, choose, coerce, option_names
from lm_eval_deepen.config_parse import ALLOWANCES, MEMBER_KEYS, unknown_key
from lm_eval_deepen.config_types import DEFAULT_METHOD
from lm_eval_deepen.errors import ConfigError

SEAMS = ("method", "weighting", "pooling")
Catalogue = Mapping[str, Mapping[str, type]]  # seam -> name -> dataclass of options


@dataclass(frozen=True)
class Chosen:
    """What a configuration chooses of one seam.

    Attributes:
        name: its name, None for nothing.
        options: every option, defaults filled in.
        built: the dataclass of these options, None for nothing.
    """

    name: str | None = None
    options: Mapping[str, Any] | None = None
    built: Any = None


def choose_names(keys: Mapping[str, Any], catalogue: Catalogue) -> dict[str, str | None]:
    """Return the name chosen of every seam, or raise ConfigError with the nearest one."""
    return {
        "method": choose(keys.get("method", DEFAULT_METHOD), catalogue["method"]),
        **{
            seam: choose(keys[seam], catalogue[seam], seam) if seam in keys else None
            for seam in ("weighting", "pooling")
        },
    }


def check_names(catalogue: Catalogue, ensemble_keys: frozenset[str]) -> None:
    """Raise TypeError where an option has the name of one of our keys, or one of another seam: keys are flat."""
    owners: dict[str, str] = {}
    for seam in SEAMS:
        for name, options in catalogue[seam].items():
            what = f"fusion method {name!r}" if seam == "method" else f"{seam} {name!r}"
            if clash := sorted(set(option_names(options)) & (ensemble_keys | MEMBER_KEYS)):
                raise TypeError(f"{what}: options {clash} are keys of the ensemble; rename them")
            for option in option_names(options):
                if owners.setdefault(option, seam) != seam:
                    raise TypeError(f"{what}: option {option!r} is one of a {owners[option]} as well; rename it")


def check_keys(
    keys: Mapping[str, Any],
    names: Mapping[str, str | None],
    catalogue: Catalogue,
    ensemble_keys: frozenset[str],
    loading: frozenset[str],
) -> None:
    """Raise ConfigError for a key that is unknown, another method's, or a member's own."""
    owners: dict[str, tuple[str, list[str]]] = {}
    for seam in SEAMS:
        for name, options in catalogue[seam].items():
            for key in option_names(options):
                owners.setdefault(key, (seam, []))[1].append(name)
    known = ensemble_keys | MEMBER_KEYS | loading | set(owners)
    for key in keys:
        if key in MEMBER_KEYS - {"pretrained", "hf_kwargs"} - ALLOWANCES:
            raise ConfigError(
                f"{key}={keys[key]!r} belongs inside a member: members: [{{pretrained: ..., {key}: ...}}]"
            )
        if key not in known:
            raise ConfigError(unknown_key(key, known))
        if key in owners:
            seam, having = owners[key]
            _check_owner(key, seam, having, names[seam], catalogue[seam])


def _check_owner(key: str, seam: str, having: Sequence[str], chosen: str | None, known: Mapping[str, type]) -> None:
    if chosen in having:
        return
    what = f"{key} is an option of {seam} {' and '.join(having)}"
    if chosen is None:
        raise ConfigError(f"{what}, and no {seam} is given; remove {key}, or give {seam}={having[0]}")
    raise ConfigError(
        f"{what}, not of {chosen!r}, which has: {', '.join(option_names(known[chosen])) or 'none'}; "
        f"remove {key} or change {seam}"
    )


def elsewhere(catalogue: Catalogue, ensemble_keys: frozenset[str]) -> dict[str, str]:
    """Return our keys and all options, each with what is said about one that is found inside a member."""
    found = {key: "belongs beside members, not inside a member" for key in ensemble_keys}
    for seam in SEAMS:
        for name, options in catalogue[seam].items():
            for key in option_names(options):
                found.setdefault(key, f"is an option of {seam} {name!r}; give it beside members")
    return found


def build_chosen(
    seam: str, name: str | None, catalogue: Catalogue, keys: Mapping[str, Any], compat: Any = None
) -> Chosen:
    """Return a seam's choice with all of its options checked."""
    if name is None:
        return Chosen()
    options = catalogue[seam][name]
    given = {key: keys[key] for key in option_names(options) if key in keys}
    profile = None if compat is None else coerce(compat, str, "compat")
    values = build_options(name, options, given, profile, seam)
    return Chosen(name, values, options(**values))


def weigh(weighting: Chosen, given: list[float] | None, count: int) -> list[float]:
    """Return the members' weights: as the weighting says, else those given, else equal ones.

    Raises:
        ConfigError: weights beside a weighting that computes them, or a weighting without members to weigh.
    """
    if weighting.built is None:
        return [1 / count] * count if given is None else given
    if given is not None and not weighting.built.TAKES_WEIGHTS:
        raise ConfigError(
            f"weights are given, but weighting={weighting.name} computes them; remove the weights, or remove weighting"
        )
    if count == 1 and weighting.built.build() is not None:
        raise ConfigError(f"weighting={weighting.name} has nothing to weigh: there is one member; remove weighting")
    return weighting.built.start(given, count)


def check_pooling(keys: Mapping[str, Any], method: Chosen, weighting: Chosen, pooling: Chosen, count: int) -> None:
    """Raise ConfigError where keys beside a pooling method would have no effect."""
    if pooling.built is None:
        return
    if count == 1:
        raise ConfigError(f"pooling={pooling.name} has nothing to combine: there is one member; remove pooling")
    if weighting.built is not None and weighting.built.build() is not None:
        raise ConfigError(
            f"weighting={weighting.name} weighs fused steps, and pooling={pooling.name} combines whole answers; "
            "remove one of the two, or give constant weights"
        )
    if getattr(pooling.built, "with_fused", False):
        return
    unused = [key for key in ("method", "compat", *(method.options or {})) if key in keys]
    if unused:
        remedy = "give with_fused=true to let the fused ensemble answer too, or " if _may_fuse(pooling) else ""
        raise ConfigError(
            f"{unused[0]}={keys[unused[0]]!r} is about fusing steps, and pooling={pooling.name} combines the members' "
            f"own answers; {remedy}remove {unused[0]}"
        )


def _may_fuse(pooling: Chosen) -> bool:
    return "with_fused" in (pooling.options or {})
