"""Covers: another member's next event where the main token ends inside one of its own, against sums over everything."""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter

import naive
import pytest
import torch
from harness import deepen, requests

from lm_eval_deepen.engine import covers
from lm_eval_deepen.engine.drafts import drafter
from lm_eval_deepen.engine.following import Job, path_of
from lm_eval_deepen.engine.generation import generate
from lm_eval_deepen.engine.places import places
from lm_eval_deepen.engine.prompts import Prompter
from lm_eval_deepen.engine.scoring import score
from lm_eval_deepen.errors import ConfigError
from lm_eval_deepen.harness.model import configure
from lm_eval_deepen.member.text import NOTHING
from lm_eval_deepen.member.tree import TokenTree

CONTEXTS = ["The quick brown fox", "Question: 1 + 1?\nAnswer:", "café 中国", "walk", ""]
CHOICES = [" jumps over the lazy dog", " two 🙂 walking", "\n\nmoon landing", "ing and singing"]
LINES = ("def f(x):", "\n    return  x  \n\n\nz\n       5\n\n        if")
REQUESTS = [*itertools.product(CONTEXTS, CHOICES), LINES]
ORDERS = [("bytelevel", "metaspace"), ("metaspace", "bytelevel"), ("bytelevel", "metaspace", "padded")]


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """Count every piece, however unlikely."""
    monkeypatch.setattr(covers, "PRECISION", 1e-9)


@pytest.fixture(scope="module", params=ORDERS, ids="+".join)
def make(request, pico, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("matrices"))

    def make(**options):
        options = {"covers": "on", **options}
        return deepen(*(pico[name] for name in request.param), matrix_dir=folder, batch_size=2, **options)

    return make


def word_of(vocab, path):
    """Return the tokens since the last space or line break, the first of a run (32 bytes at most), and their bytes."""
    at, data = len(path), b""
    while at and vocab.pieces[path[at - 1]] and len(data) + len(vocab.pieces[path[at - 1]]) <= 32:
        if data[:1] in (b" ", b"\n") and vocab.pieces[path[at - 1]][-1:] not in (b" ", b"\n", b"\r", b"\t"):
            break
        at -= 1
        data = vocab.pieces[path[at]] + data
    return tuple(path[at:]), data


def goes_on(codec, data, tokens):
    """Return whether a tokenizer spells some bytes with these tokens and more."""
    spelt = codec.follow(NOTHING, data) or ()
    return spelt[: len(tokens)] == tokens and len(spelt) > len(tokens)


def reach_of(vocab, path, prompt):
    """Return the bytes since the prompt, and those of the letters, digits and spaces that it ends with."""
    text = vocab.decode(path[:prompt]).decode(errors="ignore")
    kept = len(text)
    while kept and (text[kept - 1].isalnum() or text[kept - 1] in " \t"):
        kept -= 1
    return len(text[kept:].encode()) + len(vocab.decode(path[prompt:]))


