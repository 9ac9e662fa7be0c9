"""A router by nearest neighbours: the member that did best on the most similar prompts answers alone."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from lm_eval_deepen.errors import ConfigError, StorageError
from lm_eval_deepen.storage import read_text
from lm_eval_deepen.weighting.base import PromptLoss, Weighting, weighting


@dataclass(frozen=True)
class Example:
    """A prompt on which the members were scored: a score of each, higher is better."""

    prompt: str
    scores: tuple[float, ...]


@weighting("knn", paper="arXiv:2505.12601")
class Knn(Weighting):
    """Options of ``weighting: knn``: all weight on the member with the best mean score on the nearest prompts.

    Li (arXiv 2505.12601) embeds prompts by an encoder; here the main member embeds them: the mean of the hidden states
    from which it predicts the prompt's tokens, less the mean over the file's prompts. Prompts are near where the cosine
    is large. Of equals the member that is best on the whole file answers, then the first. A request without a prompt,
    or with one that some member cannot take in, has equal weights.
    """

    router: str = Field(
        min_length=1,
        description="A JSON Lines file. Each line has a `prompt` and `scores`: each member's score on this prompt, "
        "in the order of the members, higher is better. Do not evaluate on its documents.",
    )
    nearest: int = Field(10, ge=1, description="The number of nearest prompts that are used.")

    @cached_property
    def examples(self) -> tuple[Example, ...]:
        """The prompts of the file.

        Raises:
            ConfigError: a file that cannot be read, or a line that is no example.
        """
        try:
            lines = read_text(Path(self.router).expanduser()).split("\n")
        except StorageError as error:
            raise ConfigError(f"router {self.router}: {error}", key="router") from error
        known = tuple(
            _example(line, f"router {self.router}, line {at}") for at, line in enumerate(lines, 1) if line.strip()
        )
        if not known or len({len(one.scores) for one in known}) != 1:
            raise ConfigError(
                f"router {self.router}: at least one example is needed, and all with as many scores", key="router"
            )
        return known

    def identity(self) -> dict[str, Any]:
        """Return what decides the weights: the content of the file, not its place."""
        content = json.dumps([[one.prompt, *one.scores] for one in self.examples])
        return {**self.to_dict(), "router": hashlib.sha256(content.encode()).hexdigest()}

    def start(self, given: Sequence[float] | None, count: int) -> list[float]:
        """Return equal weights, which a request without a prompt keeps.

        Raises:
            ConfigError: a file with another number of scores than of members, or that is none.
        """
        if (scores := len(self.examples[0].scores)) != count:
            raise ConfigError(f"router {self.router} has {scores} scores a line for {count} members", key="router")
        return super().start(given, count)

    def build(self) -> KnnWeigher:
        """Return the weigher."""
        return KnnWeigher(self.nearest, self.examples)


def _example(line: str, where: str) -> Example:
    try:
        record = json.loads(line)
        prompt, scores = record["prompt"], record["scores"]
        if not isinstance(prompt, str) or not isinstance(scores, list):
            raise TypeError("no text, or no list")
        numbers = tuple(map(float, scores))
        if not all(map(math.isfinite, numbers)):
            raise ValueError("a score that is no finite number")
        return Example(prompt, numbers)
    except (ValueError, LookupError, TypeError) as error:
        raise ConfigError(
            f'{where}: {{"prompt": text, "scores": [numbers]}} is needed; got {line[:80]!r}', key="router"
        ) from error


class KnnWeigher:
    """Gives every request to one member.

    Attributes:
        prompts: those of the file, for whoever embeds them (see `learn`).
    """

    reads_prompts, reads_steps = True, False

    def __init__(self, neighbours: int, examples: Sequence[Example]) -> None:
        """Take the options."""
        self.neighbours, self.prompts = neighbours, [one.prompt for one in examples]
        self.scores = torch.tensor([one.scores for one in examples], dtype=torch.float64)  # [N, M]
        self.embeddings, self.mean = torch.empty(0), torch.empty(0)

    def learn(self, embeddings: Sequence[Tensor | None]) -> None:
        """Take the main member's embedding [d] of every prompt; one without any is left out."""
        here = [n for n, one in enumerate(embeddings) if one is not None]
        if not here:
            raise ConfigError("router: none of its prompts can be embedded; give longer ones", key="router")
        known = torch.stack([one.double() for one in embeddings if one is not None])
        self.scores, self.mean = self.scores[here], known.mean(0)
        self.embeddings = torch.nn.functional.normalize(known - self.mean, dim=1)  # [N, d]

    def prepare(self, losses: Sequence[Sequence[PromptLoss]], configured: Tensor) -> Tensor:
        """Return the weights [R, M]; see the base."""
        rows = configured.new_zeros(len(losses), len(configured))
        for row, members in zip(rows, losses, strict=True):
            if len(members) != self.scores.shape[1] or (own := members[0].embedding) is None:
                row.copy_(configured)
                continue
            near = self.embeddings @ (own.double() - self.mean)
            nearest = near.argsort(descending=True, stable=True)[: self.neighbours]
            means = self.scores[nearest].mean(0)
            best = (means >= means.max() - 1e-12).nonzero()[:, 0]
            row[best[self.scores.mean(0)[best].argmax()]] = 1.0
        return rows

    def weights(self, logp: Sequence[Tensor], base: Tensor) -> Tensor:
        """Return the weights of the requests, unchanged."""
        return base
