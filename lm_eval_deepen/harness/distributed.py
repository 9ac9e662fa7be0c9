"""Data-parallel runs: the processes of one launch answer the same requests together.

The harness can shard documents itself, by a model's `rank` and `world_size`. It then draws other random
few-shot examples than one process does (its samplers advance with every document they build), forwards
padding requests, and fails where a rank has no document. So every process is rank 0 of 1 to the harness
and builds all requests, and the work is shared here, inside the request methods, which `LM` provides for.
The harness tells such processes apart by ``LOCAL_RANK``: cache files, and who returns and saves results.

Processes may also hold slices of the same members (``tp_plan``) and answer every request together. Then groups of
such processes share the requests. A group is a launch of its own to torch, transformers and the harness's ``HFLM``,
none of which knows of the others: groups talk through the store by which torch's processes find each other.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import importlib
import logging
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState

from lm_eval_deepen.config import EnsembleConfig
from lm_eval_deepen.errors import ConfigError, RequestError
from lm_eval_deepen.member.devices import parse_device, slices

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

log = logging.getLogger(__name__)

PATIENCE = timedelta(weeks=52)  # as the harness: processes wait for each other as long as their shares take
PART = 4 << 20  # bytes: torch's store takes no value of more than 8 MiB

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process in a launch, whose groups share a run's requests."""

    index: int = 0  # number of this process's group
    count: int = 1  # how many groups share the requests
    # how many processes a group has, each with a slice of the same members: they answer requests together
    slices: int = 1
    slice: int = 0  # number of this process among them

    @property
    def speaks(self) -> bool:
        """Whether this process shows progress and writes what all of them know."""
        return self.process == 0

    @property
    def process(self) -> int:
        """Number of this process in the launch."""
        return self.index * self.slices + self.slice

    @classmethod
    def join(cls, config: EnsembleConfig) -> Ranks:
        """Join the processes that ``accelerate launch`` or ``torchrun`` started: gloo on CPU, nccl on GPU.

        Call it before members load, which then find the process group and their device.

        Raises:
            ConfigError: a member names one device for all processes, or cannot be divided over those that there are.
        """
        if any(member.loading_dict().get("tp_plan") for member in config.members):
            return cls.divided(slices(config.members))
        ranks = cls.launched()
        if ranks.count > 1:
            refuse_fixed_devices(config, PartialState())
        return ranks

    @classmethod
    def divided(cls, slices: int) -> Ranks:
        """Join the processes that hold slices of the same members; where they are all, transformers joins them.

        Raises:
            ConfigError: this process is among others already.
        """
        launched, process = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        _leave_at_the_end()
        if slices < launched:
            _store(slices)
        if dist.is_initialized() and dist.get_world_size() != slices:
            raise ConfigError(
                f"a model that was loaded before has put the processes of this launch into groups of "
                f"{dist.get_world_size()}, and this model needs groups of {slices}. Load it in a launch of its own"
            )
        return cls(process // slices, launched // slices, slices, process % slices)

    @classmethod
    def of_launch(cls) -> Ranks:
        """As `launched`, and a process that was started alone joins nothing."""
        return cls.launched() if int(os.environ.get("WORLD_SIZE", 1)) > 1 else cls()

    @classmethod
    def launched(cls) -> Ranks:
        """Join the processes of this launch; one that was started alone is 0 of 1."""
        accelerator = getattr(torch, "accelerator", torch.cuda)
        on_cpu = False
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            _leave_at_the_end()
            on_cpu = not accelerator.is_available()
        if on_cpu and "RANK" in os.environ:  # without it `accelerate` gives every process LOCAL_RANK 0
            size = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
            os.environ.setdefault("LOCAL_RANK", str(int(os.environ["RANK"]) % size))
        on_cpu = on_cpu or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "on")
        state = PartialState(cpu=on_cpu, timeout=PATIENCE)
        alone = state.num_processes == 1 and "WORLD_SIZE" not in os.environ
        if alone and {"ACCELERATE_MIXED_PRECISION", "MASTER_PORT"} <= os.environ.keys():
            log.warning(
                "`accelerate launch` was asked for several processes and started one, as it does without GPUs. "
                "On CPU give it --multi_gpu instead of --cpu, or launch with torchrun."
            )
        return cls(state.process_index, state.num_processes)

    def gather(self, value: T) -> list[T]:
        """Return the value of every process of the launch, in their order; each of them has to call this."""
        processes = self.count * self.slices
        if processes == 1:
            return [value]
        if 1 < self.slices < processes:
            return _gather(_store(self.slices), self.process, processes, value)
        values: list[Any] = [None] * processes
        dist.all_gather_object(values, value)
        return values

    def gather_groups(self, value: T) -> list[T]:
        """Return the value of every group, in their order, which is its first process's; all processes call this."""
        return self.gather(value)[:: self.slices]

    def require_same(self, digests: Sequence[str]) -> None:
        """Raise RequestError, in every process, where the requests of a group differ: its processes would hang.

        `digests` are those of the requests of every process.
        """
        if any(digest != digests[index // self.slices * self.slices] for index, digest in enumerate(digests)):
            raise RequestError(
                f"the {self.slices} processes that hold slices of a member (tp_plan) were given different requests, "
                "and can only answer the same ones together. Give every process the same tasks, documents and seeds."
            )

    @contextmanager
    def first(self) -> Iterator[None]:
        """Let process 0 do something before the others, which find what it wrote."""
        if self.process > 0:
            self.gather(None)
        yield
        if self.process == 0:
            self.gather(None)

    def share(self, arguments: Sequence[tuple], whole: bool = False) -> list[int]:
        """Return the indices of the requests that this process answers, ascending.

        Requests with one context, the first of their `arguments`, stay together, which shares its forward pass; with
        `whole`, those with an empty one, too. Contexts are dealt by length.
        """
        units: dict[Any, list[int]] = {}
        for index, (context, *_) in enumerate(arguments):
            together = isinstance(context, str) and (context or whole)  # what is no text is set aside later
            units.setdefault(context if together else index, []).append(index)

        def characters(unit: list[int]) -> int:
            texts = [arguments[unit[0]][0], *(text for index in unit for text in arguments[index][1:])]
            return sum(len(text) for text in texts if isinstance(text, str))

        dealt = sorted(units.values(), key=characters, reverse=True)[self.index :: self.count]
        return sorted(index for unit in dealt for index in unit)


def shared(method: Callable[..., list]) -> Callable[..., list]:
    """Make a request method answer a share of its requests and return every group's answers.

    Groups that were given different requests answer their own. Afterwards the model's ``traces`` are those of all
    groups.
    """

    @functools.wraps(method)
    def answer(self: Any, requests: list[Instance], disable_tqdm: bool = False) -> list:
        ranks: Ranks = self.ranks
        if ranks.count == ranks.slices == 1:
            return method(self, requests, disable_tqdm=disable_tqdm)
        arguments = [request.args for request in requests]
        digest = hashlib.sha256()
        for args in arguments:
            digest.update(repr(args).encode("utf-8", "surrogatepass"))
        digests = ranks.gather(digest.hexdigest())
        ranks.require_same(digests)
        if len(set(digests)) == 1:
            mine = ranks.share(arguments, whole=method.__name__ == "generate_until")
            own = method(self, [requests[index] for index in mine], disable_tqdm=disable_tqdm)
            answers: list = [None] * len(requests)
            for indices, parts in ranks.gather_groups((mine, own)):
                for index, part in zip(indices, parts, strict=True):
                    answers[index] = part
        else:
            log.warning(
                "the %d %s were given different %s requests: each answers all of its own.",
                ranks.count,
                "processes" if ranks.slices == 1 else "groups",
                method.__name__,
            )
            answers = method(self, requests, disable_tqdm=disable_tqdm)
        self.traces = ranks.gather_groups(self.ensemble.counters)
        return answers

    return answer


@functools.cache
def _store(slices: int) -> dist.Store:
    """Make the processes that hold slices of the same members a launch of their own; return the store of all.

    The mesh of transformers has a place for groups (``dp_replicate_size``), and wraps their members in FSDP, for
    training: these cannot be used in inference mode, nor apart from their heads.
    """
    store, process, _ = next(dist.rendezvous("env://", timeout=PATIENCE))
    store = dist.PrefixStore("lm_eval_deepen", store)
    kind = torch._C._get_accelerator().type  # as transformers and the harness find it
    if kind != "cpu":
        torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", 0)))
    if not dist.is_initialized():
        dist.init_process_group(
            dist.get_default_backend_for_device(kind),
            store=dist.PrefixStore(f"group {process // slices}", store),
            rank=process % slices,
            world_size=slices,
            timeout=PATIENCE,
        )
    return store


def _gather(store: Any, process: int, processes: int, value: T) -> list[T]:
    """Return the value of every process, in their order, by way of a store."""
    call = f"call {store.add(f'calls of {process}', 1)}"  # all of them make the same calls
    data = pickle.dumps(value)
    parts = [data[start : start + PART] for start in range(0, len(data), PART)]
    for index, part in enumerate(parts):
        store.set(f"{call}, part {index} of {process}", part)
    store.set(f"{call}, parts of {process}", str(len(parts)))
    values = []
    for other in range(processes):
        count = int(store.get(f"{call}, parts of {other}"))
        values.append(pickle.loads(b"".join(store.get(f"{call}, part {index} of {other}") for index in range(count))))
    if store.add(f"{call}, read", 1) == processes:
        store.set(f"{call}, over", "")
    if process == 0:  # without `torchrun` the store is in this process, which must not end before the others have read
        store.wait([f"{call}, over"])
    return values


def _leave_at_the_end() -> None:
    """Have this process leave its group before the interpreter ends. Call it before the group is joined.

    Functions of these modules of torch have the group as a default value if they are imported after it was joined, as
    models do. They then keep its threads alive, also when the group has been destroyed. (So do meshes of members whose
    weights are divided: torch has no way to end their threads.)
    """
    importlib.import_module("torch.distributed.nn.functional")
    importlib.import_module("torch.distributed.fsdp.sharded_grad_scaler")
    atexit.register(_leave)


def _leave() -> None:
    """End gloo's threads while the interpreter still runs: one that frees a tensor later aborts the process."""
    if dist.is_initialized() and dist.get_backend() == "gloo":
        dist.destroy_process_group()


def refuse_fixed_devices(config: EnsembleConfig, state: PartialState) -> None:
    """Raise ConfigError where a member asks for a device, and every process has its own."""
    for member in config.members:
        asked = member.loading_dict().get("device")
        if asked is None:
            continue
        device = parse_device(asked, f"member {member.name!r}:")
        if device.index is not None or device.type != state.device.type:
            raise ConfigError(
                f"member {member.name!r} asks for device {str(asked)!r}, but {state.num_processes} processes share "
                f"this run and each of them loads its members onto its own {state.device.type} device. Leave the "
                "member's device out, spread it with parallelize=true, or run a single process."
            )
