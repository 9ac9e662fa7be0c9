"""Forward passes of a source over blocks: its largest probabilities at every position, and what it needs to predict."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from lm_eval_deepen.build.distill.corpus import Tokens
from lm_eval_deepen.build.distill.store import BlockRows, DistributionStore
from lm_eval_deepen.errors import ConfigError
from lm_eval_deepen.member import Member
from lm_eval_deepen.relative.topk import largest

LOGITS_PER_CHUNK = 24_000_000


def check_length(member: Member, blocks: Sequence[Tokens]) -> None:
    """Raise ConfigError where a block does not fit into a model's context."""
    longest = max(len(block.prefix) + len(block.ids) for block in blocks)
    if longest > member.max_length:
        raise ConfigError(
            f"recipe: a block has {longest} tokens under {member.name!r}, whose context has {member.max_length}; "
            "lower context_length"
        )


def store_teacher_logits(
    member: Member, blocks: Sequence[Tokens], top_k: int, store: DistributionStore, index: int = 0, count: int = 1
) -> None:
    """Write what is missing of a source's distributions, the `top_k` largest entries of each; other groups are kept.

    Of `count` processes, the one with this index writes every `count`-th group, whatever others have written already.

    Raises:
        ConfigError: `top_k` beyond the vocabulary, or a block beyond the context.
    """
    if top_k > member.vocab_size:
        raise ConfigError(f"recipe: top_k {top_k} is above the {member.vocab_size} logits of {member.name!r}; lower it")
    check_length(member, blocks)
    missing = [group for group in store.missing() if store.number(group) % count == index]
    total = sum(map(len, missing))
    with tqdm(
        total=total, desc=f"teacher logits of {member.name}", unit="block", disable=not total or index > 0
    ) as bar:
        for group in missing:
            rows = []
            for index in group:
                rows.append(block_rows(member, blocks[index], top_k))
                bar.update()
            store.write(group, rows)


def block_rows(member: Member, block: Tokens, top_k: int) -> BlockRows:
    """Return a source's distributions at every position of a block."""
    ids, logp, nats = [], [], 0.0
    for rows, targets in _distributions(member, block):
        values, places = largest(rows, top_k)
        order = values.argsort(dim=1, descending=True, stable=True)
        ids.append(places.gather(1, order).to(torch.int32).cpu())
        logp.append(values.gather(1, order).half().cpu())
        nats -= float(rows.gather(1, targets[:, None]).double().sum())
    return BlockRows(torch.cat(ids).numpy(), torch.cat(logp).numpy(), nats)


def nats_of(member: Member, block: Tokens) -> float:
    """Return what a model needs to predict a block, in nats; control tokens are conditioned on, never scored."""
    sums = (rows.gather(1, targets[:, None]).double().sum() for rows, targets in _distributions(member, block))
    return -float(sum(map(float, sums)))


def _distributions(member: Member, block: Tokens) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield log-probabilities [n, V] at the positions of a block, in chunks, and the tokens there [n]."""
    path = (*block.prefix, *block.ids)
    start = len(block.prefix)
    states = member.states_at([path[: start + i] for i in range(len(block.ids))])
    targets = torch.tensor(block.ids, device=states.device)
    step = max(1, LOGITS_PER_CHUNK // member.vocab_size)
    for at in range(0, len(targets), step):
        yield member.logp(states[at : at + step]), targets[at : at + step].to(states.device)
