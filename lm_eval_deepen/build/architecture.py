"""Whether models can be merged, from their configurations and tokenizers alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval_deepen.build.weights import hub_file
from lm_eval_deepen.errors import ConfigError, StorageError, one_line
from lm_eval_deepen.storage import read_json

DIFFERENCES = ("architectures differ", "vocabularies differ")
# What decides the tensors of a model, by the names that configurations have for it.
_SHAPE = (
    "architectures model_type hidden_size intermediate_size num_attention_heads num_key_value_heads head_dim "
    "num_local_experts num_experts n_embd n_head n_inner tie_word_embeddings attention_bias mlp_bias"
).split()
# What decides how they are read.
_READING = (
    "rope_parameters hidden_act activation_function rms_norm_eps layer_norm_eps layer_norm_epsilon sliding_window"
).split()
_DEPTH = ("num_hidden_layers", "n_layer")


class IncompatibleError(ConfigError):
    """Models that no merge can be made of; the message begins with one of `DIFFERENCES`."""


def check_alike(places: Mapping[str, str], same_depth: bool, own_tokenizer: bool) -> None:
    """Refuse models that cannot be merged, before any weight is loaded.

    Args:
        places: name -> folder or hub name; the first is what the others are compared with.
        same_depth: whether they need as many layers.
        own_tokenizer: whether their vocabularies stay as they are: rows of embeddings are then merged by id.

    Raises:
        IncompatibleError: they differ; names both, and what differs.
        ConfigError: a configuration that cannot be read.
    """
    keys = [*_SHAPE, *(_DEPTH if same_depth else ())]
    (first, config), *others = _configurations(places)
    for other, there in others:
        if told := _differing(keys, first, config, other, there):
            raise IncompatibleError(
                f"{DIFFERENCES[0]}: {'; '.join(told[:4])}. Weights can be merged only of models with the same tensors: "
                "siblings of one base. For these, evaluate an ensemble, or distil one into the other (method: fusellm)"
            )
        if not own_tokenizer:
            continue
        told = _differing(["vocab_size"], first, config, other, there)
        mine, theirs = ({}, {}) if told else [_pieces(name, places[name]) for name in (first, other)]
        odd = [piece for piece in {**mine, **theirs} if mine.get(piece) != theirs.get(piece)]
        if mine and theirs and odd:
            told = [f"{odd[0]!r} has the id {mine.get(odd[0])} in {first} and {theirs.get(odd[0])} in {other}"]
        if told:
            raise IncompatibleError(
                f"{DIFFERENCES[1]}: {told[0]}. Rows of their embeddings would be merged that stand for different "
                "pieces; give mergekit's tokenizer_source, which permutes them"
            )


def read_otherwise(places: Mapping[str, str]) -> list[str]:
    """Return which settings of the first model, which a merge gets, are others in another model: a sentence each.

    Raises:
        ConfigError: a configuration that cannot be read.
    """
    (first, config), *others = _configurations(places)
    mine = f"{first}, which the merge gets,"
    return [told for other, there in others for told in _differing(_READING, mine, config, other, there)]


def _configurations(places: Mapping[str, str]) -> list[tuple[str, dict[str, Any]]]:
    return [(name, spelt_out(read_config(name, place))) for name, place in places.items()]


def _differing(
    keys: Sequence[str], first: str, config: Mapping[str, Any], other: str, there: Mapping[str, Any]
) -> list[str]:
    """Return which keys differ between the configurations of two models: a phrase each."""
    different = [key for key in keys if config.get(key) != there.get(key)]
    return [f"{key} is {config.get(key)} in {first} and {there.get(key)} in {other}" for key in different]


def read_config(name: str, place: str) -> dict[str, Any]:
    """Return the configuration of a model in a folder or on the hub; raises ConfigError where it cannot be had."""
    path = _fetched(name, place, "config.json")
    try:
        config = read_json(path)
        return {**config, **(config.get("text_config") or {})} | {"architectures": config.get("architectures")}
    except (StorageError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"model {name!r}: {path} is no configuration ({one_line(error)}); give a model's folder, or a hub name"
        ) from error


def spelt_out(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with the values that it leaves to its model type: older files lack keys of newer ones."""
    from lm_eval_deepen.member.configuration import completed

    if (full := completed(config)) is None:
        return dict(config)
    keys = [key for key in (*_SHAPE, *_READING, *_DEPTH, "vocab_size") if key != "architectures"]
    return {**config, **{key: getattr(full, key, config.get(key)) for key in keys}}


def _pieces(name: str, place: str) -> dict[str, int]:
    """Return piece -> id of a model's tokenizer; empty where the model has no tokenizer.json."""
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        path = _fetched(name, place, "tokenizer.json")
    except ConfigError as error:
        if isinstance(error.__cause__, EntryNotFoundError) and not isinstance(error.__cause__, LocalEntryNotFoundError):
            return {}
        raise
    if not path.is_file():
        return {}
    try:
        raw = read_json(path)
        vocab = raw["model"].get("vocab", {})
        listed = vocab.items() if isinstance(vocab, dict) else ((entry[0], i) for i, entry in enumerate(vocab))
        return {**dict(listed), **{added["content"]: added["id"] for added in raw.get("added_tokens", ())}}
    except (StorageError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is no tokenizer ({one_line(error)}); fetch the model again") from error


def _fetched(name: str, place: str, file: str) -> Path:
    if Path(place).is_dir():
        return Path(place) / file
    try:
        return hub_file(place, file)
    except Exception as error:
        raise ConfigError(
            f"model {name!r}: {file} of {place!r} cannot be had from the hub: {type(error).__name__}: "
            f"{str(error).splitlines()[0]} Check the name and your access, or give a folder: --member {name}=FOLDER"
        ) from error
