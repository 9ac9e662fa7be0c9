"""Solvers of the inverse: every module of this folder but its helpers is one, found on first use."""

from lm_eval_deepen.solvers.base import SOLVERS

__all__ = ["SOLVERS"]
