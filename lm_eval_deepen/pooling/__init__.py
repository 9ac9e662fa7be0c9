"""Pooling: request-level ensembles of the members' own answers. Every module here is a method, found on first use."""

from lm_eval_deepen.pooling.base import POOLINGS

__all__ = ["POOLINGS"]
