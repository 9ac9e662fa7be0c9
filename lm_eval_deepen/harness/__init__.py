"""The harness's view of an ensemble: the model class, its requests and caches, tasks.

The only room, beside the loading of members, that knows ``lm_eval``.
"""
