"""The published processor's golden tensors, and the same ground with an in-test transcription of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from lm_eval_deepen.fusion.deepen import Deepen, DeepenFuser
from lm_eval_deepen.relative.matrix import DenseMatrix
from lm_eval_deepen.relative.rows_from_embeddings import MatrixSpec, build_matrix
from lm_eval_deepen.relative.support import make_side
from lm_eval_deepen.vocabulary.byte_vocab import ByteVocab

FOLDER = Path(__file__).resolve().parents[2].parent / "shared" / "golden"
FILES = sorted(FOLDER.glob("*.safetensors")) if FOLDER.is_dir() else []


@dataclass
class Case:
    """Inputs and published outputs; member 0 is the main one."""

    embeddings: list[Tensor]
    anchor_ids: list[Tensor]
    relative: list[Tensor]
    logits: list[Tensor]
    fused: Tensor
    next_token: Tensor
    weights: list[float]
    learning_rate: float
    steps: int
    eos: int

    def vocabulary(self, i: int) -> ByteVocab:
        """Pieces in which the case's anchors, and nothing else, are shared."""
        pieces = [b"own%d" % w for w in range(len(self.embeddings[i]))]
        for a, w in enumerate(self.anchor_ids[i].tolist()):
            pieces[w] = b"anchor%05d" % a
        if i:
            return ByteVocab(tuple(pieces))
        pieces[self.eos] = b""
        return ByteVocab(tuple(pieces), frozenset({self.eos}), frozenset(), (self.eos,))

    def matrices(self) -> list:
        """Relative matrices from the embeddings, by the product's builder."""
        spec = MatrixSpec("reference", 100.0, 0, "all")
        return [
            build_matrix(f"m{i}", self.vocabulary(i), rows, self.anchor_ids[i].tolist(), {}, spec)
            for i, rows in enumerate(self.embeddings)
        ]

    def fuse(self, matrices: list) -> Tensor:
        """Fused log-probabilities by the product's fuser, skipped rows left to the main member."""
        compat = {**Deepen.COMPAT["reference"], "steps": self.steps, "learning_rate": self.learning_rate}
        sides = [
            make_side(self.vocabulary(i), matrix, self.anchor_ids[i].tolist(), {}, "all")
            for i, matrix in enumerate(matrices)
        ]
        fuser = DeepenFuser(self.vocabulary(0), sides, Deepen(**compat), {})
        logp = [torch.log_softmax(x, dim=-1) for x in self.logits]
        weights = torch.tensor(self.weights).expand(len(self.fused), -1)
        return torch.where(fuser.skip(logp, weights)[:, None], logp[0], fuser.fuse(logp, weights).logp)

    def check_matrices(self) -> None:
        """Compare the product's matrices with the published ones."""
        for got, expected in zip(self.matrices(), self.relative, strict=True):
            torch.testing.assert_close(got.relative, expected, atol=1e-5, rtol=0)

    def check_fused(self, matrices: list) -> None:
        """Compare the product's fused rows with the published ones."""
        got = self.fuse(matrices)
        torch.testing.assert_close(got, torch.log_softmax(self.fused, dim=-1), atol=1e-4, rtol=0)
        assert torch.equal(got.argmax(-1), self.next_token)


def load(path: Path) -> Case:
    with safe_open(path, framework="pt") as file:
        info = file.metadata()
        parts = {
            name: [file.get_tensor(f"{name}_{i}") for i in range(int(info["num_members"]))]
            for name in ("embedding", "anchor_ids", "relative_matrix", "logits")
        }
        return Case(
            *parts.values(),
            fused=file.get_tensor("fused_logits"),
            next_token=file.get_tensor("next_token"),
            weights=json.loads(info["weights"]),
            learning_rate=float(info["learning_rate"]),
            steps=int(info["steps"]),
            eos=int(info["eos_token_id"]),
        )


@pytest.mark.skipif(not FILES, reason="no golden tensors beside the checkout")
def test_golden_files_are_found() -> None:
    assert len(FILES) >= 4


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_published_tensors_are_reproduced(path: Path) -> None:
    case = load(path)
    case.check_matrices()
    case.check_fused([DenseMatrix(relative) for relative in case.relative])
    case.check_fused(case.matrices())


def published(case: Case) -> Case:
    """Fill in the outputs as the published code computes them: row by row, torch's AdamW, autograd."""
    case.relative = []
    for rows, ids in zip(case.embeddings, case.anchor_ids, strict=True):
        cosines = torch.cosine_similarity(rows[:, None, :], rows[ids][None, :, :], dim=-1)
        case.relative.append(torch.softmax(100 * torch.nn.functional.normalize(cosines, dim=-1), dim=-1))
    fused = []
    for t in range(len(case.logits[0])):
        target = sum(
            w * torch.softmax(x[t], dim=-1) @ matrix
            for w, x, matrix in zip(case.weights, case.logits, case.relative, strict=True)
        )
        logits = case.logits[0][t].clone()
        if logits.argmax() != case.eos and case.learning_rate > 0:
            logits = search(logits, target, case)
        fused.append(logits)
    case.fused = torch.stack(fused)
    case.next_token = case.fused.argmax(-1)
    return case


def search(logits: Tensor, target: Tensor, case: Case) -> Tensor:
    logits.requires_grad_(True)
    optimizer = torch.optim.AdamW([logits], lr=case.learning_rate)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10, eta_min=case.learning_rate / 4)
    for _ in range(case.steps):
        optimizer.zero_grad()
        log_q = (torch.softmax(logits, dim=-1) @ case.relative[0]).log()
        torch.nn.functional.kl_div(log_q, target, reduction="none").mean().backward()
        optimizer.step()
        scheduler.step()
    return logits.detach()


def synthetic(members: int, learning_rate: float, steps: int, seed: int) -> Case:
    g = torch.Generator().manual_seed(seed)
    sizes = [(120, 16), (150, 24), (90, 12), (200, 20)][:members]
    embeddings = [torch.randn(v, d, generator=g) for v, d in sizes]
    # id 3 is the main member's EOS and no anchor
    anchors = [(4 + torch.randperm(v - 4, generator=g)[:40]).sort().values for v, _ in sizes]
    logits = [3 * torch.randn(12, v, generator=g) for v, _ in sizes]
    logits[0][2, 3] = logits[0][9, 3] = 20.0  # rows that want to stop
    weights = torch.rand(members, generator=g) + 0.2
    return published(
        Case(
            embeddings,
            anchors,
            [],
            logits,
            torch.empty(0),
            torch.empty(0),
            (weights / weights.sum()).tolist(),
            learning_rate,
            steps,
            eos=3,
        )
    )


@pytest.mark.parametrize(
    ("members", "learning_rate", "steps"),
    [(2, 0.15, 5), (2, 0.0, 5), (3, 0.5, 5), (4, 0.1, 10), (2, 0.3, 13)],
)
def test_a_transcription_of_the_published_code_is_reproduced(members: int, learning_rate: float, steps: int) -> None:
    case = synthetic(members, learning_rate, steps, seed=members)
    case.check_matrices()
    # From the same matrices: a learning rate of 0.5 turns the last bit of a matrix into 3e-4.
    case.check_fused([DenseMatrix(relative) for relative in case.relative])
    unfused = (case.fused == case.logits[0]).all(-1)
    assert unfused.sum() == (12 if learning_rate == 0 else 2)
