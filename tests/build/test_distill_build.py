"""Whole builds on pico models: what is written, that it repeats, and that it goes on after an interruption."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pico as pico_models
import pytest
import torch
from sibling_models import configured
from transformers import AutoModelForCausalLM, AutoTokenizer

from lm_eval_deepen.build import distill
from lm_eval_deepen.build.distill import builder, teacher_logits, training
from lm_eval_deepen.build.distill.corpus import Tokens, blocks_of
from lm_eval_deepen.build.distill.fusing import Targets
from lm_eval_deepen.build.distill.store import GROUP
from lm_eval_deepen.errors import ConfigError, MemberError

FIRST_STEPS = 2
World = tuple[dict[str, Any], dict[str, str]]


@pytest.fixture(scope="module")
def world(pico: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """The recipe that the builds vary, and their models."""
    folder = tmp_path_factory.mktemp("distill")
    gc.collect()
    gc.freeze()  # builds collect garbage, which takes longer than the rest in a process that holds so much
    lines = [line for line in (pico_models.CORPUS + pico_models.FOREIGN).splitlines() if line.strip()]
    (folder / "text.txt").write_text("\n\n".join(lines), encoding="utf-8")
    recipe = {
        "target": "bytelevel", "text": str(folder / "text.txt"), "held_out": 0.3, "context_length": 32,
        "batch_size": 2, "train_tokens": 300, "learning_rate": 1e-3, "device": "cpu", "seed": 3,
        "checkpoint_steps": 2, "store": str(folder / "store"),
    }  # fmt: skip
    yield recipe, {name: str(path) for name, path in pico.items()}
    gc.unfreeze()


def fusellm(recipe: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**recipe, "method": "fusellm", "sources": ["bytelevel", "metaspace", "padded"], **changes}


class Killed(BaseException):
    """What stands for the end of the process."""


@pytest.fixture(scope="module")
def plain(world, tmp_path_factory) -> dict[str, Any]:
    """An uninterrupted build with every source."""
    recipe, members = world
    out = tmp_path_factory.mktemp("plain") / "out"
    return {**distill.build(fusellm(recipe), out, members), "out": out}


def test_models_are_read_in_the_precision_that_is_trained_in(world, tmp_path) -> None:
    recipe, members = world
    half = AutoModelForCausalLM.from_pretrained(members["bytelevel"]).to(torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(members["bytelevel"]).save_pretrained(tmp_path / "half")
    still = {**recipe, "method": "clm", "learning_rate": 1e-30}
    found = distill.build(still, tmp_path / "out", {**members, "bytelevel": str(tmp_path / "half")})
    assert found["held_out"]["change"] == 0.0  # nothing was learnt, and nothing was rounded away


@pytest.mark.parametrize("warmup", [0.1, 1.0])
def test_the_last_step_learns_though_it_is_the_only_one(world, tmp_path, warmup) -> None:
    recipe, members = world
    found = distill.build({**recipe, "method": "clm", "train_tokens": 20, "warmup": warmup}, tmp_path / "out", members)
    assert found["steps"] == 1 and found["held_out"]["change"] != 0


def test_a_build_is_an_ordinary_model_folder_that_says_what_it_is(world, plain) -> None:
    recipe, members = world
    out = plain["out"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    base = AutoModelForCausalLM.from_pretrained(members["bytelevel"])
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), base.parameters(), strict=True))
    assert (
        tokenizer("café 🙂")["input_ids"] == AutoTokenizer.from_pretrained(members["bytelevel"])("café 🙂")["input_ids"]
    )
    assert tokenizer.chat_template == pico_models.CHATML
    assert not out.with_name("out.partial").exists()
    assert plain["parameters"] == sum(p.numel() for p in base.parameters())
    assert 300 <= plain["tokens_trained"] < 332 and plain["seed"] == 3
    assert (
        plain["tensors_sha256"] != plain["target"]["tensors_sha256"] == plain["sources"]["bytelevel"]["tensors_sha256"]
    )
    assert set(plain["versions"]) >= {"torch", "transformers", "accelerate", "lm_eval_deepen", "python"}
    assert json.loads((out / builder.RESULT).read_text())["result"] == {k: v for k, v in plain.items() if k != "out"}


def test_coverage_mass_and_size_of_every_source_are_reported(plain) -> None:
    own = plain["sources"]["bytelevel"]
    assert own["coverage"] == 1 and own["stored_bytes_per_token"] == 60
    assert own["mass"]["nothing"] == own["mass"]["edit distance"] == 0
    for source in plain["sources"].values():
        assert sum(source["mass"].values()) == pytest.approx(1, abs=1e-4)
        assert source["stored_bytes_per_token"] == 60 and 0 < source["coverage"] <= 1
    assert sum(source["blocks_chosen"] for source in plain["sources"].values()) > 5


def test_bits_per_byte_before_and_after_are_those_of_plain_forward_passes(world, plain) -> None:
    recipe, members = world
    held_out, tokenizer = plain["held_out"], AutoTokenizer.from_pretrained(members["bytelevel"])
    found = builder.read_corpus(distill.DistillRecipe.parse({**recipe, "method": "clm"}, members)).held_out
    assert held_out["document_bytes"] == [len(document.encode()) for document in found]
    for folder, expected in ((members["bytelevel"], "base_bits_per_byte"), (plain["out"], "bits_per_byte")):
        model, total = AutoModelForCausalLM.from_pretrained(folder), 0.0
        for document in found:
            for block in blocks_of(document, 31, lambda text: len(tokenizer(text)["input_ids"])):
                ids = torch.tensor(
                    [[tokenizer.eos_token_id, *tokenizer(block)["input_ids"]]]
                )  # no BOS: the prefix token
                with torch.inference_mode():
                    total += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
        bits = total / torch.log(torch.tensor(2.0)).item()
        assert held_out[expected] == pytest.approx(bits / held_out["bytes"], rel=1e-4)
    assert held_out["interval"][0] <= held_out["change"] <= held_out["interval"][1]


def test_the_same_seed_gives_the_same_weights_and_another_one_others(world, plain, tmp_path) -> None:
    recipe, members = world
    again = distill.build(fusellm(recipe, device=None), tmp_path / "again", members)
    assert again["tensors_sha256"] == plain["tensors_sha256"]
    other = distill.build(fusellm(recipe, seed=4), tmp_path / "other", members)
    assert other["tensors_sha256"] != plain["tensors_sha256"]


def test_lambda_1_is_the_control_bit_by_bit_and_learns_the_text(world, plain, tmp_path) -> None:
    recipe, members = world
    control = distill.build({**recipe, "method": "clm"}, tmp_path / "clm", members)
    same = distill.build(fusellm(recipe, clm_weight=1), tmp_path / "same", members)
    assert same["tensors_sha256"] == control["tensors_sha256"] != plain["tensors_sha256"]
    assert control["tokens_trained"] == plain["tokens_trained"] and control["text_sha256"] == plain["text_sha256"]
    assert control["sources"] == {} and control["covered"] is None
    assert control["held_out"]["bits_per_byte"] < control["held_out"]["base_bits_per_byte"]
    assert distill.held_out_difference(control, same).estimate == 0


@pytest.mark.parametrize("changes", [{"fusion": "avgce"}, {"alignment": "dtw"}, {"tail": "renormalised", "top_k": 3}])
def test_every_option_makes_another_model(world, plain, tmp_path, changes: dict[str, Any]) -> None:
    recipe, members = world
    found = distill.build(fusellm(recipe, **changes), tmp_path / "out", members)
    assert found["tensors_sha256"] != plain["tensors_sha256"]
    assert found["recipe"] == {**plain["recipe"], **changes}
    assert found["covered"] == 1 if changes == {"fusion": "avgce"} else found["covered"] > 0.2


def test_an_interrupted_build_goes_on_and_ends_up_the_same(world, plain, tmp_path, monkeypatch) -> None:
    recipe, members = world
    recipe, out = fusellm(recipe, store=str(tmp_path / "store")), tmp_path / "out"
    blocks = 3 * sum(source["blocks_chosen"] for source in plain["sources"].values())
    rows, loss = teacher_logits.block_rows, training.FusionTrainer.compute_loss
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(teacher_logits, "block_rows", Counted(rows, dies_at=GROUP + 3))
        distill.build(recipe, out, members)
    assert len(list((tmp_path / "store").glob("*/*.safetensors"))) == 1 and not out.exists()

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(teacher_logits, "block_rows", counted := Counted(rows))
        patch.setattr(training.FusionTrainer, "compute_loss", Counted(loss, dies_at=FIRST_STEPS + 2))
        distill.build(recipe, out, members)
    assert counted.calls == blocks - GROUP  # the group that was written is not read again
    partial = tmp_path / "out.partial"
    assert (partial / f"checkpoint-{FIRST_STEPS}" / training.COMPLETE).exists()
    (partial / "checkpoint-4").mkdir()  # one that was not written to its end

    with monkeypatch.context() as patch:
        patch.setattr(teacher_logits, "block_rows", counted := Counted(rows))
        patch.setattr(training.FusionTrainer, "compute_loss", trained := Counted(loss))
        found = distill.build(recipe, out, members)
    assert counted.calls == 0 and trained.calls == plain["steps"] - FIRST_STEPS
    assert found["tensors_sha256"] == plain["tensors_sha256"]
    assert found["held_out"] == plain["held_out"] and found["sources"] == plain["sources"]
    assert not partial.exists()


def test_every_step_counts_in_the_losses_that_are_told_also_of_an_interrupted_training(
    world, tmp_path, monkeypatch
) -> None:
    recipe, members = world
    recipe = {**recipe, "method": "clm", "train_tokens": 600, "checkpoint_steps": 3}
    losses: list[float] = []
    own = training.FusionTrainer.compute_loss

    def noted(*args: Any, **kwargs: Any) -> Any:
        value = own(*args, **kwargs)
        losses.append(float(value.detach()))
        return value

    with monkeypatch.context() as patch:
        patch.setattr(training.FusionTrainer, "compute_loss", noted)
        whole = distill.build(recipe, tmp_path / "whole", members)
    assert whole["steps"] == len(losses) and 11 <= len(losses) < 20 and len(losses) % 2 == 1
    means = [float(np.mean(losses[at : at + 2])) for at in range(0, len(losses), 2)]  # the last one of a single step
    assert whole["loss"] == pytest.approx(means, abs=1e-4)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(training.FusionTrainer, "compute_loss", Counted(own, dies_at=5))  # a checkpoint is after step 3
        distill.build(recipe, tmp_path / "cut", members)
    assert distill.build(recipe, tmp_path / "cut", members)["loss"] == whole["loss"]


class Counted:
    """A function that counts its calls, and may end the process at one of them; works as a method, too."""

    def __init__(self, function: Any, dies_at: int | None = None) -> None:
        self.function, self.calls, self.dies_at = function, 0, dies_at

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls == self.dies_at:
            raise Killed
        return self.function(*args, **kwargs)

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return lambda *args, **kwargs: self(instance, *args, **kwargs)


def test_a_finished_build_is_not_made_again_and_one_cut_off_while_it_was_moved_is(
    world, plain, tmp_path, monkeypatch
) -> None:
    recipe, members = world
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(builder, "_publish", half_published)
        distill.build(fusellm(recipe), out, members)
    assert (out / "config.json").exists()
    found = distill.build(fusellm(recipe), out, members)
    assert found["tensors_sha256"] == plain["tensors_sha256"]
    with monkeypatch.context() as patch:
        patch.setattr(builder, "load", killed)
        assert distill.build(fusellm(recipe), out, members) == found
        for other in ({"seed": 9}, {"sources": ["bytelevel", "metaspace"]}, {"target": "padded"}):
            with pytest.raises(ConfigError, match="holds another model already"):
                distill.build(fusellm(recipe, **other), out, members)


def killed(*args: Any, **kwargs: Any) -> None:
    raise Killed


def half_published(folder: Path, out: Path, result: Any) -> None:
    out.mkdir()
    (folder / "model" / "config.json").replace(out / "config.json")
    raise Killed


def test_a_source_reads_of_a_long_block_what_its_context_has_room_for(world, plain, tmp_path) -> None:
    """A block has as many tokens as the target's context, and may have more of a source's."""
    recipe, members = world
    short = configured(Path(members["padded"]), tmp_path / "short", max_position_embeddings=20)
    given = fusellm(recipe, sources=["padded"])
    whole = distill.build(given, tmp_path / "whole", members)
    found = distill.build(given, tmp_path / "out", {**members, "padded": str(short)})
    assert 0.3 < found["sources"]["padded"]["coverage"] < whole["sources"]["padded"]["coverage"]
    assert found["tokens_trained"] == whole["tokens_trained"]
    bits = [one["sources"]["padded"]["bits_per_byte"] for one in (found, whole)]
    assert bits[0] == pytest.approx(bits[1], rel=0.2)  # of what was read
    spelt = {**recipe, "method": "clm", "target": "padded", "context_length": 20}  # of which a space may be one more
    assert distill.build(spelt, tmp_path / "clm", {"padded": str(short)})["steps"] > 1


def test_a_full_cache_keeps_the_sources_that_were_read_before(world, tmp_path, monkeypatch) -> None:
    """Each takes hours, and the cache gives up what was not used for one."""
    recipe, members = world
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("LM_EVAL_DEEPEN_CACHE_SIZE", "20KB")
    real = builder.read_source

    def hours_later(*args):
        for path in tmp_path.rglob("*"):
            os.utime(path, (path.stat().st_atime - 4000, path.stat().st_mtime - 4000))
        return real(*args)

    monkeypatch.setattr(builder, "read_source", hours_later)
    found = distill.build(fusellm(recipe, store=None), tmp_path / "out", members)
    assert len(list((tmp_path / "lm_eval_deepen" / "distributions").glob("*/"))) >= 3 and found["covered"] > 0.2


def test_another_recipe_does_not_take_up_an_interrupted_build(world, tmp_path, monkeypatch) -> None:
    recipe, members = world
    control = {**recipe, "method": "clm"}
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(training.FusionTrainer, "compute_loss", killed)
        distill.build(control, tmp_path / "out", members)
    with pytest.raises(
        ConfigError, match=r"interrupted build of something else \(other learning_rate, seed\); delete it"
    ):
        distill.build({**control, "seed": 1, "learning_rate": 1e-4}, tmp_path / "out", members)


def test_models_and_lengths_that_do_not_fit_are_refused(world, tmp_path, monkeypatch) -> None:
    recipe, members = world
    with pytest.raises(ConfigError, match="context_length 1000 is above the 512 tokens of 'bytelevel'"):
        distill.build({**recipe, "method": "clm", "context_length": 1000}, tmp_path / "a", members)
    with pytest.raises(ConfigError, match="top_k 500 is above the 400 logits of 'bytelevel'"):
        distill.build(fusellm(recipe, top_k=500), tmp_path / "b", members)
    with monkeypatch.context() as patch:
        patch.setattr(builder.Member, "generates_only", True)
        with pytest.raises(ConfigError, match="model 'bytelevel' cannot score given text"):
            distill.build({**recipe, "method": "clm"}, tmp_path / "d", members)
    with pytest.raises(MemberError, match="cannot load"):
        distill.build({**recipe, "method": "clm"}, tmp_path / "c", {"bytelevel": str(tmp_path / "nothing")})


def test_batches_are_padded_where_nothing_is_learnt() -> None:
    blocks = [Tokens((9, 8), (1, 2, 3), np.arange(3)), Tokens((9, 8), (4,), np.arange(1))]
    targets = {
        n: Targets(
            np.full((size, 2), n + 5), np.full((size, 2), 0.25, np.float32), np.full(size, 0.5), np.ones(size, bool)
        )
        for n, size in ((0, 3), (1, 1))
    }
    data = training.TrainingBlocks(blocks, (1, 0, 1), targets.__getitem__)
    assert len(data) == 3
    batch = training.collate([data[0], data[1]])
    assert batch["input_ids"].tolist() == [[9, 8, 0, 0], [9, 8, 1, 2]]
    assert batch["labels"].tolist() == [[-100, 4, -100, -100], [-100, 1, 2, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch["fused_covered"].tolist() == [[False, True, False, False], [False, True, True, True]]
    assert batch["fused_ids"][:, :, 0].tolist() == [[0, 6, 0, 0], [0, 5, 5, 5]]
    assert batch["fused_rest"].tolist() == [[0, 0.5, 0, 0], [0, 0.5, 0.5, 0.5]]
