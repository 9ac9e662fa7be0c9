"""What a person configures: typed keys, their one parse, and the registries of what is chosen by name.

`keys` is the base of every class of keys, `ensemble` holds the keys of ensembles and members, `loading` parses them,
`registry` finds methods, and `errors` says what is wrong. Options of a method stand in the method's own file.
"""

from __future__ import annotations

from lm_eval_deepen.config.describe import Choice, Names, Shown
from lm_eval_deepen.config.ensemble import EnsembleConfig, MemberConfig
from lm_eval_deepen.config.frozen import FrozenDict
from lm_eval_deepen.config.keys import Keys, Options
from lm_eval_deepen.config.loading import Catalogue, parse_config
from lm_eval_deepen.config.registry import Entry, Registry

__all__ = [
    "Catalogue", "Choice", "EnsembleConfig", "Entry", "FrozenDict", "Keys", "MemberConfig", "Names", "Options",
    "Registry", "Shown", "parse_config",
]  # fmt: skip
