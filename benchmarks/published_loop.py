"""Our greedy texts against a plain token-by-token loop of the published procedure, on identical inputs.

    python benchmarks/published_loop.py --data DIR [--limit 50] [--max-new 10] [--learning-rate 0.15]

DIR holds ``test.jsonl`` (question) and ``fewshot.jsonl`` (question, answer) of Natural Questions. Members: SmolLM2,
the main one, and Gemma 3. Ours runs with ``compat: reference``. The loop knows nothing of this package but the
anchors, which are its input: it builds dense rows from the embeddings, encodes every member's whole text anew at each
step, keeps no cache, and searches with torch's own AdamW and autograd, as the released code does (arXiv 2404.12715;
OrangeInSouth/DeePEn). One thing is corrected: the other member gets the text so far, not the main tokenizer's
spelling of it, in which a line feed is ``<0x0A>`` or ``Ċ``.

Prints one line per question, what is known of each difference, and one JSON line last.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from lm_eval_deepen.build.demo_models import GEMMA3, SMOLLM2, prepare
from lm_eval_deepen.engine.following import Job
from lm_eval_deepen.engine.generation import generate
from lm_eval_deepen.engine.prompts import Prompter
from lm_eval_deepen.harness.model import DeepenLM
from lm_eval_deepen.vocabulary.anchors import anchor_ids, find_anchors

STOP = "\n"
STEPS, TEMPERATURE = 5, 100.0
BLOCK = 8192  # rows of a matrix that are built at once


@dataclass
class Text:
    """A generated text.

    Attributes:
        ids: the main member's tokens.
        text: what they spell, up to the stop.
        inputs: the members' tokens before each step.
        top: per step, the two best tokens and the difference of their fused logits.
        changed: steps at which the search chose another token than the main member alone.
    """

    ids: list[int]
    text: str
    inputs: list[list[list[int]]] = field(default_factory=list)
    top: list[tuple[int, int, float]] = field(default_factory=list)
    changed: int = 0


def questions(folder: Path, limit: int) -> list[str]:
    """Return the published prompts of the first questions."""

    def rows(name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (folder / name).read_text("utf-8").split("\n") if line.strip()]

    shots = "".join(f"Question:{row['question']}\nAnswer:{row['answer']}\n" for row in rows("fewshot.jsonl"))
    return [f"Answer this questions:\n{shots}Question:{row['question']}\nAnswer:" for row in rows("test.jsonl")[:limit]]


# --- ours


def ours(folders: list[str], prompts: list[str], args: argparse.Namespace) -> tuple[list[Text], list[list[int]], float]:
    """Return our texts, every member's anchors as ids, and the seconds that generation took."""
    model = DeepenLM(
        pretrained=folders[0],
        members=folders,
        weights=args.weights,
        dtype="float32",
        device="cpu",
        method="deepen",
        compat="reference",
        learning_rate=args.learning_rate,
        max_anchors=args.anchors,
        matrix_dir=args.matrix_dir,
        self_check=False,
    )
    ensemble, prompter = model.ensemble, Prompter(model.ensemble)
    vocabularies = [member.codec.vocab for member in ensemble.members]
    options = ensemble.config.options_dict()
    names = [member.name for member in ensemble.members]
    anchors = find_anchors(vocabularies, max_anchors=args.anchors, seed=options["anchor_seed"], names=names)
    jobs = [Job(prompter.prompts(prompt, args.max_new), args.max_new, (STOP,)) for prompt in prompts]
    texts: list[Text] = [Text([], "")] * len(jobs)
    start = time.perf_counter()
    for index, found in generate(ensemble, jobs, args.batch_size):
        text = model.tok_decode(found.ids).split(STOP)[0]
        job, pieces = jobs[index], ensemble.main.codec.vocab
        before = [(tuple(found.ids[:n]), pieces.decode(found.ids[:n])) for n in range(len(found.ids) + 1)]
        inputs = [[list(ensemble.path(m, job.prompts[m], *seen) or ()) for m in range(2)] for seen in before]
        texts[index] = Text(found.ids, text, inputs)
    return texts, [list(anchor_ids(vocabulary, anchors)) for vocabulary in vocabularies], time.perf_counter() - start


# --- the loop


def relative_matrix(embeddings: Tensor, anchors: list[int]) -> Tensor:
    """Return the published rows [V, A]: softmax of 100 times the L2-normalised cosines with the anchors."""
    unit = nn.functional.normalize(embeddings.float(), dim=1)
    columns = unit[anchors].T
    found = torch.empty(len(unit), len(anchors))
    for start in range(0, len(unit), BLOCK):
        cosines = unit[start : start + BLOCK] @ columns
        found[start : start + BLOCK] = torch.softmax(TEMPERATURE * nn.functional.normalize(cosines, dim=1), dim=1)
    return found


