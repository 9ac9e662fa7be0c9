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
from lm_eval_deepen.errors import ConfigError, blamed, one_line
from lm_eval_deepen.storage import read_json, write_json, write_tensors

log = logging.getLogger(__name__)


def check_inputs(recipe: BuildRecipe, places: Mapping[str, str]) -> None:
    """Refuse models that cannot be merged, from their configurations and tokenizers; see `check_alike`."""
    content = recipe.content
    own_tokenizer = not (content.get("tokenizer") or content.get("tokenizer_source"))
    weighed = {name: places[name] for name in recipe.weighed}
    check_alike(weighed, same_depth=bool(content.get("models")), own_tokenizer=own_tokenizer)


def merge(recipe: BuildRecipe, out: Path, members: Mapping[str, str]) -> dict[str, Any]:
    """Merge the weights and write a model folder; returns what belongs into its provenance.

    Raises:
        ConfigError: models that cannot be merged, or what mergekit refuses; the cause is chained.
    """
    check_inputs(recipe, recipe.places(members))
    names = dict.fromkeys([recipe.architecture_of, *recipe.weighed])
    for difference in read_otherwise({name: recipe.place(name, members) for name in names}):
        log.warning("%s: %s", recipe.source, difference)
    with blamed(recipe.source):
        require()
    import mergekit.merge as engine
    from mergekit.config import MergeConfiguration
    from mergekit.io import LazyTensorLoader

    order = list(recipe.places(members).values())

    class Ordered(MergeConfiguration):
        """Whose first model, which gives tokenizer and configuration, does not depend on the hashes of names."""

        def referenced_models(self) -> list[Any]:
            models = super().referenced_models()
            return sorted(models, key=lambda model: order.index(str(model)) if str(model) in order else len(order))

    options = engine.MergeOptions(random_seed=recipe.seed, quiet=True, write_model_card=False)
    try:
        configuration = Ordered.model_validate(recipe.located(members))
        head, embedding, tied = check_heads(configuration, options, recipe.source)
        engine.run_merge(configuration, str(out), options)
        merged = LazyTensorLoader.from_disk(str(out))
        if head and _own_head(merged, head, embedding):
            if tied:
                _tie(merged, head, embedding)
            else:
                _say_untied(out / "config.json")
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"{recipe.source}: mergekit refuses the merge: {type(error).__name__}: {one_line(error)}. Its "
            "documentation has the keys of its configuration; different models are distilled (method: fusellm) or "
            "fused at every step"
        ) from error
    finally:
        gc.collect()  # mergekit's cache of loaders keeps files open
    return {"tokens_trained": 0}


def check_heads(configuration: Any, options: Any, source: str) -> tuple[str, str, bool]:
    """Refuse models whose output heads mergekit would leave out; return the names of head and embedding.

    As transformers loads models, a head that is stored with other values than the embedding is not tied to it,
    whatever ``tie_word_embeddings`` says; a head that is not stored is the embedding where that is true, else random.
    mergekit merges a stored head by itself, and what it draws for the head it does not draw for the embedding.

    Returns:
        Names of the tensors, empty ones for an architecture of which transformers does not say them; and whether the
        merge's head is its embedding: so it is in every model that either is made from, and these are the same.

    Raises:
        ConfigError: a model without a head, or a head that would be left out.
    """
    import transformers
    from mergekit.architecture import get_architecture_info
    from mergekit.io.tasks import LoaderCache

    loaders = LoaderCache()
    loaders.setup(options=options)
    models = configuration.referenced_models()
    kind = (models[0].config().architectures or [""])[0]
    pairs = getattr(getattr(transformers, kind, None), "_tied_weights_keys", None) or {}
    if len(pairs) != 1:  # code of its own, or an encoder beside the decoder
        return "", "", False
    [(head, embedding)] = pairs.items()
    first = models
    if configuration.slices:  # the embedding is made of the first layers' models, the head of the last layers'
        first, models = ([part.model for part in configuration.slices[at].sources] for at in (0, -1))
    without = [model for model in models if not _stored(loaders.get(model), head)]
    if random := [model for model in without if not getattr(model.config(), "tie_word_embeddings", True)]:
        raise ConfigError(
            f"{source}: the files of {random[0]} lack the output head {head}, and its config.json says "
            "tie_word_embeddings: false; random values would stand there. Correct its config.json, or its files"
        )
    own = [model for model in models if model not in without and _own_head(loaders.get(model), head, embedding)]
    weights = get_architecture_info(configuration, options).all_weights(models[0].config()) if own else []
    place = next((weight for weight in weights if _called(weight.name, head)), None)
    if own and (place is None or (without and not place.tied_names)):
        why = f"mergekit knows none of {kind}" if place is None else f"{without[0]} stores none"
        raise ConfigError(
            f"{source}: {own[0]} has an output head that is not its embedding ({head}), and {why}: the merge would be "
            "without it, or have it of some models alone. Store it in the files of every model, distil them (method: "
            "fusellm), or fuse them at every step"
        )
    tied = not own and all(getattr(model.config(), "tie_word_embeddings", False) for model in models)
    return head, embedding, tied and {*first} == {*models}


def _own_head(loader: Any, head: str, embedding: str) -> bool:
    """Return whether a model's files hold an output head with other values than its embedding."""
    one, other = _stored(loader, head), _stored(loader, embedding)
    if not (one and other):
        return bool(one)
    mine, theirs = loader.get_tensor(one), loader.get_tensor(other)
    return mine.shape != theirs.shape or bool((mine != theirs).any())


def _stored(loader: Any, name: str) -> str:
    """Return what a tensor is called in a model's files; empty where it is not there."""
    return next((key for key in loader.index.tensor_paths if _called(key, name)), "")


def _called(key: str, name: str) -> bool:
    """Tell whether a stored tensor is the one of a name; what stands before its last two parts differs."""
    return key.split(".")[-2:] == name.split(".")[-2:]


def _tie(loader: Any, head: str, embedding: str) -> None:
    """Store the embedding's values as the output head in a model's files."""
    from safetensors.torch import load_file

    name = _stored(loader, head)
    path = Path(loader.index.base_path, loader.index.tensor_paths[name])
    values = loader.get_tensor(_stored(loader, embedding)).clone()
    write_tensors(path, {**load_file(path), name: values}, {"format": "pt"})


def _say_untied(path: Path) -> None:
    """Write into a configuration that the output head is not the embedding: its readers would tie them, or warn."""
    config = read_json(path)
    parts = [config, *(part for part in [config.get("text_config")] if part)]
    for part in parts:
        part["tie_word_embeddings"] = False
    write_json(path, config, indent=2)
