"""Pooling in the harness: every member answers requests by itself, and the answers are combined."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lm_eval_deepen.config import EnsembleConfig
from lm_eval_deepen.errors import ConfigError
from lm_eval_deepen.harness.requests import Answers, RequestHandler
from lm_eval_deepen.harness.unanswered import SetAside
from lm_eval_deepen.member import Member
from lm_eval_deepen.member.chat import ChatPrompt
from lm_eval_deepen.pooling.base import Candidate, Pooled, Scored, check_request, fused_takes_part, scores_texts

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

AT_ONCE = 64  # requests; a kill loses the answers of at most so many


def alone(config: EnsembleConfig) -> list[EnsembleConfig]:
    """Return the configuration of every member as an ensemble of one."""
    plain = config.replace(weighting_options=None, pooling_options=None)
    return [plain.replace(members=(member.replace(weight=1.0),)) for member in config.members]


class Pool:
    """The members as models of their own, and the method that combines their answers."""

    def __init__(
        self,
        config: EnsembleConfig,
        fused: RequestHandler,
        members: Sequence[Member],
        around: Callable[[EnsembleConfig, Sequence[Member]], RequestHandler],
    ) -> None:
        """Build a model by `around` for each loaded member; `fused` answers too, or scores answers, if need be."""
        self.method = config.pooling_options
        self.name = self.method.NAME
        self.weights = list(config.weights)
        self.answerers = [around(own, [member]) for own, member in zip(alone(config), members, strict=True)]
        self.members = list(members)
        self.fallback = config.chat_fallback
        self.fused, self.counters = fused, fused.ensemble.counters
        if fused_takes_part(self.method):
            self.answerers.append(fused)

    def answers(self, kind: str, requests: Sequence[Instance]) -> Answers:
        """Yield the index of every request and the members' combined answer.

        Raises:
            RequestError: the method does not combine answers to such requests.
        """
        self.check_kind(kind)
        repeats: list[Counter[tuple]] = [Counter() for _ in self.answerers]
        for start in range(0, len(requests), AT_ONCE):
            part = requests[start : start + AT_ONCE]
            columns = []
            for m, model in enumerate(self.answerers):
                answered: dict[int, Any] = dict(model.answers(kind, self._own(m, part), repeats[m]))
                columns.append([answered[index] for index in range(len(part))])
            if scores_texts(self.method):
                columns = self._scored(part, columns)
            for index, answers in enumerate(zip(*columns, strict=True)):
                yield start + index, self._combine(kind, answers)

    def check_kind(self, kind: str) -> None:
        """Raise RequestError where the method does not combine answers to a type of request."""
        check_request(self.name, self.method, kind)
        if scores_texts(self.method):
            self.fused.check_kind("loglikelihood")

    def prepare(self, kind: str, request: Instance) -> Any:
        """Return a `SetAside` where the members, each by itself, leave nothing to combine for a request."""
        own = (self._own(m, [request])[0] for m in range(len(self.answerers)))
        made = [model.prepare(kind, mine) for model, mine in zip(self.answerers, own, strict=True)]
        return self._refused(kind, made)

    def _scored(self, requests: Sequence[Instance], columns: Sequence[Sequence[Any]]) -> list[list[Any]]:
        """Return the answerers' texts with what the fused ensemble gives them; equal texts are scored once."""
        texts = dict.fromkeys(
            (n, text) for own in columns for n, text in enumerate(own) if isinstance(text, str) and text
        )
        asked = [
            replace(requests[n], request_type="loglikelihood", arguments=(requests[n].args[0], text))
            for n, text in texts
        ]
        scores = dict(self.fused.answers("loglikelihood", asked))
        logp = {
            place: -math.inf if isinstance(scores[at], SetAside) else scores[at][0] for at, place in enumerate(texts)
        }
        return [
            [
                Candidate(text, logp.get((n, text), -math.inf)) if isinstance(text, str) else text
                for n, text in enumerate(own)
            ]
            for own in columns
        ]

    def _refused(self, kind: str, answers: Sequence[Any]) -> SetAside | None:
        """Return why there is no combined answer, None where there is one.

        Where a prompt has no place in some member's context, a text is chosen from those of the others; the main
        member's and the fused ensemble's are always among them. Scores are combined from all members or not at all:
        one without some member's does not compare with others.
        """
        others = range(1, len(self.members))
        for m, answer in enumerate(answers):
            if isinstance(answer, SetAside) and not (kind == "generate_until" and m in others and answer.too_long):
                return answer
        return None

    def _combine(self, kind: str, answers: Sequence[Any]) -> Any:
        if refused := self._refused(kind, answers):
            return refused
        missing = [m for m, answer in enumerate(answers) if isinstance(answer, SetAside)]
        weights = [weight for m, weight in enumerate(self.weights) if m not in missing]
        if missing:
            weights = [weight / sum(weights) if any(weights) else 1 / len(weights) for weight in weights]
        given = [answer for m, answer in enumerate(answers) if m not in missing]
        if kind == "generate_until":
            pooled = self.method.combine(given, weights)
        else:
            pairs = [answer if isinstance(answer, tuple) else (answer, False) for answer in given]
            pooled = self.method.combine([Scored(*pair) for pair in pairs], weights)
        self._check(kind, pooled)
        self.counters.record_pooled(pooled.stats, [self.members[m].name for m in missing])
        if kind == "generate_until":
            return pooled.answer
        return (pooled.answer.logp, pooled.answer.greedy) if kind == "loglikelihood" else pooled.answer.logp

    def _check(self, kind: str, pooled: Any) -> None:
        """Raise ConfigError for what is no combined answer."""
        answer = getattr(pooled, "answer", None)
        texts = kind == "generate_until"
        right = isinstance(answer, str) if texts else isinstance(answer, Scored) and not math.isnan(answer.logp)
        if not isinstance(pooled, Pooled) or not right:
            wanted = "text" if texts else "Scored with a number"
            raise ConfigError(
                f"pooling={self.name} combines answers into {pooled!r}, no Pooled with a {wanted}; correct it"
            )

    def _own(self, m: int, requests: Sequence[Instance]) -> Sequence[Instance]:
        """Return requests whose conversations are rendered by member `m`; the main one's rendering is there."""
        if m == 0 or m >= len(self.members):
            return requests
        own = []
        for request in requests:
            context, *rest = request.args
            if isinstance(context, ChatPrompt) and not context.failure:
                text = self.members[m].render(context.messages, context.add_generation_prompt, self.fallback)
                context = context.rendered(text)
            own.append(replace(request, arguments=(context, *rest)))
        return own
