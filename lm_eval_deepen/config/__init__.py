"""What a person configures: typed keys, their one parse, and the registries of what is chosen by name.

`schema` holds the keys of ensembles and members, `loading` parses them into the configuration of `ensemble`, and
`recipes` holds those of recipes; options of a method stand in the method's own file, which `registry` finds. `keys` is
the base of every class of keys, `describe` says what a key takes, and `errors` what is wrong with one.

What cannot be honoured is a ConfigError, with its key, what was got and the remedy.
"""

from __future__ import annotations

from lm_eval_deepen.config.catalogue import Catalogue
from lm_eval_deepen.config.describe import Choice, Names, Shown
from lm_eval_deepen.config.ensemble import EnsembleConfig, MemberConfig
from lm_eval_deepen.config.frozen import FrozenDict
from lm_eval_deepen.config.keys import Keys, Options
from lm_eval_deepen.config.loading import parse_config
from lm_eval_deepen.config.registry import Entry, Registry

__all__ = [
    "Catalogue", "Choice", "EnsembleConfig", "Entry", "FrozenDict", "Keys", "MemberConfig", "Names", "Options",
    "Registry", "Shown", "parse_config",
]  # fmt: skip
