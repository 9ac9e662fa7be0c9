"""Fake methods, fake loading arguments and short verbs for the configuration tests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest

from lm_eval_deepen.config import EnsembleConfig, parse_config
from lm_eval_deepen.errors import ConfigError

LOADING = {
    "self",
    "kwargs",
    "pretrained",
    "revision",
    "dtype",
    "device",
    "parallelize",
    "peft",
    "delta",
    "tokenizer",
    "gguf_file",
    "trust_remote_code",
    "max_length",
    "add_bos_token",
    "prefix_token_id",
    "chat_template_args",
    "batch_size",
    "max_batch_size",
    "truncation",
}


@dataclass(frozen=True)
class Alpha:
    """A fake method with every kind of option."""

    inverse: Literal["em", "adamw"] = "em"
    learning_rate: float = 0.15
    steps: int = 5
    support: int | Literal["full"] = 64
    max_anchors: int | None = None
    end_anchor: bool = True
    label: str = "a"
    COMPAT: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "reference": {"inverse": "adamw", "end_anchor": False, "support": "full", "learning_rate": 0.15}
    }

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"steps must be 1 or more; got {self.steps}")


@dataclass(frozen=True)
class Beta:
    """A fake method without profiles and with an option of its own."""

    threshold: float | None = None
    steps: int = 1


METHODS = {"deepen": Alpha, "gac": Beta}


def parse(raw: Mapping[str, Any] | None = None, /, **keys: Any) -> EnsembleConfig:
    return parse_config({**(raw or {}), **keys}, loading_keys=LOADING, methods=METHODS)


def refuse(match: str, raw: Mapping[str, Any] | None = None, /, **keys: Any) -> None:
    with pytest.raises(ConfigError, match=match):
        parse(raw, **keys)


PAIR = {"pretrained": "org/A", "members": ["org/A", "org/B"]}


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path
