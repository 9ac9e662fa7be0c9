"""Slow, obvious references: one request, one position, one member at a time, no cache, no batch."""

from __future__ import annotations

import torch

from lm_eval_deepen.engine.prompts import Prompter, Span
from lm_eval_deepen.harness.model import DeepenLM


def member_logp(member, tokens) -> torch.Tensor:
    """Return next-token log-probabilities [1, V] by a plain forward pass over all the tokens."""
    with torch.no_grad():
        logits = member.lm.model(torch.tensor([list(tokens)])).logits[:, -1]
    return torch.log_softmax(logits.float() / member.config.temperature, dim=-1)


def fused_row(ensemble, prompts, main_tokens, continuation: bytes) -> torch.Tensor:
    """Return the fused log-probabilities [K] after a prompt and a continuation."""
    rows, here = [member_logp(ensemble.main, prompts[0].ids + tuple(main_tokens))], [True]
    for member, prompt in zip(ensemble.active[1:], prompts[1:], strict=True):
        same = member.codec.identity == ensemble.main.codec.identity
        tokens = prompt.ids + tuple(main_tokens) if same else member.codec.follow(prompt, continuation)
        if tokens is not None and len(tokens) > member.max_length:
            tokens = None
        here.append(tokens is not None)
        rows.append(member_logp(member, tokens or member.codec.prefix_ids))
    weights = ensemble.weights[: len(rows)] * torch.tensor(here)
    if ensemble.fuser is None:
        return rows[0][0]
    weights = (weights / weights.sum())[None] if weights.sum() > 0 else torch.eye(len(rows))[:1]
    if bool(ensemble.fuser.skip(rows, weights)[0]) or weights[0, 0] == 1:
        return rows[0][0]
    return ensemble.fuser.fuse(rows, weights).logp[0]


def score_span(ensemble, span: Span) -> list[float]:
    """Return the log-probability of every target token."""
    seen, values = b"", []
    for at, target in enumerate(span.target):
        row = fused_row(ensemble, span.prompts, span.target[:at], span.lead + seen[span.skip :])
        values.append(float(row[target]))
        if len(ensemble.active) > 1:
            seen += ensemble.main.codec.vocab.pieces[target]
    return values


def generate_ids(model: DeepenLM, context: str, steps: int) -> tuple[list[int], list[float]]:
    """Return greedily chosen main tokens and their log-probabilities, until EOS or `steps`."""
    ensemble = model.ensemble
    prompts = Prompter(ensemble).prompts(context, steps)
    ids: list[int] = []
    values: list[float] = []
    for _ in range(steps):
        seen = ensemble.main.codec.vocab.decode(ids) if len(ensemble.active) > 1 else b""
        row = fused_row(ensemble, prompts, ids, seen)
        token = int(row.argmax())
        if token in ensemble.main.eos_ids:
            break
        ids.append(token)
        values.append(float(row[token]))
    return ids, values
