"""The sources of a build: their stored distributions, their vocabularies, and what they say of the target's tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
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
from lm_eval_deepen.build.distill.store import GROUP, DistributionStore
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


def align(
    target: Tokens, source: Tokens, pieces: Sequence[bytes], own_pieces: Sequence[bytes], mapping: VocabularyMap,
    how: str,
) -> NDArray[np.int64]:  # fmt: skip
    """Return the source's position for every position of the target in a block, -1 for none [T]."""
    if how == "bytes":
        return by_bytes(target.ends, source.ends)
    # Compared as bytes: the tokenizer may have used another id of the same piece than the map leads to.
    meant = [pieces[i] if i >= 0 else None for i in mapping.target[list(source.ids)].tolist()]
    return by_dtw([pieces[i] for i in target.ids], [own_pieces[i] for i in source.ids], meant)


@dataclass(frozen=True, eq=False)
class AlignedBlock:
    """Where the sources stand at the T positions of a block of the target, and what they have there."""

    places: list[NDArray[np.int32]]  # per source, its position for every position of the target, -1 for none [T]
    weights: list[float]  # per source, how much it counts
    aligned: list[int]  # per source, positions that have a distribution of it
    mass: list[dict[str, float]]  # per source, probability by how its ids were matched
    covered: int  # positions that have something to learn


@dataclass(frozen=True, eq=False)
class Learnt:
    """What the target learns from its sources, and how it came about.

    Distributions stay on the disk, and are fused when they are asked for: those of a large text fit into no memory.
    """

    stores: list[DistributionStore]  # per source, its distributions
    maps: list[VocabularyMap]  # per source, where its ids go
    blocks: list[AlignedBlock]  # the blocks that are trained on
    tail: str  # what becomes of the mass without an entry

    def of(self, used: Sequence[int]) -> Callable[[int], Targets]:
        """Return what gives a block's targets by its index; `used` are the indices of `blocks`."""
        number = {index: n for n, index in enumerate(used)}
        return lambda index: self.targets(number[index])

    def targets(self, n: int) -> Targets:
        """Return what the target learns at the positions of the n-th of the blocks."""
        block = self.blocks[n]
        rows = (store.block(n) for store in self.stores)
        places = (at.astype(np.int64) for at in block.places)
        parts = [project(own, at, mapping) for own, at, mapping in zip(rows, places, self.maps, strict=True)]
        return fuse(parts, block.weights, self.tail)

    @property
    def covered(self) -> float:
        """Share of the target's positions that have something to learn."""
        return sum(block.covered for block in self.blocks) / sum(len(block.places[0]) for block in self.blocks)


def learn(
    sources: Sequence[Source], blocks: Sequence[Tokens], codec: TextCodec, roles: Mapping[str, int],
    recipe: DistillRecipe, ranks: Ranks,
) -> Learnt:  # fmt: skip
    """Align the sources' distributions with every block, and match their vocabularies; processes share the blocks.

    Raises:
        ConfigError: no position is covered.
    """
    maps = []
    for source in sources:
        occurring = {*source.store.occurring(), *(token for block in source.tokens for token in block.ids)}
        maps.append(match(source.codec.vocab, codec.vocab, occurring, source.roles, roles))
    own = [n for n in range(len(blocks)) if n // GROUP % ranks.count == ranks.index]
    aligned: dict[int, AlignedBlock] = {}
    for n in tqdm(own, desc="align", unit="block", disable=ranks.index > 0):
        pieces, rows = codec.vocab.pieces, [source.store.block(n) for source in sources]
        places = [
            align(blocks[n], source.tokens[n], pieces, source.codec.vocab.pieces, mapping, recipe.alignment)
            for source, mapping in zip(sources, maps, strict=True)
        ]
        each = list(zip(rows, places, maps, strict=True))
        parts = [project(*one) for one in each]
        # of a block that it read in part, as many nats per byte in the rest
        read = [source.tokens[n].num_bytes(source.codec.vocab.pieces) for source in sources]
        nats = [one.nats * (blocks[n].num_bytes(pieces) / size) for one, size in zip(rows, read, strict=True)]
        weights = shares(nats, len(blocks[n].ids), recipe.fusion)
        aligned[n] = AlignedBlock(
            places=[at.astype(np.int32) for at in places],
            weights=weights,
            aligned=[int(part.covered.sum()) for part in parts],
            mass=[mass_by_kind(*one) for one in each],
            covered=int(fuse(parts, weights, recipe.tail).covered.sum()),
        )
    for others in ranks.gather(aligned):
        aligned |= others
    learnt = Learnt([source.store for source in sources], maps, [aligned[n] for n in range(len(blocks))], recipe.tail)
    if not any(block.covered for block in learnt.blocks):
        raise ConfigError("recipe: no position of the target matches one of a source; use alignment: bytes")
    return learnt


def source_facts(sources: Sequence[Source], learnt: Learnt, blocks: Sequence[Tokens]) -> dict[str, Any]:
    """Return what a build reports of every source, and of what was learnt from all of them."""
    positions = sum(len(block.ids) for block in blocks)
    chosen = [int(np.argmax(block.weights)) for block in learnt.blocks]  # the source that counts most
    facts: dict[str, Any] = {}
    for m, source in enumerate(sources):
        rows = [source.store.block(n) for n in range(len(blocks))]
        own = sum(len(block.ids) for block in source.tokens)
        num_bytes = sum(block.num_bytes(source.codec.vocab.pieces) for block in source.tokens)
        mass: dict[str, float] = {}
        for what, value in (pair for block in learnt.blocks for pair in block.mass[m].items()):
            mass[what] = mass.get(what, 0.0) + value
        total = sum(mass.values()) or 1.0
        facts[source.name] = {
            "tensors_sha256": source.weights,
            "bits_per_byte": sum(block.nats for block in rows) / math.log(2) / num_bytes,
            "coverage": sum(block.aligned[m] for block in learnt.blocks) / positions,
            "blocks_chosen": chosen.count(m),
            "mass": {what: round(value / total, 6) for what, value in mass.items()},
            "stored_bytes_per_token": sum(block.num_bytes for block in rows) / own,
        }
    return facts
