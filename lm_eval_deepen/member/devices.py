"""Devices that members load on: those of this machine. A device that it lacks is never replaced by another."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from lm_eval_deepen.config import MemberConfig
from lm_eval_deepen.errors import ConfigError, MemberError

ACCELERATORS = ("cuda", "xpu", "npu", "hpu")  # what ``HFLM`` places models on, by number


def give_back_freed_memory() -> None:
    """Give the system back what was freed, where the C library is glibc, which keeps much of it."""
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def existing_devices() -> tuple[str, ...]:
    """Return every device of this machine that a member can be loaded on, as ``HFLM`` spells it."""
    devices = ["cpu"]
    for kind in ACCELERATORS:
        module = getattr(torch, kind, None)  # `torch.npu` and `torch.hpu` come with plugins
        devices += [f"{kind}:{index}" for index in range(module.device_count() if module else 0)]
    return (*devices, "mps:0") if torch.backends.mps.is_available() else tuple(devices)


def default_device() -> str:
    """Return the first GPU where there is one, else the CPU."""
    return "cuda:0" if torch.cuda.is_available() else "cpu"


def parse_device(asked: Any, where: str) -> torch.device:
    """Return the device that an argument such as ``cuda:1`` names, whether it exists or not.

    Raises ConfigError, which begins with `where`, for what is not the name of a device.
    """
    try:
        if isinstance(asked, (str, torch.device)):
            return torch.device(asked)
        reason = f"a {type(asked).__name__} is not a device's name"
    except RuntimeError as error:
        reason = str(error).splitlines()[0].rstrip(".")
    raise ConfigError(f"{where} device={asked!r} is not a device: {reason}. {_advice()}")


def place(asked: Any, where: str) -> str:
    """Return the device to load on as ``HFLM`` spells it, which takes any other spelling for no device at all.

    None stands for the first GPU, or the CPU where there is none. Raises ConfigError, which begins with `where`, for a
    device that this machine lacks.
    """
    if asked is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    device, existing = parse_device(asked, where), existing_devices()
    name = "cpu" if device.type == "cpu" and not device.index else str(device)
    if name in existing:
        return name
    if device.index is None and f"{name}:0" in existing:
        return name if name == "cuda" else f"{name}:0"
    raise ConfigError(f"{where} device={str(asked)!r} does not exist on this machine. {_advice()}")


def _advice() -> str:
    return (
        f"Give one of {', '.join(existing_devices())}, or leave device out: members then load on the first GPU where "
        "there is one, else on the CPU."
    )


def slices(members: Sequence[MemberConfig]) -> int:
    """Return how many processes hold slices of the same members: 1 where none of them has a ``tp_plan``.

    Raises:
        ConfigError: members that are divided over different numbers, or a launch that is no multiple of the number.
    """
    launched = int(os.environ.get("WORLD_SIZE", 1))
    loading = {member.name: member.loading_dict() for member in members}
    sizes = {name: keys.get("tp_size") or launched for name, keys in loading.items() if keys.get("tp_plan")}
    if len({*sizes.values()}) > 1:
        raise ConfigError(
            f"tp_size differs between members: {', '.join(f'{name} {size}' for name, size in sizes.items())}. The "
            "processes of a group hold slices of the same members; give one tp_size beside members"
        )
    size = max(sizes.values(), default=1)
    if launched % size:
        raise ConfigError(
            f"tp_size={size} divides a member over {size} processes, and this launch has {launched}, which is no "
            f"multiple of it. Start a multiple of {size}, as with torchrun --nproc-per-node {size}, or give another "
            "tp_size"
        )
    return size


def working_device(module: nn.Module) -> torch.device:
    """Return where a module computes: where its weights are, or are brought to if they were offloaded."""
    device = next(module.parameters()).device
    hook = getattr(module, "_hf_hook", None)  # of `accelerate`, which offloads
    return torch.device(hook.execution_device) if device.type == "meta" and hook is not None else device


def weight_of(module: Any) -> Tensor:
    """Return the ``weight`` of an embedding or of a linear layer, with what an adapter adds to it.

    It is fetched from where it was offloaded to. Raises MemberError where it is divided over processes.
    """
    # A DTensor, whose place moves between versions of torch. Gathering it needs all processes at once, which build
    # matrices in turn.
    if hasattr(module.weight, "full_tensor"):
        raise MemberError(
            "a method that reads embeddings needs them whole, and tp_plan divides them over processes. Use a method "
            "that reads none, such as deepen with rows from bytes (canonical or prefix), or leave tp_plan out"
        )
    if hasattr(module, "base_layer"):  # of PEFT, whose weight is the one below the adapter
        rows, width = module.weight.shape
        with torch.no_grad():
            device = working_device(module.base_layer)
            if isinstance(module.base_layer, nn.Embedding):
                return module(torch.arange(rows, device=device))
            inputs = torch.eye(width + 1, width, dtype=module.weight.dtype, device=device)
            outputs = module(inputs)  # [width + 1, rows], the last one the bias alone
            return (outputs[:width] - outputs[width]).T.contiguous()
    if module.weight.device.type != "meta":
        return module.weight.detach()
    with align_module_device(module):
        return module.weight.detach().clone()
