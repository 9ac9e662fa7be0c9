"""Requests without an answer: set aside while all others are answered, then listed in one error."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from lm_eval.api import model as api

from lm_eval_deepen.errors import RequestError, UnansweredError, WindowError
from lm_eval_deepen.harness.command import locals_of

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from sqlitedict import SqliteDict

    from lm_eval_deepen.harness.distributed import Ranks

KINDS = ("loglikelihood", "loglikelihood_rolling", "generate_until")
SHOWN = 20  # reasons that the error lists, and documents that it lists of each

T = TypeVar("T")


@dataclass(frozen=True)
class SetAside:
    """What stands in the place of an answer."""

    reason: str  # why there is none
    too_long: bool = False  # whether a text does not fit into a member's context


@dataclass(frozen=True)
class Unanswered:
    """A request without an answer."""

    task: str | None  # its task; None for a request that was made by hand
    document: int | None  # its document's number in the task
    index: int  # its place among the requests of the call
    reason: str  # why it has no answer

    @property
    def where(self) -> str:
        """Its document, for a person; requests of one document are not told apart."""
        return f"request {self.index}" if self.task is None else f"document {self.document}"


def attempt(call: Callable[..., T], *arguments: Any) -> T | SetAside:
    """Return what a call makes of one request, or why it has no honest answer.

    Any other error is a member's or the program's, and no request is set aside for it.
    """
    try:
        return call(*arguments)
    except RequestError as error:
        return SetAside(str(error), isinstance(error, WindowError))


def unanswered(requests: Sequence[Instance], answers: Sequence[Any]) -> list[Unanswered]:
    """Return the requests in whose places nothing but a `SetAside` is."""
    return [
        Unanswered(request.task_name, request.doc_id, index, answer.reason)
        for index, (request, answer) in enumerate(zip(requests, answers, strict=True))
        if isinstance(answer, SetAside)
    ]


def complete(method: Callable[..., list]) -> Callable[..., list]:
    """Make a request method of the model raise one error, at the end, where some requests were set aside.

    All processes raise the same one. It lists the requests of other types too, which the harness would have asked for
    later: what has an answer among these goes into the response cache first, if there is one.
    """

    @functools.wraps(method)
    def answer(self: Any, requests: list[Instance], disable_tqdm: bool = False) -> list:
        answers = method(self, requests, disable_tqdm=disable_tqdm)
        missing = _everywhere(self.ranks, unanswered(requests, answers))
        if not missing:
            return answers
        stored = self.cache_hook.dbdict
        for kind, later in requests_to_come(method.__name__).items():
            missing += _answered_early(self, kind, later, disable_tqdm)
        raise error_of(missing, cached=stored is not None)

    return answer


def _everywhere(ranks: Ranks, missing: list[Unanswered]) -> list[Unanswered]:
    """Return what is missing in any process."""
    return list(dict.fromkeys(request for own in ranks.gather(missing) for request in own))


def requests_to_come(kind: str) -> dict[str, list[Instance]]:
    """Return the requests of other types that the harness is going to ask for, by type.

    The harness asks for one type after the other, and tells a model nothing of the next one. Empty where something else
    calls.
    """
    by_kind = requests_of_the_run()
    asked = [*by_kind].index(kind) + 1 if kind in by_kind else len(by_kind)
    return {later: list(by_kind[later]) for later in list(by_kind)[asked:] if later in KINDS}


def requests_of_the_run() -> Mapping[str, list[Instance]]:
    """Return all requests of the harness's run by type, those with cached answers too; none elsewhere."""
    by_type = (locals_of("evaluate") or {}).get("requests")
    return by_type if isinstance(by_type, Mapping) else {}  # later the name is that of a list


def _answered_early(model: Any, kind: str, requests: list[Instance], disable_tqdm: bool) -> list[Unanswered]:
    """Answer requests of a later type into the response cache, or check them alone; return those without an answer."""
    refused = attempt(model.source.check_kind, kind)
    if isinstance(refused, SetAside):
        return unanswered(requests, [refused] * len(requests))
    stored = model.cache_hook.dbdict
    if stored is None:
        return model.unprepared(kind, requests)
    states = [_state(stored, kind, request) for request in requests]
    missing = model.unprepared(kind, [r for r, state in zip(requests, states, strict=True) if state == "drawn"])
    left = [r for r, state in zip(requests, states, strict=True) if state == "left"]
    answers = getattr(type(model), kind).__wrapped__(model, left, disable_tqdm=disable_tqdm)
    return missing + _everywhere(model.ranks, unanswered(left, answers))


def _state(stored: SqliteDict, kind: str, request: Instance) -> str:
    """Return whether a request's answer is ``stored``, is ``drawn`` at random and never looked up, or is ``left``."""
    if kind == "generate_until" and isinstance(request.args[1], dict) and request.args[1].get("do_sample"):
        return "drawn"
    try:
        return "stored" if api.hash_args(kind, request.args) in stored else "left"
    except (TypeError, ValueError):  # what has no key is no text, and is set aside
        return "left"


def error_of(missing: Sequence[Unanswered], *, cached: bool) -> UnansweredError:
    """Return the error that ends a run; `cached`: a response cache keeps the answers to all other requests."""
    by_reason: dict[tuple[str | None, str], dict[str, None]] = {}
    for request in missing:
        by_reason.setdefault((request.task, request.reason), {})[request.where] = None
    lines = []
    for (task, reason), where in list(by_reason.items())[:SHOWN]:
        first, *others = list(where)[:SHOWN]
        documents = ", ".join([first, *(name.rpartition(" ")[2] for name in others)])  # ``document 1, 2``
        documents += f" and {len(where) - SHOWN} more" if len(where) > SHOWN else ""
        lines.append(f"{'' if task is None else f'task {task!r}, '}{documents}: {reason}")
    if (more := len(by_reason) - SHOWN) > 0:
        lines.append(f"and {more} more reasons, of other requests")
    requests = "1 request" if len(missing) == 1 else f"{len(missing)} requests"
    kept = (
        "The answers to all others are in the response cache: the same command goes on from there."
        if cached
        else "With --use_cache PATH the answers to all others would have been kept, and the next run would go on from "
        "there."
    )
    head = f"{requests} cannot be answered, so nothing was scored. Mend the documents, or leave them out (--samples)."
    return UnansweredError("\n  ".join([f"{head} {kept}", *lines]), tuple(missing))
