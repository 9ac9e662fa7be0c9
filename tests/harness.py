"""Requests as the harness makes them, and one-call construction of models under test."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from lm_eval_deepen.harness.model import DeepenLM

# Harness 0.5 has other request and task formats; it asks for a text as for a continuation of "", and takes a pair.
HARNESS_05 = "additional_args" in {field.name for field in fields(Instance)}


def requests(kind: str, *arguments: tuple) -> list[Instance]:
    """Return one request of a kind per tuple of arguments."""
    return [
        Instance(
            request_type=kind,
            doc={},
            arguments=args,
            idx=i,
            task_name="task",
            doc_id=i,
            metadata=("task", i, 1),  # what the harness before 0.5 reads the names from
        )
        for i, args in enumerate(arguments)
    ]


class Reference(HFLM):
    """The harness's own model; texts are asked for, and answered, in the same way with every harness."""

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list:
        """Return the log-probability of each whole text; as the harness wants it where the harness itself asks."""
        if not HARNESS_05 or all(len(request.args) > 1 for request in requests):
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
        pairs = [replace(request, arguments=("", *request.args)) for request in requests]
        return [score for score, _ in super().loglikelihood_rolling(pairs, disable_tqdm=disable_tqdm)]


def hf(path: Any, **kwargs: Any) -> HFLM:
    """Return the harness's own model, the reference of every parity test."""
    return Reference(pretrained=str(path), device="cpu", **{"batch_size": 1, "logits_cache": False, **kwargs})


STATIC = {"covers": "off", "weighting": "uniform"}


def deepen(*paths: Any, **kwargs: Any) -> DeepenLM:
    """Return a static ensemble of the models at `paths`, the main member first, named m0, m1, ...

    Where `kwargs` do not say otherwise it has equal weights and no covers, so that a step is one plain fusion.
    """
    static = {"covers": "off"} if kwargs.get("weights") else STATIC
    return by_default(*paths, **{**static, **kwargs})


def by_default(*paths: Any, **kwargs: Any) -> DeepenLM:
    """Return an ensemble of the models at `paths` with the defaults of a user, named likewise."""
    members = [{"name": f"m{i}", "pretrained": str(path)} for i, path in enumerate(paths)]
    return DeepenLM(pretrained=str(paths[0]), members=members, device="cpu", **{"self_check": False, **kwargs})
