"""Writing by words against a plain loop: one text, one member, one forward pass over all the tokens at a time."""

from __future__ import annotations

import re
from codecs import getincrementaldecoder
from functools import cache

import naive
import pytest
from harness import deepen, requests

from lm_eval_deepen.engine.prompts import Prompter
from lm_eval_deepen.engine.self_check import examine
from lm_eval_deepen.errors import ConfigError, RequestError
from lm_eval_deepen.harness.model import configure
from lm_eval_deepen.pooling import POOLINGS

LONGEST = 4
CONTEXTS = [
    "The quick brown fox",
    "Question: How many days are there in a week?\nAnswer:",
    "café 中国 café",
    "",
    "ends\n",
]

member_logp = cache(naive.member_logp)


@cache
def events(member, path) -> list[tuple[float, bytes]]:
    """What a member may say next, as probabilities and bytes (none for an end), the likeliest first."""
    vocab, logp = member.codec.vocab.events, member_logp(member, path)[0].double()
    mass: dict[bytes, float] = {}
    for token, piece in enumerate(vocab.pieces):
        text = piece and token not in vocab.control | vocab.unused
        if text or token in vocab.eos:
            mass[piece] = mass.get(piece, 0.0) + float(logp[token].exp())
    return sorted(((p / sum(mass.values()), piece) for piece, p in mass.items()), key=lambda pair: -pair[0])


def token_of(member, piece: bytes) -> int:
    vocab = member.codec.vocab.events
    return vocab.preferred([i for i in vocab.ids_of[piece] if i not in vocab.control | vocab.unused])


def word_after(member, path, piece: bytes) -> tuple[int, ...]:
    word, data = [], b""
    while piece and not (data.strip() and (data[-1:].isspace() or piece[:1].isspace())):
        word.append(token_of(member, piece))
        data += piece
        if len(word) == LONGEST:
            break
        piece = events(member, (*path, *word))[0][1]
    return tuple(word)


def proposals(member, path, threshold: float, candidates: int, words: int) -> list[tuple[int, ...]]:
    span: tuple[int, ...] = ()
    for nth in range(1, words + 1):
        ranked = events(member, path + span)
        sure = ranked[0][0] - ranked[1][0] >= threshold
        if nth == words or (nth == 1 and not sure):
            return [span + word_after(member, path + span, piece) for _, piece in ranked[:candidates]]
        word = word_after(member, path + span, ranked[0][1])
        span += word
        if not sure or not word:
            return [span]
    raise AssertionError


def mean_logp(member, start, end) -> float:
    if end is None:
        return float(member_logp(member, start)[0, list(member.codec.vocab.events.eos)].logsumexp(0))
    shared = next(n for n in range(len(end)) if n == len(start) or start[n] != end[n])
    values = [float(member_logp(member, end[:n])[0, end[n]]) for n in range(shared, len(end))]
    return sum(values) / len(values)


def written(model, context: str, most: int, threshold=0.7, candidates=3, words=3) -> tuple[list[int], float]:
    """Return the main member's tokens, and the smallest margin between the two best proposals of a place."""
    ensemble = model.ensemble
    main, prompts = ensemble.main, Prompter(ensemble).prompts(context, most)
    lead = " " if not context and main.codec.prefix_space else ""
    ids: tuple[int, ...] = ()
    closest = float("inf")

    def path(m: int, ids: tuple[int, ...]) -> tuple[int, ...]:
        if m in ensemble.siblings:
            return prompts[m].ids + ids
        text = main.codec.vocab.decode(ids).removeprefix(lead.encode())
        return ensemble.active[m].codec.follow(prompts[m].before(text), text)

    while len(ids) < most:
        found: dict[bytes, tuple[int, ...]] = {}
        for m, member in enumerate(ensemble.active):
            for tokens in proposals(member, path(m, ids), threshold, candidates, words):
                data = member.codec.vocab.decode(tokens)
                if data and m not in ensemble.siblings:
                    try:
                        text = ("" if ids else lead) + getincrementaldecoder("utf-8")().decode(data)
                    except UnicodeDecodeError:
                        continue
                    if not text.removeprefix(lead):  # a character that has only begun
                        continue
                    data, tokens = text.encode(), main.codec.encode(text)
                found.setdefault(data, tokens)
        scores = []
        for tokens in found.values():
            means = [
                mean_logp(member, path(m, ids), path(m, ids + tokens) if tokens else None)
                for m, member in enumerate(ensemble.active)
            ]
            scores.append(sum(w * mean for w, mean in zip(ensemble.weights.tolist(), means, strict=True)))
        order = sorted(range(len(scores)), key=lambda n: -scores[n])
        if len(order) > 1:
            closest = min(closest, scores[order[0]] - scores[order[1]])
        best = list(found.values())[order[0]]
        if not best or set(best) & set(main.eos_ids):
            break
        ids += best
    return list(ids[:most]), closest


