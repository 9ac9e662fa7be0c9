"""Whether two runs had the same task. A regression check must refuse to compare others.

The candidate of a check may be anything: another checkpoint, another library, other code. What must be equal is the
task's side: documents, prompts, few-shots, expected answers, decoding arguments, scoring. An ensemble's
configuration (`config.deepen.fingerprint`) is refused too unless the change is declared, since its members' weights
change without it, and a check that compares two methods by mistake says nothing about either.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval_deepen.results.files import Run, TaskRun, fingerprint
from lm_eval_deepen.results.samples import mismatch

# Of a task's configuration, what decides which requests are made and how answers are scored. `metadata`, paths of data
# and aliases differ between machines; documents are compared by their hashes.
_TASK_KEYS = (
    "output_type", "description", "doc_to_text", "doc_to_target", "doc_to_choice", "target_delimiter", "gen_prefix",
    "fewshot_split", "fewshot_delimiter", "fewshot_config", "generation_kwargs", "repeats", "filter_list",
    "process_results", "metric_list",
)  # fmt: skip
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_SHOWN = 100


@dataclass(frozen=True)
class Objections:
    """Why two runs cannot be compared (`reasons`), and what is only worth saying (`notes`)."""

    reasons: tuple[str, ...]
    notes: tuple[str, ...]


def objections(first: Run, second: Run, tasks: Sequence[str], allow_config_change: bool = False) -> Objections:
    """Return what speaks against comparing `second` with `first`, the baseline, on these tasks."""
    reasons: list[str] = []
    notes: list[str] = []
    ensembles: dict[str, list[str]] = {}  # tasks by how the ensembles differ there
    for name in tasks:
        if name not in second.tasks:
            reasons.append(f"{name}: {second.label} has no samples of it ({second.folder})")
            continue
        one, two = first.tasks[name], second.tasks[name]
        if one.columns and not two.columns:
            reasons.append(f"{name}: {two.results_path} has no metric (--predict_only); evaluate without it")
            continue
        reasons.extend(f"{name}: {reason}" for reason in _settings(one, two) + _documents(one, two))
        notes.extend(f"{name}: {note}" for note in _notes(one, two))
        if changed := _ensemble(one, two):
            ensembles.setdefault(changed, []).append(name)
    for changed, names in ensembles.items():
        said = f"{', '.join(names)}: {changed}"
        if allow_config_change:
            notes.append(said)
        else:
            reasons.append(f"{said}; where this is meant, give --allow-config-change")
    unasked = [name for name in second.tasks if name not in first.tasks]
    if unasked:
        notes.append(f"{second.label} has tasks that {first.label} does not have: {', '.join(unasked)}")
    return Objections(tuple(dict.fromkeys(reasons)), tuple(dict.fromkeys(notes)))


def _settings(one: TaskRun, two: TaskRun) -> list[str]:
    """Return the differences in how the harness was asked to run the task."""
    a, b = one.results, two.results
    differences = [
        _differs("task version", *(_of(r, "versions", one.task) for r in (a, b))),
        _differs("number of few-shots", *(_of(r, "n-shot", one.task) for r in (a, b))),
        _differs("chat template", *(_short(r.get("chat_template_sha")) for r in (a, b))),
        _differs("system instruction", *(r.get("system_instruction") for r in (a, b))),
        _differs("few-shots as turns of a conversation", *(bool(r.get("fewshot_as_multiturn")) for r in (a, b))),
    ]
    if _of(a, "n-shot", one.task) or _of(b, "n-shot", one.task):
        differences.append(_differs("few-shot seed", *(_of(r, "config", "fewshot_seed") for r in (a, b))))
    counts = [_of(r, "n-samples", one.task, "effective") for r in (a, b)]
    if counts[0] != counts[1]:
        limits = [_of(r, "config", "limit") for r in (a, b)]
        differences.append(_differs("limit", *limits) or _differs("number of documents", *counts))
    differences += [_differs(key, one.config.get(key), two.config.get(key)) for key in _TASK_KEYS]
    return [difference for difference in differences if difference]


def _documents(one: TaskRun, two: TaskRun) -> list[str]:
    """Return the differences that the samples' hashes show."""
    compared = mismatch(one.samples, two.samples)
    reasons = []
    if not compared.shared:
        return ["no document in common (by doc_hash): other split, data or processing of documents"]
    if compared.only_first or compared.only_second:
        reasons.append(
            f"other documents: {compared.shared} in common, {compared.only_first} of the baseline alone, "
            f"{compared.only_second} of the candidate alone"
        )
    if compared.prompts:
        asked = f"{compared.prompts} of {compared.shared} documents"
        reasons.append(f"other prompts for {asked} (few-shots, template, description)")
    if compared.targets:
        reasons.append(f"other expected answers for {compared.targets} of {compared.shared} documents")
    return reasons


