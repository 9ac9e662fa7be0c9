"""Slow, obvious references of the fusion methods: one row at a time, pieces as bytes, no tensors but at the ends."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lm_eval_deepen.errors import VocabularyError
from lm_eval_deepen.fusion.base import MemberView
from lm_eval_deepen.vocabulary.byte_vocab import ByteVocab

END = "end of text"
Event = bytes | str


def events(vocab: ByteVocab, row: Tensor, with_end: bool = True) -> dict[Event, float]:
    """The probabilities of pieces as bytes, and of the end, given that the next piece is one of these."""
    found: dict[Event, float] = {}
    apart = vocab.unused | (vocab.control - set(vocab.eos))
    for i, p in enumerate(row.double().exp().tolist()):
        key = END if i in vocab.eos else vocab.pieces[i]
        if i in apart or not key or (key == END and not with_end):
            continue
        found[key] = found.get(key, 0.0) + p
    total = sum(found.values())
    return {key: p / total for key, p in found.items()}


def as_row(out: ByteVocab, main: ByteVocab, own: Tensor, fused: dict[Event, float]) -> Tensor:
    """The fused row [K] from the fused probabilities of events: equal ids in proportion to the main member's."""
    p = own.double().exp().tolist()
    total = sum(value for i, value in enumerate(p) if i not in main.unused)
    p = [value / total for value in p]
    control = [i for i in main.control if i not in main.eos]
    kept = 1 - sum(p[i] for i in control)
    added = {piece: n for n, piece in enumerate(out.pieces) if n >= len(main)}
    row = [0.0] * len(out)
    for i in control:
        row[i] = p[i]
    for key, mass in fused.items():
        ids = sorted(set(main.eos)) if key == END else main.ids_of.get(key, ())
        if not ids:
            row[added[key]] = mass * kept
            continue
        own_mass = sum(p[i] for i in ids)
        for i in ids:
            row[i] = mass * kept * (p[i] / own_mass if own_mass else 1 / len(ids))
    return torch.tensor(row, dtype=torch.float64)


def gac(members: Sequence[MemberView], logp: Sequence[Tensor], weights: Iterable[float]) -> dict[Event, float]:
    """The weighted sum of the members' probabilities of every piece that one of them has."""
    fused: dict[Event, float] = {}
    for member, row, weight in zip(members, logp, weights, strict=True):
        for key, p in (events(member.vocabulary, row) if weight else {}).items():
            fused[key] = fused.get(key, 0.0) + float(weight) * p
    return fused


def first_token(member: MemberView, piece: bytes) -> bytes | None:
    """The bytes of the first token that a member spells some bytes with."""
    if member.spelling is None:
        return next((piece[:n] for n in range(len(piece), 0, -1) if piece[:n] in member.vocabulary.ids_of), None)
    try:
        ids = member.spelling.encode(piece)
    except VocabularyError:  # a text that this tokenizer alters
        return None
    return member.vocabulary.pieces[ids[0]] if ids else None


def unite(
    members: Sequence[MemberView], logp: Sequence[Tensor], weights: Iterable[float], k: int, tail: str
) -> dict[Event, float]:
    """The average over the union of the members' k likeliest pieces, each member's scores normalised over it."""
    weights = [float(weight) for weight in weights]
    rows_of = enumerate(zip(members, logp, weights, strict=True))
    own = [events(m.vocabulary, row) if w or not i else {} for i, (m, row, w) in rows_of]
    candidates = {key for found in own for key in sorted(found, key=found.__getitem__, reverse=True)[:k]}
    fused = dict.fromkeys(candidates, 0.0)
    for member, found, weight in zip(members, own, weights, strict=True):
        if not weight:
            continue
        scores = {}
        for key in candidates:
            first = key if key in found or isinstance(key, str) else first_token(member, key)
            scores[key] = 0.0 if first is None else found.get(first, 0.0)
        total = sum(scores.values())
        for key, score in scores.items():
            fused[key] += weight * score / total
    total = sum(fused.values())
    inside = sum(own[0].get(key, 0.0) for key in candidates) if tail == "main" else 1.0
    rest = {key: p for key, p in own[0].items() if key not in candidates} if tail == "main" else {}
    return {**rest, **{key: p / total * inside for key, p in fused.items()}}


def mapped(
    members: Sequence[MemberView],
    logp: Sequence[Tensor],
    weights: Iterable[float],
    maps: Sequence[dict[bytes, dict[bytes, float]]],
) -> dict[Event, float]:
    """The average over the main member's pieces, the other members' pieces going where their maps say."""
    fused: dict[Event, float] = {}
    for m, (member, row, weight) in enumerate(zip(members, logp, weights, strict=True)):
        for key, p in (events(member.vocabulary, row) if weight else {}).items():
            ways = {key: 1.0} if m == 0 or isinstance(key, str) else maps[m - 1][key]
            for target, share in ways.items():
                fused[target] = fused.get(target, 0.0) + float(weight) * p * share
    total = sum(fused.values())
    return {key: p / total for key, p in fused.items()}


