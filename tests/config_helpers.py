"""Fake methods, fake loading arguments and short verbs for the configuration tests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from pydantic import Field

from lm_eval_deepen.config import Catalogue, EnsembleConfig, Options, Registry, parse_config
from lm_eval_deepen.errors import ConfigError

LOADING = set(
    "self kwargs pretrained revision dtype device parallelize peft delta tokenizer gguf_file trust_remote_code "
    "max_length add_bos_token prefix_token_id chat_template_args batch_size max_batch_size truncation".split()
)


class Alpha(Options):
    """A fake method with every kind of option."""

    inverse: Literal["em", "adamw"] = "em"
    learning_rate: float = 0.15
    steps: int = Field(5, ge=1)
    support: int | Literal["full"] = 64
    max_anchors: int | None = None
    end_anchor: bool = True
    label: str = "a"
    COMPAT: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "reference": {"inverse": "adamw", "end_anchor": False, "support": "full", "learning_rate": 0.15}
    }


class Beta(Options):
    """A fake method without profiles and with an option of its own."""

    threshold: float | None = None
    steps: int = 1


def registry(kind: str, **options: type[Options]) -> Registry:
    found = Registry(kind)
    for name, cls in options.items():
        found.register(name)(cls)
    return found


METHODS = registry("method", deepen=Alpha, gac=Beta)
NONE = {"weighting": Registry("weighting"), "pooling": Registry("pooling")}


def catalogue(loading: Iterable[str] = LOADING, **kinds: Registry) -> Catalogue:
    return Catalogue(frozenset(loading), {"method": METHODS, **NONE, **kinds})


def parse(raw: Mapping[str, Any] | None = None, /, **keys: Any) -> EnsembleConfig:
    return parse_config({**(raw or {}), **keys}, catalogue())


def refuse(match: str, raw: Mapping[str, Any] | None = None, /, **keys: Any) -> None:
    with pytest.raises(ConfigError, match=match):
        parse(raw, **keys)


PAIR = {"pretrained": "org/A", "members": ["org/A", "org/B"]}


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path
