"""Each member's loss on a prompt, for weights that depend on prompts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lm_eval_deepen.engine.evidence import Read
from lm_eval_deepen.member import Member, Prompt
from lm_eval_deepen.member.tree import TokenTree
from lm_eval_deepen.weighting.base import PromptLoss

LOGITS_PER_CHUNK = 40_000_000  # computed at once, over all members: 128 rows of the demo pair, which fill its heads
ROWS = 16  # of log-probabilities at once


Place = tuple[int, int]  # a node of a tree, and a token after it


def numbered(nodes: Iterable[int | None]) -> dict[int, int]:
    """Return the place of every node among the distinct ones, in their order."""
    return {node: n for n, node in enumerate(dict.fromkeys(node for node in nodes if node is not None))}


def places_of(
    tree: TokenTree, prompts: Sequence[Prompt], wanted: Sequence[Sequence[Read] | None]
) -> list[list[Place] | None]:
    """Return the places of one member's tokens that are evidence, which are added to its tree."""
    places: list[list[Place] | None] = []
    for prompt, reads in zip(prompts, wanted, strict=True):
        length = reads[-1].before if reads else 0
        way = tree.last(tree.add(prompt.ids[:length]), length)[1] if length else []
        places.append(None if reads is None else [(way[read.before - 1], read.token) for read in reads])
    return places


def prompt_losses(
    member: Member,
    wanted: Sequence[Sequence[Place] | None],
    states: Tensor,
    at: Mapping[int, int],
    step: int,
    powers: Sequence[float] = (1.0,),
) -> list[PromptLoss | None]:
    """Return one member's loss on each prompt, computing `step` rows of logits at once.

    `wanted` are the places of its tokens of every prompt that are evidence, None where it cannot take in the prompt.
    The states [n, ...] are those of some nodes, each at its place of `at`. Of the powers of its distributions, 1 comes
    first.
    """
    targets: dict[int, dict[int, tuple[float, ...]]] = {}
    for node, token in (place for places in wanted for place in places or ()):
        targets.setdefault(node, {})[token] = ()
    nodes = list(targets)
    for start in range(0, len(nodes), step):
        chunk = nodes[start : start + step]
        logits = member.logits(states[[at[node] for node in chunk]])
        # a few rows at a time: the log-probabilities of all would take as much memory as the logits again
        for first in range(0, len(logits), ROWS):
            here = logits[first : first + ROWS]
            rows = torch.stack([torch.log_softmax(power * here, dim=-1) for power in powers], dim=-1)  # [b, V, P]
            for row, node in zip(rows, chunk[first:], strict=False):
                tokens = list(targets[node])
                values = row[torch.tensor(tokens, device=row.device)].tolist()
                targets[node].update(zip(tokens, map(tuple, values), strict=True))
    pieces = member.codec.vocab.pieces
    return [
        None
        if places is None
        else PromptLoss(
            nats=-sum(targets[node][token][0] for node, token in places),
            tokens=len(places),
            num_bytes=sum(len(pieces[token]) for _, token in places),
            each=tuple((targets[node][token][0], len(pieces[token])) for node, token in places),
            at_powers=tuple(targets[node][token] for node, token in places),
            embedding=states[[at[node] for node, _ in places]].float().mean(0).flatten().cpu() if places else None,
        )
        for places in wanted
    ]
