"""Covers: another member's next event where the main token ends inside one of its own, against sums over everything."""

from __future__ import annotations

import itertools

import naive
import pytest
import torch
from harness import deepen, requests

from lm_eval_deepen.engine.covers import NOTHING
from lm_eval_deepen.engine.drafts import drafter
from lm_eval_deepen.engine.following import Job, path_of
from lm_eval_deepen.engine.generation import generate
from lm_eval_deepen.engine.prompts import Prompter
from lm_eval_deepen.engine.scoring import score
from lm_eval_deepen.errors import ConfigError
from lm_eval_deepen.harness.model import configure

CONTEXTS = ["The quick brown fox", "Question: 1 + 1?\nAnswer:", "café 中国", "walk", ""]
CHOICES = [" jumps over the lazy dog", " two 🙂 walking", "\n\nmoon landing", "ing and singing"]
REQUESTS = list(itertools.product(CONTEXTS, CHOICES))
ORDERS = [("bytelevel", "metaspace"), ("metaspace", "bytelevel"), ("bytelevel", "metaspace", "padded")]


@pytest.fixture(scope="module", params=ORDERS, ids="+".join)
def make(request, pico, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("matrices"))

    def make(**options):
        options = {"covers": "on", **options}
        return deepen(*(pico[name] for name in request.param), matrix_dir=folder, batch_size=2, **options)

    return make


def word_of(vocab, path):
    """Return the tokens since the last space or line break (32 bytes at most), and their bytes."""
    at, data = len(path), b""
    while at and vocab.pieces[path[at - 1]] and len(data) + len(vocab.pieces[path[at - 1]]) <= 32:
        at -= 1
        data = vocab.pieces[path[at]] + data
        if data[:1] in (b" ", b"\n"):
            break
    return tuple(path[at:]), data


def covered(ensemble, m, main_path, path):
    """Return member `m`'s distribution [V_m] of what comes next: every prefix of its tokens, every piece of its own."""
    main, other = ensemble.main.codec, ensemble.active[m].codec
    reader = ensemble.covers[m]
    tokens, word = word_of(main.vocab, main_path)
    masses, pending, log_path = {}, b"", 0.0
    whole = naive.member_logp(ensemble.active[m], path)[0].double()
    # backwards: the probability of the tokens behind a cover divides that of the pieces that begin there
    for at in range(len(path) - 1, 0, -1):
        piece = other.vocab.pieces[path[at]]
        pending = piece + pending
        if not piece or not word.endswith(pending):
            break
        row = naive.member_logp(ensemble.active[m], path[:at])[0].double()
        log_path += float(row[path[at]])
        for token, text in enumerate(other.vocab.pieces):
            if token in other.vocab.control or not text.startswith(pending) or text == pending:
                continue
            spelt = main.follow(NOTHING, word + text[len(pending) :])
            if spelt is None or spelt[: len(tokens)] != tokens or len(spelt) == len(tokens):
                continue
            bytes_ = reader.stand_in(main.vocab.pieces[spelt[len(tokens)]])
            ids = other.vocab.ids_of.get(bytes_)
            if ids:
                masses[ids[0]] = masses.get(ids[0], 0.0) + float((row[token] - log_path).exp())
    p = whole.exp()
    for token, mass in masses.items():
        p[token] += mass
    return (p / p.sum()).log().float()[None], bool(masses)


def naive_score(ensemble, span):
    """Return the log-probability of every target, every member's row covered; and in how many rows that changed it."""
    seen, values, changed = b"", [], 0
    for at, target in enumerate(span.target):
        paths = span.paths(ensemble, at)
        rows = [naive.member_logp(ensemble.main, paths[0])]
        for m in range(1, len(ensemble.active)):
            if paths[m] is None:
                rows.append(rows[0].new_zeros(1, ensemble.active[m].vocab_size))
                continue
            row, here = covered(ensemble, m, paths[0], paths[m])
            changed += here
            rows.append(row)
        weights = ensemble.weights * torch.tensor([path is not None for path in paths])
        values.append(float(ensemble.fuser.fuse(rows, (weights / weights.sum())[None]).logp[0, target]))
        seen += ensemble.main.codec.vocab.pieces[target]
    return values, changed


def test_scoring_equals_the_sum_over_all_covers(make):
    ensemble = make().ensemble
    prompter = Prompter(ensemble)
    spans = [prompter.span(*request) for request in REQUESTS]
    found, changed = dict(score(ensemble, spans, 16)), 0
    for index, span in enumerate(spans):
        expected, here = naive_score(ensemble, span)
        changed += here
        assert found[index].logp == pytest.approx(expected, abs=5e-4)
    assert changed > 5


def naive_row(ensemble, job, ids):
    """Return the fused distribution [K] after a prompt and the main member's tokens, others' rows covered."""
    data = ensemble.main.codec.vocab.decode(ids)
    paths = [path_of(ensemble, m, job, tuple(ids), data) for m in range(len(ensemble.active))]
    rows = [naive.member_logp(ensemble.main, paths[0])]
    for m in range(1, len(paths)):
        if paths[m] is None:
            rows.append(rows[0].new_zeros(1, ensemble.active[m].vocab_size))
        else:
            rows.append(covered(ensemble, m, paths[0], paths[m])[0])
    weights = ensemble.weights * torch.tensor([path is not None for path in paths])
    return ensemble.fuser.fuse(rows, (weights / weights.sum())[None]).logp[0]


@pytest.mark.parametrize("speculate", ["off", "lookup"])
def test_generation_equals_the_sum_over_all_covers(make, speculate):
    """In a batch, with texts that end and others that take their places; drafts change no text."""
    ensemble = make(speculate=speculate).ensemble
    contexts = [*CONTEXTS, "She was walking and talk", "10 + 20 = 30, 12 *"]
    jobs = [Job(Prompter(ensemble).prompts(context, 8), 4 + n) for n, context in enumerate(contexts)]
    found = dict(generate(ensemble, jobs, 3, drafter(speculate)))
    for index, job in enumerate(jobs):
        for n, (token, value) in enumerate(zip(found[index].ids, found[index].logp, strict=True)):
            row = naive_row(ensemble, job, found[index].ids[:n])
            assert float(row.max() - row[token]) < 1e-3
            assert value == pytest.approx(float(row[token]), abs=1e-3)


def test_covers_change_scores_and_off_is_as_before(make):
    pairs = REQUESTS[:4]
    on = make().loglikelihood(requests("loglikelihood", *pairs))
    off = make(covers="off").loglikelihood(requests("loglikelihood", *pairs))
    assert [value for value, _ in on] != pytest.approx([value for value, _ in off], abs=1e-4)


def test_a_published_method_has_no_covers():
    keys = {"pretrained": "a/b", "members": ["a/b", "c/d"], "compat": "reference"}
    with pytest.raises(ConfigError, match="covers=on.*compat=reference"):
        configure({**keys, "covers": "on"})
    assert configure(keys).covers == "off"