def others(weights, masses, keys, average):
    """Other averages of classes: text by class, and the masses of text and of end."""
    ends = [mass.get(END, 0.0) for mass in masses]
    texts = [sum(mass.get(key, 0.0) for key in keys) for mass in masses]
    given = [{key: mass.get(key, 0.0) / text for key in keys} for mass, text in zip(masses, texts, strict=True)]
    end = sum(w * own for w, own in zip(weights, ends, strict=True))
    text = sum(w * own for w, own in zip(weights, texts, strict=True))
    shares = [w * own / text for w, own in zip(weights, texts, strict=True)]
    if isinstance(average, list):
        least = [1e-12 if e < 0 else 2.0**-149 for e in average]
        pooled = pooled_product(
            [{key: max(q, low) for key, q in own.items()} for own, low in zip(given, least, strict=True)], average
        )
        ends = [b or 1e-12 if e > 0 else max(b, 1e-12) for b, e in zip(ends, average, strict=True)]
        stop = pooled_product([{"text": a, "end": b} for a, b in zip(texts, ends, strict=True)], average)
        return pooled, stop["text"], stop["end"]
    if average == "consistent":
        mean = {key: sum(s * own[key] for s, own in zip(shares, given, strict=True)) for key in keys}
        filters, counts = [], []
        for own in given:
            least = math.exp(-2)
            said = [key for key in keys if own[key] + given[0][key] > 1e-12]
            scores = {key: (math.exp(-2 * abs(own[key] - mean[key])) - least) / (1 - least) for key in said}
            entropy = -sum(q * math.log(q) for q in own.values() if q > 0)
            counts.append(sum(scores.values()) / (entropy + 1e-12))
            size = sum(scores.values()) / len(scores)
            filters.append({key: scores.get(key, 0.0) / size for key in keys})
        counts = [s * count for s, count in zip(shares, counts, strict=True)]
        counts[0] = max(counts[0], sum(counts[1:]))
        filters[0] = dict.fromkeys(keys, 1.0)
        pairs = list(zip(counts, filters, given, strict=True))
        pooled = {key: sum(w * f[key] * own[key] for w, f, own in pairs) for key in keys}
    else:
        pooled = {}
        for key in keys:
            values = [max(own[key], 2.0**-149) for own in given]
            pooled[key] = power_mean(values, shares, {"min": -math.inf, "max": math.inf}.get(average, average))
    total = sum(pooled.values())
    return {key: value / total for key, value in pooled.items()}, text, end


def power_mean(values, shares, power):
    """The mean of numbers above 0, in steps that neither overflow nor underflow."""
    if math.isinf(power):
        return min(values) if power < 0 else max(values)
    extreme = min(values) if power < 0 else max(values)
    return extreme * sum(s * (q / extreme) ** power for s, q in zip(shares, values, strict=True)) ** (1 / power)


def pooled_product(given, exponents):
    """A product of experts; beside a negative exponent, only of what the other members find plausible."""
    logs = {key: sum(e * math.log(own[key]) for e, own in zip(exponents, given, strict=True)) for key in given[0]}
    if min(exponents) < 0:
        liked = {
            key: sum(max(e, 0) * math.log(own[key]) for e, own in zip(exponents, given, strict=True)) for key in logs
        }
        most, scale = max(liked.values()), sum(max(e, 0) for e in exponents)
        liked = {key: (value - most) / scale for key, value in liked.items()}
        best = max(value for key, value in logs.items() if liked[key] >= math.log(0.1))
        logs = {
            key: value if liked[key] >= math.log(0.1) else best + min(liked[key], math.log(1e-12))
            for key, value in logs.items()
        }
    top = max(logs.values())
    total = sum(math.exp(value - top) for value in logs.values())
    return {key: math.exp(value - top) / total for key, value in logs.items()}


def classes(
    members: Sequence[MemberView],
    logp: Sequence[Tensor],
    weights: Iterable[float],
    anchor_of: Sequence[dict[bytes, bytes | None]],
    average: str | float | list[float],
) -> dict[Event, float]:
    """The average over classes of pieces, a class's mass shared in proportion to the main member's own.

    Args:
        members: the main one first.
        logp: a row of each.
        weights: all above 0.
        anchor_of: for every member the anchor that stands for a piece, None where none does.
        average: as the option; ``geometric`` and a product pool text, and text against end.
    """
    weights = [float(weight) for weight in weights]
    own = [events(member.vocabulary, row) for member, row in zip(members, logp, strict=True)]
    masses = []
    for found, anchors in zip(own, anchor_of, strict=True):
        mass: dict[Event | None, float] = {}
        for key, p in found.items():
            anchor = key if isinstance(key, str) else anchors[key]
            mass[anchor] = mass.get(anchor, 0.0) + p
        masses.append(mass)
    keys = {key for mass in masses for key in mass}
    if average == "linear":
        mixed = {key: sum(w * mass.get(key, 0.0) for w, mass in zip(weights, masses, strict=True)) for key in keys}
        end = mixed.pop(END, 0.0)
        text = sum(mixed.values())
    elif average != "geometric":
        mixed, text, end = others(weights, masses, keys - {END}, average)
    else:
        ends = [mass.get(END, 0.0) for mass in masses]
        mixed = {key: 1.0 for key in keys if key != END}
        for w, mass, own_end in zip(weights, masses, ends, strict=True):
            for key in mixed:
                mixed[key] *= max(mass.get(key, 0.0) / (1 - own_end), 1e-12) ** w
        text = end = 1.0
        for w, own_end in zip(weights, ends, strict=True):
            text, end = text * (1 - own_end) ** w, end * own_end**w
        text, end = text / (text + end), end / (text + end)
    reached = {key: p for key, p in mixed.items() if masses[0].get(key, 0.0) > 0}  # the others have no piece to go to
    total = sum(reached.values())
    fused: dict[Event, float] = {END: end}
    for key, p in own[0].items():
        if not isinstance(key, str):
            anchor = anchor_of[0][key]
            fused[key] = p / masses[0][anchor] * reached[anchor] / total * text if anchor in reached else 0.0
    return fused