def covered(ensemble, m, main_path, path, prompt):
    """Return member `m`'s distribution [V_m] of what comes next: every way to the end, every piece of its own.

    None of its ways begins in what the prompt (the main member's first `prompt` tokens) ends with, but for a word.

    Its ways are its tokens of the bytes so far and, behind white space, those of more white space and a letter, where
    the main member's tokens of the bytes so far stay what they are. What its own row gives to spaces is given to
    what the main tokenizer has of them before a word.
    """
    main, other = ensemble.main.codec, ensemble.active[m].codec
    vocab, white = other.vocab, (b" ", b"\n", b"\r", b"\t")
    tokens, word = word_of(main.vocab, main_path)
    begin = len(path)
    back = reach_of(main.vocab, main_path, prompt)
    while begin > 1 and vocab.pieces[path[begin - 1]] and word.endswith(vocab.decode(path[begin - 1 :])):
        if len(vocab.decode(path[begin - 1 :])) > back:
            break
        begin -= 1
    head, tail = path[:begin], path[begin:]
    data = vocab.decode(tail)
    ways, looked_ahead, whole = [tail], False, True
    if word[-1:] in white and (not tail or other.follow(NOTHING, data) == tail):
        kept = [more for more in (b"", b" ", b"\n") if goes_on(main, word + more + b"a", tokens)]
        whole = not kept or b"" in kept
        for more in kept:
            if not more or not (whole or goes_on(main, word + more, tokens)):
                spelt = other.follow(NOTHING, data + more + b"a") or ()
                ends = [n for n in range(len(spelt) + 1) if len(vocab.decode(spelt[:n])) <= len(data + more)]
                way = spelt[: ends[-1]]
                if way != tail[: len(way)] and tail != way[: len(tail)]:
                    ways.append(way)
                    looked_ahead = True
    row_after = functools.cache(lambda tokens: naive.member_logp(ensemble.active[m], tokens)[0].double())
    nodes = {way[:n] for way in ways for n in range(len(way) + 1)}

    def stands_for(rest, token):
        """Return the first id that stands for what a token goes on with, None where that does not count."""
        text, after = vocab.pieces[token], b""
        if text[-1:] in white:
            after = next((x for x in (b"a", b" a") if (other.follow(NOTHING, text + x) or ())[:1] == (token,)), b"")
        if not goes_on(main, word + rest + after, tokens) or (whole and not goes_on(main, word + rest, tokens)):
            return None
        following = main.vocab.pieces[main.follow(NOTHING, word + rest + after)[len(tokens)]]
        ids = vocab.ids_of.get(ensemble.covers[m].stand_in(following[: len(rest + after.rstrip(b"a"))]))
        return ids[0] if ids else None

    masses = {}
    for node in nodes:
        if whole and node == tail:
            continue
        spelt = vocab.decode(node)
        pending, ahead = data[len(spelt) :], spelt[len(data) :]
        rows = [row_after(head + node[:n]) for n in range(len(node) + 1)]
        log_way = sum(float(row[token]) for row, token in zip(rows, node, strict=False))
        for token, text in enumerate(vocab.pieces):
            rest = ahead + text[len(pending) :]
            longer = text.startswith(pending) and text != pending and token not in vocab.control
            if not longer or not rest or (*node, token) in nodes:
                continue
            if (target := stands_for(rest, token)) is not None:
                masses[target] = masses.get(target, 0.0) + float((log_way + rows[-1][token]).exp())
    own, left = row_after(path).exp(), False
    if whole:
        before = own.clone()
        for token, text in enumerate(vocab.pieces):
            spaces = len(text) > 1 and text.isspace() and text[-1:] in (b" ", b"\t") and token not in vocab.control
            target = stands_for(text, token) if spaces else None
            if target is not None and target != token and before[token] > 1e-9:
                own[target] += 0.9999 * before[token]
                own[token] -= 0.9999 * before[token]
                left = True
    log_way = sum(float(row_after(head + tail[:n])[token]) for n, token in enumerate(tail))
    p = own * (math.exp(log_way) if whole else 1e-4 * sum(masses.values()))
    if not masses:
        return own.log().float()[None], Counter(left=left)
    for token, mass in masses.items():
        p[token] += mass
    return (p / p.sum()).log().float()[None], Counter(changed=1, looked_ahead=looked_ahead, left=left)


def naive_score(ensemble, span):
    """Return the log-probability of every target, every member's row covered; and what was done to how many rows."""
    seen, values, done = b"", [], Counter()
    for at, target in enumerate(span.target):
        paths = span.paths(ensemble, at)
        rows = [naive.member_logp(ensemble.main, paths[0])]
        for m in range(1, len(ensemble.active)):
            if paths[m] is None:
                rows.append(rows[0].new_zeros(1, ensemble.active[m].vocab_size))
                continue
            row, here = covered(ensemble, m, paths[0], paths[m], len(span.prompts[0].ids))
            done += here
            rows.append(row)
        weights = ensemble.weights * torch.tensor([path is not None for path in paths])
        values.append(float(ensemble.fuser.fuse(rows, (weights / weights.sum())[None]).logp[0, target]))
        seen += ensemble.main.codec.vocab.pieces[target]
    return values, done


