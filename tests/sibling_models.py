"""Siblings of a pico model: its weights with noise, its tokenizer as it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from lm_eval_deepen.build import BuildRecipe, parse_build

MERGES = {
    "linear": {"weight": 1.0},
    "slerp": {"t": 0.5},
    "task_arithmetic": {"weight": 0.5},
    "ties": {"weight": 0.5, "density": 0.5},
    "dare_ties": {"weight": 0.5, "density": 0.5},
    "dare_linear": {"weight": 0.5, "density": 0.5},
}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def parsed(raw: object, folder: Path) -> BuildRecipe:
    """Return the recipe that stands in ``recipe.yaml`` of a folder."""
    return parse_build(raw, "recipe.yaml", folder)


def family_of(base: Path, folder: Path) -> dict[str, str]:
    """Write three siblings of a base; return their places, and the base's, by name."""
    return {"base": str(base), **{f"s{i}": str(write_sibling(base, folder / f"s{i}", i)) for i in (1, 2, 3)}}


def write_sibling(base: Path, folder: Path, seed: int, scale: float = 0.05) -> Path:
    """Copy a model folder, its weights changed by seeded noise."""
    shutil.copytree(base, folder)
    generator = torch.Generator().manual_seed(seed)
    changed = {
        name: value + scale * torch.randn(value.shape, generator=generator) for name, value in tensors(base).items()
    }
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def with_head(folder: Path, target: Path, head: torch.Tensor | None, **changes: object) -> Path:
    """Copy a model folder, its output head another one, or none; its configuration changed."""
    configured(folder, target, **changes)
    held = {name: value for name, value in tensors(target).items() if name != "lm_head.weight"}
    held |= {} if head is None else {"lm_head.weight": head.contiguous()}
    save_file(held, target / "model.safetensors", metadata={"format": "pt"})
    return target


def configured(folder: Path, target: Path, **changes: object) -> Path:
    """Copy a model folder, its configuration changed."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **changes}))
    return target


def merge_of(method: str, models: list[str], base: str | None = "base", **parameters: object) -> dict[str, object]:
    """Return a configuration of mergekit; parameters of methods other than slerp stand beside every model."""
    given = parameters or MERGES[method]
    raw: dict[str, object] = {"merge_method": method, "dtype": "float32"}
    raw["models"] = [{"model": name, **({} if method == "slerp" else {"parameters": given})} for name in models]
    if method == "slerp":
        raw["parameters"] = given
    return raw | ({"base_model": base} if base else {})
