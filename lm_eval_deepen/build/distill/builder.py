"""From a recipe to a model folder: FuseLLM (arXiv 2401.10491) or plain continued training on the same text."""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import math
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lm_eval_deepen.build.distill import evaluation
from lm_eval_deepen.build.distill.corpus import Corpus, Text, Tokens, cut, read_corpus, text_digest
from lm_eval_deepen.build.distill.recipe import DistillRecipe
from lm_eval_deepen.build.distill.sources import Source, learn, read_source, roles_of, source_facts
from lm_eval_deepen.config import FrozenDict, MemberConfig
from lm_eval_deepen.errors import ConfigError, MemberError, StorageError
from lm_eval_deepen.harness.distributed import Ranks
from lm_eval_deepen.member import Member, TextCodec, load_member
from lm_eval_deepen.relative.files import content_hash, identity_hash
from lm_eval_deepen.storage import (
    cache_folder,
    make_folder,
    move_file,
    read_json,
    reason,
    remove_folder,
    used,
    write_json,
)

PACKAGES = ("lm_eval_deepen", "torch", "transformers", "accelerate", "lm_eval", "tokenizers")
PARTIAL = ".partial"
IDENTITY = "recipe.json"
RESULT = "distill.json"


class Clock:
    """Seconds that the stages of a build took in this process, and those of its threads on processors.

    Other work on the machine makes the first longer, the second hardly.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.cpu_seconds: dict[str, float] = {}
        self._last = time.monotonic(), time.process_time()

    def lap(self, stage: str) -> None:
        """Count the time since the last lap to a stage."""
        now = time.monotonic(), time.process_time()
        for spent, start, end in zip((self.seconds, self.cpu_seconds), self._last, now, strict=True):
            spent[stage] = round(spent.get(stage, 0.0) + end - start, 1)
        self._last = now


def build(recipe: Mapping[str, Any], out: Path, members: Mapping[str, str]) -> dict[str, Any]:
    """Train the target model of a recipe and write an ordinary model folder.

    An interrupted build goes on where it was: distributions are kept in the store, checkpoints in ``OUT.partial``.
    The same recipe, models, text and number of threads give the same weights. The processes of ``torchrun`` or
    ``accelerate launch`` share every batch, and get to the same weights up to rounding; process 0 evaluates and writes.

    Args:
        recipe: the keys of `DistillRecipe`.
        out: the folder to write; it may exist if it holds no model.
        members: hub name or folder of every model that the recipe names.

    Returns:
        What is known of the result: recipe, hashes of weights and text, versions, tokens trained, held-out bits per
        byte, and for ``fusellm`` coverage and matched mass of every source.

    Raises:
        ConfigError: an impossible recipe, before any model loads; or a folder in use.
        MemberError: a model that cannot be loaded.
        VocabularyError: a tokenizer that cannot be mapped to bytes exactly.
        MatrixError: a store that cannot be used.
    """
    from lm_eval_deepen.build.distill.training import TrainingBlocks, claim, train

    config = DistillRecipe.parse(recipe, members)
    out = Path(out)
    corpus, clock = read_corpus(config), Clock()
    places = {name: members[name] for name in dict.fromkeys([config.target, *config.sources])}
    files = {
        name: sorted([path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in Path(place).glob("*.*"))
        for name, place in places.items()
    }
    key = {  # what tells one build from another before any model is loaded
        "recipe": config.identity(),
        "target": config.target,
        "sources": list(config.sources),
        "models": places,
        "files": files,
        "text": {"train": text_digest(corpus.train), "held_out": text_digest(corpus.held_out)},
        "versions": versions(),
    }
    ranks = Ranks.of_launch()
    if config.batch_size % ranks.count:
        raise ConfigError(
            f"recipe: batch_size {config.batch_size} cannot be shared by {ranks.count} processes; take a multiple"
        )
    finished = _finished(out, key)
    if ranks.gather(finished is not None)[0]:
        return finished or {}
    folder = out.with_name(out.name + PARTIAL)
    read = _read(config, corpus, members, clock, ranks)
    gc.collect()
    identity = {
        **config.identity(), "target_sha256": read.weights, "text_sha256": text_digest(read.text.train),
        "sources_sha256": [source.weights for source in read.sources],
    }  # fmt: skip
    learnt = learn(read.sources, read.used, read.codec, read.roles, config, ranks) if read.sources else None
    told = source_facts(read.sources, learnt, read.used) if learnt and ranks.index == 0 else {}
    read = replace(read, sources=[])  # with their tokens
    clock.lap("alignment")
    with ranks.first():
        claim(folder / IDENTITY, identity)
    fused = None if learnt is None else learnt.of(read.text.used)
    data = TrainingBlocks(read.blocks, read.text.order, fused)
    trained = train(config, members[config.target], data, folder, read.cpu, ranks)
    if ranks.index > 0:
        return trained
    clock.lap("training")
    facts = {
        **trained,
        "method": config.method,
        "recipe": config.to_dict(),
        "target": {"name": config.target, "tensors_sha256": read.weights},
        "sources": told,
        "covered": learnt.covered if learnt else None,
        "versions": versions(),
        "seed": config.seed,
        "tokens_trained": read.text.tokens,
        "distinct_tokens": sum(len(block.ids) for block in read.used),
        "text_sha256": text_digest(read.text.train),
        **_evaluated(config, read, folder / "model"),
    }
    clock.lap("held out, result")
    facts |= {"seconds": clock.seconds, "cpu_seconds": clock.cpu_seconds}
    _publish(folder, out, {"key": key, "result": facts})
    return facts


@dataclass(frozen=True, eq=False)
class Read:
    """What is known before training; no model is in memory any more."""

    text: Text  # the corpus in blocks
    blocks: list[Tokens]  # the training blocks as the target reads them
    codec: TextCodec  # the target's tokenizer
    roles: Mapping[str, int]  # its control ids by role
    weights: str  # hash of its weights
    bits: list[float]  # what it needs for every held-out document
    cpu: bool  # whether models run on the CPU
    sources: list[Source]  # the sources with their distributions

    @property
    def used(self) -> list[Tokens]:
        """The blocks that are trained on."""
        return [self.blocks[i] for i in self.text.used]


def _read(config: DistillRecipe, corpus: Corpus, members: Mapping[str, str], clock: Clock, ranks: Ranks) -> Read:
    """Load the models, one after another, and keep what is needed of them."""
    target = load(config.target, members[config.target], config.device)
    if config.context_length > target.max_length:
        raise ConfigError(
            f"recipe: context_length {config.context_length} is above the {target.max_length} tokens of "
            f"{config.target!r}; lower it"
        )
    text = cut(config, corpus, target.codec)
    root = Path(config.store).expanduser() if config.store else cache_folder() / "distributions"
    weights = tensors_hash(target)
    with ranks.first():  # the others find what it keeps
        bits = _base_bits(root, weights, target, text)
    clock.lap("held out, base")
    texts, sources = [text.train[i] for i in text.used], []
    for name in config.sources:  # one model in memory beside the target's
        member = target if name == config.target else load(name, members[name], config.device)
        own = weights if member is target else tensors_hash(member)
        sources.append(read_source(member, own, texts, config.top_k, root, ranks))
        if member is not target:
            del member
            gc.collect()  # models hold themselves in circles
        clock.lap(f"externalise {name}")
    return Read(
        text=text,
        blocks=[Tokens.of(target.codec, block) for block in text.train],
        codec=target.codec,
        roles=roles_of(target.lm.tokenizer),
        weights=weights,
        bits=bits,
        cpu=target.lm.device.type == "cpu",
        sources=sources,
    )


def _evaluated(config: DistillRecipe, read: Read, folder: Path) -> dict[str, Any]:
    """Return what a build reports of its result, loaded as anyone would load it."""
    result = load(config.target, str(folder), config.device)
    if result.codec.vocab.fingerprint != read.codec.vocab.fingerprint:
        raise MemberError(f"target {config.target!r}: its tokenizer changes when it is saved; use one that does not")
    bits = evaluation.bits_of(result, _held_out(result, read.text))
    facts = evaluation.facts(read.bits, bits, read.text.sizes)
    return {
        "tensors_sha256": tensors_hash(result),
        "parameters": sum(p.numel() for p in result.lm.model.parameters()),
        "held_out": {**facts, "text_sha256": read.text.held_out_digest},
    }


def load(name: str, pretrained: str, device: str | None) -> Member:
    """Load one model with its tokenizer; ConfigError where it gives no distribution for given text."""
    loading = FrozenDict({"dtype": "float32"})  # as it is trained, whatever its weights are stored in
    member = load_member(MemberConfig(name=name, pretrained=pretrained, loading=loading), device)
    if member.generates_only:
        raise ConfigError(f"recipe: model {name!r} cannot score given text; use a causal language model")
    return member


def tensors_hash(member: Member) -> str:
    """Return the hex SHA-256 of a loaded model's tensors: names, shapes, dtypes, content. Not of files."""
    return content_hash(member.lm.model.state_dict(), {})


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in PACKAGES}}


