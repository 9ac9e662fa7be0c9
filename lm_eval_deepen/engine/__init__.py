"""The ensemble as one model: scoring, decoding and the trace of what fusion did."""

from lm_eval_deepen.engine.ensemble import Ensemble

__all__ = ["Ensemble"]
