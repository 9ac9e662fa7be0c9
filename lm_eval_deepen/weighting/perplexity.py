"""Weights of a request: a member that predicts the prompt better gets more."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from lm_eval_deepen.weighting.base import PromptLoss, Weighting, weighting


@weighting("perplexity", paper="arXiv:2404.11531")
class Perplexity(Weighting):
    """Options of ``weighting: perplexity``, PackLLM-sim: softmax of minus the prompt's mean loss (section 3.2).

    The loss is of the prompt alone, never of an answer, and of the same bytes for every member (see `PromptLoss`). A
    loss per token favours tokenizers with short tokens; per byte it is comparable. A request without such bytes has
    equal weights. The published method averages the members' logits with these weights, and its code re-encodes the
    prompt by one member's tokenizer and maps ids; here each member reads its own tokens, and the weights are those of
    whatever `method` averages, which is mostly probabilities.
    """

    loss_temperature: float = Field(1.0, gt=0, description="The losses are divided by it before the softmax.")
    loss_per: Literal["token", "byte"] = Field(
        "token", description="Whether a prompt's loss is divided by its tokens, as published, or by its bytes."
    )
    reads_prompts: ClassVar[bool] = True

    def prepare(self, losses: Sequence[Sequence[PromptLoss]], configured: Tensor) -> Tensor:
        """Return the weights [R, M]; see `weighting.base`."""
        rows = []
        for members in losses:
            counts = [loss.num_bytes if self.loss_per == "byte" else loss.tokens for loss in members]
            if not all(counts) or all(loss.nats == math.inf for loss in members):  # nothing to compare them by
                rows.append(configured.double())
                continue
            means = torch.tensor([loss.nats for loss in members], dtype=torch.float64) / torch.tensor(counts)
            above = (means - means.min()).to(configured.device)  # a tiny temperature makes large ones infinite, not all
            rows.append(torch.softmax(-above / self.loss_temperature, dim=0))
        if not rows:
            return configured.new_empty(0, len(configured))
        return torch.stack(rows).to(configured.dtype)
