"""The memory of a batch: formulas for ``batch_size: auto`` and for the packing of scoring."""

from __future__ import annotations

from collections import Counter

import psutil
import torch

from lm_eval_deepen.engine.base import EnsembleBase
from lm_eval_deepen.engine.drafts import LONGEST
from lm_eval_deepen.member import Member
from lm_eval_deepen.member.runner import NODES_PER_FORWARD

SHARE = 0.5  # of the free memory; the rest is left to forward passes and to other processes
ROOM = 1.5  # columns grow by a quarter, and a layer is copied when they do
FUSION_COPIES = 6  # fp32 copies of a row's logits that fusion holds at once
NODES_ON_ACCELERATOR = 8_192


def kv_bytes(member: Member) -> int:
    """Return the bytes of keys and values that one token takes up in one member."""
    config = member.lm.model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", 1)
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return 2 * config.num_hidden_layers * kv_heads * width * member.lm.model.dtype.itemsize


def free_bytes(device: torch.device) -> int:
    """Return the memory that a device has free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def row_bytes(ensemble: EnsembleBase, longest: int) -> dict[torch.device, int]:
    """Return the bytes per device that one text of at most `longest` tokens takes up while it is decoded."""
    needed: Counter[torch.device] = Counter()
    drafted = 1 if ensemble.config.speculate == "off" else 1 + LONGEST
    for member in ensemble.active:
        device = member.runner.device
        needed[device] += int(ROOM * kv_bytes(member) * longest)
        needed[device] += 4 * member.vocab_size * drafted
        needed[ensemble.device] += 4 * FUSION_COPIES * member.vocab_size * drafted
    return dict(needed)


def safe_batch(ensemble: EnsembleBase, longest: int, limit: int) -> int:
    """Return how many texts of at most `longest` tokens fit into the free memory of every device (1 to `limit`)."""
    sizes = [int(SHARE * free_bytes(device) // size) for device, size in row_bytes(ensemble, longest).items()]
    return max(1, min(limit, *sizes))


def nodes_per_forward(ensemble: EnsembleBase, tokens: int) -> int:
    """Return how many tokens to forward at once in scoring, where a batch was said to have `tokens`.

    Tokens of different texts in one forward pass pay attention over all of them: on a CPU this outweighs what
    a longer pass saves, an accelerator is only busy with long ones.
    """
    if any(member.runner.device.type == "cpu" for member in ensemble.active):
        return NODES_PER_FORWARD
    return max(NODES_PER_FORWARD, min(tokens, NODES_ON_ACCELERATOR))
