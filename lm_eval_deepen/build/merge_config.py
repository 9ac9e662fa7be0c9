"""The configuration of a merge, checked where mergekit is silent."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lm_eval_deepen.config.errors import unknown_key
from lm_eval_deepen.config.keys import to_number
from lm_eval_deepen.errors import ConfigError, blamed, did_you_mean

KEYS = (
    "merge_method models slices modules base_model parameters dtype out_dtype tokenizer tokenizer_source chat_template"
).split()
# Where models stand: what each entry may hold, and what it must.
_PARTS: Mapping[str, tuple[str, ...]] = {
    "models": ("model", "parameters"),
    "sources": ("model", "layer_range", "parameters"),
    "slices": ("sources", "base_model", "residual_weight", "parameters"),
    "modules": ("slices", "models", "parameters"),
    "tokens": ("source", "force"),
}
_BY_NAME = ("modules", "tokens")  # mappings of names to such entries; the others are lists of them
_TOKENIZER = ("source", "tokens", "pad_to_multiple_of")
_NEEDED = {"models": "model", "sources": "model", "slices": "sources"}
# Parameters of the methods that are offered by name; whatever else mergekit has is checked against its own list.
SWITCHES = frozenset({"normalize", "rescale", "int8_mask"})
_WORDS = ("true", "false", "yes", "no", "on", "off")
_TASK = frozenset("weight density normalize rescale lambda int8_mask".split())
METHODS: Mapping[str, frozenset[str]] = {
    "linear": frozenset({"weight", "normalize"}),
    "slerp": frozenset({"t"}),
    "task_arithmetic": _TASK,
    "ties": _TASK,
    "dare_ties": _TASK,
    "dare_linear": _TASK,
}
_DROPPING = ("dare_", "della")  # drop entries at random, and nothing at mergekit's default density of 1
_INSTALL = "pip install 'lm_eval_deepen[merge]' (mergekit>=0.1.5,<0.2, which needs transformers 5)"


def check(content: Mapping[str, Any], source: str) -> None:
    """Refuse a configuration that mergekit would take for something else than what it says; nothing is loaded.

    Raises:
        ConfigError: an unknown key, method or parameter; a base model or density that is missing.
    """
    _refuse_others(content, KEYS)
    _refuse_endless(content)
    given = [key for key in ("models", "slices", "modules") if content.get(key)]
    if len(given) != 1:
        raise ConfigError(f"give one of models, slices, modules; got {' and '.join(given) or 'none of them'}")
    _check_parts(content)
    method = str(content["merge_method"])
    known: Mapping[str, frozenset[str]] = METHODS
    if method not in METHODS:
        require()
        from mergekit.merge_methods.registry import registered_methods

        specs = [registered.spec for registered in registered_methods()]
        known = {spec.name: frozenset(parameter.name for parameter in spec.parameters) for spec in specs}
    if method not in known:
        near = did_you_mean(method, known)
        raise ConfigError(f"merge_method {method!r} is unknown.{near} Methods: {', '.join(known)}")
    for at, parameters in _settings(content):
        for key in parameters:
            if key not in known[method]:  # mergekit ignores it
                near = did_you_mean(str(key), known[method])
                raise ConfigError(
                    f"{at}: parameter {key!r} is none of {method}'s.{near} It takes: "
                    f"{', '.join(sorted(known[method])) or 'none'}"
                )
    if "models" in given:
        _check_models(content, method)
    if method.startswith(_DROPPING):
        _check_density(content, method, source)
    elif method == "ties":
        for model, density in _densities(content):
            if density is None:
                raise ConfigError(
                    "ties keeps the largest differences, and needs a density: the share that is kept; got none for "
                    f"{model}, which is 1 to mergekit. Give density, as 0.2, under the model's parameters"
                )
    for at, parameters in _settings(content):
        for key, value in parameters.items():
            _check_value(value, f"{at}: {key}", switch=key in SWITCHES, typed=method in METHODS)


def _items(value: Any, at: str = "") -> list[tuple[str, Any, Any]]:
    """Return where each item of a mapping or a list stands, its key or index, and itself; none of anything else."""
    if isinstance(value, list):
        return [(f"{at}[{i}]", i, inner) for i, inner in enumerate(value)]
    items = value.items() if isinstance(value, Mapping) else ()
    return [(f"{at}.{key}".lstrip("."), key, inner) for key, inner in items]


def _check_parts(part: Mapping[str, Any], inside: str = "") -> None:
    """Refuse models, slices and modules of another shape than mergekit's, and keys there that it would ignore."""
    for at, key, value in _items(part, inside):
        if value is None:
            continue
        if key in ("model", "base_model") and not isinstance(value, str):
            raise ConfigError(f"{at} must be a model's name, as text; got {value!r}")
        if key == "parameters" and not isinstance(value, Mapping):
            raise ConfigError(f"{at} must be a mapping of names to values; got {value!r}")
        if key == "tokenizer":
            if not isinstance(value, Mapping) or not set(value) <= set(_TOKENIZER):
                raise ConfigError(f"{at} must be a mapping with {' and '.join(_TOKENIZER)}; got {value!r}")
            _check_parts(value, at)
        if key not in _PARTS:
            continue
        known, needed, kind = _PARTS[key], _NEEDED.get(key), Mapping if key in _BY_NAME else list
        entries = _items(value, at)
        if not isinstance(value, kind) or not all(isinstance(entry, Mapping) for *_, entry in entries):
            what = "mapping" if key in _BY_NAME else "list"
            raise ConfigError(f"{at} must be a {what} of mappings with {' and '.join(known)}; got {value!r}")
        for place, _, entry in entries:
            with blamed(place):
                _refuse_others(entry, known)
            if needed and not entry.get(needed):
                raise ConfigError(f"{place} must have {needed}; got {dict(entry)!r}")
            _check_parts(entry, place)


