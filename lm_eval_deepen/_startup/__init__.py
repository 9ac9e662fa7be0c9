"""The start-up hook, and the registration of the model ``deepen`` that it leads to."""

OFF_SWITCH = "LM_EVAL_DEEPEN_NO_HOOK"
MODELS = "lm_eval.models"
