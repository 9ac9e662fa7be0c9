"""Pieces of configuration parsing: ensemble files, members, names and weights."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval_deepen.config_options import coerce, whole_number
from lm_eval_deepen.config_source import SOURCE_KEYS, parse_source
from lm_eval_deepen.config_types import DEFAULT_TEMPERATURE, FrozenDict, MemberConfig, freeze
from lm_eval_deepen.config_weights import given_weights, parse_temperature
from lm_eval_deepen.errors import ConfigError, did_you_mean
from lm_eval_deepen.yaml_reading import read_yaml

# Arguments of `from_pretrained` that are accepted without `hf_kwargs`.
FROM_PRETRAINED_KEYS: tuple[str, ...] = (
    "attn_implementation",
    "cache_dir",
    "code_revision",
    "device_map",
    "experts_implementation",
    "load_in_4bit",
    "load_in_8bit",
    "local_files_only",
    "low_cpu_mem_usage",
    "quantization_config",
    "token",
    "use_safetensors",
    "variant",
)
# What is allowed of a member that is loaded: accepted beside `members` for all of them, too.
ALLOWANCES = frozenset({"allow_altered_tokenizer"})
MEMBER_KEYS = frozenset({"name", "pretrained", "weight", "temperature", "hf_kwargs"}) | SOURCE_KEYS | ALLOWANCES
FILE_SUFFIXES = (".yaml", ".yml", ".json")
# What a recipe says besides the ensemble itself: read by `lm-eval-deepen inspect`, without effect on an evaluation.
RECIPE_KEYS = frozenset({"title", "task", "harness", "expected", "source", "note"})
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
PATH_KEYS = ("pretrained", "tokenizer", "peft", "delta")  # arguments that may name a local folder


def given(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys that have a value; None stands for "not given"."""
    return {key: value for key, value in raw.items() if value is not None}


def is_ensemble_file(value: Any) -> bool:
    """Tell whether `pretrained` names an ensemble file rather than a model."""
    return (
        isinstance(value, str)
        and value.lower().endswith(FILE_SUFFIXES)
        and not os.path.isdir(os.path.expanduser(value))
    )


def read_ensemble_file(name: str) -> dict[str, Any]:
    """Return the keys of an ensemble file; model folders found beside it are made reachable from here.

    Raises:
        ConfigError: the file is missing, is not YAML, holds no mapping, or names another ensemble file.
    """
    path = Path(name).expanduser()
    if not path.is_file():
        raise ConfigError(
            f"pretrained={name}: this ensemble file does not exist (looked in {path.absolute().parent}); "
            "give the path of an existing file, or a model"
        )
    raw = read_yaml(path, f"ensemble file {path}")
    if not isinstance(raw, Mapping):
        raise ConfigError(f"ensemble file {path} must hold keys such as members: and method:; got {type(raw).__name__}")
    found = given(beside({key: value for key, value in raw.items() if key not in RECIPE_KEYS}, path.parent))
    if is_ensemble_file(found.get("pretrained")):
        raise ConfigError(
            f"ensemble file {path}: pretrained={found['pretrained']} is an ensemble file too; name the main model there"
        )
    members = found.get("members")
    if isinstance(members, str):
        found["members"] = members = _split(members)
    if isinstance(members, (list, tuple)):
        found["members"] = [beside(member, path.parent) for member in members]
    return found


