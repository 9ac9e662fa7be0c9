"""Step-level fusion methods: every module of this folder is one, found on first use."""

from lm_eval_deepen.fusion.base import METHODS

__all__ = ["METHODS"]