@pytest.mark.parametrize(
    ("names", "options"),
    [
        (("bytelevel", "metaspace"), {}),
        (("metaspace", "bytelevel"), {"threshold": 0.02, "weights": [0.3, 0.7]}),
        (("padded", "metaspace", "bytelevel"), {"threshold": 0.01, "candidates": 2, "words": 2}),
        (("bytelevel", "bytelevel"), {"threshold": 0.0, "candidates": 1}),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, tuple) else None,
)
def test_it_writes_what_the_plain_loop_writes(pico, tmp_path, monkeypatch, names, options) -> None:
    """In batches, with caches that go back, and rows of unequal lengths."""
    monkeypatch.setattr("lm_eval_deepen.engine.writing_by_words.LONGEST", LONGEST)
    model = deepen(*(pico[name] for name in names), method="adafuse", matrix_dir=str(tmp_path), batch_size=3, **options)
    lengths = [6, 4, 3, 5, 4]
    asked = requests(
        "generate_until",
        *((c, {"max_gen_toks": n, "until": ["\0"]}) for c, n in zip(CONTEXTS, lengths, strict=True)),
    )
    texts = model.generate_until(asked, disable_tqdm=True)
    plain = {key: value for key, value in options.items() if key != "weights"}
    compared = 0
    for context, length, text in zip(CONTEXTS, lengths, texts, strict=True):
        ids, closest = written(model, context, length, **plain)
        if closest > 1e-4:  # else rounding decides
            compared += 1
            assert text == model.ensemble.main.lm.tok_decode(ids), context
    assert compared >= 4
    counts = model.get_model_info()["deepen"]["proposals"]
    assert counts["proposed"] >= counts["written"] > 0


@pytest.fixture(scope="module")
def pair(pico, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("matrices"))
    return deepen(pico["bytelevel"], pico["metaspace"], method="adafuse", words=1, candidates=1, matrix_dir=folder)


def test_texts_end_by_stop_strings_lengths_and_a_seen_end(pair) -> None:
    context = CONTEXTS[0]
    whole = pair.generate_until(requests("generate_until", (context, {"max_gen_toks": 6, "until": ["\0"]})))[0]
    stop = whole[2:4]
    cut = pair.generate_until(requests("generate_until", (context, {"max_gen_toks": 6, "until": [stop]})))[0]
    assert cut == whole[: whole.index(stop)]
    (one,) = pair.ensemble.generate([context], max_gen_toks=2, until=[])
    assert len(one.logp) == 2 and one.reason == "length" and whole.startswith(one.text)


def test_an_end_of_text_is_a_proposal(pair, monkeypatch) -> None:
    """Where every member wants to stop, the text stops, and nothing is written."""
    for member in pair.ensemble.active:
        eos = list(member.codec.vocab.events.eos)

        def logp(states, own=member.logp, eos=eos):
            rows = own(states)
            rows[:, eos] += 50.0
            return rows.log_softmax(-1)

        monkeypatch.setattr(member, "logp", logp)
    (one,) = pair.ensemble.generate([CONTEXTS[0]], max_gen_toks=5)
    assert (one.text, one.reason, one.logp) == ("", "eos", ())


def test_what_it_cannot_do_is_an_error_that_says_so(pair, pico) -> None:
    for kind, arguments in (("loglikelihood", ("a", " b")), ("loglikelihood_rolling", ("a b",))):
        with pytest.raises(RequestError, match="method=adafuse writes texts by words and has no probability") as told:
            getattr(pair, kind)(requests(kind, arguments))
        assert re.findall(r"pooling=([\w-]+)", str(told.value)) == ["logp-mean"] and "logp-mean" in POOLINGS
    with pytest.raises(RequestError, match="without sampling, penalties"):
        pair.generate_until(requests("generate_until", ("a", {"do_sample": True, "temperature": 1.0})))
    with pytest.raises(RequestError, match="whole words, which have no steps"):
        pair.ensemble.generate(["a"], traced=True)
    with pytest.raises(RequestError, match="has no probability"):
        pair.ensemble.score("a", [" b"])
    members = {"pretrained": str(pico["bytelevel"]), "members": [str(pico["bytelevel"]), str(pico["metaspace"])]}
    for key, value in {
        "speculate": "lookup", "skip_when": "agree", "covers": "on", "trace": True, "weighting": "confidence",
        "sampling": "member",
    }.items():  # fmt: skip
        with pytest.raises(ConfigError, match=f"{key}=.* is about single steps, and method=adafuse"):
            configure({**members, "method": "adafuse", key: value})
    assert examine(pair.ensemble) == {}  # no text is scored to warn of
    assert pair.ensemble.next_logp("a").logp.exp().sum().item() == pytest.approx(1, abs=1e-4)
