"""The same weight for every member."""

from __future__ import annotations

from lm_eval_deepen.weighting.base import Weighting, weighting


@weighting("uniform", paper="arXiv:2404.12715")
class Uniform(Weighting):
    """``weighting: uniform``: 1/M each, DeePEn-Avg of the paper; it has no options."""
