"""Chooses the next token, greedily or by drawing, with transformers' own logits processors."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import (
    EncoderRepetitionPenaltyLogitsProcessor,
    ExponentialDecayLengthPenalty,
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
)

from lm_eval_deepen.errors import RequestError, one_line

# These multiply scores, so that what they do depends on where the zero of the logits lies.
MULTIPLYING = (RepetitionPenaltyLogitsProcessor, EncoderRepetitionPenaltyLogitsProcessor, ExponentialDecayLengthPenalty)


@dataclass(frozen=True, eq=False)
class Sampler:
    """Chooses the tokens of one text."""

    # what changes the scores before the choice
    processors: LogitsProcessorList = field(default_factory=LogitsProcessorList)
    do_sample: bool = False  # draw from the distribution; otherwise take its maximum
    named: str = ""  # the settings, for messages

    def choose(self, scores: Tensor, before: Sequence[int], generator: torch.Generator | None) -> int:
        """Return the next token.

        Args:
            scores: logits of one member alone, or fused log-probabilities [K].
            before: the tokens so far, those of the prompt among them.
            generator: the row's own source of randomness; needed where tokens are drawn.

        Raises:
            RequestError: the settings leave nothing to choose from.
        """
        ids = torch.tensor([list(before)], device=scores.device)
        try:
            with torch.no_grad():
                scores = self.processors(ids, scores[None].float().clone())[0]
        except (IndexError, TypeError, ValueError) as error:
            raise RequestError(
                f"the generation arguments {self.named} cannot be applied to a text of {len(before)} tokens: "
                f"{one_line(error)}. Correct them or leave them out."
            ) from error
        if not self.do_sample:
            return int(scores.argmax())
        probabilities = torch.softmax(scores, dim=-1).cpu()
        if not bool(probabilities.isfinite().all()):
            raise RequestError(
                f"the generation arguments {self.named} leave no distribution to draw a token from: all pieces are "
                "ruled out, or logits divided by the temperature are no finite numbers. Correct them."
            )
        return int(torch.multinomial(probabilities, 1, generator=generator))

    @property
    def plain_greedy(self) -> bool:
        """Whether the choice is the maximum of the distribution as it stands."""
        return not self.do_sample and not self.processors


class FromChance(LogitsProcessor):
    """A processor that multiplies scores, applied to log(K p), whose zero is a piece as likely as by chance.

    K is the number of pieces. A penalty brings a piece that is likelier than 1/K closer to that, and one that is less
    likely further away from it, as it does with a model's logits and their zero. So nothing depends on a number added
    to all scores, which changes no probability. Log-probabilities themselves would leave a piece of probability 1 as
    it is; log-odds, one above 1/2 always in front.
    """

    def __init__(self, processor: LogitsProcessor) -> None:
        self.processor = processor

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return log(K p), changed, [B, K] from scores [B, K]."""
        return self.processor(input_ids, torch.log_softmax(scores, dim=-1) + math.log(scores.shape[-1]))


def from_chance(processors: LogitsProcessorList) -> LogitsProcessorList:
    """Return processors for a fused distribution, whose logits have no zero that would mean anything."""
    return LogitsProcessorList(
        FromChance(processor) if isinstance(processor, MULTIPLYING) else processor for processor in processors
    )


def row_generator(seed: int, *parts: str) -> torch.Generator:
    """Return a generator that depends on the seed and on `parts` alone, not on batching or order."""
    digest = hashlib.sha256("\0".join([str(seed), *parts]).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
