"""Put memory and time of large ensembles, by the formulas of preflight, into docs/scale.md.

    python benchmarks/make_scale_table.py

Nothing is measured: weights and keys and values follow from a model's shape, times from what its weights take to read
and its arithmetic to do. Only the text between the markers changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from make_performance_table import insert

from lm_eval_deepen.engine.memory import fusion_bytes, kv_bytes_by
from lm_eval_deepen.preflight.cost import Machine, TaskCost, hours

PAGE = Path(__file__).resolve().parents[1] / "docs" / "scale.md"
BYTES = 2  # bfloat16
GPU_BYTES, BANDWIDTH, FLOPS = 80e9, 3.35e12, 4e14  # an H100, at 40 % of its arithmetic
ROOM = 0.9  # of a GPU; the rest is for the forward pass
BATCH, TOKENS = 8, 4_096
TASK = TaskCost("questions", 10_000, 10_000 * 1_000, 10_000 * 100, TOKENS)


@dataclass(frozen=True)
class Shape:
    """What memory and time follow from; parameters are counted in full, `active` those that a token passes through."""

    parameters: float
    active: float
    vocabulary: int
    num_hidden_layers: int
    num_key_value_heads: int
    head_dim: int

    @property
    def weight_bytes(self) -> float:
        """Bytes of the weights."""
        return self.parameters * BYTES

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values of one token."""
        given: dict[str, Any] = asdict(self)
        return kv_bytes_by(lambda key, default=None: given.get(key, default), BYTES)


MISTRAL_7B = Shape(7.25e9, 7.25e9, 32_768, 32, 8, 128)
QWEN_7B = Shape(7.62e9, 7.62e9, 152_064, 28, 4, 128)
INTERNLM_20B = Shape(19.9e9, 19.9e9, 92_544, 48, 8, 128)
LLAMA_70B = Shape(70.6e9, 70.6e9, 128_256, 80, 8, 128)
MIXTRAL = Shape(46.7e9, 12.9e9, 32_000, 32, 8, 128)
ENSEMBLES = {
    "2 x 7B (Mistral 7B, Qwen2.5 7B)": (MISTRAL_7B, QWEN_7B),
    "4 x 20B (InternLM2 20B)": (INTERNLM_20B,) * 4,
    "70B + Mixtral (Llama 3 70B, Mixtral 8x7B)": (LLAMA_70B, MIXTRAL),
}


def line(name: str, members: Sequence[Shape]) -> str:
    """Return an ensemble's line of the table."""
    weights = sum(member.weight_bytes for member in members)
    cache = sum(member.kv_bytes for member in members) * BATCH * TOKENS
    fusion = sum(fusion_bytes(member.vocabulary, BATCH) for member in members)
    total = weights + cache + fusion
    gpus = next(count for count in (1, 2, 4, 8, 16) if total <= count * ROOM * GPU_BYTES)
    taken = hours([TASK], members, BATCH, Machine(BANDWIDTH * gpus, FLOPS * gpus))  # type: ignore[arg-type]
    gigabytes = " | ".join(f"{size / 1e9:.1f}" for size in (weights, cache, fusion, total))
    return f"| {name} | {gigabytes} | {gpus} | {taken:.2f} |"


def table() -> str:
    """Return the table."""
    head = (
        "| ensemble | weights | keys and values | fusion | together, GB | GPUs of 80 GB | hours |",
        "|---|---|---|---|---|---|---|",
    )
    return "\n".join([*head, *(line(name, members) for name, members in ENSEMBLES.items())])


if __name__ == "__main__":
    PAGE.write_text(insert(PAGE.read_text("utf-8"), "formulas", table()), "utf-8")
