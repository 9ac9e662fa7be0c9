"""A device of its own on a machine that has a CPU alone: `npu:0`, as HFLM names an accelerator.

Its tensors hold CPU tensors and compute with them. As on a GPU, an operation on tensors of two devices fails. Only
copies, and indices from the CPU, are allowed. So a tensor that the code forgets to move shows without a GPU.
Registering it holds for the whole process, so tests use it in one of their own.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map

NAME = "npu"
aten = torch.ops.aten
COPIES = {aten.copy_.default, aten._to_copy.default}
MADE = ["arange", "arange.start", "arange.start_step", "linspace", "eye", "eye.m", "randperm", "randperm.generator"]
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}


class Placed(torch.Tensor):
    """A tensor of the device; `held` is the CPU tensor."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> Placed:
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        with torch.inference_mode(False):  # torch refuses views of such tensors that were made in that mode
            return torch.Tensor._make_wrapper_subclass(cls, held.shape, device=f"{NAME}:0", **layout)

    def __init__(self, held: torch.Tensor) -> None:
        self.held = held

    def __repr__(self) -> str:
        return f"Placed({self.held})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.tolist:  # torch has none for a class of one's own
            return args[0].held.tolist()
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._can_decompose() and (made := func.decompose(*args, **kwargs)) is not NotImplemented:
            return made
        if func is aten._has_compatible_shallow_copy_type.default:
            return False
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        judged = [args[0], *args[2:3]] if func.overloadpacket in INDEXING else tensors
        alien = [x for x in judged if isinstance(x, torch.Tensor) and not isinstance(x, Placed) and x.dim()]
        if alien and func not in COPIES:
            found = ", ".join(f"{list(x.shape)} on {x.device}" for x in tensors)
            raise RuntimeError(f"Expected all tensors to be on the same device: {func}, {found}")
        target = kwargs.get("device")
        stays = target is None or torch.device(target).type == NAME
        if target is not None and stays:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        plain, named = tree_map(held, (args, kwargs))
        out = func(*plain, **named)
        if func is aten.copy_.default:
            return args[0]
        for x in tensors:
            assert not isinstance(x, Placed) or x.shape == x.held.shape, f"{func} has changed a shape"
        known = {id(x.held): x for x in tensors if isinstance(x, Placed)}

        def wrapped(x: Any) -> Any:
            if not isinstance(x, torch.Tensor):
                return x
            return known[id(x)] if id(x) in known else Placed(x)

        return tree_map(wrapped, out) if stays else out


def held(x: Any) -> Any:
    return x.held if isinstance(x, Placed) else x


def made(name: str, *args: Any, device: Any = None, **named: Any) -> Placed:
    """Make a tensor by an operation that torch would start from an empty tensor that grows, which `Placed` cannot."""
    packet, _, overload = name.partition(".")
    return Placed(getattr(getattr(aten, packet), overload or "default")(*args, device="cpu", **named))


def register() -> torch.library.Library:
    """Register the device; it lasts as long as what is returned."""
    backend_registration._setup_privateuseone_for_python_backend(NAME)
    kernels = torch.library.Library("aten", "IMPL")

    def empty(size: Any, dtype: Any = None, layout: Any = None, device: Any = None, *others: Any, **named: Any) -> Any:
        return Placed(torch.empty(size, dtype=dtype))

    def empty_strided(size: Any, stride: Any, dtype: Any = None, *others: Any, **named: Any) -> Any:
        return Placed(torch.empty_strided(size, stride, dtype=dtype))

    def copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        held(target).copy_(held(source))
        return target

    for name, kernel in {
        "empty.memory_format": empty,
        "empty_strided": empty_strided,
        "_copy_from": copy_from,
        **{name: partial(made, name) for name in MADE},
    }.items():
        kernels.impl(name, kernel, "PrivateUse1")
    return kernels
