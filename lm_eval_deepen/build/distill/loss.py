"""The loss of FuseLLM: lambda * CLM + (1 - lambda) * fusion (arXiv 2401.10491, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED = -100
SMALLEST = 1e-7  # of the mass that the model leaves to the rest: rounding may make it negative


@dataclass(frozen=True, eq=False)
class FusedBatch:
    """What the target learns from its sources."""

    ids: Tensor  # ids with a probability [B, T, K]
    p: Tensor  # their probabilities, 0 for padding [B, T, K]
    rest: Tensor  # mass of all other ids together [B, T]; where it is 0 the event does not count
    covered: Tensor  # positions with a distribution [B, T] (bool)


@dataclass(frozen=True, eq=False)
class Loss:
    """The loss of a batch and its two parts, in nats; `fusion` is None where it has no weight."""

    total: Tensor
    clm: Tensor
    fusion: Tensor | None


def distillation_loss(
    logits: Tensor,
    labels: Tensor,
    clm_weight: float,
    fused: FusedBatch | None,
    counts: tuple[Tensor, Tensor] | None = None,
) -> Loss:
    """Return the loss of a batch.

    Both parts are means over their positions: those with a label, and those with a distribution. The fusion part is
    the cross-entropy of the events that the distribution knows: each of its ids, and all other ids together.

    Args:
        logits: of the target [B, T, V]; those at position i predict label i.
        labels: ids [B, T], `IGNORED` where there is none.
        clm_weight: lambda.
        fused: what the sources say; None only where lambda is 1.
        counts: what the sums over positions with a label, and over those with a distribution, are divided by, where
            the batch is a part of a larger one (see `counted`); None: by their numbers here.

    Raises:
        ValueError: lambda below 1 without `fused`.
    """
    labelled = labels != IGNORED
    flat = logits[labelled].float()  # [n, V]
    log_total = torch.logsumexp(flat, dim=1)
    each = log_total - flat.gather(1, labels[labelled][:, None])[:, 0]
    clm = each.mean() if counts is None else each.sum() / counts[0]
    if clm_weight == 1:
        return Loss(clm, clm, None)
    if fused is None:
        raise ValueError(f"clm_weight {clm_weight} leaves weight for a fusion loss, but no distributions are given")
    here = FusedBatch(*(part[labelled] for part in vars(fused).values()))
    logq = flat.gather(1, here.ids) - log_total[:, None]  # [n, K]
    q_rest = 1 - torch.where(here.p > 0, logq.exp(), 0.0).sum(1)
    row = -(here.p * logq).sum(1) - here.rest * q_rest.clamp(min=SMALLEST).log()
    total = torch.where(here.covered, row, 0.0).sum()
    fusion = total / (here.covered.sum().clamp(min=1) if counts is None else counts[1])  # 0 where no row is covered
    return Loss(clm_weight * clm + (1 - clm_weight) * fusion, clm, fusion)


def counted(labels: Tensor, fused: FusedBatch | None) -> Tensor:
    """Return how many positions of a batch have a label, and how many of these a distribution [2]."""
    labelled = labels != IGNORED
    covered = labelled & fused.covered if fused is not None else torch.zeros_like(labelled)
    return torch.stack([labelled.sum(), covered.sum()]).float()
