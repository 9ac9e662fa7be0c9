"""One process gets to the same weights where it is killed on the way, and two that train together up to rounding."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pico as pico_models
import pytest
import torch
import yaml
from ports import free_port
from safetensors.torch import load_file

from lm_eval_deepen.build import distill
from lm_eval_deepen.build.distill import training
from lm_eval_deepen.build.distill.builder import load
from lm_eval_deepen.build.distill.loss import IGNORED, FusedBatch, counted, distillation_loss
from lm_eval_deepen.build.distill.store import GROUP, DistributionStore
from lm_eval_deepen.build.distill.teacher_logits import store_teacher_logits
from lm_eval_deepen.errors import ConfigError
from lm_eval_deepen.harness.distributed import Ranks

PATIENCE_S = 600


@pytest.fixture
def recipe(pico: dict[str, Path], tmp_path: Path) -> dict[str, Any]:
    text = tmp_path / "text.txt"
    text.write_text(pico_models.CORPUS.replace("\n", "\n\n"), encoding="utf-8")
    return {
        "kind": "distill", "method": "fusellm", "models": {name: str(path) for name, path in pico.items()},
        "target": "bytelevel", "sources": ["bytelevel", "metaspace"], "text": str(text), "train_tokens": 900,
        "context_length": 32, "batch_size": 2, "learning_rate": 1e-3, "checkpoint_steps": 6, "device": "cpu",
        "store": str(tmp_path / "store"), "adam_betas": [0.9, 0.95], "gradient_checkpointing": True, "seed": 3,
    }  # fmt: skip


def launch(recipe: dict[str, Any], out: Path, count: int) -> list[subprocess.Popen]:
    """Start ``make`` in one process, or in two that know of each other."""
    file = out.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(recipe))
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(count),
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, "-m", "lm_eval_deepen.cli.main", "make", str(file), str(out)]
    return [
        subprocess.Popen(
            command, env={**os.environ, **shared, "RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(count)
    ]  # fmt: skip


@pytest.mark.parametrize("count", [1, 2])
def test_processes_that_are_killed_once_end_up_as_one_that_was_not(count, recipe, tmp_path: Path) -> None:
    own = {key: value for key, value in recipe.items() if key != "kind"} | {"store": str(tmp_path / "own-store")}
    alone = distill.build(own, tmp_path / "alone", recipe["models"])
    processes, deadline = launch(recipe, tmp_path / "two", count), time.monotonic() + PATIENCE_S
    while not list(tmp_path.glob(f".two.partial.partial/checkpoint-*/{training.COMPLETE}")):
        assert time.monotonic() < deadline and processes[0].poll() is None
        time.sleep(0.002)
    for process in processes:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert not (tmp_path / "two").exists()

    processes = launch(recipe, tmp_path / "two", count)
    told = [process.communicate(timeout=PATIENCE_S)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * count, "\n".join(told)[-4000:]
    assert ["bits per byte" in one for one in told] == [True, False][:count]
    together = json.loads((tmp_path / "two" / "distill.json").read_text())["result"]
    assert count > 1 or together["tensors_sha256"] == alone["tensors_sha256"]
    assert together["steps"] == alone["steps"] and together["tokens_trained"] == alone["tokens_trained"]
    assert together["loss"] == pytest.approx(alone["loss"], abs=1e-4)
    assert together["held_out"]["change"] == pytest.approx(alone["held_out"]["change"], abs=1e-5)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("alone", "two"))
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=2e-5, rtol=1e-3)


def test_processes_share_the_teacher_logits_and_a_lost_group_is_made_again(
    pico: dict[str, Path], tmp_path: Path
) -> None:
    member = load("m", str(pico["metaspace"]), "cpu")
    blocks = [training.Tokens.of(member.codec, text) for text in pico_models.CORPUS.split("\n") if text.strip()][:40]
    alone = DistributionStore(tmp_path / "alone", "m", {}, len(blocks))
    store_teacher_logits(member, blocks, 4, alone)
    together = DistributionStore(tmp_path / "two", "m", {}, len(blocks))
    store_teacher_logits(member, blocks, 4, together, 0, 2)
    left = [together.number(group) for group in together.missing()]
    assert left == list(range(1, -(-len(blocks) // GROUP), 2)) and left
    store_teacher_logits(member, blocks, 4, together, 1, 2)
    files = sorted(path.name for path in alone.folder.glob("*.safetensors"))
    assert [path.name for path in sorted(together.folder.glob("*.safetensors"))] == files
    assert all((alone.folder / name).read_bytes() == (together.folder / name).read_bytes() for name in files)
    (together.folder / files[1]).unlink()
    store_teacher_logits(member, blocks, 4, together, 0, 2)  # another's
    assert together.missing()
    store_teacher_logits(member, blocks, 4, together, 1, 2)
    assert not together.missing()


def test_parts_of_a_batch_add_up_to_its_loss() -> None:
    """What every process computes of its rows, averaged over processes, is the loss of all rows and its gradient."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 6, 9, generator=generator, requires_grad=True)
    labels = torch.randint(0, 9, (4, 6), generator=generator)
    labels[0, 2:] = labels[3, :] = IGNORED  # rows count for as many positions as they have; one has none
    p = torch.softmax(torch.randn(4, 6, 3, generator=generator), -1) * 0.8
    ids = torch.stack([torch.randperm(9, generator=generator)[:3] for _ in range(24)]).view(4, 6, 3)
    covered = torch.rand(4, 6, generator=generator) > 0.4
    fused = FusedBatch(ids, p, torch.full((4, 6), 0.2), covered)
    whole = distillation_loss(logits, labels, 0.7, fused)
    [wanted] = torch.autograd.grad(whole.total, logits, retain_graph=True)
    rows = [slice(0, 2), slice(2, 4)]
    parts = [FusedBatch(*(part[here] for part in vars(fused).values())) for here in rows]
    counts = sum(counted(labels[here], part) for here, part in zip(rows, parts, strict=True)) / 2
    losses = [
        distillation_loss(logits[here], labels[here], 0.7, part, (counts[0], counts[1]))
        for here, part in zip(rows, parts, strict=True)
    ]
    total = sum(loss.total for loss in losses) / 2
    assert total.item() == pytest.approx(whole.total.item(), abs=1e-6)
    [found] = torch.autograd.grad(total, logits)
    torch.testing.assert_close(found, wanted)


def test_blocks_are_filled_up_with_some_of_which_nothing_is_learnt() -> None:
    tokens = training.Tokens((1,), (2, 3, 4), torch.zeros(3).numpy())
    data = training.TrainingBlocks([tokens], [0, 0, 0], None, multiple=2)
    assert len(data) == 4 and data[2]["labels"] == [2, 3, 4]
    assert data[3]["labels"] == [IGNORED] * 3 and data[3]["input_ids"] == data[2]["input_ids"]
    assert len(training.TrainingBlocks([tokens], [0, 0, 0], None)) == 3


def test_batches_that_cannot_be_shared_and_merges_are_refused(recipe, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(Ranks, "of_launch", classmethod(lambda cls: cls(0, 2)))
    own = {key: value for key, value in recipe.items() if key != "kind"}
    with pytest.raises(ConfigError, match="batch_size 3 cannot be shared by 2 processes"):
        distill.build({**own, "batch_size": 3}, tmp_path / "out", recipe["models"])