def _refuse_others(part: Mapping[str, Any], known: Sequence[str]) -> None:
    if others := [key for key in part if key not in known]:
        raise ConfigError(unknown_key(others[0], known, f"It takes: {', '.join(known)}"))


def _check_value(value: Any, at: str, switch: bool, typed: bool) -> None:
    """Refuse what mergekit would take for a number: NaN makes a model of NaN, and true is 1 to it.

    The value is a number, a gradient over layers, or values by filter; a `switch` is true or false. For methods that
    are not in `METHODS`, whose values are not `typed`, it may also be text.
    """
    if isinstance(value, list) and value:
        for inner in value:
            _check_value(inner, at, switch, typed)
    elif isinstance(value, Mapping) and "value" in value and set(value) <= {"value", "filter"}:
        _check_value(value["value"], at, switch, typed)
    elif switch and not (isinstance(value, bool) or value in (0, 1) or str(value).strip().lower() in _WORDS):
        raise ConfigError(f"{at} must be true or false; got {value!r}")
    elif not switch and to_number(value) is None and (typed or isinstance(value, (float, bool))):
        raise ConfigError(
            f"{at} must be a finite number, a list of numbers (over layers), or a list of mappings with filter and "
            f"value; got {value!r}"
        )


def _refuse_endless(value: Any, at: str = "") -> None:
    """Raise ConfigError for NaN or an infinite number anywhere in a configuration."""
    for place, _, inner in _items(value, at):
        _refuse_endless(inner, place)
    if isinstance(value, float) and to_number(value) is None:
        raise ConfigError(f"{at} must be a finite number; got {value!r}")


def require() -> None:
    """Raise ConfigError, with the command that installs it, where mergekit is missing."""
    try:
        import mergekit  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"merging needs mergekit, which is not installed: {_INSTALL}") from error


def _settings(value: Any, at: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield every mapping of parameters, after where it stands."""
    for place, key, inner in _items(value, at):
        if key == "parameters" and isinstance(inner, Mapping):
            yield place, inner
        else:
            yield from _settings(inner, place)


def _check_models(content: Mapping[str, Any], method: str) -> None:
    """Check which models a method needs."""
    base, names = content.get("base_model"), [entry["model"] for entry in content["models"]]
    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        raise ConfigError(f"model {twice[0]!r} is listed twice; list it once, with more weight")
    if method in METHODS and method != "linear" and not base:
        what = "the model that it starts from" if method == "slerp" else "the model that the others were trained from"
        raise ConfigError(f"{method} needs base_model, {what}; got none")
    if method == "slerp" and len({*names, base}) != 2:
        raise ConfigError(f"slerp merges two models, base_model and one other; got {base} and {', '.join(names)}")
    if len(names) < 2 and not base:
        raise ConfigError("one model alone is no merge; list two or more under models")


def _check_density(content: Mapping[str, Any], method: str, source: str) -> None:
    """Refuse a merge that drops nothing; warn where it is scaled twice."""
    densities = list(_densities(content))
    if not densities:
        raise ConfigError(f"{method} merges differences to base_model, and no other model is listed; list one")
    for model, density in densities:
        values = [to_number(value) or 0.0 for value in _reached(density)]
        if not all(0 < value <= 1 for value in values) or min(values) == 1:
            got = "none, which is 1 to mergekit" if density is None else repr(density)
            raise ConfigError(
                f"{method} drops differences at random, and needs a density above 0 and below 1: the share that is "
                f"kept; got {got} for {model}. With 1 nothing is dropped, and it is task arithmetic. Give density, "
                "as 0.5, under the model's parameters; after values with a filter, one without"
            )
    for at, parameters in _settings(content):
        if any(_true(value) for value in _reached(parameters.get("normalize"))):
            warnings.warn(
                f"{source}: {at}: normalize: true with {method} divides by the weights of what was kept, on top of the "
                "rescaling that stands for what was dropped: the published method has normalize: false",
                UserWarning,
                stacklevel=2,
            )


def _densities(content: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the density of every model but the base, as it is given; None where it is not."""
    overall = content.get("parameters") or {}
    groups = [(part.get("base_model"), part.get("sources"), part) for part in content.get("slices") or ()]
    groups += [(None, content.get("models"), {})]
    for module in (content.get("modules") or {}).values():
        groups += [(part.get("base_model"), part.get("sources"), part) for part in module.get("slices") or ()]
        groups += [(None, module.get("models"), module)]
    for base, entries, part in groups:
        for entry in entries or ():
            if entry.get("model") == (base or content.get("base_model")):
                continue  # has no difference to itself
            scopes = [entry.get("parameters"), part.get("parameters"), overall]
            densities = [scope["density"] for scope in scopes if scope and scope.get("density") is not None]
            yield str(entry.get("model")), densities[0] if densities else None


def _reached(setting: Any) -> list[Any]:
    """Return the values that tensors get, None being mergekit's default; the first filter that fits counts."""
    entries = setting if isinstance(setting, list) else [setting]
    if not entries or setting is None:
        return [None]
    if not any(isinstance(entry, Mapping) for entry in entries):
        return list(entries)  # one value, or a gradient over layers
    values: list[Any] = []
    for entry in entries:
        within = entry.get("value") if isinstance(entry, Mapping) else entry
        values += _reached(within)
        if not isinstance(entry, Mapping) or entry.get("filter") in (None, "*"):
            return values
    return [*values, None]


def _true(value: Any) -> bool:
    """Tell whether mergekit takes a value for true."""
    return value is True or value == 1 or str(value).strip().lower() in ("true", "yes", "on", "t", "y")
