"""Ensemble configuration: four spellings in, one frozen and fingerprinted `EnsembleConfig` out.

The spellings are a harness argument string, JSON, an ensemble file (``pretrained=ensemble.yaml``)
and nested YAML. All reach `parse_config` as a mapping of flat keys.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from typing import Any

from lm_eval_deepen.config_options import coerce, option_names, whole_number
from lm_eval_deepen.config_parse import (
    ALLOWANCES,
    FROM_PRETRAINED_KEYS,
    given,
    is_ensemble_file,
    merge_file,
    parse_members,
)
from lm_eval_deepen.config_seams import (
    SEAMS,
    Catalogue,
    build_chosen,
    check_keys,
    check_names,
    check_pooling,
    choose_names,
    elsewhere,
    weigh,
)
from lm_eval_deepen.config_types import (
    DEFAULT_BATCH_SIZE,
    DEFAULT_CHAT_FALLBACK,
    DEFAULT_COVERS,
    DEFAULT_MAX_BATCH_SIZE,
    DEFAULT_SEED,
    DEFAULT_SKIP_ABOVE,
    DEFAULT_SKIP_WHEN,
    DEFAULT_SPECULATE,
    ChatFallback,
    Covers,
    EnsembleConfig,
    FrozenDict,
    MemberConfig,
    SkipWhen,
    Speculate,
)
from lm_eval_deepen.errors import ConfigError

__all__ = ["FROM_PRETRAINED_KEYS", "EnsembleConfig", "FrozenDict", "MemberConfig", "parse_config"]

ENSEMBLE_KEYS = frozenset(
    "members weights method weighting pooling compat seed chat_fallback matrix_dir batch_size max_batch_size "
    "speculate skip_when skip_above skip_check self_check evidence covers".split()
)


def parse_config(
    raw: Mapping[str, Any],
    *,
    loading_keys: Collection[str],
    methods: Mapping[str, type],
    weightings: Mapping[str, type] | None = None,
    poolings: Mapping[str, type] | None = None,
) -> EnsembleConfig:
    """Return the configuration that `raw` spells, validated before anything is loaded.

    Keys beside ``pretrained=FILE.yaml`` override the file's; a member's own loading argument wins
    over one given beside `members`; a key with the value None counts as not given.

    Args:
        raw: what the harness hands to a model class: parsed inline arguments, JSON or YAML.
        loading_keys: arguments of the harness's ``HFLM``, accepted for every member.
        methods: fusion methods by name; the fields of each dataclass are its options.
        weightings: weightings by name, likewise.
        poolings: pooling methods by name, likewise.

    Raises:
        ConfigError: whatever cannot be honoured, naming the key and the remedy.
    """
    keys = given(raw)
    catalogue = {"method": methods, "weighting": weightings or {}, "pooling": poolings or {}}
    if not is_ensemble_file(keys.get("pretrained")):
        return _parse(keys, loading_keys, catalogue)
    try:
        return _parse(merge_file(keys["pretrained"], keys), loading_keys, catalogue)
    except ConfigError as error:
        if str(keys["pretrained"]) in str(error):
            raise
        raise ConfigError(f"ensemble file {keys['pretrained']}: {error}") from error


def _parse(keys: Mapping[str, Any], loading_keys: Collection[str], catalogue: Catalogue) -> EnsembleConfig:
    """Parse keys in which no ensemble file is left."""
    names = choose_names(keys, catalogue)
    check_names(catalogue, ENSEMBLE_KEYS)
    loading = frozenset(loading_keys) - {"self", "kwargs"} | frozenset(FROM_PRETRAINED_KEYS) | ALLOWANCES
    loading -= ENSEMBLE_KEYS.union(*(option_names(cls) for seam in SEAMS for cls in catalogue[seam].values()))
    check_keys(keys, names, catalogue, ENSEMBLE_KEYS, loading)
    method = build_chosen("method", names["method"], catalogue, keys, keys.get("compat"))
    weighting = build_chosen("weighting", names["weighting"], catalogue, keys)
    pooling = build_chosen("pooling", names["pooling"], catalogue, keys)
    members = parse_members(
        keys.get("members"),
        {k: v for k, v in keys.items() if k in loading or k in ("pretrained", "hf_kwargs")},
        keys.get("weights"),
        accepted=loading,
        elsewhere=elsewhere(catalogue, ENSEMBLE_KEYS),
        weigh=lambda given, count: weigh(weighting, given, count),
    )
    check_pooling(keys, method, weighting, pooling, len(members))
    matrix_dir = keys.get("matrix_dir")
    if matrix_dir is not None and not isinstance(matrix_dir, (str, os.PathLike)):
        raise ConfigError(f"matrix_dir must be the path of a folder; got {matrix_dir!r}")
    return EnsembleConfig(
        members=members,
        method=str(method.name),
        options=FrozenDict(method.options),
        weighting=weighting.name,
        weighting_options=FrozenDict(weighting.options),
        weights_change=weighting.built is not None and weighting.built.build() is not None,
        weights_computed=weighting.built is not None and not weighting.built.TAKES_WEIGHTS,
        pooling=pooling.name,
        pooling_options=FrozenDict(pooling.options),
        compat=keys.get("compat"),
        seed=whole_number(keys.get("seed", DEFAULT_SEED), "seed"),
        chat_fallback=coerce(keys.get("chat_fallback", DEFAULT_CHAT_FALLBACK), ChatFallback, "chat_fallback"),
        matrix_dir=None if matrix_dir is None else os.fspath(matrix_dir),
        batch_size=parse_batch_size(keys.get("batch_size", DEFAULT_BATCH_SIZE)),
        max_batch_size=_positive(keys.get("max_batch_size", DEFAULT_MAX_BATCH_SIZE), "max_batch_size"),
        speculate=parse_speculate(keys.get("speculate", DEFAULT_SPECULATE)),
        skip_when=coerce(keys.get("skip_when", DEFAULT_SKIP_WHEN), SkipWhen, "skip_when"),
        skip_above=parse_probability(keys.get("skip_above", DEFAULT_SKIP_ABOVE), "skip_above"),
        skip_check=coerce(keys.get("skip_check", False), bool, "skip_check"),
        self_check=coerce(keys.get("self_check", True), bool, "self_check"),
        evidence=parse_evidence(keys.get("evidence", {})),
        covers=coerce(_off(keys.get("covers", DEFAULT_COVERS)), Covers, "covers"),
    )


def parse_batch_size(value: Any) -> int | str:
    """Return a positive number, ``auto`` or ``auto:N``, as `--model hf` takes them."""
    if isinstance(value, str) and re.fullmatch(r"auto(:\d+(\.\d+)?)?", value):
        return value
    return _positive(value, "batch_size", " (or auto, auto:N)")


def parse_evidence(value: Any) -> FrozenDict:
    """Return what `lm-eval-deepen tune` measured; it is shown in results and changes nothing."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"evidence must be a mapping, as `lm-eval-deepen tune` writes it; got {value!r}. Remove it.")
    return FrozenDict(value)


def parse_probability(value: Any, key: str) -> float:
    """Return a probability above 0 and at most 1."""
    number = coerce(value, float, key)
    if not 0 < number <= 1:
        raise ConfigError(f"{key} must be a probability above 0 and at most 1; got {value!r}")
    return number


def parse_speculate(value: Any) -> Speculate:
    """Return how decoding drafts."""
    return coerce(_off(value), Speculate, "speculate")


def _off(value: Any) -> Any:
    """Return ``off`` and ``on`` as they were written: YAML reads a bare one as a boolean."""
    return {False: "off", True: "on"}.get(value, value) if isinstance(value, bool) else value


def _positive(value: Any, key: str, also: str = "") -> int:
    """Return a whole number above 0."""
    try:
        number = coerce(value, int, key)
    except ConfigError as error:
        raise ConfigError(f"{error}{also}") from error
    if number < 1:
        raise ConfigError(f"{key} must be 1 or more{also}; got {value!r}")
    return number
