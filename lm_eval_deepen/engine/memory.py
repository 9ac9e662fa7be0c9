"""The memory of a batch: formulas for ``batch_size: auto`` and for the packing of scoring."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch

from lm_eval_deepen.engine.base import EnsembleBase
from lm_eval_deepen.engine.drafts import LONGEST
from lm_eval_deepen.member import Member
from lm_eval_deepen.member.attention import SLACK
from lm_eval_deepen.member.runner import NODES_PER_FORWARD, TreeRunner
from lm_eval_deepen.member.state_runner import OLD_STATES, StateRunner

SHARE = 0.5  # of the free memory; the rest is left to forward passes and to other processes
ROOM = 1.5  # columns grow by a quarter, and a layer is copied when they do
FUSION_COPIES = 6  # fp32 copies of a row's logits that fusion holds at once
NODES_ON_ACCELERATOR = 8_192
CGROUPS, OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_VERSION_2 = ("memory.max", "memory.current", "inactive_file")  # limit and use, and the entry of `memory.stat`
_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def kv_bytes(member: Member, tokens: int = 1) -> int:
    """Return the bytes that one member keeps of a text: keys and values, states.

    A member that keeps nothing, as it forwards whole texts, counts by `kv_bytes_by`.
    """
    runner = getattr(member.runner, "carrier", member.runner)
    if isinstance(runner, (TreeRunner, StateRunner)):
        return runner.held.num_bytes(tokens)
    config = member.lm.model.config.get_text_config()

    def get(key: str, default: Any = None) -> Any:
        with suppress(Exception):  # a value of which every layer has its own
            return getattr(config, key, default)
        return default

    return kv_bytes_by(get, member.lm.model.dtype.itemsize, tokens)


def kv_bytes_by(get: Callable[..., Any], itemsize: int, tokens: int = 1) -> int:
    """Return the bytes of keys and values of a text by a configuration: two vectors a layer, key-value head and token.

    It is an estimate, for models that nobody can build from their configuration, of which `get` returns a value or a
    default. Layers that are named as those with a sliding window keep its tokens and a few more.
    """
    heads = get("num_attention_heads", 1)
    width = get("head_dim") or get("kv_channels") or get("hidden_size", 0) // heads
    window, layers = get("sliding_window"), get("num_hidden_layers", 0)
    windowed = (get("layer_types") or []).count("sliding_attention") if window else 0
    kept = (layers - windowed) * tokens + windowed * min(tokens, (window or 0) + SLACK)
    return 2 * (get("num_key_value_heads") or heads) * width * itemsize * kept


def fusion_bytes(vocabulary: int, batch: int) -> int:
    """Return the bytes that fusing a step of a batch takes for a member with so many logits."""
    return 4 * FUSION_COPIES * batch * vocabulary


def free_bytes(device: torch.device) -> int:
    """Return the memory that a device has free; on a CPU at most what the limits of a container leave."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min([psutil.virtual_memory().available, *_left_by_limits()])


def _left_by_limits() -> Iterator[int]:
    """Yield what every limit on this process's control group, and on those around it, leaves: cgroups v2 and v1.

    Cached files that were not read lately count as free. In a container the own group may be the root of those that
    it sees, whatever its path.
    """
    try:
        lines = OWN_CGROUP.read_text().splitlines()
    except OSError:  # another system than Linux
        return
    for number, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        version_2 = number == "0" and not controllers
        if not version_2 and "memory" not in controllers.split(","):
            continue
        root, names = (CGROUPS, _VERSION_2) if version_2 else (CGROUPS / "memory", _VERSION_1)
        group = root / path.lstrip("/")
        for folder in [group, *group.parents]:
            with suppress(OSError, ValueError):  # no such group here, or one without a limit
                limit, used = (int((folder / name).read_text()) for name in names[:2])
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                yield max(0, limit - used + int(stat.get(names[2], 0)))
            if folder == root:
                break


def row_bytes(ensemble: EnsembleBase, longest: int) -> dict[torch.device, int]:
    """Return the bytes per device that one text of at most `longest` tokens takes up while it is decoded.

    A row with a state has the last one, and where its tokens may be cut anew that after the prompt and a few older
    ones; a pass joins the last ones of all rows to a batch.
    """
    needed: Counter[torch.device] = Counter()
    drafted = 1 if ensemble.config.speculate == "off" else 1 + LONGEST
    for m, member in enumerate(ensemble.active):
        device, runner = member.runner.device, getattr(member.runner, "carrier", member.runner)
        if isinstance(runner, StateRunner):
            goes_on = m in ensemble.siblings and ensemble.config.speculate == "off"
            needed[device] += runner.held.num_bytes(longest) * (2 if goes_on else OLD_STATES + 3)
        else:
            needed[device] += int(ROOM * kv_bytes(member, longest))
        needed[device] += 4 * member.vocab_size * drafted
        needed[ensemble.device] += fusion_bytes(member.vocab_size, drafted)
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
