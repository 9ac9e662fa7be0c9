"""Ensemble configuration: four spellings in, one frozen and fingerprinted `EnsembleConfig` out.

The spellings are a harness argument string, JSON, an ensemble file (``pretrained=ensemble.yaml``)
and nested YAML. All reach `parse_config` as a mapping of flat keys.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from typing import Any

from lm_eval_deepen.config_options import build_options, choose_method, coerce, option_names
from lm_eval_deepen.config_parse import (
    FROM_PRETRAINED_KEYS,
    MEMBER_KEYS,
    given,
    is_ensemble_file,
    merge_file,
    parse_members,
    unknown_key,
)
from lm_eval_deepen.config_types import (
    DEFAULT_BATCH_SIZE,
    DEFAULT_CHAT_FALLBACK,
    DEFAULT_MAX_BATCH_SIZE,
    DEFAULT_METHOD,
    DEFAULT_SEED,
    DEFAULT_SPECULATE,
    ChatFallback,
    EnsembleConfig,
    FrozenDict,
    MemberConfig,
    Speculate,
)
from lm_eval_deepen.errors import ConfigError

__all__ = ["FROM_PRETRAINED_KEYS", "EnsembleConfig", "FrozenDict", "MemberConfig", "parse_config"]

ENSEMBLE_KEYS = frozenset(
    "members weights method compat seed chat_fallback matrix_dir batch_size max_batch_size speculate".split()
)
_ONLY_IN_MEMBER = MEMBER_KEYS - {"pretrained", "hf_kwargs"}


def parse_config(
    raw: Mapping[str, Any], *, loading_keys: Collection[str], methods: Mapping[str, type]
) -> EnsembleConfig:
    """Return the configuration that `raw` spells, validated before anything is loaded.

    Keys beside ``pretrained=FILE.yaml`` override the file's; a member's own loading argument wins
    over one given beside `members`; a key with the value None counts as not given.

    Args:
        raw: what the harness hands to a model class: parsed inline arguments, JSON or YAML.
        loading_keys: arguments of the harness's ``HFLM``, accepted for every member.
        methods: fusion methods by name; the fields of each dataclass are its options.

    Raises:
        ConfigError: whatever cannot be honoured, naming the key and the remedy.
    """
    keys = given(raw)
    if not is_ensemble_file(keys.get("pretrained")):
        return _parse(keys, loading_keys, methods)
    try:
        return _parse(merge_file(keys["pretrained"], keys), loading_keys, methods)
    except ConfigError as error:
        if str(keys["pretrained"]) in str(error):
            raise
        raise ConfigError(f"ensemble file {keys['pretrained']}: {error}") from error


def _parse(
    keys: Mapping[str, Any], loading_keys: Collection[str], methods: Mapping[str, type]
) -> EnsembleConfig:
    """Parse keys in which no ensemble file is left."""
    method = choose_method(keys.get("method", DEFAULT_METHOD), methods)
    own = option_names(methods[method])
    loading = frozenset(loading_keys) - {"self", "kwargs"} | frozenset(FROM_PRETRAINED_KEYS)
    check_method_names(methods)
    loading -= ENSEMBLE_KEYS.union(*map(option_names, methods.values()))
    check_keys(keys, method, methods, loading)
    compat = coerce(keys["compat"], str, "compat") if "compat" in keys else None
    options = build_options(method, methods[method], {k: keys[k] for k in own if k in keys}, compat)
    elsewhere = {key: "belongs beside members, not inside a member" for key in ENSEMBLE_KEYS}
    for name, fields in methods.items():
        for key in option_names(fields):
            elsewhere.setdefault(key, f"is an option of method {name!r}; give it beside members")
    defaults = {k: v for k, v in keys.items() if k in loading or k in ("pretrained", "hf_kwargs")}
    members = parse_members(
        keys.get("members"), defaults, keys.get("weights"), accepted=loading, elsewhere=elsewhere
    )
    matrix_dir = keys.get("matrix_dir")
    if matrix_dir is not None and not isinstance(matrix_dir, (str, os.PathLike)):
        raise ConfigError(f"matrix_dir must be the path of a folder; got {matrix_dir!r}")
    return EnsembleConfig(
        members=members,
        method=method,
        options=FrozenDict(options),
        compat=compat,
        seed=coerce(keys.get("seed", DEFAULT_SEED), int, "seed"),
        chat_fallback=coerce(keys.get("chat_fallback", DEFAULT_CHAT_FALLBACK), ChatFallback, "chat_fallback"),
        matrix_dir=None if matrix_dir is None else os.fspath(matrix_dir),
        batch_size=parse_batch_size(keys.get("batch_size", DEFAULT_BATCH_SIZE)),
        max_batch_size=_positive(keys.get("max_batch_size", DEFAULT_MAX_BATCH_SIZE), "max_batch_size"),
        speculate=parse_speculate(keys.get("speculate", DEFAULT_SPECULATE)),
    )


def check_method_names(methods: Mapping[str, type]) -> None:
    """Raise TypeError where a method's option has the name of one of our keys: keys are flat."""
    for name, options in methods.items():
        if clash := sorted(set(option_names(options)) & (ENSEMBLE_KEYS | MEMBER_KEYS)):
            raise TypeError(f"fusion method {name!r}: options {clash} are keys of the ensemble; rename them")


def check_keys(
    keys: Mapping[str, Any], method: str, methods: Mapping[str, type], loading: frozenset[str]
) -> None:
    """Raise ConfigError for a key that is unknown, another method's, or a member's own."""
    owners: dict[str, list[str]] = {}
    for name, options in methods.items():
        for key in option_names(options):
            owners.setdefault(key, []).append(name)
    known = ENSEMBLE_KEYS | MEMBER_KEYS | loading | set(owners)
    for key in keys:
        if key in _ONLY_IN_MEMBER:
            raise ConfigError(
                f"{key}={keys[key]!r} belongs inside a member: members: [{{pretrained: ..., {key}: ...}}]"
            )
        if key not in known:
            raise ConfigError(unknown_key(key, known))
        if key in owners and method not in owners[key]:
            raise ConfigError(
                f"{key} is an option of method {' and '.join(owners[key])}, not of {method!r}, which has: "
                f"{', '.join(option_names(methods[method])) or 'none'}; remove {key} or change method"
            )


def parse_batch_size(value: Any) -> int | str:
    """Return a positive number, ``auto`` or ``auto:N``, as `--model hf` takes them."""
    if isinstance(value, str) and re.fullmatch(r"auto(:\d+(\.\d+)?)?", value):
        return value
    return _positive(value, "batch_size", " (or auto, auto:N)")


def parse_speculate(value: Any) -> Speculate:
    """Return how decoding drafts; YAML reads a bare ``off`` as False."""
    return coerce("off" if value is False else value, Speculate, "speculate")


def _positive(value: Any, key: str, also: str = "") -> int:
    """Return a whole number above 0."""
    try:
        number = coerce(value, int, key)
    except ConfigError as error:
        raise ConfigError(f"{error}{also}") from error
    if number < 1:
        raise ConfigError(f"{key} must be 1 or more{also}; got {value!r}")
    return number