def _finished(out: Path, key: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the result of a build that is finished already; None where there is none, or an interrupted one."""
    path = out / RESULT
    if path.is_file():
        try:
            stored = read_json(path)
            if stored["key"] == key:
                return dict(stored["result"])
        except (StorageError, LookupError, TypeError, ValueError) as error:
            raise ConfigError(f"{path} is damaged ({error}); delete {out} to build the model again") from error
    used = out.is_file() or any((out / name).exists() for name in (RESULT, "config.json"))
    if used and not (out.with_name(out.name + PARTIAL) / IDENTITY).exists():
        raise ConfigError(f"{out} holds another model already; delete it, or give another folder")
    return None


def _held_out(member: Member, text: Text) -> list[list[Tokens]]:
    return [[Tokens.of(member.codec, block) for block in blocks] for blocks in text.held_out]


def _base_bits(root: Path, weights: str, target: Member, text: Text) -> list[float]:
    """Return the held-out bits of the target before training; kept beside the distributions."""
    identity = {
        "weights": weights, "vocabulary": target.codec.vocab.fingerprint, "prefix": list(target.codec.prefix_ids),
        "text": text.held_out_digest,
    }  # fmt: skip
    path = root / f"bits-{identity_hash(identity)[:16]}.json"
    with contextlib.suppress(StorageError, LookupError, TypeError, ValueError):  # else it is written again
        kept = read_json(path)
        bits = [float(bits) for bits in kept["bits"]]
        if len(bits) == len(text.held_out) and all(map(math.isfinite, bits)) and kept["identity"] == identity:
            used(path)
            return bits
    bits = evaluation.bits_of(target, _held_out(target, text))
    try:
        write_json(path, {"identity": identity, "bits": bits}, indent=None)
    except StorageError as error:
        raise ConfigError(
            f"recipe: store {root} cannot be written ({reason(error)}); give another with store:"
        ) from error
    return bits


def _publish(folder: Path, out: Path, result: Mapping[str, Any]) -> None:
    """Move the finished model to its place, its result last, and remove what an interrupted build would need."""
    make_folder(out)
    for path in sorted((folder / "model").iterdir()):
        move_file(path, out / path.name)
    write_json(out / RESULT, result, indent=1)
    remove_folder(folder)