def test_scoring_equals_the_sum_over_all_covers(make):
    ensemble = make().ensemble
    prompter = Prompter(ensemble)
    spans = [prompter.span(*request) for request in REQUESTS]
    found, done = dict(score(ensemble, spans, 16)), Counter()
    for index, span in enumerate(spans):
        expected, here = naive_score(ensemble, span)
        done += here
        assert found[index].logp == pytest.approx(expected, abs=5e-4)
    assert done["changed"] > 5
    assert done["looked_ahead"] > 2
    assert done["left"] > 2


def test_what_a_prompt_ends_with_is_given_but_for_words(make):
    """Punctuation and line breaks are the prompt's own tokens; a word may go on inside a member's piece."""
    ensemble = make().ensemble
    first = {}
    for context in ("Question: 1 + 1?\nAnswer:", "walk?\n", "She was walking and talk", "10 + 1"):
        span, trees = Prompter(ensemble).span(context, "ing 1"), [TokenTree() for _ in ensemble.active]
        place = next(places(ensemble, span, trees))
        first[context] = [place.plan(reader, trees, m) for m, reader in ensemble.covers.items()]
    given, going_on = list(first.values())[:2], list(first.values())[2:]
    assert not any(plan.covers for plans in given for plan in plans)
    assert any(plan.covers for plans in going_on for plan in plans)


def naive_row(ensemble, job, ids):
    """Return the fused distribution [K] after a prompt and the main member's tokens, others' rows covered."""
    data = ensemble.main.codec.vocab.decode(ids)
    paths = [path_of(ensemble, m, job, tuple(ids), data) for m in range(len(ensemble.active))]
    rows = [naive.member_logp(ensemble.main, paths[0])]
    for m in range(1, len(paths)):
        if paths[m] is None:
            rows.append(rows[0].new_zeros(1, ensemble.active[m].vocab_size))
        else:
            rows.append(covered(ensemble, m, paths[0], paths[m], len(job.prompts[0].ids))[0])
    weights = ensemble.weights * torch.tensor([path is not None for path in paths])
    return ensemble.fuser.fuse(rows, (weights / weights.sum())[None]).logp[0]


@pytest.mark.parametrize("speculate", ["off", "lookup"])
def test_generation_equals_the_sum_over_all_covers(make, speculate):
    """In a batch, with texts that end and others that take their places; drafts change no text."""
    ensemble = make(speculate=speculate).ensemble
    contexts = [*CONTEXTS, "She was walking and talk", "10 + 20 = 30, 12 *", "def f(x):\n    return x\n\n   "]
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


def test_rests_are_kept_in_the_cache_folder(make, tmp_path, monkeypatch):
    """Scores are the same with what was kept, with a damaged file, and where nothing can be kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked = []
    target = covers.CoverReader._target
    monkeypatch.setattr(covers.CoverReader, "_target", lambda *of: asked.append(of) or target(*of))

    def run():
        asked.clear()
        pairs = [*REQUESTS[:2], LINES]
        return [value for value, _ in make().loglikelihood(requests("loglikelihood", *pairs))], len(asked)

    expected, count = run()
    assert not list(tmp_path.rglob("rests-*"))  # these vocabularies are small
    monkeypatch.setattr(covers, "KEPT_FROM", 0)
    monkeypatch.setattr(covers, "NEW_TO_KEEP", 1)
    assert run() == (expected, count)
    again, fewer = run()
    assert again == expected and fewer < count / 2
    for path in tmp_path.rglob("rests-*"):
        path.write_bytes(path.read_bytes()[:-1] + b"\7")
    assert run() == (expected, count)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert run() == (expected, count)
