"""Staged search: one option after another, each on one pass over the logits."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lm_eval_deepen.config import EnsembleConfig, FrozenDict
from lm_eval_deepen.engine import Ensemble
from lm_eval_deepen.engine.bits_per_byte import Document, Reading, Variant, ensemble_bits, quiet
from lm_eval_deepen.engine.ensemble import view
from lm_eval_deepen.errors import ConfigError, DeepenError
from lm_eval_deepen.fusion.base import Fuser
from lm_eval_deepen.relative.store import MatrixStore

WEIGHTS = tuple(k / 10 for k in range(1, 10))
TEMPERATURES = (0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.5)
STRONG = 0.8  # of one member, where spaces are compared
WEIGHT_STEPS = (-0.1, -0.05, 0.05, 0.1)
TEMPERATURE_STEPS = (0.87, 0.93, 1.07, 1.15)  # factors
BYTE_SPACES = tuple(
    {"rows": rows, "average": average} for rows in ("canonical", "prefix") for average in ("geometric", "linear")
)
EMBEDDING_SPACES = tuple(
    {"rows": rows, "normalization": normalization, "average": average}
    for rows in ("exact", "embedding")
    for normalization in ("centered", "decorrelated", "cosine")
    for average in ("geometric", "linear")
)
OUTPUT_SPACES = tuple({**space, "embeddings": "output"} for space in EMBEDDING_SPACES)  # where a head is not tied
SOLVERS = ({"inverse": "em"}, {"inverse": "mirror"}, {"inverse": "adamw"})
FREE = dict.fromkeys(  # each space has its own defaults
    "inverse steps learning_rate support max_support max_truncated embeddings normalization relative_temperature "
    "row_entropy top_m".split()
)


@dataclass(frozen=True)
class Candidate:
    """A point of the search: options of the method, weights and temperatures of the members."""

    options: FrozenDict
    weights: tuple[float, ...]
    temperatures: tuple[float, ...]


class Fusers:
    """Fusers by options; built once."""

    def __init__(self, ensemble: Ensemble) -> None:
        self.ensemble = ensemble
        self._store = MatrixStore(ensemble.config.matrix_dir)
        self._built: dict[FrozenDict, Fuser] = {}

    def options(self, candidate: Candidate) -> Any:
        """Return a candidate's options of the method, checked."""
        return type(self.ensemble.config.options)(**candidate.options)

    def variant(self, candidate: Candidate) -> Variant:
        """Return what a candidate is to a reading; DeepenError for options that these members cannot be fused with."""
        if candidate.options not in self._built:
            method = self.options(candidate)
            self._built[candidate.options] = method.build([view(m) for m in self.ensemble.members], self._store)
        fuser, weights = self._built[candidate.options], torch.tensor(candidate.weights)
        return Variant(quiet(replace(self.ensemble, fuser=fuser, weights=weights)), candidate.temperatures)


@dataclass(frozen=True)
class Chosen:
    """What a search found."""

    fusers: Fusers
    first: Candidate  # what was given
    best: Candidate  # what was chosen
    log: tuple[str, ...]  # a line per stage

    @property
    def config(self) -> EnsembleConfig:
        """The configuration of what was chosen; its weights are constant, wherever those given came from."""
        config = constant(self.fusers.ensemble.config)
        settings = zip(config.members, self.best.weights, self.best.temperatures, strict=True)
        members = tuple(member.replace(weight=w, temperature=t) for member, w, t in settings)
        return config.replace(members=members, options=self.fusers.options(self.best), compat=None)

    def before(self, documents: Sequence[Document]) -> Tensor:
        """Return bits per document [D] of what was given."""
        return self._bits(self.first, documents)

    def after(self, documents: Sequence[Document]) -> Tensor:
        """Return bits per document [D] of what was chosen."""
        return self._bits(self.best, documents)

    def _bits(self, candidate: Candidate, documents: Sequence[Document]) -> Tensor:
        reading, variant = Reading.of(self.fusers.ensemble, documents), self.fusers.variant(candidate)
        if not variant.ensemble.by_stretches:
            return reading.bits(reading.logp([variant]))[0]
        members = [copy.copy(member) for member in variant.ensemble.members]
        for member, temperature in zip(members, candidate.temperatures, strict=True):
            member.config = member.config.replace(temperature=temperature)
        return ensemble_bits(reading, replace(variant.ensemble, members=tuple(members)))


def constant(config: EnsembleConfig) -> EnsembleConfig:
    """Return a configuration whose members' weights are kept as they are, and written as they are.

    Weights that learn from the text, the default, begin as equal ones.

    Raises:
        ConfigError: a weighting that makes the weights anew for every request or step.
    """
    if config.weights_change and config.weighting != "bayes":
        raise ConfigError(
            f"tune: weighting={config.weighting} makes the weights by request or step; remove it to fit constant ones"
        )
    return config.replace(weighting_options=None)


