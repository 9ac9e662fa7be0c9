"""The two sides of a comparison: ensembles as `--model deepen` builds them, members under the harness's `hf`."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from costs.timers import Timers, counted, members_of
from costs.workloads import Scale, Shape, Source, generation, scoring, shapes
from lm_eval_deepen.errors import ConfigError
from lm_eval_deepen.harness.model import DeepenLM, configure
from lm_eval_deepen.member import Member, load_member

HF_BATCH_SIZES = (1, 8)


class BenchmarkError(RuntimeError):
    """A figure cannot be measured as it is defined."""


@dataclass(frozen=True)
class Settings:
    """What is compared, and how.

    Attributes:
        models: folders of the members, the main member first.
        device, dtype, batch_size: of both sides, but `hf` runs at the faster of `HF_BATCH_SIZES`.
        scale: how much is measured.
        data: folder of the samples.
        matrix_dir: where relative matrices are; None is the user's cache.
        judged: whether figures are compared with the goals, which are those of the demo's pair.
    """

    models: tuple[str, ...]
    device: str
    dtype: str
    batch_size: int
    scale: Scale
    data: Path
    matrix_dir: str | None = None
    judged: bool = True

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the members: those of their folders."""
        return tuple(Path(model).name for model in self.models)

    def arguments(self, which: Sequence[int], **options: Any) -> dict[str, Any]:
        """Return the `model_args` of an ensemble of these members, by index; one may come twice."""
        members = [
            {"name": f"{self.names[m]} #{list(which[:at]).count(m) + 1}", "pretrained": self.models[m]}
            for at, m in enumerate(which)
        ]
        shared = {"pretrained": self.models[which[0]], "dtype": self.dtype, "batch_size": self.batch_size}
        if self.matrix_dir is not None:
            shared["matrix_dir"] = self.matrix_dir
        return {**shared, "members": members, **options}


