"""From what a person writes to the configuration of an ensemble, parsed once.

The spellings are a harness argument string, JSON, an ensemble file (``pretrained=ensemble.yaml``) and nested YAML.
All come here as a mapping of flat keys: those of `Composition` and `Settings`, the options of the chosen method,
weighting and pooling, and arguments that every member is loaded with.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lm_eval_deepen.config.catalogue import ENSEMBLE_KEYS, MEMBER_KEYS, Catalogue
from lm_eval_deepen.config.ensemble import EnsembleConfig, MemberConfig
from lm_eval_deepen.config.errors import conflict
from lm_eval_deepen.config.files import ensemble_file, merge_file
from lm_eval_deepen.config.keys import Options, given
from lm_eval_deepen.config.members import parse_members, several, weights_given
from lm_eval_deepen.config.schema import ALLOWANCES, Composition, Settings
from lm_eval_deepen.errors import ConfigError, Problem, Problems

_OF_SEVERAL = {"compat": None, "covers": "off", "skip_when": "never", "sampling": "fused"}  # settings, where unset
LEARNING = "bayes"  # the weighting of methods that learn, where nothing is said about weights


def parse_config(raw: Mapping[str, Any], catalogue: Catalogue, alike: Collection[str] = ()) -> EnsembleConfig:
    """Return the configuration that `raw` spells, checked before anything is loaded.

    Keys beside ``pretrained=FILE.yaml`` override the file's; a member's own loading argument wins over one given
    beside `members`; a key with the value None counts as not given.

    Args:
        raw: what the harness hands to a model class: parsed inline arguments, JSON or YAML.
        catalogue: what there is to choose from.
        alike: keys that several ensembles share, so that they may say nothing of this one: an ensemble of one, which
            has no `weighting` and no `pooling`. So may those of a file whose `members` are given beside it.

    Raises:
        ConfigError: everything that cannot be honoured, each with its key and the remedy.
    """
    keys = given(raw)
    file = ensemble_file(keys.get("pretrained"))
    if file is None:
        return _parse(keys, catalogue, alike)
    merged = merge_file(file, keys)
    beside = keys.keys() - {"pretrained"}
    try:
        return _parse(merged, catalogue, {*alike, *(merged.keys() - keys.keys() if "members" in keys else ())})
    except ConfigError as error:  # what is given beside the file is no fault of the file
        raise ConfigError(*(_in_file(one, file, beside) for one in error.problems)) from None


def _in_file(problem: Problem, file: Path, beside: Collection[str]) -> Problem:
    """Return a problem with the file in front, unless it is about a key given beside it; which can remove no key."""
    key = re.split(r"[.\[]", problem.key)[0]
    if key in beside:
        return problem
    message = problem.message
    if beside and key and f"remove {key}" in message:
        message += f". What is given beside a file cannot remove a key of it: leave {key} out of a copy of {file.name}"
    return replace(problem, message=message, where=(str(file), *problem.where))


def _parse(keys: Mapping[str, Any], catalogue: Catalogue, alike: Collection[str]) -> EnsembleConfig:
    """Parse keys in which no ensemble file is left."""
    problems = Problems()
    chosen: dict[str, type[Options]] = {}
    for kind, registry in catalogue.kinds.items():
        with problems.collected():
            if (name := keys.get(kind, Composition.model_fields[kind].default)) is not None:
                chosen[kind] = registry.choose(name).options
    fuses = "method" in chosen and "pooling" not in keys and "compat" not in keys and several(keys.get("members"))
    if fuses and "weighting" not in keys and not weights_given(keys) and chosen["method"].learns(keys):
        chosen["weighting"] = catalogue.kinds["weighting"].choose(LEARNING).options
    by_use, unfit = _sort(keys, chosen, catalogue)
    problems.errors += unfit
    settings: dict[str, Any] = {}
    with problems.collected():
        settings = dict(Settings(**by_use["settings"]))
        if settings["covers"] is None:
            settings["covers"] = "on" if fuses and chosen["method"].covers(keys) else "off"
    built: dict[str, Any] = {}
    for kind, cls in chosen.items():
        profile = keys.get("compat") if kind == "method" else None
        with problems.collected():
            built[kind] = cls.parse(by_use[kind], profile if isinstance(profile, str) else None)
    for kind in ("weighting", "pooling") if not several(keys.get("members")) else ():
        if kind in alike and kind in chosen:
            problems.errors += [
                Problem(
                    f"{key}={keys[key]!r} is an option of {kind}, and there is one member; remove {key}, or give "
                    "several members",
                    key, "conflict",
                )
                for key in chosen[kind].names()
                if key in keys and key not in alike
            ]  # fmt: skip
            built.pop(kind, None)
    with problems.collected():
        _check_use(keys, built.get("method"), built.get("pooling"))
    members: tuple[MemberConfig, ...] = ()
    with problems.collected():
        members = parse_members(
            keys.get("members"), by_use["loading"], keys.get("weights"), built.get("weighting"), catalogue
        )
    problems.refuse()
    if len(members) == 1:
        _check_alone({key: value for key, value in keys.items() if key not in alike}, built["method"], settings)
    return EnsembleConfig(
        members=members,
        options=built["method"],
        weighting_options=built.get("weighting"),
        pooling_options=built.get("pooling"),
        **settings,
    )


def _sort(
    keys: Mapping[str, Any], chosen: Mapping[str, type[Options]], catalogue: Catalogue
) -> tuple[dict[str, dict[str, Any]], list[Problem]]:
    """Return keys by their use, which is ``settings``, ``loading`` of members or the kind of an option, and misfits."""
    owners, unfit = catalogue.owners(), list[Problem]()
    by_use: dict[str, dict[str, Any]] = {use: {} for use in ("settings", "loading", *catalogue.kinds)}
    for key, value in keys.items():
        if key in owners:
            kind, having = owners[key]
            if kind in chosen and chosen[kind].NAME in having:
                by_use[kind][key] = value
            elif kind in chosen or kind not in keys:  # else its name is wrong, and that is said
                unfit.append(Problem(_not_an_option(key, kind, having, chosen.get(kind)), key, "conflict"))
        elif key in catalogue.loading_keys or key in ("pretrained", "hf_kwargs", *ALLOWANCES):
            by_use["loading"][key] = value
        elif key in Settings.names():
            by_use["settings"][key] = value
        elif key in MEMBER_KEYS:
            said = f"{key}={value!r} belongs inside a member: members: [{{pretrained: ..., {key}: ...}}]"
            unfit.append(Problem(said, key, "misplaced"))
        elif key not in ENSEMBLE_KEYS:
            unfit.append(catalogue.unknown(key))
    return by_use, unfit


def _not_an_option(key: str, kind: str, having: Sequence[str], chosen: type[Options] | None) -> str:
    """Return what is said about an option of something that was not chosen."""
    what = f"{key} is an option of {kind} {' and '.join(having)}"
    if chosen is None:
        return f"{what}, and no {kind} is given; remove {key}, or give {kind}={having[0]}"
    own = ", ".join(chosen.names()) or "none"
    return f"{what}, not of {chosen.NAME!r}, which has: {own}; remove {key} or change {kind}"


def _check_use(keys: Mapping[str, Any], method: Options | None, pooling: Options | None) -> None:
    """Refuse keys about fusing steps beside a pooling that leaves the fused ensemble out."""
    if pooling is None or method is None or pooling.uses_fused:
        return
    remedy = "give with_fused=true to let the fused ensemble answer too, or " if hasattr(pooling, "with_fused") else ""
    for key in ("method", "compat", *method.names()):
        if key in keys:
            raise conflict(
                key,
                f"{key}={keys[key]!r} is about fusing steps, and pooling={pooling.NAME} combines the members' own "
                f"answers; {remedy}remove {key}",
            )


def _check_alone(own: Mapping[str, Any], method: Options, settings: Mapping[str, Any]) -> None:
    """Refuse keys about fusing steps where there is one member, which is `hf`; what the defaults say may be said."""
    fields = type(method).model_fields
    idle = {"method": method.NAME != Composition.model_fields["method"].default}
    idle |= {key: getattr(method, key) != fields[key].get_default(call_default_factory=True) for key in method.names()}
    idle |= {key: settings[key] != unset for key, unset in _OF_SEVERAL.items()}
    problems = Problems()
    for key, value in own.items():
        if idle.get(key):
            problems.add(
                f"{key}={value!r} is about fusing steps, and there is one member, whose steps are its own; remove "
                f"{key}, or give several members",
                key, "conflict",
            )  # fmt: skip
    problems.refuse()