def search(reading: Reading, *, everything: bool = False) -> Chosen:
    """Choose options, weights and temperatures by the bits of some documents, stage by stage.

    Args:
        reading: the documents, and the ensemble where the search starts; its main member stays the main one.
        everything: try spaces made from embeddings, too.

    Raises:
        ConfigError: a weighting that makes the weights by request or step.
    """
    ensemble, documents = reading.ensemble, reading.documents
    fusers, config = Fusers(ensemble), constant(ensemble.config)
    first = best = Candidate(
        FrozenDict(config.options_dict()), config.weights, tuple(member.temperature for member in config.members)
    )
    num_bytes, log = sum(document.num_bytes for document in documents), list[str]()
    if ensemble.by_stretches:
        log.append(
            f"candidates are compared by fused steps; method {config.method} scores, and is reported, by stretches"
        )
    spaces = spaces_of(ensemble, everything)
    for name, stage in (
        ("space and weights", lambda at: _with_weights(with_spaces(at, spaces))),
        ("weights", _weights),
        ("common temperature", _common_temperature),
        ("temperatures", _temperatures),
        ("space again", lambda at: with_spaces(at, spaces)),
        ("weights, finer", _finer_weights),
        ("solver", lambda at: _solvers(at, config.method)),
    ):
        candidates = [best]
        for candidate in stage(best):
            try:
                fusers.variant(candidate)
            except DeepenError as error:
                log.append(f"{name}: {dict(candidate.options)} left out: {error}")
                continue
            candidates.append(candidate)
        bits = reading.bits(reading.logp([fusers.variant(candidate) for candidate in candidates])).sum(1)
        best = candidates[int(bits.argmin())]
        figure = float(bits.min()) / num_bytes
        log.append(f"{name}: {len(candidates)} tried, {figure:.4f} bits/byte, {_say(best, first)}")
    return Chosen(fusers, first, best, tuple(log))


def _say(at: Candidate, first: Candidate) -> str:
    changed = {key: value for key, value in at.options.items() if first.options[key] != value}
    options = "".join(f"{key} {value}, " for key, value in changed.items())
    weights, temperatures = ("+".join(f"{x:.4g}" for x in values) for values in (at.weights, at.temperatures))
    return f"{options}weights {weights}, temperatures {temperatures}"


def spaces_of(ensemble: Ensemble, everything: bool) -> Sequence[dict[str, str]]:
    """Return the spaces to try: those of output embeddings where any member's differ from its input embeddings."""
    if ensemble.config.method != "deepen":
        return ()
    untied = everything and not all(view(member).tied for member in ensemble.members)
    return (*BYTE_SPACES, *(EMBEDDING_SPACES if everything else ()), *(OUTPUT_SPACES if untied else ()))


def with_spaces(at: Candidate, spaces: Sequence[dict[str, str]]) -> Iterator[Candidate]:
    """Yield a candidate with each of some spaces."""
    for changes in spaces:
        yield replace(at, options=FrozenDict({**at.options, **FREE, **changes}))


def _with_weights(spaces: Iterator[Candidate]) -> Iterator[Candidate]:
    """Yield every space with a few weights: which one is best depends on how much the weaker member is heard."""
    for at in spaces:
        yield at
        for m in range(len(at.weights)):
            yield _with_weight(at, m, STRONG)


def _solvers(at: Candidate, method: str) -> Iterator[Candidate]:
    if method == "deepen" and at.options["rows"] in ("embedding", "exact"):
        for changes in SOLVERS:
            yield replace(at, options=FrozenDict({**at.options, "steps": None, "learning_rate": None, **changes}))


def _weights(at: Candidate) -> Iterator[Candidate]:
    """Yield candidates with one member's weight changed, the others' scaled in proportion."""
    for m in _independent(at):
        for weight in WEIGHTS:
            yield _with_weight(at, m, weight)


def _finer_weights(at: Candidate) -> Iterator[Candidate]:
    for m in _independent(at):
        for step in WEIGHT_STEPS:
            if 0 < at.weights[m] + step < 1:
                yield _with_weight(at, m, at.weights[m] + step)


def _independent(at: Candidate) -> range:
    """Return the members whose weights say all: one of two, else every one in turn."""
    return range(1 if len(at.weights) == 2 else 0, len(at.weights))


def _with_weight(at: Candidate, m: int, weight: float) -> Candidate:
    rest = 1 - at.weights[m]
    others = [(w / rest if rest > 0 else 1 / (len(at.weights) - 1)) * (1 - weight) for w in at.weights]
    return replace(at, weights=tuple(round(weight if i == m else w, 6) for i, w in enumerate(others)))


def _common_temperature(at: Candidate) -> Iterator[Candidate]:
    for value in TEMPERATURES:
        yield replace(at, temperatures=(value,) * len(at.temperatures))


def _temperatures(at: Candidate) -> Iterator[Candidate]:
    for m, own in enumerate(at.temperatures):
        for factor in TEMPERATURE_STEPS:
            changed = round(own * factor, 4)
            yield replace(at, temperatures=tuple(changed if i == m else t for i, t in enumerate(at.temperatures)))
