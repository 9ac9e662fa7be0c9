"""Weightings: where the members' weights come from. Every module of this folder is one, found on first use."""

from lm_eval_deepen.weighting.base import WEIGHTINGS

__all__ = ["WEIGHTINGS"]
