"""What makes the harness know the model ``deepen``: the start-up hook, and the registration that it leads to."""

OFF_SWITCH = "LM_EVAL_DEEPEN_NO_HOOK"
MODELS = "lm_eval.models"
