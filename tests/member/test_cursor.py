"""A text that grows: the same tokens as when it is read whole, and no more of it read than a word."""

import pickle
import random
from collections import Counter
from dataclasses import replace

import pytest
from harness import deepen, requests
from pico import CORPUS, FOREIGN

from lm_eval_deepen.engine.bits_per_byte import Document, Reading
from lm_eval_deepen.engine.evidence import evidence
from lm_eval_deepen.engine.following import GrowingPaths, Job, path_of
from lm_eval_deepen.engine.prompts import Prompter
from lm_eval_deepen.member.cursor import TextCursor
from lm_eval_deepen.member.text import NOTHING, TextCodec
from lm_eval_deepen.member.tree import TokenTree

HOSTILE = ["", " ", "  ", "a", " a", "é", "中", "🙂", "</s>", "<bos>", "\n", "\x00", "<|endoftext|>", "1 2", "\u2581"]


@pytest.fixture(scope="module")
def trio(pico):
    return deepen(pico["bytelevel"], pico["padded"], pico["metaspace"]).ensemble


@pytest.mark.parametrize("m", [0, 1, 2])
def test_a_cursor_gives_the_tokens_of_the_whole_text(trio, m):
    """Whatever bytes come, in whatever parts, and whatever is looked at ahead without being taken in."""
    codec, draw = trio.active[m].codec, random.Random(m)
    words = [*(CORPUS + FOREIGN).split(" "), *HOSTILE]
    for trial in range(120):
        text = " ".join(draw.choice(words) for _ in range(draw.randrange(12))).encode()
        if trial % 3 == 0:  # bytes that are no characters
            at = draw.randrange(len(text) + 1)
            text = text[:at] + bytes(draw.choices([0x80, 0xC3, 0xE4, 0xB8, 0xF0, 0xFF, 0x20, 0x61], k=3)) + text[at:]
        prompt = codec.prompt(" ".join(draw.choice(words) for _ in range(draw.randrange(4)))).before(text)
        if trial % 10 == 0:
            prompt = replace(prompt, spelt=False)
        cursor, at = TextCursor(codec, prompt), 0
        while True:
            for ahead in (0, draw.randrange(9)):
                end = cursor.end(text[at : at + ahead])
                found = None if end is None else (*cursor.fixed[: end[0]], *end[1])
                assert found == codec.follow(prompt, text[: at + ahead]), (text[:at], ahead)
            if at == len(text):
                break
            step = draw.randint(1, 6)
            cursor.take(text[at : at + step])
            at = min(at + step, len(text))


@pytest.mark.parametrize("m", [0, 1, 2])
def test_texts_that_are_read_at_once_have_the_tokens_of_each(trio, m):
    codec, draw = trio.active[m].codec, random.Random(m)
    words = [*(CORPUS + FOREIGN).split(" "), *HOSTILE, "\u00b2", "<0x41>", "\ufffd"]
    texts = [" ".join(draw.choices(words, k=draw.randrange(4))).encode() for _ in range(300)]
    texts += [text[: draw.randrange(len(text) + 1)] + bytes(draw.choices(range(256), k=2)) for text in texts]
    assert codec.follow_all(texts) == [codec.follow(NOTHING, text) for text in texts]
    assert codec.follow_all([]) == []


def test_the_price_of_a_token_does_not_grow_with_the_text(trio, pico, monkeypatch):
    """What is encoded, added to trees, climbed in them and held: four times as much for a text four times as long."""
    pair = deepen(pico["bytelevel"], pico["padded"], covers="on")
    weighted = deepen(pico["bytelevel"], pico["padded"], method="gac", weighting="perplexity")
    counts: Counter[str] = Counter()
    encode, way_up, add = TextCodec.encode, TokenTree.way_up, TokenTree.add

    def counted(codec, text):
        counts["encoded"] += len(text)
        return encode(codec, text)

    def climbed(tree, node):
        for found in way_up(tree, node):
            counts["climbed"] += 1
            yield found

    monkeypatch.setattr(TextCodec, "encode", counted)

    def added(tree, path):
        counts["added"] += len(path)
        return add(tree, path)

    monkeypatch.setattr(TokenTree, "way_up", climbed)
    monkeypatch.setattr(TokenTree, "add", added)

    def measured(words):
        reading = Reading.of(pair.ensemble, [Document("A text:" + " the other fox walked" * (words // 4))])
        counts["held"] += len(pickle.dumps(reading.positions))

    def compared(words):
        context = "A text:" + " the other fox walked" * (words // 4)
        weighted.loglikelihood(requests("loglikelihood", (context, " and")))
        weighted.generate_until(requests("generate_until", (context, {"max_gen_toks": 2, "until": []})))
        prompts = Prompter(weighted.ensemble).prompts(context, 4)
        counts["held"] += len(pickle.dumps(evidence(weighted.ensemble, prompts)))

    def scored(words):
        pair.loglikelihood(requests("loglikelihood", ("A text:", " the other fox walked" * (words // 4))))

    def generated(words):
        codec = trio.main.codec
        ids = codec.encode(" the other fox walked" * (words // 4))
        paths = GrowingPaths(trio, Job(tuple(member.prompt("The dog") for member in trio.active), words))
        for count in range(len(ids)):
            data = codec.vocab.decode(ids[:count])
            paths.grow(data)
            found = paths.paths(ids[:count], data)
            if count + 1 == len(ids):
                before = counts.copy()
                assert found == tuple(path_of(trio, m, paths.job, ids[:count], data) for m in range(3))
                counts.update({key: before[key] - counts[key] for key in counts})  # what reads the whole text

    for action in (scored, generated, measured, compared):
        found = []
        for words in (32, 128):
            counts.clear()
            action(words)
            found.append(counts.copy())
        assert found[0]["encoded"] > 0
        assert all(found[1][key] < 5 * found[0][key] + 200 for key in found[1]), (action, found)
