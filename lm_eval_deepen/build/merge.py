"""Weight merging, by mergekit."""

from __future__ import annotations

import gc
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lm_eval_deepen.build.architecture import check_alike, read_otherwise
from lm_eval_deepen.build.merge_config import require
from lm_eval_deepen.build.recipe import BuildRecipe
from lm_eval_deepen.errors import ConfigError, one_line

log = logging.getLogger(__name__)


def check_inputs(recipe: BuildRecipe, places: Mapping[str, str]) -> None:
    """Refuse models that cannot be merged, from their configurations and tokenizers.

    Raises:
        IncompatibleError: their architectures or vocabularies differ.
        ConfigError: a configuration cannot be read.
    """
    content = recipe.content
    own_tokenizer = not (content.get("tokenizer") or content.get("tokenizer_source"))
    check_alike(places, same_depth=bool(content.get("models")), own_tokenizer=own_tokenizer)


def merge(recipe: BuildRecipe, out: Path, members: Mapping[str, str]) -> dict[str, Any]:
    """Merge the weights and write a model folder; returns what belongs into its provenance.

    Raises:
        ConfigError: models that cannot be merged, or what mergekit refuses; the cause is chained.
    """
    check_inputs(recipe, recipe.places(members))
    for difference in read_otherwise(recipe.places(members)):
        log.warning("%s: %s", recipe.source, difference)
    require(f"{recipe.source}: ")
    import mergekit.merge as engine
    from mergekit.config import MergeConfiguration

    order = list(recipe.places(members).values())

    class Ordered(MergeConfiguration):
        """Whose first model, which gives tokenizer and configuration, does not depend on the hashes of names."""

        def referenced_models(self) -> list[Any]:
            models = super().referenced_models()
            return sorted(models, key=lambda model: order.index(str(model)) if str(model) in order else len(order))

    options = engine.MergeOptions(random_seed=recipe.seed, quiet=True, write_model_card=False)
    try:
        engine.run_merge(Ordered.model_validate(recipe.located(members)), str(out), options)
    except Exception as error:
        raise ConfigError(
            f"{recipe.source}: mergekit refuses the merge: {type(error).__name__}: {one_line(error)}. Its "
            "documentation has the keys of its configuration; different models are distilled (method: fusellm) or "
            "fused at every step"
        ) from error
    finally:
        gc.collect()  # mergekit's cache of loaders keeps files open
    return {"tokens_trained": 0}
