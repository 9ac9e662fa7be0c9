"""Evaluate ensembles of language models with lm-evaluation-harness."""

__version__ = "0.1.0"
