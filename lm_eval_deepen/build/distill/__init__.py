"""Distilling several models into one: FuseLLM (arXiv 2401.10491) and its control, plain continued training.

Pure parts (`token_alignment`, `alignment`, `fusing`, `loss`) know no model. `teacher_logits` reads members,
`training` knows ``transformers.Trainer``, and `builder` puts them together. Importing the package loads none of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_deepen.build.distill.recipe import METHODS, DistillRecipe

if TYPE_CHECKING:
    from lm_eval_deepen.results.statistics.intervals import Interval

__all__ = ["METHODS", "DistillRecipe", "build", "held_out_difference"]


def build(recipe: Mapping[str, Any], out: Path, members: Mapping[str, str]) -> dict[str, Any]:
    """Train the target model of a recipe and write an ordinary model folder; see `builder.build`."""
    from lm_eval_deepen.build.distill.builder import build as run

    return run(recipe, out, members)


def held_out_difference(first: Mapping[str, Any], second: Mapping[str, Any]) -> Interval:
    """Return how many bits per byte the second build needs more than the first; see `evaluation.difference`."""
    from lm_eval_deepen.build.distill.evaluation import difference

    return difference(first, second)
