"""Paired statistics of two systems on the same documents: numpy alone, no model, no file.

Two runs over the same documents are compared document by document: what makes both of them right or wrong together
drops out, and only the documents on which they differ carry evidence.
"""

from lm_eval_deepen.results.statistics.correction import Comparisons, holm, level_of_each, rivals, step_down
from lm_eval_deepen.results.statistics.intervals import (
    CONFIDENCE,
    Interval,
    change_interval,
    mean_interval,
    paired_interval,
    proportion_interval,
    pseudo_values,
    score_interval,
    standard_error,
)
from lm_eval_deepen.results.statistics.paired import Alternative, check_resampling, discordant, mcnemar, sign_flip
from lm_eval_deepen.results.statistics.power import detectable_drop, detectable_shift, mcnemar_power, paired_needs

__all__ = [
    "CONFIDENCE",
    "Alternative",
    "Comparisons",
    "Interval",
    "change_interval",
    "check_resampling",
    "detectable_drop",
    "detectable_shift",
    "discordant",
    "holm",
    "level_of_each",
    "mcnemar",
    "mcnemar_power",
    "mean_interval",
    "paired_needs",
    "paired_interval",
    "proportion_interval",
    "pseudo_values",
    "rivals",
    "score_interval",
    "sign_flip",
    "standard_error",
    "step_down",
]
