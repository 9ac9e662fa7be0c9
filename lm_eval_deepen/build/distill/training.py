"""Continued training of the target with ``transformers.Trainer``; here are the data, the loss and the checkpoints."""

from __future__ import annotations

import json
import logging
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, SequentialSampler
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

from lm_eval_deepen.build.distill.corpus import Tokens
from lm_eval_deepen.build.distill.fusing import Targets
from lm_eval_deepen.build.distill.loss import IGNORED, FusedBatch, counted, distillation_loss
from lm_eval_deepen.build.distill.recipe import DistillRecipe
from lm_eval_deepen.errors import ConfigError, MemberError, StorageError, one_line
from lm_eval_deepen.harness.distributed import Ranks
from lm_eval_deepen.member.weights import check_weights, weights_reports
from lm_eval_deepen.storage import make_folder, read_json, reason, write_json

log = logging.getLogger(__name__)

COMPLETE = "complete"
CHECKPOINTS = 5
ALONE = Ranks()


@dataclass(frozen=True, eq=False)
class TrainingBlocks(Dataset):
    """Blocks in the order of training."""

    blocks: Sequence[Tokens]  # what the target reads
    order: Sequence[int]  # indices of blocks
    fused: Callable[[int], Targets] | None  # gives what the sources say of a block, by its index; None without sources
    # of which the length is one; what is missing are blocks without labels, of which nothing is learnt
    multiple: int = 1

    def __len__(self) -> int:
        return -(-len(self.order) // self.multiple) * self.multiple

    def __getitem__(self, at: int) -> dict[str, Any]:
        """Return inputs and labels [T]: at position i the model has read the prefix and i tokens of the text."""
        if at >= len(self.order):
            first = self[0]
            return {**first, "labels": [IGNORED] * len(first["labels"])}
        block = self.blocks[self.order[at]]
        lead = len(block.prefix) - 1
        example: dict[str, Any] = {
            "input_ids": [*block.prefix, *block.ids[:-1]],
            "labels": [IGNORED] * lead + list(block.ids),
            "lead": lead,
        }
        return example if self.fused is None else {**example, "targets": self.fused(self.order[at])}


def collate(examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return a batch, padded on the right: positions without a label are neither read by others nor learnt."""
    width = max(len(example["labels"]) for example in examples)
    shape = (len(examples), width)
    ids, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, IGNORED)
    for row, example in enumerate(examples):
        size = len(example["labels"])
        ids[row, :size] = torch.tensor(example["input_ids"])
        labels[row, :size] = torch.tensor(example["labels"])
        mask[row, :size] = 1
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if "targets" in examples[0]:
        batch |= _collated([(example["lead"], example["targets"]) for example in examples], width)
    return batch


def _collated(pairs: Sequence[tuple[int, Targets]], width: int) -> dict[str, Any]:
    entries = max(targets.ids.shape[1] for _, targets in pairs)
    ids = np.zeros((len(pairs), width, entries), dtype=np.int64)
    p = np.zeros((len(pairs), width, entries), dtype=np.float32)
    rest, covered = np.zeros((len(pairs), width), np.float32), np.zeros((len(pairs), width), bool)
    for row, (lead, targets) in enumerate(pairs):
        here = slice(lead, lead + len(targets.covered))
        ids[row, here, : targets.ids.shape[1]], p[row, here, : targets.p.shape[1]] = targets.ids, targets.p
        rest[row, here], covered[row, here] = targets.rest, targets.covered
    parts = {"fused_ids": ids, "fused_p": p, "fused_rest": rest, "fused_covered": covered}
    return {name: torch.from_numpy(part) for name, part in parts.items()}


class FusionTrainer(Trainer):
    """A trainer with the loss of FuseLLM that takes blocks in the order of its dataset."""

    def __init__(self, *args: Any, clm_weight: float, ranks: Ranks = ALONE, **kwargs: Any) -> None:
        """Take what ``Trainer`` takes, lambda, and the processes that share every batch."""
        super().__init__(*args, **kwargs)
        self.clm_weight, self.ranks = clm_weight, ranks
        self.model_accepts_loss_kwargs = False  # the loss is a mean over its batch

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss of a batch that `collate` made."""
        names = ("fused_ids", "fused_p", "fused_rest", "fused_covered")
        fused = FusedBatch(*(inputs[name] for name in names)) if names[0] in inputs else None
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        counts = None
        if self.ranks.count > 1:  # gradients are averaged over processes: each divides by an equal share of all counts
            shared = counted(inputs["labels"], fused)
            torch.distributed.all_reduce(shared)
            shared = (shared / self.ranks.count).clamp(min=1 / self.ranks.count)
            counts = shared[0], shared[1]
        loss = distillation_loss(outputs.logits, inputs["labels"], self.clm_weight, fused, counts)
        return (loss.total, outputs) if return_outputs else loss.total


class MarkComplete(TrainerCallback):
    """Marks checkpoints that were written to their end, and logs the loss up to each, and up to the last step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Have the loss logged where ``Trainer`` would forget it: it knows none of before a checkpoint."""
        control.should_log |= control.should_save or state.global_step >= state.max_steps

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the mark, when all processes have written their part."""
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        write_json(folder / COMPLETE, _sizes(folder))


def claim(path: Path, identity: Mapping[str, Any]) -> None:
    """Make the folder of an unfinished build, or accept the one that an interrupted build of the same left.

    Raises:
        ConfigError: it belongs to another build, or cannot be made.
    """
    folder, wanted = path.parent, json.loads(json.dumps(identity))
    try:
        make_folder(folder)
        if not path.exists():
            write_json(path, wanted, indent=1)
            return
    except (OSError, StorageError) as error:
        raise ConfigError(f"{folder} cannot be used ({reason(error)}); give another output folder") from error
    try:
        settings = dict(read_json(path))
    except (StorageError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{folder} holds an interrupted build, and what it says of itself is damaged ({error}); delete the folder "
            "to start anew"
        ) from error
    if settings != wanted:
        keys = sorted(key for key in {*settings, *wanted} if settings.get(key) != wanted.get(key))
        raise ConfigError(
            f"{folder} holds an interrupted build of something else (other {', '.join(keys)}); delete it to start "
            "anew, or go on with the recipe it belongs to"
        )


def last_checkpoint(folder: Path) -> str | None:
    """Return the last checkpoint that was written to its end, and whose files are as they were then."""
    folders = [path.parent for path in folder.glob(f"checkpoint-*/{COMPLETE}") if _is_whole(path)]
    return str(max(folders, key=lambda path: int(path.name.split("-")[1]))) if folders else None


def _is_whole(mark: Path) -> bool:
    try:
        return bool(read_json(mark) == _sizes(mark.parent))
    except StorageError as error:
        log.warning("%s: the checkpoint is left alone", error)
        return False


def _sizes(checkpoint: Path) -> dict[str, int]:
    """Return the bytes of a checkpoint's files, by name."""
    files = [path for path in checkpoint.rglob("*") if path.is_file() and path.name != COMPLETE]
    return {str(path.relative_to(checkpoint)): path.stat().st_size for path in sorted(files)}


def train(
    recipe: DistillRecipe, pretrained: str, data: TrainingBlocks, folder: Path, cpu: bool, ranks: Ranks = ALONE
) -> dict[str, Any]:
    """Train from the last complete checkpoint on, or from the start; write the model to ``folder/model``.

    The processes of `ranks` share every batch, and get the result of one process, up to rounding. With `cpu`, training
    stays on the CPU although there is an accelerator.

    Returns:
        Steps, and the mean loss over each tenth of them.

    Raises:
        MemberError: the target cannot be loaded, or its weights are not those of its files.
    """
    try:
        with weights_reports() as reports:
            model = AutoModelForCausalLM.from_pretrained(pretrained, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(pretrained)
    except (OSError, ValueError) as error:
        raise MemberError(
            f"target {recipe.target!r}: cannot load {pretrained!r} for training: {one_line(error)}"
        ) from error
    check_weights(reports, f"target {recipe.target!r}:")
    steps = math.ceil(len(data.order) / recipe.batch_size)
    data = replace(data, multiple=recipe.batch_size if ranks.count > 1 else 1)
    with _random_states_kept():
        trainer = FusionTrainer(
            model=model, args=_arguments(recipe, folder, steps, cpu, ranks), train_dataset=data,
            data_collator=collate, callbacks=[MarkComplete()], clm_weight=recipe.clm_weight, ranks=ranks,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=last_checkpoint(folder))
    if ranks.count > 1:
        trainer.save_model(str(folder / "model"))  # gathers what the processes share out
    else:
        model.save_pretrained(folder / "model")
    if ranks.index == 0:
        tokenizer.save_pretrained(folder / "model")
    logged = [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    return {"steps": steps, "loss": [round(value, 4) for value in tenths(logged, _tenth(steps))]}


def tenths(logged: Sequence[tuple[int, float]], size: int) -> list[float]:
    """Return the mean loss over each `size` steps, the last ones fewer.

    Each entry of `logged` is a step, and the mean loss since the last entry; there is one at the end of each tenth.
    """
    sums: dict[int, float] = {}
    before = 0
    for step, loss in logged:
        sums[(step - 1) // size] = sums.get((step - 1) // size, 0.0) + (step - before) * loss
        before = step
    return [total / (min((tenth + 1) * size, before) - tenth * size) for tenth, total in sums.items()]


def _tenth(steps: int) -> int:
    return max(1, math.ceil(steps / 10))


def _arguments(recipe: DistillRecipe, folder: Path, steps: int, cpu: bool, ranks: Ranks) -> TrainingArguments:
    # the first of these steps has the rate 0; the last step of all learns
    warmup = min(math.ceil(recipe.warmup * steps), steps - 1)
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=recipe.batch_size // ranks.count,
        adam_beta1=recipe.adam_betas[0],
        adam_beta2=recipe.adam_betas[1],
        bf16=recipe.precision == "bfloat16",
        gradient_checkpointing=recipe.gradient_checkpointing,
        num_train_epochs=1,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=warmup,
        weight_decay=recipe.weight_decay,
        seed=recipe.seed,
        full_determinism=not cpu and torch.cuda.is_available(),
        use_cpu=cpu,
        logging_steps=_tenth(steps),
        save_steps=recipe.checkpoint_steps or max(1, math.ceil(steps / CHECKPOINTS)),
        save_total_limit=2,
        report_to=[],
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # else batches are as many times larger, and the result is another
    return arguments


@contextmanager
def _random_states_kept() -> Iterator[None]:
    """Leave the process's random generators as they were: ``Trainer`` seeds all of them."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
