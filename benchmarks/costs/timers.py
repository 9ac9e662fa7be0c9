"""Where time goes: cumulative wall time of named sections, each without the sections inside it."""

from __future__ import annotations

import functools
import importlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lm_eval_deepen.harness.model import DeepenLM

OTHER = "everything else"

# What time is spent on, and the functions that spend it: `module:Class.method` or `module:function`, below the
# package. Functions that a version of the product does not have are listed, not timed.
SECTIONS: dict[str, tuple[str, ...]] = {
    "log-softmax, temperature": ("member.runner:Runner.logp",),
    "masks": ("member.attention:MaskMaker.__call__",),
    "cache bookkeeping": (
        "member.kv_cache:RowCache.advance",
        "member.kv_cache:RowCache.admit",
        "member.kv_cache:RowCache.keep",
        "member.kv_cache:ColumnCache.pack",
        "member.kv_cache:ColumnCache.take",
        "member.kv_cache:ColumnCache.aim",
    ),
    "prefix trees": (
        "member.tree:TokenTree.add",
        "member.tree:TokenTree.preorder",
        "member.runner:Runner.states_at",
        "member.walk:Walker.states",
        "member.walk:TreeWalker.prefill",
        "member.walk:TreeWalker._forward",
        "member.walk:TreeWalker._move",
    ),
    "experts of weights that learn": (
        "fusion._deepen_experts:OneHotExperts.__init__",
        "fusion._deepen_experts:OneHotExperts.at",
        "fusion._deepen_experts:OneHotExperts.mixed",
        "fusion._expert_rows:FusedByEach.__init__",
        "fusion._expert_rows:FusedByEach.at",
        "fusion._expert_rows:FusedByEach.mixed",
    ),
    "covers": ("engine.covers:CoverReader.plan", "engine.covers:CoverReader.rows"),
    "inverse, relative rows": ("fusion.deepen:DeepenFuser.fuse", "fusion.deepen:DeepenFuser.skip"),
    "fusion around it": ("engine.base:EnsembleBase.fuse",),
    "trace": (
        "engine.trace:Trace.record_fused",
        "engine.trace:Trace.record_present",
        "engine.trace:Trace.record_skipped",
    ),
    "tokens of a byte prefix": ("engine.base:EnsembleBase.path", "engine.prompts:Span.paths"),
    "prompts, tokenisation": ("engine.prompts:Prompter.span", "engine.prompts:Prompter.prompts"),
    "positions to read": ("engine.scoring:_rows",),
    "reading targets": ("engine.scoring:_read",),
    "stops": ("engine.generation:append", "engine.generation:Decoder._take"),
    "drafting": ("engine.drafts:Lookup.draft", "engine.drafts:Cheapest.draft"),
}


class Timers:
    """Exclusive wall time of sections that may nest.

    Attributes:
        seconds: by section.
        calls: by section.
    """

    def __init__(self, settle: Callable[[], None] = lambda: None) -> None:
        """Start at zero; `settle` waits for an accelerator before every reading of the clock."""
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self._open: list[str] = []
        self._settle = settle
        self._last = 0.0

    def enter(self, section: str) -> None:
        """Begin a section inside the present one."""
        self._charge()
        self._open.append(section)
        self.calls[section] += 1

    def leave(self) -> None:
        """End the section that began last."""
        self._charge()
        self._open.pop()

    def _charge(self) -> None:
        self._settle()
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._last
        self._last = now

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Time a block."""
        self.enter(name)
        try:
            yield
        finally:
            self.leave()

    def wrap(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """Return `function`, timed."""

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.section(name):
                return function(*args, **kwargs)

        return timed

    @contextmanager
    def forwards(self, models: Mapping[str, Any]) -> Iterator[None]:
        """Time the bodies and output heads of models (`HFLM` by name), at the modules of transformers themselves."""
        hooks = []
        for name, lm in models.items():
            parts = {"body": body_of(lm), "head": lm.model.get_output_embeddings()}
            for part, module in parts.items():
                section = f"{part} of {name}"
                hooks.append(module.register_forward_pre_hook(lambda *_, name=section: self.enter(name)))
                hooks.append(module.register_forward_hook(lambda *_: self.leave()))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def inside(self, *parts: str) -> float:
        """Return the time inside models' parts: ``body``, ``head``."""
        return sum(value for key, value in self.seconds.items() if key.startswith(tuple(f"{p} of " for p in parts)))


def body_of(lm: Any) -> Any:
    """Return the module below the output head of an `HFLM`'s model."""
    return getattr(lm.model, lm.model.base_model_prefix)


def members_of(model: DeepenLM) -> dict[str, Any]:
    """Return the `HFLM` of every active member by name."""
    return {member.name: member.lm for member in model.ensemble.active}


@contextmanager
def counted(models: Mapping[str, Any]) -> Iterator[dict[str, int]]:
    """Count the tokens that go through models' bodies, padding included, whatever the engine says."""
    seen = dict.fromkeys(models, 0)
    hooks = []

    def count(module: Any, args: Any, kwargs: dict[str, Any], name: str) -> None:
        if "forward" not in vars(module):  # else the head alone runs, on states computed before
            seen[name] += kwargs["input_ids"].numel()

    for name, lm in models.items():
        counter = functools.partial(count, name=name)
        hooks.append(body_of(lm).register_forward_pre_hook(counter, with_kwargs=True))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def sections(timers: Timers) -> Iterator[list[str]]:
    """Time the functions of `SECTIONS`; yields those that this version of the product does not have."""
    saved: list[tuple[Any, str, Any]] = []
    missing: list[str] = []
    for name, targets in SECTIONS.items():
        for target in targets:
            owner, attribute = _locate(target)
            if owner is None or attribute not in vars(owner):
                missing.append(target)
                continue
            original = vars(owner)[attribute]
            saved.append((owner, attribute, original))
            setattr(owner, attribute, timers.wrap(original, name))
    try:
        yield missing
    finally:
        for owner, attribute, original in reversed(saved):
            setattr(owner, attribute, original)


def _locate(target: str) -> tuple[Any, str]:
    """Return the owner (None if there is none) and the attribute that a target of `SECTIONS` names."""
    module, _, path = target.partition(":")
    try:
        found: Any = importlib.import_module(f"lm_eval_deepen.{module}")
    except ImportError:
        return None, path
    owner, _, attribute = path.rpartition(".")
    return (getattr(found, owner, None) if owner else found), attribute
