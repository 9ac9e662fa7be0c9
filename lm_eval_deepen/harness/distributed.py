"""Data-parallel runs: the processes of one launch answer the same requests together.

The harness can shard documents itself, by a model's `rank` and `world_size`. It then draws other random
few-shot examples than one process does (its samplers advance with every document they build), forwards
padding requests, and fails where a rank has no document. So every process is rank 0 of 1 to the harness
and builds all requests, and the work is shared here, inside the request methods, which `LM` provides for.
The harness tells such processes apart by ``LOCAL_RANK``: cache files, and who returns and saves results.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed
from accelerate import PartialState

from lm_eval_deepen.config import EnsembleConfig
from lm_eval_deepen.errors import ConfigError, RequestError
from lm_eval_deepen.member.devices import parse_device

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

log = logging.getLogger(__name__)

PATIENCE = timedelta(weeks=52)  # as the harness: processes wait for each other as long as their shares take

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those that share a run's requests.

    Attributes:
        index: number of this process, 0 for the one that shows progress.
        count: how many processes share the requests.
        slices: how many processes hold slices of the same members, and answer every request together.
        slice: number of this process among them.
    """

    index: int = 0
    count: int = 1
    slices: int = 1
    slice: int = 0

    @property
    def speaks(self) -> bool:
        """Whether this process shows progress and writes what all of them know."""
        return self.index == self.slice == 0

    @classmethod
    def join(cls, config: EnsembleConfig) -> Ranks:
        """Join the processes that ``accelerate launch`` or ``torchrun`` started: gloo on CPU, nccl on GPU.

        Call it before members load, which then find the process group and their device.

        Raises:
            ConfigError: a member names one device for all processes.
        """
        if any(member.loading_dict().get("tp_plan") for member in config.members):
            atexit.register(_leave)
            return cls(slices=int(os.environ.get("WORLD_SIZE", 1)), slice=int(os.environ.get("RANK", 0)))
        ranks = cls.launched()
        if ranks.count > 1:
            refuse_fixed_devices(config, PartialState())
        return ranks

    @classmethod
    def of_launch(cls) -> Ranks:
        """As `launched`, and a process that was started alone joins nothing."""
        return cls.launched() if int(os.environ.get("WORLD_SIZE", 1)) > 1 else cls()

    @classmethod
    def launched(cls) -> Ranks:
        """Join the processes of this launch; one that was started alone is 0 of 1."""
        accelerator = getattr(torch, "accelerator", torch.cuda)
        on_cpu = int(os.environ.get("WORLD_SIZE", 1)) > 1 and not accelerator.is_available()
        if on_cpu and "RANK" in os.environ:  # without it `accelerate` gives every process LOCAL_RANK 0
            size = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
            os.environ.setdefault("LOCAL_RANK", str(int(os.environ["RANK"]) % size))
        on_cpu = on_cpu or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "on")
        state = PartialState(cpu=on_cpu, timeout=PATIENCE)
        if state.num_processes > 1:
            atexit.register(_leave)
        elif {"ACCELERATE_MIXED_PRECISION", "MASTER_PORT"} <= os.environ.keys() and "WORLD_SIZE" not in os.environ:
            log.warning(
                "`accelerate launch` was asked for several processes and started one, as it does without GPUs. "
                "On CPU give it --multi_gpu instead of --cpu, or launch with torchrun."
            )
        return cls(state.process_index, state.num_processes)

    def gather(self, value: T) -> list[T]:
        """Return every process's value, in the order of the processes; each of them has to call this."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(values, value)
        return values

    def require_same(self, digest: str) -> None:
        """Refuse requests that are not those of every process that holds a slice: they would wait for each other.

        Raises:
            RequestError: they are not.
        """
        digests: list[Any] = [None] * self.slices
        torch.distributed.all_gather_object(digests, digest)
        if len(set(digests)) > 1:
            raise RequestError(
                f"the {self.slices} processes that hold slices of a member (tp_plan) were given different requests, as "
                "where response caches of an interrupted run differ. Remove these caches, and start all again."
            )

    @contextmanager
    def first(self) -> Iterator[None]:
        """Let process 0 do something before the others, which find what it wrote."""
        if self.count > 1 and self.index > 0:
            torch.distributed.barrier()
        yield
        if self.count > 1 and self.index == 0:
            torch.distributed.barrier()

    def share(self, arguments: Sequence[tuple], whole: bool = False) -> list[int]:
        """Return the indices of the requests that this process answers, ascending.

        Requests with one context stay together, which shares its forward pass; contexts are dealt by length.

        Args:
            arguments: the requests' arguments, context first.
            whole: keep requests with an empty context together as well.
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
    """Make a request method answer a share of its requests and return every process's answers.

    Processes that were given different requests answer their own. Afterwards the model's ``traces`` are those
    of all processes.
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
        if ranks.slices > 1:
            ranks.require_same(digest.hexdigest())
            return method(self, requests, disable_tqdm=disable_tqdm)
        if len(set(ranks.gather(digest.hexdigest()))) == 1:
            mine = ranks.share(arguments, whole=method.__name__ == "generate_until")
            own = method(self, [requests[index] for index in mine], disable_tqdm=disable_tqdm)
            answers: list = [None] * len(requests)
            for indices, parts in ranks.gather((mine, own)):
                for index, part in zip(indices, parts, strict=True):
                    answers[index] = part
        else:
            log.warning(
                "the %d processes were given different %s requests: each answers all of its own.",
                ranks.count,
                method.__name__,
            )
            answers = method(self, requests, disable_tqdm=disable_tqdm)
        self.traces = ranks.gather(self.ensemble.counters)
        return answers

    return answer


def _leave() -> None:
    """End gloo's threads while the interpreter still runs: one that frees a tensor later aborts the process."""
    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
        torch.distributed.destroy_process_group()


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