class Bench:
    """Models that are loaded once, and the clock."""

    def __init__(self, settings: Settings) -> None:
        """Load nothing yet."""
        self.settings, self.scale = settings, settings.scale
        self.forwarded: dict[str, list[int]] = {}  # tokens per member of each scoring shape, as the engine counts
        self.through: dict[str, list[int]] = {}  # tokens, padding included, that went through the members' bodies
        self.cpu_seconds = 0.0  # processor time of what was timed last, which other processes do not add to
        self._members: dict[Any, Member] = {}
        self._ensembles: dict[tuple, DeepenLM] = {}

    @cached_property
    def source(self) -> Source:
        """The questions."""
        return Source.load(self.settings.data)

    @cached_property
    def hf(self) -> tuple[HFLM, ...]:
        """Every member under `hf`, with the defaults of the harness."""
        s = self.settings
        return tuple(HFLM(pretrained=model, device=s.device, dtype=s.dtype, batch_size=1) for model in s.models)

    @cached_property
    def shapes(self) -> dict[str, Shape]:
        """The scoring shapes."""
        return shapes(self.source, self.scale, self.length)

    def length(self, text: str) -> int:
        """Return how many tokens a text has for the main member."""
        return len(self.pair.tok_encode(text, add_special_tokens=False))

    @property
    def pair(self) -> DeepenLM:
        """All members, equal weights, the product's defaults."""
        return self.ensemble(tuple(range(len(self.settings.models))))

    @property
    def smaller(self) -> int:
        """Index of the member with the fewest parameters."""
        sizes = [parameters(lm.model) for lm in self.hf]
        return sizes.index(min(sizes))

    def ensemble(self, which: tuple[int, ...], **options: Any) -> DeepenLM:
        """Return the ensemble of these members, built by the class that `--model deepen` names.

        A model that several ensembles of this benchmark have is in memory once, unless one ensemble has it twice.
        """
        key = (which, tuple(sorted(options.items())))
        if key not in self._ensembles:
            with self._shared_members():
                arguments = self.settings.arguments(which, **options)
                self._ensembles[key] = DeepenLM(device=self.settings.device, **arguments)
        return self._ensembles[key]

    def drop(self, which: tuple[int, ...]) -> None:
        """Forget the ensembles of these members, and members that no other ensemble has."""
        self._ensembles = {key: model for key, model in self._ensembles.items() if key[0] != which}
        used = {id(member) for model in self._ensembles.values() for member in model.ensemble.members}
        self._members = {key: member for key, member in self._members.items() if id(member) in used}
        gc.collect()

    def accepts(self, **options: Any) -> bool:
        """Return whether an ensemble takes these options."""
        try:
            configure(self.settings.arguments(range(len(self.settings.models)), **options))
        except ConfigError:
            return False
        return True

    @contextmanager
    def _shared_members(self) -> Iterator[None]:
        def shared(config: Any, *args: Any, **kwargs: Any) -> Member:
            key = config.replace(weight=1.0)
            if key not in self._members:
                self._members[key] = load_member(config, *args, **kwargs)
            return self._members[key]

        with patch("lm_eval_deepen.engine.ensemble.load_member", shared):
            yield

    def seconds(self, action: Callable[[], Any]) -> float:
        """Return how long `action` takes, and keep its processor time in `cpu_seconds`."""
        self.settle()
        start, cpu = time.perf_counter(), time.process_time()
        action()
        self.settle()
        self.cpu_seconds = time.process_time() - cpu
        return time.perf_counter() - start

    def settle(self) -> None:
        """Wait for what a GPU still computes."""
        if self.settings.device.startswith("cuda"):
            torch.cuda.synchronize()

    def warm_up(self) -> None:
        """Run both sides once on a little of everything."""
        document = self.shapes["arc_zero"].documents[:1]
        prompt = [document[0].context]
        for model in (self.pair, *self.hf):
            model.loglikelihood(scoring(document), disable_tqdm=True)
            model.generate_until(generation(prompt, [2]), disable_tqdm=True)

    def score(self, shape: Shape) -> float:
        """Score all documents of a shape with the ensemble; return seconds.

        Raises:
            BenchmarkError: a repeat forwarded another number of tokens: something was kept between calls.
        """
        asked, before = scoring(shape.documents), forwarded(self.pair)
        with counted(members_of(self.pair)) as seen:
            taken = self.seconds(lambda: self.pair.loglikelihood(asked, disable_tqdm=True))
        tokens = [after - start for after, start in zip(forwarded(self.pair), before, strict=True)]
        through = list(seen.values())
        if any(passed < token for passed, token in zip(through, tokens, strict=True)):
            raise BenchmarkError(f"{shape.name}: {tokens} tokens counted by the engine, {through} seen at the models")
        if self.through.setdefault(shape.name, through) != through:
            raise BenchmarkError(
                f"{shape.name}: {through} tokens forwarded, {self.through[shape.name]} in an earlier repeat: "
                "what one call computed is used by the next, so that repeats measure something else."
            )
        self.forwarded[shape.name] = tokens
        return taken

    def hf_score(self, m: int, batch_size: int, asked: list[Instance]) -> tuple[float, float]:
        """Score requests with one member under `hf`; return seconds, and the body's share of them."""
        self.hf[m].batch_size_per_gpu = batch_size
        timers = Timers(self.settle)
        with timers.forwards({"hf": self.hf[m]}):
            taken = self.seconds(lambda: self.hf[m].loglikelihood(asked, disable_tqdm=True))
        return taken, timers.inside("body") / taken

    def generate(self, model: DeepenLM, asked: list[Instance]) -> tuple[float, list[str]]:
        """Generate with an ensemble; return seconds and texts."""
        texts: list[str] = []
        taken = self.seconds(lambda: texts.extend(model.generate_until(asked, disable_tqdm=True)))
        return taken, texts

    def hf_generate(self, m: int, batch_size: int, asked: list[Instance]) -> float:
        """Generate with one member under `hf`; return seconds.

        Raises:
            BenchmarkError: it generated another number of tokens than was asked for.
        """
        lm, counted = self.hf[m], [0]
        lm.batch_size_per_gpu = batch_size
        original = lm.model.generate

        def counting(*args: Any, **kwargs: Any) -> Any:
            found = original(*args, **kwargs)
            counted[0] += len(found) * (found.shape[1] - kwargs["input_ids"].shape[1])
            return found

        lm.model.generate = counting
        try:
            taken = self.seconds(lambda: lm.generate_until(asked, disable_tqdm=True))
        finally:
            del lm.model.generate
        wanted = sum(request.args[1]["max_gen_toks"] for request in asked)
        if counted[0] != wanted:
            raise BenchmarkError(f"hf {self.settings.names[m]}: {counted[0]} tokens generated instead of {wanted}")
        return taken


def parameters(model: Any) -> int:
    """Return the number of parameters, tied ones once."""
    return sum(p.numel() for p in model.parameters())


def head_share(model: Any) -> float:
    """Return the output head's share of the parameters."""
    return model.get_output_embeddings().weight.numel() / parameters(model)


def forwarded(model: DeepenLM) -> list[int]:
    """Return the tokens that every member of an ensemble has forwarded so far, padding excluded."""
    return [member.runner.forwarded for member in model.ensemble.active]


def rows_read(model: DeepenLM) -> int:
    """Return how many distributions an ensemble has read so far."""
    found = model.get_model_info()["deepen"]
    return found["steps_fused"] + found["steps_skipped"]


@contextmanager
def endless(models: Sequence[Any]) -> Iterator[None]:
    """Keep transformers models from ending a text: their end-of-text logits are next to impossible."""
    hooks = []
    for lm in models:
        sources = (getattr(lm.model, "generation_config", None), lm.model.config, lm.tokenizer)
        ids: set[int] = set()
        for found in (getattr(source, "eos_token_id", None) for source in sources):
            ids |= set() if found is None else set(found) if isinstance(found, (list, tuple)) else {found}
        hooks.append(lm.model.get_output_embeddings().register_forward_hook(_Forbid(sorted(ids))))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Forbid:
    def __init__(self, ids: Sequence[int]) -> None:
        self.ids = list(ids)

    def __call__(self, module: Any, inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        logits[..., self.ids] = -1e4
        return logits


def cores() -> int:
    """Return how many cores this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