class Published:
    """The published procedure, one token after the other."""

    def __init__(self, folders: list[str], anchors: list[list[int]], args: argparse.Namespace) -> None:
        """Load models and tokenizers, and build the members' matrices."""
        self.args = args
        self.tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in folders]
        self.models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for folder in folders]
        with torch.no_grad():
            self.matrices = [
                relative_matrix(model.get_input_embeddings().weight, own)
                for model, own in zip(self.models, anchors, strict=True)
            ]

    def logits(self, m: int, ids: list[int]) -> Tensor:
        """Return the next-token logits [1, V_m] of a member, by one forward pass over all of its text."""
        with torch.no_grad():
            return self.models[m](torch.tensor([ids]), logits_to_keep=1).logits[:, -1].float()

    def search(self, logits: list[Tensor]) -> Tensor:
        """Return the main member's logits [1, V_0] after the search."""
        parts = [torch.softmax(own, dim=-1) @ matrix for own, matrix in zip(logits, self.matrices, strict=True)]
        average = sum(weight * part for weight, part in zip(self.args.weights, parts, strict=True))
        found = logits[0].clone().requires_grad_(True)
        rate = self.args.learning_rate
        optimizer = torch.optim.AdamW([found], lr=rate, betas=(0.9, 0.999))
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10, eta_min=rate / 4)
        criterion = nn.KLDivLoss(reduction="mean")
        for _ in range(STEPS):
            loss = criterion(torch.log(torch.softmax(found, dim=-1) @ self.matrices[0]), average)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
        return found.detach()

    def text(self, prompt: str) -> Text:
        """Return the greedy text after a prompt."""
        main, other = self.tokenizers
        head, end = main(prompt)["input_ids"], main.eos_token_id
        found = Text([], "")
        for _ in range(self.args.max_new):
            so_far = main.decode(found.ids, clean_up_tokenization_spaces=False)
            inputs = [head + found.ids, other(prompt + so_far)["input_ids"]]
            logits = [self.logits(m, ids) for m, ids in enumerate(inputs)]
            fused = logits[0] if int(logits[0].argmax()) == end else self.search(logits)
            (first, second), (best, next_best) = fused[0].topk(2).indices.tolist(), fused[0].topk(2).values.tolist()
            found.inputs.append(inputs)
            found.top.append((first, second, best - next_best))
            found.changed += first != int(logits[0].argmax())
            if first == end:
                break
            found.ids.append(first)
            if STOP in main.decode(found.ids, clean_up_tokenization_spaces=False):
                break
        found.text = main.decode(found.ids, skip_special_tokens=True).split(STOP)[0]
        return found


# --- both


def difference(mine: Text, theirs: Text, tokenizer: Any) -> dict[str, Any] | None:
    """Return where two texts part and what is known of that step; None where they are equal."""
    if mine.ids == theirs.ids:
        return None
    at = next((n for n, (a, b) in enumerate(zip(mine.ids, theirs.ids, strict=False)) if a != b), None)
    at = min(len(mine.ids), len(theirs.ids)) if at is None else at
    first, second, margin = theirs.top[min(at, len(theirs.top) - 1)]
    chosen = mine.ids[at] if at < len(mine.ids) else tokenizer.eos_token_id
    same = at < len(theirs.inputs) and mine.inputs[at] == theirs.inputs[at]
    return {
        "step": at,
        "ours": tokenizer.decode([chosen]),
        "theirs": tokenizer.decode([first]),
        "their_second": tokenizer.decode([second]),
        "margin": margin,
        "ours_is_their_second": chosen == second,
        "same_member_inputs": same,
        "same_text": mine.text == theirs.text,
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run both, compare, and return what the last line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with test.jsonl and fewshot.jsonl")
    parser.add_argument("--limit", type=int, default=50)
    parser.add_argument("--max-new", type=int, default=10, help="tokens of the main member (default: the task's)")
    parser.add_argument("--learning-rate", type=float, default=0.15)
    parser.add_argument("--weights", type=float, nargs=2, default=[0.5, 0.5])
    parser.add_argument("--anchors", type=int, default=4000)
    parser.add_argument("--batch-size", type=int, default=8, help="of ours; the loop takes one question at a time")
    parser.add_argument("--matrix-dir", help="where ours keeps its dense matrices (5 GB; default: the user's cache)")
    parser.add_argument("--models", nargs=2, metavar="FOLDER", help="instead of SmolLM2 and Gemma 3, main first")
    args = parser.parse_args(argv)
    folders = args.models or [str(prepare(model)) for model in (SMOLLM2, GEMMA3)]
    prompts = questions(args.data, args.limit)
    mine, anchors, seconds = ours(folders, prompts, args)
    print(f"ours: {len(mine)} texts in {seconds:.1f} s", flush=True)
    gc.collect()  # its dense matrices, before the loop builds its own
    loop = Published(folders, anchors, args)
    parted, margins, changed, theirs_s = [], [], 0, 0.0
    for n, prompt in enumerate(prompts):
        start = time.perf_counter()
        theirs = loop.text(prompt)
        theirs_s += time.perf_counter() - start
        margins += [margin for *_, margin in theirs.top]
        changed += theirs.changed
        found = difference(mine[n], theirs, loop.tokenizers[0])
        print(f"{n:4} {'same' if found is None else 'DIFFERENT'} {theirs.text!r}", flush=True)
        if found is not None:
            parted.append({"question": n, **found})
            print(f"     ours {mine[n].text!r}: {json.dumps(found)}", flush=True)
    versions = {package: version(package) for package in ("torch", "transformers", "lm_eval")}
    summary = {
        "questions": len(prompts),
        "same_tokens": len(prompts) - len(parted),
        "same_texts": len(prompts) - sum(not one["same_text"] for one in parted),
        "steps": len(margins),
        "steps_changed_by_fusion": changed,
        "smallest_margin": min(margins, default=None),
        "seconds_ours": round(seconds, 1),
        "seconds_loop": round(theirs_s, 1),
        "threads": torch.get_num_threads(),
        "learning_rate": args.learning_rate,
        "weights": args.weights,
        "anchors": args.anchors,
        "max_new": args.max_new,
        **versions,
        "different": parted,
    }
    print(json.dumps(summary))
    return summary


if __name__ == "__main__":
    main()
