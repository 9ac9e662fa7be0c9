"""The members of an ensemble: a member's own keys go over those beside `members`."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval_deepen.config.catalogue import FROM_PRETRAINED_KEYS, MEMBER_KEYS, PATH_KEYS, Catalogue
from lm_eval_deepen.config.ensemble import MemberConfig
from lm_eval_deepen.config.errors import bad_value, conflict, misplaced, shown
from lm_eval_deepen.config.frozen import FrozenDict, freeze
from lm_eval_deepen.config.keys import given
from lm_eval_deepen.config.recipes import SUFFIXES
from lm_eval_deepen.config.schema import SAVED, LoadingKeys, MemberKeys
from lm_eval_deepen.config.weights import member_weights
from lm_eval_deepen.errors import ConfigError, Problems

# Arguments that belong to one model, and why: shared by models that differ, all load and some are wrong. Those that say
# how or where from any model is loaded can be shared, and so can file names, which fail where a model lacks the file.
OF_ONE_MODEL = {
    "tokenizer": "another model's pieces have other ids",
    "prefix_token_id": "another vocabulary has another token there",
    "peft": "an adapter is trained for one model",
    "delta": "it is the difference from one model",
    "revision": "a repository has revisions of its own",
    "code_revision": "a repository has revisions of its own",
}

Entry = Mapping[str, Any] | MemberConfig  # a member as it was written, or as it was understood elsewhere
Parsed = tuple[MemberKeys, Mapping[str, Any]]  # a member's keys, and the arguments that it is loaded with


def parse_members(
    raw: Any, defaults: Mapping[str, Any], weights: Any, weighting: Any, catalogue: Catalogue
) -> tuple[MemberConfig, ...]:
    """Return the members, the main member first.

    Args:
        raw: the value of `members`: ``A+B``, a list of names or mappings, or None for one member.
        defaults: keys given beside `members` that a member may have, `pretrained` and `hf_kwargs` among them.
        weights: the value of `weights`.
        weighting: the options of what makes the weights; None where they are given, or equal.
        catalogue: what a member may be loaded with.
    """
    entries, parsed, problems = _entries(raw, defaults), list[Parsed](), Problems()
    for i, entry in enumerate(entries):
        try:
            parsed.append(_parse(entry, defaults, f"members[{i}]", catalogue))
        except ConfigError as error:  # what stands beside members is said once
            said = {one.message for one in problems.errors if one.key.partition("].")[2].split(".")[0] in defaults}
            problems.errors += [one for one in error.problems if one.message not in said]
    problems.refuse()
    _check_shared(entries, [own.pretrained for own, _ in parsed], defaults)
    main, beside = parsed[0][0].pretrained, defaults.get("pretrained")
    if beside is not None and _same(beside) != _same(main):
        raise conflict(
            "pretrained",
            f"pretrained={beside if isinstance(beside, str) else shown(beside)} is not the first of members ({main}); "
            "the main member comes first in members: put it there, or leave pretrained out",
        )
    shares = member_weights(weights, [own.weight for own, _ in parsed], weighting)
    return tuple(
        MemberConfig.model_construct(**{**dict(own), "name": name, "weight": share, "loading": FrozenDict(loading)})
        for (own, loading), name, share in zip(parsed, _names(parsed), shares, strict=True)
    )


def several(raw: Any) -> bool:
    """Return whether the value of `members` names more than one; whatever else is wrong with it."""
    return len(raw.split("+") if isinstance(raw, str) else raw) > 1 if isinstance(raw, (str, list, tuple)) else False


def weights_given(keys: Mapping[str, Any]) -> bool:
    """Return whether weights are given, beside the members or with any of them."""
    listed = keys.get("members")
    entries = [entry for entry in listed if isinstance(entry, Mapping)] if isinstance(listed, (list, tuple)) else []
    return keys.get("weights") is not None or any(entry.get("weight") is not None for entry in entries)


def _entries(raw: Any, defaults: Mapping[str, Any]) -> list[Entry]:
    """Return one mapping of given keys per member; one that is configured already stays as it is."""
    if raw is None and "pretrained" in defaults:
        return [{}]
    if raw is None:
        said = "no member: give pretrained=MODEL, or members=MODEL+MODEL with the main member first"
        raise ConfigError(said, key="members", code="missing")
    listed = raw.split("+") if isinstance(raw, str) and raw.strip() else raw
    if isinstance(listed, str) or listed in ([], ()):
        raise bad_value("members", "members is empty: name at least one model, the main member first")
    if not isinstance(listed, (list, tuple)):
        got = f"{type(raw).__name__}: {shown(raw)}"
        raise bad_value("members", f"members must be a list of models, or A+B inline; got {got}")
    return [_entry(entry, f"members[{i}]") for i, entry in enumerate(listed)]


def _entry(raw: Any, at: str) -> Entry:
    """Return the keys of one member that are given."""
    if isinstance(raw, (str, os.PathLike)):
        return {"pretrained": os.fspath(raw).strip()}
    if isinstance(raw, Mapping):
        return given(raw)
    if not isinstance(raw, MemberConfig):
        said = f"{at} must be a model's name, as text, or a mapping with pretrained; got {shown(raw)}"
        raise bad_value(at, f"{said}. {SAVED.capitalize()}")
    return raw


def _parse(entry: Entry, defaults: Mapping[str, Any], at: str, catalogue: Catalogue) -> Parsed:
    """Return a member's keys over the ensemble's defaults, and its loading arguments."""
    if isinstance(entry, MemberConfig):
        return _configured(entry, defaults), entry.loading
    merged, problems = {**defaults, **entry}, Problems()
    for key in PATH_KEYS:
        if isinstance(merged.get(key), (str, os.PathLike)):
            merged[key] = os.path.expanduser(merged[key])
    both = [part.get("hf_kwargs", {}) for part in (defaults, entry)]
    if all(isinstance(arguments, Mapping) for arguments in both):
        merged["hf_kwargs"] = {**both[0], **both[1]}
    own = {key: value for key, value in merged.items() if key in MEMBER_KEYS}
    loading = {key: value for key, value in merged.items() if key in catalogue.loading_keys}
    problems.errors += [catalogue.not_of_a_member(key) for key in merged if key not in own and key not in loading]
    keys: MemberKeys | None = None
    with problems.collected():
        keys = MemberKeys(**own)
        for key in keys.hf_kwargs:
            if key in {*MEMBER_KEYS, *own, *loading, *(catalogue.loading_keys - FROM_PRETRAINED_KEYS)}:
                said = f"hf_kwargs holds {key!r}, an argument of its own; give {key} beside pretrained, once"
                raise misplaced(f"hf_kwargs.{key}", said)
        _check_paths(merged)
    with problems.collected():
        loading = _checked(loading)
    for key, value in loading.items():
        try:
            freeze(value)
        except ConfigError as error:
            problems.errors += error.within(key).beneath(key).problems
    if problems.errors or keys is None:
        where = f"{at} ({merged['pretrained']})" if isinstance(merged.get("pretrained"), str) else at
        raise ConfigError(*problems.errors).within(where).beneath(at)
    return keys, loading


def _checked(loading: Mapping[str, Any]) -> dict[str, Any]:
    """Return loading arguments as they are meant: 40 for "40" and 40.0; raises ConfigError for wrong ones."""
    own = {key: value for key, value in loading.items() if key in LoadingKeys.names()}
    keys = LoadingKeys(**own)
    return {**loading, **{key: getattr(keys, key) for key in own}}


def _configured(member: MemberConfig, defaults: Mapping[str, Any]) -> MemberKeys:
    """Return the keys of a member that is configured already, without its weight."""
    loaded = {**member.loading, "pretrained": member.pretrained, "hf_kwargs": member.hf_kwargs}
    for key, value in _checked(defaults).items():
        if key != "pretrained" and freeze(value) != loaded.get(key):
            raise conflict(
                key,
                f"{key}={value!r} would load member {member.name!r} in another way than other rows do; members are "
                "loaded once, so loading arguments belong to members or common",
            )
    own: dict[str, Any] = {name: getattr(member, name) for name in MemberKeys.names()}
    return MemberKeys(**own).replace(weight=None)


def _check_shared(entries: Sequence[Entry], names: Sequence[str], defaults: Mapping[str, Any]) -> None:
    """Refuse an argument beside members that belongs to one model, and would be given to several."""
    for key, reason in OF_ONE_MODEL.items():
        if key not in defaults or (key == "revision" and defaults[key] == "main"):
            continue
        own = zip(entries, names, strict=True)
        heirs = [name for entry, name in own if not isinstance(entry, MemberConfig) and key not in entry]
        if len({_same(name) for name in heirs}) > 1:
            value = shown(defaults[key])
            raise misplaced(
                key,
                f"{key}={value} beside members would be given to {' and '.join(heirs)}, but {reason}. "
                f"Give it inside the member it belongs to, in JSON or YAML: "
                f"members: [{{pretrained: {heirs[0]}, {key}: {value}}}, ...]",
            )


def _check_paths(keys: Mapping[str, Any]) -> None:
    """Refuse an argument that is spelled as a path where nothing is there, or that names an ensemble file."""
    for key in PATH_KEYS:
        value = keys.get(key)
        if not isinstance(value, str):
            continue
        if key == "pretrained" and Path(value).suffix.lower() in SUFFIXES and not os.path.isdir(value):
            raise bad_value(key, f"pretrained={value} is an ensemble file; a member is one model")
        if re.match(r"(/|\.\.?(/|$)|~)", value) and not os.path.exists(value):
            raise bad_value(
                key,
                f"{key}={value} does not exist (looked from {os.getcwd()}); correct the path, or give a hub name "
                "without a leading '/', './' or '~'",
            )


def _names(members: Sequence[Parsed]) -> list[str]:
    """Return the members' names, which differ: by default `pretrained`'s last component, with any ``@revision``."""
    names = []
    for own, loading in members:
        last = os.path.basename(os.path.normpath(own.pretrained))
        if last in (".", ".."):
            last = os.path.basename(os.path.abspath(own.pretrained))
        revision = loading.get("revision", "main")
        names.append(own.name or (last if revision == "main" else f"{last}@{revision}"))
    for i, name in enumerate(names):
        if (first := names.index(name)) < i:
            raise conflict(
                f"members[{i}].name",
                f"members[{first}] and members[{i}] are both named {name!r}; give each a `name` of its own (in JSON or "
                "YAML)",
            )
    return names


def _same(pretrained: Any) -> Any:
    """Return a form of `pretrained` in which equal models are equal."""
    return os.path.expanduser(pretrained).rstrip("/") if isinstance(pretrained, (str, os.PathLike)) else pretrained
