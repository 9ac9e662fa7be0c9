"""Refuses a model whose weights are not those of its files, by transformers' own report.

A layer that its files lack is initialised at random and scores in silence; a weight that the model lacks is left out.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from lm_eval_deepen.errors import MemberError

ALLOW_MISSING, ALLOW_UNEXPECTED = "allow_missing_weights", "allow_unexpected_weights"
# Masks and frequencies that older versions of transformers saved as buffers, and newer ones compute without any.
OLD_BUFFERS = re.compile(r"(^|\.)(attn|attention|crossattention)\.(masked_)?bias$|\.inv_freq$|\.causal_mask$")
SHOWN = 4  # names in a message
# Weights of adapters that PEFT keeps in one place of their files, and in others of the model.
SHARED_IN_ADAPTERS = re.compile(r"vblora_vector_bank|prompt_encoder|\.tinylora_v\.|^prompt_embeddings$")


@dataclass(frozen=True)
class WeightsReport:
    """What loading one set of files left undone."""

    source: str  # the folder, hub name or file
    kind: str  # the model's class
    missing: tuple[str, ...] = ()  # weights of the model that the files lack; they are random
    unexpected: tuple[str, ...] = ()  # weights in the files that the model lacks; they are left out
    mismatched: tuple[str, ...] = ()  # weights of other shapes in the files than in the model; they are random


@contextmanager
def weights_reports() -> Iterator[list[WeightsReport]]:
    """Collect a report of everything that transformers and PEFT load meanwhile, whoever calls them."""
    reports: list[WeightsReport] = []
    with ExitStack() as stack:
        for patch in (*_reports_of_models(reports), *_reports_of_adapters(reports)):
            stack.enter_context(patch)
        yield reports


def _reports_of_models(reports: list[WeightsReport]) -> Iterator[Any]:
    """Yield patches of what tells of loading: what ``from_pretrained`` returns of it, and transformers' own report.

    The first is public. The other comes before an error of transformers, and for a model below an adapter as well.
    """
    import transformers.integrations.peft
    import transformers.modeling_utils

    def note(model: Any, source: Any, missing: Any, unexpected: Any, mismatched: Any) -> None:
        shapes = {f"{key} {_shape(got)} for {_shape(wanted)}" for key, got, wanted in mismatched}
        buffers = {name for name, _ in model.named_buffers()} - model.state_dict().keys()  # computed and never saved
        prefix = f"{getattr(model, 'base_model_prefix', '')}."
        left_out = {key for key in unexpected if not OLD_BUFFERS.search(key)} - buffers
        left_out -= {name.removeprefix(prefix) for name in buffers}
        kind, source = type(model).__name__, str(source)
        reports.append(WeightsReport(source, kind, *map(tuple, map(sorted, (missing, left_out, shapes)))))

    from_pretrained = transformers.PreTrainedModel.from_pretrained.__func__

    def loaded(cls: Any, source: Any, *args: Any, output_loading_info: bool = False, **kw: Any) -> Any:
        model, info = from_pretrained(cls, source, *args, output_loading_info=True, **kw)
        note(model, source, *(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")))
        return (model, info) if output_loading_info else model

    yield mock.patch.object(transformers.PreTrainedModel, "from_pretrained", classmethod(loaded))
    for module in (transformers.modeling_utils, transformers.integrations.peft):

        def report(*args: Any, _as_before: Any = module.log_state_dict_report, **kw: Any) -> Any:
            given = inspect.signature(_as_before).bind(*args, **kw).arguments
            model, source, info = (given[x] for x in ("model", "pretrained_model_name_or_path", "loading_info"))
            note(model, source, info.missing_keys, info.unexpected_keys, info.mismatched_keys)
            return _as_before(*args, **kw)

        yield mock.patch.object(module, "log_state_dict_report", report)


def _reports_of_adapters(reports: list[WeightsReport]) -> Iterator[Any]:
    """Yield a patch of where PEFT returns what it loaded of an adapter; none where PEFT is not installed."""
    try:
        from peft import PeftModel
    except ImportError:
        return
    original = PeftModel.load_adapter

    def load_adapter(model: Any, model_id: Any, *args: Any, **kw: Any) -> Any:
        result = original(model, model_id, *args, **kw)
        missing, unexpected = (
            tuple(key for key in keys if not SHARED_IN_ADAPTERS.search(key))
            for keys in (result.missing_keys, result.unexpected_keys)
        )
        reports.append(WeightsReport(str(model_id), type(model).__name__, missing, unexpected))
        return result

    yield mock.patch.object(PeftModel, "load_adapter", load_adapter)


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "()"


def check_weights(reports: Sequence[WeightsReport], where: str, allowed: Mapping[str, bool] | None = None) -> None:
    """Raise MemberError where a model's weights are not those of its files, and all of them; `where` begins the error.

    `allowed`: what is allowed of a member; None where nothing can be.
    """
    for report in reports:
        random = f"of {report.kind}; random values would stand there"
        no_place = f", which {report.kind} has no place for; they would be left out"
        for verb, keys, rest, key in (
            ("lack", report.missing, f" {random}", ALLOW_MISSING),
            ("have another shape of", report.mismatched, f" {random}", ALLOW_MISSING),
            ("hold", report.unexpected, no_place, ALLOW_UNEXPECTED),
        ):
            if keys and not (allowed or {}).get(key):
                more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
                some = f"{len(keys)} weight{'s' * (len(keys) > 1)} ({', '.join(keys[:SHOWN])}{more})"
                remedy = "" if allowed is None else f", or give the member {key}: true"
                raise MemberError(
                    f"{where} the files of {report.source} {verb} {some}{rest}. Correct config.json (number of "
                    f"layers, vocabulary, tie_word_embeddings, architectures) or the files{remedy}."
                )
