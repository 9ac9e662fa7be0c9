"""From what a person writes to the configuration of an ensemble, parsed once.

The spellings are a harness argument string, JSON, an ensemble file (``pretrained=ensemble.yaml``) and nested YAML.
All come here as a mapping of flat keys: those of `Composition` and `Settings`, the options of the chosen method,
weighting and pooling, and arguments that every member is loaded with.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from lm_eval_deepen.config.describe import Shown
from lm_eval_deepen.config.ensemble import (
    ALLOWANCES,
    SAVED,
    EnsembleConfig,
    LoadingKeys,
    MemberConfig,
    MemberKeys,
    Settings,
)
from lm_eval_deepen.config.errors import shown, unknown_key
from lm_eval_deepen.config.frozen import FrozenDict, freeze
from lm_eval_deepen.config.keys import Keys, Options, split_numbers, to_number
from lm_eval_deepen.config.recipes import SUFFIXES, find_recipe_file, read_recipe
from lm_eval_deepen.config.registry import Registry
from lm_eval_deepen.errors import ConfigError, Problems

# Arguments of `from_pretrained` that are accepted without `hf_kwargs`.
FROM_PRETRAINED_KEYS = frozenset(
    "attn_implementation cache_dir code_revision device_map experts_implementation load_in_4bit load_in_8bit "
    "local_files_only low_cpu_mem_usage quantization_config token use_safetensors variant".split()
)
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
# What a recipe says besides the ensemble itself: read by `lm-eval-deepen inspect`, without effect on an evaluation.
RECIPE_KEYS = frozenset({"kind", "title", "task", "harness", "expected", "source", "note"})
WEIGHT_TOLERANCE = 1e-4  # of the weights' sum around 1
REMEDY = "Correct it, or pass an argument of from_pretrained inside hf_kwargs"


class Composition(Keys):
    """Keys that say what an ensemble is made of; what they name has keys of its own."""

    pretrained: Annotated[Any, Shown("a hub name, a folder or a YAML file")] = Field(
        None, description="The main member, in whose vocabulary texts are generated; or a YAML file with these keys."
    )
    members: Annotated[Any, Shown("a list of models (inline: A+B)", "the main member alone")] = Field(
        None, description="All members, the main member first; in JSON and YAML each is a name or a mapping."
    )
    weights: Annotated[Any, Shown("a list of numbers (inline: 0.6+0.4)", "equal weights")] = Field(
        None, description="One weight for each member; they sum to 1."
    )
    method: Annotated[Any, Shown("the name of a method")] = Field(
        "deepen", description="How the members' next-token distributions are fused."
    )
    weighting: Annotated[Any, Shown("the name of a weighting", "the weights as given")] = Field(
        None, description="Where the weights come from instead."
    )
    pooling: Annotated[Any, Shown("the name of a pooling", "steps are fused")] = Field(
        None, description="How the members' own answers are combined, instead of fusing their steps."
    )


ENSEMBLE_KEYS = frozenset({*Composition.names(), *Settings.names()})
MEMBER_KEYS = frozenset(MemberKeys.names())


@dataclass(frozen=True)
class Catalogue:
    """What ensembles are made of.

    Attributes:
        loading: names of the arguments that a member is loaded with.
        kinds: the registries of methods, weightings and poolings, by the key that chooses from them.
    """

    loading: frozenset[str]
    kinds: Mapping[str, Registry]

    def owners(self) -> dict[str, tuple[str, list[str]]]:
        """Return the kind that an option belongs to, and the names of those that have it.

        Raises:
            TypeError: an option with the name of another key: keys are flat.
        """
        found: dict[str, tuple[str, list[str]]] = {}
        for kind, registry in self.kinds.items():
            for name, entry in registry.items():
                if clash := sorted({*entry.options.names()} & (ENSEMBLE_KEYS | MEMBER_KEYS)):
                    raise TypeError(f"{kind} {name!r}: options {clash} are keys of the ensemble; rename them")
                for option in entry.options.names():
                    owner, names = found.setdefault(option, (kind, []))
                    if owner != kind:
                        raise TypeError(f"{kind} {name!r}: option {option!r} is one of a {owner} as well; rename it")
                    names.append(name)
        return found

    def loading_keys(self) -> frozenset[str]:
        """Return the arguments that a member is loaded with and that are no keys of ours."""
        return (self.loading | FROM_PRETRAINED_KEYS) - {"self", "kwargs"} - ENSEMBLE_KEYS - MEMBER_KEYS

    def keys(self) -> frozenset[str]:
        """Return every key that an ensemble may have."""
        return frozenset({*ENSEMBLE_KEYS, *MEMBER_KEYS, *self.loading_keys(), *self.owners()})


def parse_config(raw: Mapping[str, Any], catalogue: Catalogue) -> EnsembleConfig:
    """Return the configuration that `raw` spells, checked before anything is loaded.

    Keys beside ``pretrained=FILE.yaml`` override the file's; a member's own loading argument wins over one given
    beside `members`; a key with the value None counts as not given.

    Args:
        raw: what the harness hands to a model class: parsed inline arguments, JSON or YAML.
        catalogue: what there is to choose from.

    Raises:
        ConfigError: everything that cannot be honoured, each with its key and the remedy.
    """
    keys = given(raw)
    file = ensemble_file(keys.get("pretrained"))
    if file is None:
        return _parse(keys, catalogue)
    merged = merge_file(file, keys)
    try:
        return _parse(merged, catalogue)
    except ConfigError as error:  # what is given beside the file is no fault of the file
        inline = keys.keys() - {"pretrained"}
        raise ConfigError(
            *(
                one if re.split(r"[.\[]", one.key)[0] in inline else replace(one, where=(str(file), *one.where))
                for one in error.problems
            )
        ) from None


def _parse(keys: Mapping[str, Any], catalogue: Catalogue) -> EnsembleConfig:
    """Parse keys in which no ensemble file is left."""
    problems, owners, loading = Problems(), catalogue.owners(), catalogue.loading_keys()
    chosen: dict[str, type[Options]] = {}
    for kind, registry in catalogue.kinds.items():
        with problems.collected():
            if (name := keys.get(kind, Composition.model_fields[kind].default)) is not None:
                chosen[kind] = registry.choose(name).options
    settings: dict[str, Any] = {}
    options: dict[str, dict[str, Any]] = {kind: {} for kind in catalogue.kinds}
    defaults: dict[str, Any] = {}
    for key, value in keys.items():
        if key in owners:
            kind, having = owners[key]
            if kind in chosen and chosen[kind].NAME in having:
                options[kind][key] = value
            elif kind in chosen or keys.get(kind) is None:
                problems.add(_not_an_option(key, kind, having, chosen.get(kind)), key, "conflict")
        elif key in loading or key in ("pretrained", "hf_kwargs", *ALLOWANCES):
            defaults[key] = value
        elif key in MEMBER_KEYS:
            problems.add(
                f"{key}={value!r} belongs inside a member: members: [{{pretrained: ..., {key}: ...}}]", key, "misplaced"
            )
        elif key not in ENSEMBLE_KEYS:
            problems.found.append(unknown_key(key, catalogue.keys(), REMEDY))
        elif key in Settings.names():
            settings[key] = value
    with problems.collected():
        settings = dict(Settings(**settings))
    compat = keys.get("compat")
    built: dict[str, Any] = {}
    for kind, cls in chosen.items():
        with problems.collected():
            built[kind] = cls.parse(options[kind], compat if kind == "method" and isinstance(compat, str) else None)
    with problems.collected():
        _check_use(keys, built.get("method"), built.get("pooling"))
    entries: list[tuple[MemberKeys, dict[str, Any]]] = []
    shares: list[float] = []
    with problems.collected():
        entries = parse_members(keys.get("members"), defaults, loading, _elsewhere(owners))
        weights = given_weights(keys.get("weights"), [own.weight for own, _ in entries])
        if "weighting" in built or "weighting" not in chosen:
            shares = _weigh(built.get("weighting"), weights, len(entries))
    problems.refuse()
    return EnsembleConfig(
        members=tuple(
            MemberConfig.model_construct(**{**dict(own), "weight": share, "loading": FrozenDict(arguments)})
            for (own, arguments), share in zip(entries, shares, strict=True)
        ),
        options=built["method"],
        weighting_options=built.get("weighting"),
        pooling_options=built.get("pooling"),
        **settings,
    )


def _not_an_option(key: str, kind: str, having: Sequence[str], chosen: type[Options] | None) -> str:
    """Return what is said about an option of something that was not chosen."""
    what = f"{key} is an option of {kind} {' and '.join(having)}"
    if chosen is None:
        return f"{what}, and no {kind} is given; remove {key}, or give {kind}={having[0]}"
    own = ", ".join(chosen.names()) or "none"
    return f"{what}, not of {chosen.NAME!r}, which has: {own}; remove {key} or change {kind}"


def _elsewhere(owners: Mapping[str, tuple[str, Sequence[str]]]) -> dict[str, str]:
    """Return our keys and all options, each with what is said about one that is found inside a member."""
    options = {
        key: f"is an option of {kind} {names[0]!r}; give it beside members" for key, (kind, names) in owners.items()
    }
    return options | dict.fromkeys(ENSEMBLE_KEYS - MEMBER_KEYS, "belongs beside members, not inside a member")


# ---- members


def parse_members(
    raw: Any, defaults: Mapping[str, Any], loading: frozenset[str], elsewhere: Mapping[str, str]
) -> list[tuple[MemberKeys, dict[str, Any]]]:
    """Return the keys of every member, and the arguments that it is loaded with; the main member comes first.

    Args:
        raw: the value of `members`: ``A+B``, a list of names or mappings, or None for one member.
        defaults: loading arguments given beside `members`, `pretrained` and `hf_kwargs` among them.
        loading: keys a member may have besides `MEMBER_KEYS`.
        elsewhere: other known keys -> what is said about one that is found inside a member.

    Raises:
        ConfigError: what is wrong with any of them.
    """
    problems = Problems()
    found: list[tuple[MemberKeys, dict[str, Any]]] = []
    entries = member_entries(raw, defaults)
    for i, entry in enumerate(entries):
        if isinstance(entry, MemberConfig):
            found.append((_configured(entry, defaults), entry.loading_dict()))
            continue
        with problems.collected():
            found.append(_member(entry, defaults, f"members[{i}]", loading, elsewhere))
    first = {one.message: one for one in reversed(problems.found)}  # what stands beside members is said once
    problems.found = [
        one
        for one in problems.found
        if first[one.message] is one or one.key.partition("].")[2].split(".")[0] not in defaults
    ]
    problems.refuse()
    _check_shared(entries, [own.pretrained for own, _ in found], defaults)
    main = found[0][0].pretrained
    if _same(defaults.get("pretrained", main)) != _same(main):
        raise ConfigError(
            f"pretrained={_text(defaults['pretrained'])} is not the first of members ({main}); members includes the "
            "main member, first: put it there, or leave pretrained out",
            key="pretrained", code="conflict",
        )  # fmt: skip
    named = [(own.replace(name=own.name or default_name(own.pretrained, more)), more) for own, more in found]
    names = [own.name for own, _ in named]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise ConfigError(
                f"members[{names.index(name)}] and members[{i}] are both named {name!r}; give each a `name` of its own "
                "(in JSON or YAML)",
                key=f"members[{i}].name", code="conflict",
            )  # fmt: skip
    return named


def member_entries(raw: Any, defaults: Mapping[str, Any]) -> list[dict[str, Any] | MemberConfig]:
    """Return one mapping of given keys per member; one that is configured already stays as it is."""
    if raw is None:
        if "pretrained" not in defaults:
            raise ConfigError(
                "no member: give pretrained=MODEL, or members=MODEL+MODEL with the main member first",
                key="members", code="missing",
            )  # fmt: skip
        return [{}]
    listed = raw.split("+") if isinstance(raw, str) and raw.strip() else raw
    if isinstance(listed, str) or listed in ([], ()):
        raise ConfigError(
            "members is empty: name at least one model, the main member first", key="members", code="value"
        )
    if not isinstance(listed, (list, tuple)):
        raise ConfigError(
            f"members must be a list of models, or A+B inline; got {type(raw).__name__}: {shown(raw)}",
            key="members", code="value",
        )  # fmt: skip
    entries: list[dict[str, Any] | MemberConfig] = []
    for i, entry in enumerate(listed):
        if isinstance(entry, MemberConfig):
            entries.append(entry)
            continue
        if not isinstance(entry, (str, Mapping)):
            raise ConfigError(
                f"members[{i}] must be a model's name, as text, or a mapping with pretrained; got {shown(entry)}. "
                f"{SAVED.capitalize()}",
                key=f"members[{i}]", code="value",
            )  # fmt: skip
        entries.append({"pretrained": entry.strip()} if isinstance(entry, str) else given(entry))
    return entries


def _member(
    entry: Mapping[str, Any],
    defaults: Mapping[str, Any],
    at: str,
    loading: frozenset[str],
    elsewhere: Mapping[str, str],
) -> tuple[MemberKeys, dict[str, Any]]:
    """Return one member's keys over the ensemble's defaults, and its loading arguments."""
    merged, problems = {**defaults, **entry}, Problems()
    for key in PATH_KEYS:
        if isinstance(merged.get(key), (str, os.PathLike)):
            merged[key] = os.path.expanduser(merged[key])
    where = f"{at} ({merged['pretrained']})" if isinstance(merged.get("pretrained"), str) else at
    both = [part.get("hf_kwargs", {}) for part in (defaults, entry)]
    if all(isinstance(kwargs, Mapping) for kwargs in both):
        merged["hf_kwargs"] = {**both[0], **both[1]}
    own = {key: value for key, value in merged.items() if key in MEMBER_KEYS}
    arguments = {key: value for key, value in merged.items() if key in loading}
    for key in merged.keys() - own.keys() - arguments.keys():
        if key in elsewhere:
            problems.add(f"{key} {elsewhere[key]}", key, "misplaced")
        else:
            problems.found.append(unknown_key(key, MEMBER_KEYS | loading, REMEDY))
    found: MemberKeys | None = None
    with problems.collected():
        found = MemberKeys(**own)
        _check_kwargs(found.hf_kwargs, {*own, *arguments}, loading)
        _check_paths(merged)
    with problems.collected():
        LoadingKeys(**{key: value for key, value in arguments.items() if key in LoadingKeys.names()})
    for key, value in arguments.items():
        try:
            freeze(value)
        except ConfigError as error:
            problems.found += error.within(key).beneath(key).problems
    if problems.found or found is None:
        raise ConfigError(*problems.found).within(where).beneath(at)
    return found, arguments


def _check_shared(
    entries: Sequence[Mapping[str, Any] | MemberConfig], names: Sequence[str], defaults: Mapping[str, Any]
) -> None:
    """Refuse an argument beside members that belongs to one model, and would be given to several.

    Args:
        entries: the members' own keys.
        names: what they are loaded from.
        defaults: keys given beside members.
    """
    for key, reason in OF_ONE_MODEL.items():
        if key not in defaults or (key == "revision" and defaults[key] == "main"):
            continue
        own = zip(entries, names, strict=True)
        heirs = [name for entry, name in own if not isinstance(entry, MemberConfig) and key not in entry]
        if len({_same(name) for name in heirs}) > 1:
            raise ConfigError(
                f"{key}={shown(defaults[key])} beside members would be given to {' and '.join(heirs)}, but {reason}. "
                f"Give it inside the member it belongs to, in JSON or YAML: "
                f"members: [{{pretrained: {heirs[0]}, {key}: {shown(defaults[key])}}}, ...]",
                key=key, code="misplaced",
            )  # fmt: skip


def _configured(member: MemberConfig, defaults: Mapping[str, Any]) -> MemberKeys:
    """Return the keys of a member that is configured already, without its weight.

    Raises:
        ConfigError: arguments beside `members` that would load it in another way.
    """
    loaded = {**member.loading, "pretrained": member.pretrained, "hf_kwargs": member.hf_kwargs}
    for key, value in defaults.items():
        if key != "pretrained" and freeze(value) != loaded.get(key):
            raise ConfigError(
                f"{key}={value!r} would load member {member.name!r} in another way than elsewhere; loading arguments "
                "belong to members or common, for members are loaded once",
                key=key, code="conflict",
            )  # fmt: skip
    own: dict[str, Any] = {name: getattr(member, name) for name in MemberKeys.names()}
    return MemberKeys(**own).replace(weight=None)


def default_name(pretrained: str, loading: Mapping[str, Any]) -> str:
    """Return the last path component of `pretrained`, with ``@revision`` where one is given."""
    name = os.path.basename(os.path.normpath(pretrained))
    if name in (".", ".."):
        name = os.path.basename(os.path.abspath(pretrained))
    revision = loading.get("revision", "main")
    return name if revision == "main" else f"{name}@{revision}"


def _check_kwargs(hf_kwargs: Mapping[str, Any], own: set[str], loading: frozenset[str]) -> None:
    """Refuse an argument in `hf_kwargs` that has a key of its own."""
    for key in hf_kwargs:
        if key in MEMBER_KEYS or (key in loading and key not in FROM_PRETRAINED_KEYS) or key in own:
            raise ConfigError(
                f"hf_kwargs holds {key!r}, an argument of its own; give {key} beside pretrained, once",
                key=f"hf_kwargs.{key}", code="misplaced",
            )  # fmt: skip


def _check_paths(keys: Mapping[str, Any]) -> None:
    """Refuse an argument that is spelled as a path where nothing is there, or that names an ensemble file."""
    for key in PATH_KEYS:
        value = keys.get(key)
        if not isinstance(value, str):
            continue
        if key == "pretrained" and Path(value).suffix.lower() in SUFFIXES and not os.path.isdir(value):
            raise ConfigError(f"pretrained={value} is an ensemble file; a member is one model", key=key, code="value")
        if re.match(r"(/|\.\.?(/|$)|~)", value) and not os.path.exists(value):
            raise ConfigError(
                f"{key}={value} does not exist (looked from {os.getcwd()}); correct the path, or give a hub name "
                "without a leading '/', './' or '~'",
                key=key, code="value",
            )  # fmt: skip


def _text(pretrained: Any) -> str:
    return pretrained if isinstance(pretrained, str) else shown(pretrained)


def _same(pretrained: Any) -> Any:
    """Return a form of `pretrained` in which equal models are equal."""
    return os.path.expanduser(pretrained).rstrip("/") if isinstance(pretrained, (str, os.PathLike)) else pretrained


# ---- weights, and what they are used for


def given_weights(listed: Any, own: Sequence[float | None]) -> list[float] | None:
    """Return the members' weights, summing to 1; None where none are given.

    Args:
        listed: the value of `weights`: a list, ``0.6+0.4`` inline, one number, or None.
        own: the `weight` of each member, None where it has none.

    Raises:
        ConfigError: two spellings at once, too few weights, or weights that do not sum to 1.
    """
    missing = [f"members[{i}]" for i, weight in enumerate(own) if weight is None]
    if listed is None and len(missing) == len(own):
        return None
    if listed is None and missing:
        raise _bad_weights(f"weight is missing for {', '.join(missing)}; give every member a weight, or none")
    if listed is not None and len(missing) < len(own):
        raise _bad_weights("weights and a member's own weight are both given; keep one of the two spellings")
    values = own if listed is None else split_numbers(listed)
    if len(values) != len(own):
        raise _bad_weights(f"weights has {len(values)} values for {len(own)} members; give one per member")
    weights = []
    for i, value in enumerate(values):
        number = to_number(value)
        if number is None or number < 0:
            raise _bad_weights(f"weights[{i}] must be a finite number, 0 or more; got {value!r}")
        weights.append(number)
    total = math.fsum(weights)
    if total == 0:
        raise _bad_weights("weights are all zero; give at least one member a positive weight")
    if abs(total - 1) > WEIGHT_TOLERANCE + 1e-12:
        scaled = "+".join(f"{weight / total:.6g}" for weight in weights)
        raise _bad_weights(f"weights sum to {total:.6g}, not to 1 (within {WEIGHT_TOLERANCE}); {scaled} would")
    if abs(total - 1) < 1e-12:
        return weights  # sums to 1 up to rounding: kept as given
    return [weight / total for weight in weights]


def _bad_weights(message: str) -> ConfigError:
    return ConfigError(message, key="weights", code="value")


def _weigh(weighting: Any, given: list[float] | None, count: int) -> list[float]:
    """Return the members' weights: as the weighting says, else those given, else equal ones."""
    if weighting is None:
        return [1 / count] * count if given is None else given
    if given is not None and not weighting.TAKES_WEIGHTS:
        raise ConfigError(
            f"weights are given, but weighting={weighting.NAME} computes them; remove the weights, or remove weighting",
            key="weights", code="conflict",
        )  # fmt: skip
    found: list[float] = weighting.start(given, count)
    return found


