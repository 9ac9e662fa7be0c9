"""Requests as the harness makes them, and one-call construction of models under test."""

from __future__ import annotations

from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from lm_eval_deepen.harness.model import DeepenLM


def requests(kind: str, *arguments: tuple) -> list[Instance]:
    """Return one request of a kind per tuple of arguments."""
    return [
        Instance(request_type=kind, doc={}, arguments=args, idx=i, metadata=("task", i, 1))
        for i, args in enumerate(arguments)
    ]


def hf(path: Any, **kwargs: Any) -> HFLM:
    """Return the harness's own model, the reference of every parity test."""
    return HFLM(pretrained=str(path), device="cpu", **{"batch_size": 1, "logits_cache": False, **kwargs})


def deepen(*paths: Any, **kwargs: Any) -> DeepenLM:
    """Return an ensemble of the models at `paths`, the main member first, named m0, m1, ..."""
    members = [{"name": f"m{i}", "pretrained": str(path)} for i, path in enumerate(paths)]
    return DeepenLM(pretrained=str(paths[0]), members=members, device="cpu", **{"self_check": False, **kwargs})
