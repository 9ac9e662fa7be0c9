"""Every architecture of transformers, made tiny, against `--model hf`: the rows of a table in docs/conformance.md."""

from __future__ import annotations

import re
import signal
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tiny_models import byte_level_tokenizer, tiny_config, tiny_model
from torch import nn
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from lm_eval_deepen.errors import DeepenError
from lm_eval_deepen.harness.model import DeepenLM
from lm_eval_deepen.member.runner import PlainRunner
from lm_eval_deepen.member.state_runner import StateRunner

PATIENCE_S = 240
LONGEST_REASON = 200  # characters
NATS_PER_TOKEN = 2e-5  # linear attention computes chunks in single precision, and chunks begin elsewhere here
EQUAL, OFF = "equal", "off by"
SHOTS = "Question: What is the largest planet of the solar system? It is not the Earth.\nAnswer:"
LONG = "In 1969 the first people walked on the moon; in 2024 there were many. " * 4
ENDLESS = {"until": [], "max_gen_toks": 12}
REQUESTS: dict[str, list[tuple[Any, ...]]] = {
    "loglikelihood": [
        (SHOTS, " Jupiter"),
        (SHOTS, " the café in 中国"),
        (SHOTS, " Rome is the capital of Italy."),
        ("The fox walked", " away"),
        ("", "Paris is the capital"),
    ],
    "loglikelihood_rolling": [("The quick brown fox jumps over the lazy dog.",), (LONG,)],
    "generate_until": [
        (SHOTS, ENDLESS),
        ("The quick brown", {**ENDLESS, "until": ["e"]}),
        ("def add(a, b):\n", ENDLESS),
    ],
}
_ROPE = {"rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 32}
_LONGROPE = {"rope_type": "longrope", **_ROPE, "short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
# What an architecture can be configured to besides: its name -> model_type and values of its configuration.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon, alibi": ("falcon", {"alibi": True}),
    "falcon, new decoder": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "gpt_bigcode, a key per head": ("gpt_bigcode", {"multi_query": False}),
    "gpt_neox, serial": ("gpt_neox", {"use_parallel_residual": False}),
    "llama, linear rope": ("llama", {"rope_parameters": {"rope_type": "linear", **_ROPE}}),
    "llama, dynamic rope": ("llama", {"rope_parameters": {"rope_type": "dynamic", **_ROPE}}),
    "llama, yarn": ("llama", {"rope_parameters": {"rope_type": "yarn", **_ROPE}}),
    "llama, llama3 rope": (
        "llama",
        {"rope_parameters": {"rope_type": "llama3", **_ROPE, "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
    ),
    "phi3, longrope": ("phi3", {"rope_parameters": _LONGROPE, "original_max_position_embeddings": 32}),
    "mistral, no window": ("mistral", {"sliding_window": None}),
    "mpt, learned positions": ("mpt", {"attn_config": {"alibi": False}}),
    "opt, narrow embeddings": ("opt", {"word_embed_proj_dim": 16}),
    "opt, norm after": ("opt", {"do_layer_norm_before": False}),
    "qwen2, window": ("qwen2", {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 2}),
    "smollm3, no positions": ("smollm3", {"no_rope_layers": [0, 0, 0, 0]}),
    "stablelm, parallel": ("stablelm", {"use_parallel_residual": True, "qk_layernorm": True}),
    "xlm, causal": ("xlm", {"causal": True}),
}


@dataclass(frozen=True)
class Row:
    """What one architecture does.

    Attributes:
        name: its `model_type`, or a name in `VARIANTS`.
        kind: the model's class; empty where none could be made.
        path: ``tree``, ``whole texts``, or ``whole texts, one at a time``; empty where it was not loaded.
        outcomes: type of request -> ``equal``, or what else came about.
        tokens: type of request -> tokens forwarded, and by `hf`.
        why: why it was not made or is refused.
    """

    name: str
    kind: str = ""
    path: str = ""
    outcomes: Mapping[str, str] = field(default_factory=dict)
    tokens: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    why: str = ""


def path_of(model: DeepenLM) -> str:
    """Return which forward passes a model's main member takes."""
    runner = model.ensemble.main.runner
    if isinstance(runner, PlainRunner):
        return "whole texts, one at a time" if runner.alone else "whole texts"
    if isinstance(runner, StateRunner):
        return "state" + ", by token" * runner.by_token + ", one at a time" * (not runner.together)
    return "tree"


def compare(folder: Path | str, name: str = "", **loading: Any) -> Row:
    """Return what one member does beside `hf`, on a model's folder.

    Args:
        folder: of the model.
        name: of the row.
        loading: arguments that both load it with.
    """
    theirs = HFLM(pretrained=str(folder), device="cpu", batch_size=1, logits_cache=False, **loading)
    kind = type(theirs.model).__name__
    try:
        ours = DeepenLM(pretrained=str(folder), device="cpu", batch_size=3, self_check=False, **loading)
    except DeepenError as error:
        failed = isinstance(_ask(theirs, "loglikelihood", REQUESTS["loglikelihood"]), Exception)
        return Row(name, kind, why=f"refused{', and hf fails' * failed}: {_reason(error)}")
    outcomes, tokens = {}, {}
    runner, counted = ours.ensemble.main.runner, _count(theirs.model)
    for request, arguments in REQUESTS.items():
        runner.forwarded, counted[0] = 0, 0
        got, expected = (_ask(model, request, arguments) for model in (ours, theirs))
        outcomes[request] = _outcome(got, expected, theirs, arguments)
        tokens[request] = (runner.forwarded, counted[0])
    if any(outcome.startswith(OFF) for outcome in outcomes.values()) and "dtype" not in loading:
        # rounding goes away there, and nothing else does; grouped products of experts are of single precision only
        double = compare(folder, dtype="float64", experts_implementation="eager", **loading).outcomes
        rounded = [name for name in outcomes if outcomes[name].startswith(OFF) and double.get(name) == EQUAL]
        outcomes |= {request: f"equal in float64 (float32: {outcomes[request]})" for request in rounded}
    return Row(name, kind, path_of(ours), outcomes, tokens)


def _ask(model: Any, request: str, arguments: Sequence[tuple[Any, ...]]) -> Any:
    instances = [
        Instance(request_type=request, doc={}, arguments=each, idx=at, metadata=("task", at, 1))
        for at, each in enumerate(arguments)
    ]
    try:
        return getattr(model, request)(instances, disable_tqdm=True)
    except Exception as error:
        return error


def _count(model: nn.Module) -> list[int]:
    """Return a cell that sums up the tokens that a model forwards from now on."""
    total = [0]

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        total[0] += 0 if ids is None else ids.numel()

    model.register_forward_pre_hook(note, with_kwargs=True)
    return total


def _outcome(got: Any, expected: Any, theirs: HFLM, arguments: Sequence[tuple[Any, ...]]) -> str:
    if isinstance(expected, Exception):
        return f"hf fails ({type(expected).__name__}), " + (
            "so does this" if isinstance(got, Exception) else "answered"
        )
    if isinstance(got, DeepenError):
        return f"refused: {_reason(got)}"
    if isinstance(got, Exception):
        return _reason(got)
    if isinstance(expected[0], str):
        return EQUAL if got == expected else "another text"
    worst = 0.0
    for a, b, asked in zip(got, expected, arguments, strict=True):
        (a, flag), (b, other) = (a, b) if isinstance(a, (list, tuple)) else ((a, None), (b, None))
        if flag != other:
            return "another is_greedy"
        worst = max(worst, abs(a - b) / max(len(theirs.tok_encode(asked[-1])), 1))
    return EQUAL if worst <= NATS_PER_TOKEN else f"{OFF} {worst:.0e} nats per token"


def _reason(error: BaseException) -> str:
    """Return the beginning of an error, without the member's name and figures."""
    text = re.sub(r"^member '[^']*': | \(by [^)]*\)|cannot load '[^']*': ", "", " ".join(str(error).split()))
    text = text if isinstance(error, DeepenError) else f"{type(error).__name__}: {text}"
    return text if len(text) <= LONGEST_REASON else f"{text[:LONGEST_REASON].rpartition(' ')[0]} ..."


def rows(names: Sequence[str] = ()) -> Iterator[Row]:
    """Yield a row of every class of ``MODEL_FOR_CAUSAL_LM_MAPPING`` and of `VARIANTS`, or of those named.

    A class that is an encoder unless its configuration says otherwise has another row as a decoder.
    """
    every = {kind: (kind, {}) for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES} | VARIANTS
    for name, (kind, changes) in every.items():
        if names and name not in names:
            continue
        row = made(name, kind, changes)
        yield row
        if "no causal language model" in row.why and "is_decoder" in CONFIG_MAPPING[kind]().to_dict():
            yield made(f"{name}, decoder", kind, {**changes, "is_decoder": True})


def made(name: str, kind: str, changes: Mapping[str, Any]) -> Row:
    """Return the row of an architecture, or one that says why it cannot be made.

    Args:
        name: of the row.
        kind: its ``model_type``.
        changes: values of its configuration.
    """
    try:
        with tempfile.TemporaryDirectory() as folder, _time_limit():
            return compare(folder, name, **write_tiny(kind, folder, **changes))
    except (Exception, OutOfTimeError) as error:
        return Row(name, why=f"not made: {_reason(error)}")


def write_tiny(kind: str, folder: Path | str, **changes: Any) -> dict[str, str]:
    """Write a tiny model with a tokenizer; return the arguments that the harness needs to load it.

    Args:
        kind: its ``model_type``.
        folder: where.
        changes: as `tiny_model` takes them.
    """
    tokenizer, config = byte_level_tokenizer(), CONFIG_MAPPING[kind]
    model = tiny_model(config, len(tokenizer), **changes)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(Path(folder) / "tokenizer")  # beside a config.json some classes would replace parts of it
    if not isinstance(model.config, config):  # a part of it was saved, which no class may be registered for
        changes = {key: value for key, value in changes.items() if key not in ("seed", "wide")}
        tiny_config(config, len(tokenizer), **changes).save_pretrained(folder)
    loading = {"tokenizer": str(Path(folder) / "tokenizer")}
    # the harness takes a class that is one of an encoder-decoder, too, for that
    return loading | ({"backend": "causal"} if kind in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES else {})


class OutOfTimeError(BaseException):
    """A row took too long; no code that takes any Exception for a model's failure takes it for one."""


@contextmanager
def _time_limit() -> Iterator[None]:
    """Limit the processor's time: on a machine that others use, that of a clock says nothing of a model."""

    def stop(*_: Any) -> None:
        raise OutOfTimeError(f"nothing came of it in {PATIENCE_S} s of the processor's time")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, PATIENCE_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def table(found: Sequence[Row]) -> str:
    """Return rows as Markdown."""
    lines = [
        "| `model_type` | class | path | loglikelihood | rolling | generation | tokens, scoring | tokens, generation |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found:
        if row.why:
            lines.append(f"| {row.name} | {row.kind} | {_cell(row.why)} | | | | | |")
            continue
        scoring = [sum(row.tokens[kind][side] for kind in REQUESTS if kind != "generate_until") for side in (0, 1)]
        cells = [row.outcomes[kind] for kind in REQUESTS]
        shares = [_share(*scoring), _share(*row.tokens["generate_until"])]
        lines.append(f"| {' | '.join(map(_cell, (row.name, row.kind, row.path, *cells, *shares)))} |")
    return "\n".join(lines)


def merged(page: str, found: Sequence[Row]) -> str:
    """Return a page's table with these rows in the place of those of the same names."""
    new = dict(zip((row.name for row in found), table(found).splitlines()[2:], strict=True))
    return "\n".join(new.get(line[2:].partition(" | ")[0], line) for line in page.splitlines() if line.startswith("|"))


def summary(text: str) -> str:
    """Return how many rows of a table came out how, in a sentence."""
    lines = [line.split(" | ") for line in text.splitlines()[2:]]
    found = [[cell.strip("| ") for cell in cells] for cells in lines]
    loaded = [cells for cells in found if not cells[2].startswith(("refused", "not made"))]
    equal = [cells for cells in loaded if all(outcome.startswith(EQUAL) for outcome in cells[3:6])]
    refused = sum(cells[2].startswith("refused") for cells in found)
    paths = Counter(cells[2].partition(",")[0] for cells in equal)
    return (
        f"{len(found)} rows: {len(equal)} equal in all three requests ({paths['tree']} on the prefix tree, "
        f"{paths['state']} with a state), {len(loaded) - len(equal)} in some, {refused} refused when they load, "
        f"{len(found) - len(loaded) - refused} could not be made."
    )


def _share(ours: int, theirs: int) -> str:
    return f"{ours / theirs:.2f}" if ours and theirs else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
