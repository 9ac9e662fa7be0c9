"""A pytest plugin that puts our class in the place of the harness's `HFLM`, for the harness's own tests."""

import lm_eval.models.huggingface

from lm_eval_deepen.harness.model import DeepenLM

lm_eval.models.huggingface.HFLM = DeepenLM