def merge_file(name: str, inline: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of an ensemble file, overridden by the keys given beside `pretrained`."""
    found = read_ensemble_file(name)
    if "members" in inline:
        found.pop("pretrained", None)
    members = found.get("members")
    if "weights" in inline and isinstance(members, list):
        found["members"] = [
            {key: value for key, value in member.items() if key != "weight"} if isinstance(member, Mapping) else member
            for member in members
        ]
    return found | {key: value for key, value in inline.items() if key != "pretrained"}


def beside(member: Any, folder: Path) -> Any:
    """Return a member (or a file's top level) whose relative paths reach folders beside the file."""
    if isinstance(member, str):
        return beside({"pretrained": member}, folder)["pretrained"]
    if not isinstance(member, Mapping):
        return member
    resolved = dict(member)
    for key in PATH_KEYS:
        value = member.get(key)
        if isinstance(value, str) and value and not os.path.isabs(value) and (folder / value).exists():
            resolved[key] = os.path.normpath(folder / value)
    return resolved


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split("+")]


def parse_members(
    raw: Any,
    defaults: Mapping[str, Any],
    weights: Any,
    *,
    accepted: frozenset[str],
    elsewhere: Mapping[str, str],
    weigh: Callable[[list[float] | None, int], Sequence[float]],
) -> tuple[MemberConfig, ...]:
    """Return the members of an ensemble, the main member first.

    Args:
        raw: the value of `members`: ``A+B``, a list of names or mappings, or None for one member.
        defaults: loading arguments given beside `members`, `pretrained` and `hf_kwargs` among them.
        weights: the value of `weights`, or None.
        accepted: keys a member may have besides `MEMBER_KEYS`.
        elsewhere: other known keys -> what is said about one that is found inside a member.
        weigh: returns the members' weights, from those given (None for none) and the number of members.
    """
    entries = member_entries(raw, defaults)
    full = [merge_defaults(entry, defaults, i) for i, entry in enumerate(entries)]
    check_shared(entries, full, defaults)
    for i, entry in enumerate(full):
        check_member_keys(entry, i, accepted, elsewhere)
        check_paths(entry, i)
        if "max_length" in entry:
            whole_number(entry["max_length"], f"members[{i}] ({entry['pretrained']}): max_length", 1)
    main = defaults.get("pretrained", full[0]["pretrained"])
    if _same(main) != _same(full[0]["pretrained"]):
        raise ConfigError(
            f"pretrained={main if isinstance(main, str) else shown(main)} is not the first of members "
            f"({full[0]['pretrained']}); "
            "members includes the main member, first: put it there, or leave pretrained out"
        )
    shares = weigh(given_weights(weights, [entry.get("weight") for entry in full]), len(full))
    names = member_names(full)
    return tuple(
        MemberConfig(
            name=name,
            pretrained=entry["pretrained"],
            weight=share,
            temperature=parse_temperature(entry.get("temperature", DEFAULT_TEMPERATURE), name),
            loading=FrozenDict({k: v for k, v in entry.items() if k not in MEMBER_KEYS}),
            hf_kwargs=FrozenDict(entry.get("hf_kwargs", {})),
            source=parse_source(entry, i),
            **{key: coerce(entry[key], bool, f"members[{i}]: {key}") for key in ALLOWANCES & entry.keys()},
        )
        for i, (name, entry, share) in enumerate(zip(names, full, shares, strict=True))
    )


def member_entries(raw: Any, defaults: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return one mapping of given keys per member."""
    if raw is None and "pretrained" not in defaults:
        raise ConfigError("no member: give pretrained=MODEL, or members=MODEL+MODEL with the main member first")
    if raw is None:
        return [{}]
    if isinstance(raw, str):
        raw = _split(raw) if raw.strip() else []
    if not isinstance(raw, (list, tuple)):
        raise ConfigError(f"members must be a list of models, or A+B inline; got {type(raw).__name__}: {raw!r}")
    if not raw:
        raise ConfigError("members is empty: name at least one model, the main member first")
    entries = []
    for i, entry in enumerate(raw):
        if isinstance(entry, str):
            entry = {"pretrained": entry.strip()}
        if not isinstance(entry, Mapping):
            raise ConfigError(
                f"members[{i}] must be a model's name, as text, or a mapping with pretrained; got {shown(entry)}. "
                "Save a model that is loaded already, and its tokenizer, with save_pretrained, and give the folder"
            )
        entries.append(given(entry))
    return entries


def merge_defaults(entry: Mapping[str, Any], defaults: Mapping[str, Any], i: int) -> dict[str, Any]:
    """Return a member's keys over the ensemble's defaults, with a checked `pretrained`."""
    merged = {**defaults, **entry}
    where = f"members[{i}]"
    for part in (defaults, entry):
        if not isinstance(part.get("hf_kwargs", {}), Mapping):
            raise ConfigError(f"{where}: hf_kwargs must be a mapping; got {part['hf_kwargs']!r}")
    kwargs = {**defaults.get("hf_kwargs", {}), **entry.get("hf_kwargs", {})}
    merged.pop("hf_kwargs", None)
    if kwargs:
        merged["hf_kwargs"] = kwargs
    for key in PATH_KEYS:
        if isinstance(merged.get(key), os.PathLike):
            merged[key] = os.fspath(merged[key])
        if isinstance(merged.get(key), str) and merged[key].startswith("~"):
            merged[key] = os.path.expanduser(merged[key])
    pretrained = merged.get("pretrained")
    if not isinstance(pretrained, str) or not pretrained.strip():
        raise ConfigError(
            f"{where}: pretrained must be a hub name or a path, as text; got {shown(pretrained)} "
            "(quote it if it is a number; save a model that is loaded already, and its tokenizer, with "
            "save_pretrained, and give the folder)"
        )
    if is_ensemble_file(pretrained):
        raise ConfigError(f"{where}: pretrained={pretrained} is an ensemble file; a member is one model")
    return merged


def check_shared(
    entries: Sequence[Mapping[str, Any]], full: Sequence[Mapping[str, Any]], defaults: Mapping[str, Any]
) -> None:
    """Raise ConfigError for an argument beside members that belongs to one model, and would be given to several.

    Args:
        entries: the members' own keys.
        full: with those given beside members.
        defaults: those given beside members.
    """
    for key, reason in OF_ONE_MODEL.items():
        if key not in defaults or (key == "revision" and defaults[key] == "main"):
            continue
        heirs = [merged["pretrained"] for entry, merged in zip(entries, full, strict=True) if key not in entry]
        if len({_same(name) for name in heirs}) > 1:
            raise ConfigError(
                f"{key}={shown(defaults[key])} beside members would be given to {' and '.join(heirs)}, but {reason}. "
                f"Give it inside the member it belongs to, in JSON or YAML: "
                f"members: [{{pretrained: {heirs[0]}, {key}: {shown(defaults[key])}}}, ...]"
            )


def shown(value: Any) -> str:
    """Return a value for a message: an object that no configuration can hold by its type alone."""
    if value is None or isinstance(value, (str, bool, int, float, list, tuple, Mapping)):
        return repr(value)
    return f"an object of type {type(value).__name__}"


def check_member_keys(entry: Mapping[str, Any], i: int, accepted: frozenset[str], elsewhere: Mapping[str, str]) -> None:
    """Raise ConfigError for a key that a member does not take, or takes in another place."""
    known = MEMBER_KEYS | accepted
    for key in entry:
        if key in elsewhere:
            raise ConfigError(f"members[{i}] ({entry['pretrained']}): {key} {elsewhere[key]}")
        if key not in known:
            raise ConfigError(unknown_key(key, known, f"members[{i}] ({entry['pretrained']}): "))
    for key in entry.get("hf_kwargs", {}):
        if key in MEMBER_KEYS or (key in accepted and key not in FROM_PRETRAINED_KEYS) or key in entry:
            raise ConfigError(
                f"members[{i}] ({entry['pretrained']}): hf_kwargs holds {key!r}, an argument of its own; "
                f"give {key} beside pretrained, once"
            )
    for key, value in entry.items():
        try:
            freeze(value)
        except ConfigError as error:
            raise ConfigError(f"members[{i}] ({entry['pretrained']}): {key}: {error}") from error


def unknown_key(key: Any, known: Sequence[str] | frozenset[str], where: str = "") -> str:
    """Return the message for a key nobody takes."""
    return (
        f"{where}unknown key {key!r}.{did_you_mean(str(key), sorted(known))} "
        "Correct it, or pass an argument of from_pretrained inside hf_kwargs"
    )


def check_paths(entry: Mapping[str, Any], i: int) -> None:
    """Raise ConfigError where an argument is spelled as a path and nothing is there."""
    for key in PATH_KEYS:
        value = entry.get(key)
        if not isinstance(value, str) or not re.match(r"(/|\.\.?(/|$)|~)", value):
            continue
        if not os.path.exists(value):
            raise ConfigError(
                f"members[{i}]: {key}={value} does not exist (looked from {os.getcwd()}); "
                "correct the path, or give a hub name without a leading '/', './' or '~'"
            )


def _same(pretrained: Any) -> Any:
    """Return a form of `pretrained` in which equal models are equal."""
    if isinstance(pretrained, os.PathLike):
        pretrained = os.fspath(pretrained)
    return os.path.expanduser(pretrained).rstrip("/") if isinstance(pretrained, str) else pretrained


def member_names(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the given or derived names, or raise ConfigError where two are the same."""
    names: list[str] = []
    for i, entry in enumerate(entries):
        name = entry.get("name", default_name(entry))
        if not isinstance(name, str) or not name.strip():
            raise ConfigError(f"members[{i}]: name must be non-empty text; got {name!r} (quote it if it is a number)")
        if name in names:
            raise ConfigError(
                f"members[{names.index(name)}] and members[{i}] are both named {name!r}; "
                "give each a `name` of its own (in JSON or YAML)"
            )
        names.append(name)
    return names


def default_name(entry: Mapping[str, Any]) -> str:
    """Return the last path component of `pretrained`, with ``@revision`` where one is given."""
    name = os.path.basename(os.path.normpath(entry["pretrained"]))
    if name in (".", ".."):
        name = os.path.basename(os.path.abspath(entry["pretrained"]))
    revision = entry.get("revision", "main")
    return name if revision == "main" else f"{name}@{revision}"