def _check_use(keys: Mapping[str, Any], method: Options | None, pooling: Options | None) -> None:
    """Refuse keys about fusing steps beside a pooling that leaves the fused ensemble out."""
    if pooling is None or method is None or getattr(pooling, "with_fused", False):
        return
    for key in ("method", "compat", *method.names()):
        if key in keys:
            remedy = "give with_fused=true to let the fused ensemble answer too, or "
            raise ConfigError(
                f"{key}={keys[key]!r} is about fusing steps, and pooling={pooling.NAME} combines the members' own "
                f"answers; {remedy if hasattr(pooling, 'with_fused') else ''}remove {key}",
                key=key, code="conflict",
            )  # fmt: skip


# ---- files


def given(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys that have a value; None stands for "not given"."""
    return {key: value for key, value in raw.items() if value is not None}


def ensemble_file(value: Any) -> Path | None:
    """Return the file of an ensemble that `pretrained` names; None where it names a model.

    Raises:
        ConfigError: a file that is not there, or nearly the name of a shipped recipe.
    """
    if not isinstance(value, str):
        return None
    try:
        return find_recipe_file(value)
    except ConfigError as error:
        raise error.beneath("pretrained") from None


def read_ensemble_file(path: Path) -> dict[str, Any]:
    """Return the keys of an ensemble file; model folders found beside it are made reachable from here.

    Raises:
        ConfigError: the file is not YAML, holds no ensemble, or names another ensemble file.
    """
    raw = read_recipe(path, "ensemble")
    found = given(beside({key: value for key, value in raw.items() if key not in RECIPE_KEYS}, path.parent))
    main = found.get("pretrained")
    if isinstance(main, str) and Path(main).suffix in SUFFIXES and not os.path.isdir(main):
        raise ConfigError(
            f"{path}: pretrained={main} is an ensemble file too; name the main model there", key="pretrained"
        )
    members = found.get("members")
    if isinstance(members, str):
        found["members"] = members = [part.strip() for part in members.split("+")]
    if isinstance(members, (list, tuple)):
        found["members"] = [beside(member, path.parent) for member in members]
    return found


def merge_file(path: Path, inline: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of an ensemble file, overridden by the keys given beside `pretrained`."""
    found = read_ensemble_file(path)
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
