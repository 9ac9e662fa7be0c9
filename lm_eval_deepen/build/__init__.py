"""Models made from other models, as ordinary model folders: weight merging and distillation, by one recipe each."""

from lm_eval_deepen.build.publish import build
from lm_eval_deepen.build.recipe import BuildRecipe, parse_build, read_build

__all__ = ["BuildRecipe", "build", "parse_build", "read_build"]