def _ensemble(one: TaskRun, two: TaskRun) -> str | None:
    """Return how the ensembles differ in configuration; None where they do not, or neither run is one."""
    prints = [fingerprint(run.results) for run in (one, two)]
    if prints[0] == prints[1]:
        return None
    described = [((run.results.get("config") or {}).get("deepen") or {}) for run in (one, two)]
    told = [_configuration(d.get("configuration") or d) for d in described]  # results of older versions have less
    if told[0]["method"] != told[1]["method"]:  # what one of them does not have is no change
        told = [{key: value for key, value in own.items() if all(key in other for other in told)} for own in told]
    differences = [_differs(key, *(own.get(key) for own in told)) for key in dict.fromkeys([*told[0], *told[1]])]
    if told[0]["members"] == told[1]["members"]:
        for i, (first, second) in enumerate(zip(*(_members(d.get("configuration")) for d in described), strict=False)):
            keys = dict.fromkeys([*first, *second])
            differences += [_differs(f"members[{i}].{key}", first.get(key), second.get(key)) for key in keys]
    named = "; ".join(difference for difference in differences if difference)
    shown = " -> ".join(_short(p) or "none (no ensemble)" for p in prints)
    return f"ensemble fingerprint: {shown}" + (f" ({named})" if named else "")


def _configuration(told: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the results tell of an ensemble by option, and its members in short."""
    flat: dict[str, Any] = {key: told.get(key) for key in ("method", "compat", "seed", "chat_fallback")}
    flat |= told.get("options") or {}
    flat |= {key: told.get(key) for key in ("covers", "sampling", "skip")}
    for kind in ("weighting", "pooling"):
        own = told.get(kind)
        named = own if isinstance(own, Mapping) else {"name": own}
        flat |= {kind if key == "name" else f"{kind}.{key}": value for key, value in named.items()}
    return flat | {"members": [f"{m.get('pretrained')} x {m.get('weight')}" for m in told.get("members") or ()]}


def _members(told: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Return what each member is asked and loaded with."""
    return [
        {**member, **(member.get("loading") or {}), "loading": None} for member in (told or {}).get("members") or ()
    ]


def _notes(one: TaskRun, two: TaskRun) -> list[str]:
    """Return differences that a check tolerates."""
    a, b = one.results, two.results
    differences = [
        _differs("lm_eval", a.get("lm_eval_version"), b.get("lm_eval_version")),
        _differs("transformers", a.get("transformers_version"), b.get("transformers_version")),
        _differs("model class", _of(a, "config", "model"), _of(b, "config", "model")),
    ]
    if fingerprint(a) is None and fingerprint(b) is None:
        differences.append(_differs("model arguments", _of(a, "config", "model_args"), _of(b, "config", "model_args")))
    then, now = (_files(results) for results in (a, b))
    others = [place for place, told in now.items() if then.get(place, told) != told]
    differences.append(f"other files, so other weights, under the same name: {', '.join(others)}" if others else None)
    return [difference for difference in differences if difference]


def _files(results: Mapping[str, Any]) -> dict[str, Any]:
    """Return what told the members' models, by folder or hub name; empty in results of older versions."""
    members = _of(results, "config", "deepen", "members")
    told = [one.get("files") for one in members if isinstance(one, Mapping)] if isinstance(members, list) else []
    return {place: digest for files in told if isinstance(files, Mapping) for place, digest in files.items()}


def _of(results: Mapping[str, Any], *keys: str) -> Any:
    value: Any = results
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _differs(what: str, first: Any, second: Any) -> str | None:
    a, b = (_ADDRESS.sub("", json.dumps(value, sort_keys=True, ensure_ascii=False)) for value in (first, second))
    return None if a == b else f"{what}: {_excerpt(a, b)} -> {_excerpt(b, a)}"


def _excerpt(text: str, other: str) -> str:
    """Return the text, or of a long one the part where it begins to differ from the other."""
    if len(text) <= _SHOWN:
        return text
    start = next((i for i, (x, y) in enumerate(zip(text, other, strict=False)) if x != y), min(len(text), len(other)))
    start = max(0, start - _SHOWN // 2)
    return ("..." if start else "") + text[start : start + _SHOWN] + ("..." if start + _SHOWN < len(text) else "")


def _short(digest: Any) -> str | None:
    return str(digest)[:12] if digest else None
