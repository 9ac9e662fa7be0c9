"""Weights of a request from how well each member predicts its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lm_eval_deepen.errors import ConfigError
from lm_eval_deepen.weighting.seam import PromptLoss, weighting


@weighting("perplexity", paper="arXiv:2404.11531")
@dataclass(frozen=True)
class Perplexity:
    """Options of ``weighting: perplexity``, PackLLM-sim: softmax of minus the prompt's mean loss (section 3.2).

    The loss is of the prompt alone, never of an answer, and of the same bytes for every member (see `PromptLoss`). A
    loss per token favours tokenizers with short tokens; per byte it is comparable. A request without such bytes has
    equal weights. The published method averages the members' logits with these weights, and its code re-encodes the
    prompt by one member's tokenizer and maps ids; here each member reads its own tokens, and the weights are those of
    whatever `method` averages, which is mostly probabilities.

    Attributes:
        loss_temperature: divides the losses before the softmax.
        loss_per: ``token``, as published, or ``byte``.
    """

    loss_temperature: float = 1.0
    loss_per: Literal["token", "byte"] = "token"
    TAKES_WEIGHTS: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the values."""
        if not self.loss_temperature > 0:
            raise ConfigError(f"loss_temperature must be a number above 0, got {self.loss_temperature!r}.")
        if self.loss_per not in ("token", "byte"):
            raise ConfigError(f"loss_per must be 'token' or 'byte', got {self.loss_per!r}.")

    def start(self, given: Sequence[float] | None, count: int) -> list[float]:
        """Return equal weights, which a request without a prompt keeps."""
        return [1 / count] * count

    def build(self) -> PerplexityWeigher:
        """Return the weigher."""
        return PerplexityWeigher(self)


class PerplexityWeigher:
    """Weighs requests by their prompts."""

    reads_prompts, reads_steps = True, False

    def __init__(self, options: Perplexity) -> None:
        """Take the options."""
        self.options = options

    def prepare(self, losses: Sequence[Sequence[PromptLoss]], configured: Tensor) -> Tensor:
        """Return the weights [R, M]; see the seam."""
        rows = []
        for members in losses:
            counts = [loss.num_bytes if self.options.loss_per == "byte" else loss.tokens for loss in members]
            if not all(counts):
                rows.append(configured.double())
                continue
            means = torch.tensor([loss.nats for loss in members], dtype=torch.float64) / torch.tensor(counts)
            rows.append(torch.softmax(-means.to(configured.device) / self.options.loss_temperature, dim=0))
        if not rows:
            return configured.new_empty(0, len(configured))
        return torch.stack(rows).to(configured.dtype)

    def weights(self, logp: Sequence[Tensor], base: Tensor) -> Tensor:
        """Return the weights of the requests, unchanged."""
        return base
