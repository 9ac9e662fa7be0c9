"""Paired statistics of two systems on the same documents: numpy alone, no model, no file.

Two runs over the same documents are compared document by document: what makes both of them right or wrong together
drops out, and only the documents on which they differ carry evidence.
"""

from lm_eval_deepen.statistics.bootstrap import Interval, paired_bootstrap, standard_error
from lm_eval_deepen.statistics.correction import holm
from lm_eval_deepen.statistics.paired import Alternative, discordant, mcnemar, sign_flip
from lm_eval_deepen.statistics.power import detectable_drop, detectable_shift, mcnemar_power

__all__ = [
    "Alternative",
    "Interval",
    "detectable_drop",
    "detectable_shift",
    "discordant",
    "holm",
    "mcnemar",
    "mcnemar_power",
    "paired_bootstrap",
    "sign_flip",
    "standard_error",
]
