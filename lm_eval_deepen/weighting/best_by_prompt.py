"""A router without training: the member that predicts the prompt best answers alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from lm_eval_deepen.weighting.base import PromptLoss, Weighting, weighting


@weighting("best_by_prompt", paper="none")
class BestByPrompt(Weighting):
    """Options of ``weighting: best_by_prompt``: all weight on the member with the lowest loss per byte of the prompt.

    It is the limit of ``weighting: perplexity`` with ``loss_per: byte`` at a temperature of 0, and what weights by
    prompts are to be compared with. Of equals the first member answers, so that the main one does; a request without
    a prompt has equal weights.
    """

    reads_prompts: ClassVar[bool] = True

    def prepare(self, losses: Sequence[Sequence[PromptLoss]], configured: Tensor) -> Tensor:
        """Return the weights [R, M]; see the base."""
        rows = configured.new_zeros(len(losses), len(configured))
        for row, members in zip(rows, losses, strict=True):
            if not all(loss.num_bytes for loss in members):
                row.copy_(configured)
                continue
            means = [loss.nats / loss.num_bytes for loss in members]
            row[min(range(len(means)), key=means.__getitem__)] = 1.0
        return rows
