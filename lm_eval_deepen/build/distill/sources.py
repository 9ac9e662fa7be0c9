"""The sources of a build: their stored distributions, their vocabularies, and what they say of the target's tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from lm_eval_deepen.build.distill.alignment import by_bytes, by_dtw
from lm_eval_deepen.build.distill.corpus import Tokens, text_digest
from lm_eval_deepen.build.distill.fusing import Targets, fuse, mass_by_kind, project, shares
from lm_eval_deepen.build.distill.recipe import DistillRecipe
from lm_eval_deepen.build.distill.store import DistributionStore
from lm_eval_deepen.build.distill.teacher_logits import store_teacher_logits
from lm_eval_deepen.build.distill.token_alignment import VocabularyMap, match
from lm_eval_deepen.errors import ConfigError
from lm_eval_deepen.harness.distributed import Ranks
from lm_eval_deepen.member import Member, TextCodec

ROLES = ("bos", "unk", "pad", "sep", "cls", "mask")


@dataclass(frozen=True, eq=False)
class Source:
    """A source after its forward passes."""

    name: str  # its name in the recipe
    weights: str  # hash of its weights
    codec: TextCodec  # its tokenizer
    roles: Mapping[str, int]  # its control ids by role
    tokens: Sequence[Tokens]  # the blocks as it reads them
    store: DistributionStore  # its distributions on them


def roles_of(tokenizer: Any) -> dict[str, int]:
    """Return the control ids of a tokenizer by role; end of text is known to its vocabulary."""
    ids = {role: getattr(tokenizer, f"{role}_token_id", None) for role in ROLES}
    return {role: i for role, i in ids.items() if i is not None}


def read_source(member: Member, weights: str, texts: Sequence[str], top_k: int, root: Path, ranks: Ranks) -> Source:
    """Return a source with its distributions on some blocks; all processes compute a share of what the store lacks.

    Of a block that is longer than the source's context, in its own tokens, it reads the beginning.
    """
    whole = [Tokens.of(member.codec, text) for text in texts]
    tokens = [block.within(member.max_length) for block in whole]
    identity = {
        "weights": weights, "vocabulary": member.codec.vocab.fingerprint, "top_k": top_k,
        "text": text_digest(texts), "prefix": list(member.codec.prefix_ids),
        **({"longest": member.max_length} if tokens != whole else {}),
    }  # fmt: skip
    store = DistributionStore(root, member.name, identity, len(tokens))
    store_teacher_logits(member, tokens, top_k, store, ranks.index, ranks.count)
    ranks.gather(None)  # all of them are there
    return Source(member.name, weights, member.codec, roles_of(member.lm.tokenizer), tokens, store)


def vocabulary_map(source: Source, codec: TextCodec, target_roles: Mapping[str, int]) -> VocabularyMap:
    """Match a source's vocabulary to the target's, for the ids that occur in its distributions or its text."""
    occurring = {*source.store.occurring(), *(token for block in source.tokens for token in block.ids)}
    return match(source.codec.vocab, codec.vocab, occurring, source.roles, target_roles)


def align(
    target: Tokens, source: Tokens, pieces: Sequence[bytes], own_pieces: Sequence[bytes], mapping: VocabularyMap,
    how: str,
) -> NDArray[np.int64]:  # fmt: skip
    """Return the source's position for every position of the target in a block, -1 for none [T]."""
    if how == "bytes":
        return by_bytes(target.ends, source.ends)
    # Compared as bytes: the tokenizer may have used another id of the same piece than the map leads to.
    meant = [pieces[i] if i >= 0 else None for i in mapping.target[list(source.ids)].tolist()]
    read = [pieces[i] for i in target.ids]
    equal = [[bool(piece) and piece == other for other in meant] for piece in read]
    return by_dtw(read, [own_pieces[i] for i in source.ids], equal)


@dataclass(frozen=True, eq=False)
class Learnt:
    """What the target learns from its sources, and how it came about."""

    targets: list[Targets]  # per block
    chosen: list[int]  # index of the source that counts most, per block
    aligned: list[int]  # per source, positions that have a distribution of it
    mass: list[dict[str, float]]  # per source, probability by how its ids were matched

    @property
    def covered(self) -> float:
        """Share of the target's positions that have something to learn."""
        return sum(int(t.covered.sum()) for t in self.targets) / sum(len(t.covered) for t in self.targets)


def block_targets(
    sources: Sequence[Source], blocks: Sequence[Tokens], codec: TextCodec, roles: Mapping[str, int],
    recipe: DistillRecipe,
) -> Learnt:  # fmt: skip
    """Align, match and fuse the sources' distributions on every block.

    Raises:
        ConfigError: no position is covered.
    """
    maps = [vocabulary_map(source, codec, roles) for source in sources]
    targets, chosen, aligned = [], [], [0] * len(sources)
    mass: list[dict[str, float]] = [{} for _ in sources]
    for n, block in enumerate(tqdm(blocks, desc="align", unit="block")):
        parts, nats = [], []
        for m, (source, mapping) in enumerate(zip(sources, maps, strict=True)):
            pieces = codec.vocab.pieces, source.codec.vocab.pieces
            at = align(block, source.tokens[n], *pieces, mapping, recipe.alignment)
            rows = source.store.block(n)
            parts.append(project(rows, at, mapping))
            # of a block that it read in part, as many nats per byte in the rest
            nats.append(rows.nats * (block.num_bytes(pieces[0]) / source.tokens[n].num_bytes(pieces[1])))
            aligned[m] += int(parts[-1].covered.sum())
            for what, value in mass_by_kind(rows, at, mapping).items():
                mass[m][what] = mass[m].get(what, 0.0) + value
        weights = shares(nats, len(block.ids), recipe.fusion)
        chosen.append(int(np.argmax(weights)))
        targets.append(fuse(parts, weights, recipe.tail))
    if not any(target.covered.any() for target in targets):
        raise ConfigError("recipe: no position of the target matches one of a source; use alignment: bytes")
    return Learnt(targets, chosen, aligned, mass)


def source_facts(sources: Sequence[Source], learnt: Learnt, blocks: Sequence[Tokens]) -> dict[str, Any]:
    """Return what a build reports of every source, and of what was learnt from all of them."""
    positions = sum(len(block.ids) for block in blocks)
    facts: dict[str, Any] = {}
    for m, source in enumerate(sources):
        rows = [source.store.block(n) for n in range(len(blocks))]
        own = sum(len(block.ids) for block in source.tokens)
        num_bytes = sum(block.num_bytes(source.codec.vocab.pieces) for block in source.tokens)
        total = sum(learnt.mass[m].values()) or 1.0
        facts[source.name] = {
            "tensors_sha256": source.weights,
            "bits_per_byte": sum(block.nats for block in rows) / math.log(2) / num_bytes,
            "coverage": learnt.aligned[m] / positions,
            "blocks_chosen": learnt.chosen.count(m),
            "mass": {what: round(value / total, 6) for what, value in learnt.mass[m].items()},
            "stored_bytes_per_token": sum(block.num_bytes for block in rows) / own,
        }
    return facts
