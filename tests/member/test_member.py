"""One member's forward passes and text: the fast paths against plain forward passes."""

from __future__ import annotations

import json
import logging
import shutil
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from lm_eval_deepen.config import FrozenDict, MemberConfig
from lm_eval_deepen.errors import MemberError
from lm_eval_deepen.member import load_member
from lm_eval_deepen.member.attention import MaskMaker
from lm_eval_deepen.member.runner import PlainRunner, TreeRunner, speed_up_few_rows
from lm_eval_deepen.member.text import complete_character, incomplete_tail
from lm_eval_deepen.member.tree import TokenTree, common_prefix

FAMILIES = ["bytelevel", "metaspace", "padded"]
QUICK = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
TEXTS = ["", " ", "walk", "The quick brown", "ends\n", "café", "▁ literal", "中国", "a </s> b", "🙂🙂", "x  y   z"]


@pytest.fixture(scope="module")
def members(pico):
    return {name: load_member(MemberConfig(name=name, pretrained=str(pico[name])), "cpu") for name in FAMILIES}


def plain(runner, sequences):
    reference = PlainRunner(runner.model)
    return reference.logp(reference.states_at(list(sequences)))


tokens = st.lists(st.integers(4, 399), min_size=1, max_size=40)


@QUICK
@given(data=st.data(), family=st.sampled_from(FAMILIES))
def test_a_tree_equals_plain_forwards_and_forwards_each_prefix_once(members, data, family):
    runner = members[family].runner
    trunk = data.draw(tokens)
    calls = [
        [
            trunk[: data.draw(st.integers(1, len(trunk)))] + data.draw(st.lists(st.integers(4, 9), max_size=4))
            for _ in range(data.draw(st.integers(1, 6)))
        ]
        for _ in range(data.draw(st.integers(1, 3)))
    ]
    walker = runner.walker(data.draw(st.sampled_from([1, 3, 7, 100])))
    for paths in calls:
        runner.forwarded = 0
        kept = tuple(walker.tokens)
        got = runner.logp(walker.states(paths))
        assert torch.allclose(got, plain(runner, paths), atol=2e-4)
        prefixes = {tuple(path[:n]) for path in paths for n in range(1, len(path) + 1)}
        held = {kept[:n] for n in range(1, len(kept) + 1)}
        assert runner.forwarded == len(prefixes - held)


@QUICK
@given(
    paths=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=12),
    first=st.lists(st.integers(0, 2), max_size=7),
)
def test_a_tree_is_visited_depth_first(paths, first):
    tree, _ = TokenTree.of(paths)
    children = tree.children()

    def below(node, way):  # `way`: the tokens that go first, as far as they lead on from here
        own = sorted(children[node], key=lambda child: way[:1] != [tree.tokens[child]])
        return [x for n in own for x in (n, *below(n, way[1:] if way[:1] == [tree.tokens[n]] else []))]

    order, way = tree.preorder(first)
    assert [*way, *order] == below(-1, first)
    assert [tree.tokens[node] for node in way] == list(first[: len(way)])


@QUICK
@given(data=st.data(), rows=st.integers(1, 3), queries=st.integers(1, 4), keys=st.integers(1, 30))
def test_a_window_hides_what_lies_before_it(data, rows, queries, keys):
    config = SimpleNamespace(sliding_window=data.draw(st.integers(1, 40)), layer_types=["sliding_attention"])
    numbers = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    place = torch.randint(0, 40, (rows, queries), generator=numbers)
    at = torch.randint(0, 40, (rows, keys), generator=numbers).sort(1).values
    allowed = torch.rand(rows, queries, keys, generator=numbers) > 0.3
    found = MaskMaker(config, torch.float32)(allowed, place, at)
    assert torch.equal(found[:, 0], allowed & (place[:, :, None] - at[:, None] < config.sliding_window))


@pytest.mark.parametrize("nodes", [1, 2, 5, 100])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_walk_goes_on_from_any_tree_to_any_other(members, family, nodes):
    """From one way to others that share nothing with it, all of it, or are longer than any before."""
    runner = members[family].runner
    walker = runner.walker(nodes)
    grown = [9, *range(4, 40)]
    for paths in ([[5], [6], [7]], [[8]], [[5, 6], [5, 7], [9]], [grown, [4]], [grown[:5], grown], [[3]], [grown[:2]]):
        assert torch.allclose(runner.logp(walker.states(paths)), plain(runner, paths), atol=2e-4)


@QUICK
@given(data=st.data(), family=st.sampled_from(FAMILIES))
def test_prefilled_rows_go_on_like_plain_forwards(members, data, family):
    runner = members[family].runner
    trunk = data.draw(tokens)
    paths = [trunk + data.draw(st.lists(st.integers(4, 9), max_size=4)) for _ in range(data.draw(st.integers(1, 4)))]
    rows = runner.rows()
    rows.admit(runner.walker(data.draw(st.sampled_from([2, 50]))).prefill(*TokenTree.of(paths))[0])
    assert torch.allclose(runner.logp(rows.advance(paths)), plain(runner, paths), atol=2e-4)
    longer = [path + data.draw(st.lists(st.integers(4, 9), max_size=3)) for path in paths]
    reads = [
        sorted({len(path), len(more), max(len(path), len(more) - 1)}) for path, more in zip(paths, longer, strict=True)
    ]
    got = runner.logp(rows.advance(longer, reads))
    read = [more[:n] for more, lengths in zip(longer, reads, strict=True) for n in lengths]
    assert torch.allclose(got, plain(runner, read), atol=2e-4)
    rows.admit(runner.walker().prefill(*TokenTree.of([[9, 8, 7]]))[0], [0])  # another text takes a place
    longer[0] = [9, 8, 7, 6]
    assert torch.allclose(runner.logp(rows.advance(longer)), plain(runner, longer), atol=2e-4)


@QUICK
@given(data=st.data(), family=st.sampled_from(FAMILIES))
def test_a_cache_equals_plain_forwards_after_any_walk(members, data, family):
    """Appends of several tokens, rollbacks deeper than the sliding window and what is kept beside it, departures."""
    runner = members[family].runner
    sequences = [data.draw(tokens) for _ in range(data.draw(st.integers(1, 3)))]
    with patch.object(runner.masks, "slack", data.draw(st.sampled_from([2, 6, 200]))):
        rows = runner.rows()
        rows.admit(runner.walker().prefill(*TokenTree.of(sequences))[0])
    for _ in range(data.draw(st.integers(1, 5))):
        if len(sequences) > 1 and data.draw(st.booleans()):
            kept = data.draw(st.permutations(range(len(sequences))))[:-1]
            rows.keep(kept)
            sequences = [sequences[row] for row in kept]
        for row, before in enumerate(sequences):
            back = data.draw(st.integers(0, len(before)))
            sequences[row] = before[: len(before) - back] + data.draw(st.lists(st.integers(4, 399), max_size=5))
            sequences[row] = sequences[row] or [5]
        got = runner.logp(rows.advance(sequences))
        assert torch.allclose(got, plain(runner, sequences), atol=2e-4)


def test_a_layer_with_a_window_keeps_what_lies_in_it(members, monkeypatch):
    """16 tokens and 8 more in the layer that has the window, of texts that are prefilled, grow and go back."""
    runner = members["metaspace"].runner
    monkeypatch.setattr(runner.masks, "slack", 8)
    text, other = list(range(10, 70)), list(range(100, 105))
    prefilled, _ = runner.walker().prefill(*TokenTree.of([text, other]))
    assert [[keys.shape[1] for keys, _ in own.kv] for own in prefilled] == [[24, 60], [5, 5]]
    rows = runner.rows(2, len(text))
    rows.admit(prefilled)
    texts, whole = [text, other], []
    forwarded = runner.forwarded
    for back, more in ((0, 1), (3, 1), (5, 20), (9, 2), (40, 3)):
        texts = [text[: len(text) - back] + list(range(200, 200 + more)), texts[1] + list(range(more))]
        text = texts[0]
        assert torch.allclose(runner.logp(rows.advance(texts)), plain(runner, texts), atol=2e-4)
        whole.append(runner.forwarded - forwarded >= len(text) + more)
        forwarded = runner.forwarded
    assert whole == [False, False, False, True, True]
    assert [layer.keys.shape[2] for layer in rows.kv.layers] == [24, 124]
    walker = runner.walker()
    [held], _ = walker.prefill(*TokenTree.of([text]))
    (keys, _), copied = held.kv[1], held.kv[1][0].clone()
    assert keys.data_ptr() == walker.kv.layers[1].keys.data_ptr()  # handed over, not copied
    walker.forget([*text[:2], 3])
    assert walker.tokens == text[:2] and walker.kv.layers[0].keys.shape[2] == 2
    assert torch.allclose(runner.logp(walker.states([text])), plain(runner, [text]), atol=2e-4)
    assert torch.equal(keys, copied)  # it is the text's own since


def test_rows_that_wait_are_not_forwarded(members, monkeypatch):
    runner, seen = members["metaspace"].runner, []
    rows, sequences, body = runner.rows(), [[5, 6], [7, 8, 9], [10]], runner.body
    rows.admit(runner.walker().prefill(*TokenTree.of(sequences))[0])
    monkeypatch.setattr(runner, "body", lambda ids, *given: seen.append(tuple(ids.shape)) or body(ids, *given))
    for longer in ([[5, 6], [7, 8, 9, 4], [10, 11]], [[5, 6, 4, 4], [7, 8, 9, 4], [10, 11]]):
        rows.advance(longer)
    assert seen == [(2, 1), (1, 2)]


def test_a_rollback_needs_no_room(members):
    runner = members["metaspace"].runner
    rows, sequence = runner.rows(), list(range(10, 60))
    rows.admit(runner.walker().prefill(*TokenTree.of([sequence]))[0])
    for step in range(40):
        sequence = sequence[:-3] + [20 + step, 30 + step, 40 + step]
        state = rows.advance([sequence])
    assert rows.kv.layers[0].keys.shape[2] < 130
    assert torch.allclose(runner.logp(state), plain(runner, [sequence]), atol=2e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_eager_attention_takes_the_same_masks(pico, family):
    model = AutoModelForCausalLM.from_pretrained(pico[family], attn_implementation="eager").eval()
    runner = TreeRunner(model)
    paths = [list(range(5, 45)), [*range(5, 30), 9, 9]]
    assert torch.allclose(runner.logp(runner.states_at(paths)), plain(runner, paths), atol=2e-4)


def test_a_model_whose_cache_cannot_be_shared_is_forwarded_in_full(pico, monkeypatch, caplog):
    """A mask that the model ignores is noticed when it loads, and the slow path gives the same numbers."""
    fast = load_member(MemberConfig(name="fast", pretrained=str(pico["bytelevel"])), "cpu")
    body = TreeRunner.body
    monkeypatch.setattr(
        TreeRunner, "body", lambda self, ids, at, allowed, *rest: body(self, ids, at, torch.ones_like(allowed), *rest)
    )
    monkeypatch.setattr("lm_eval_deepen.member.state_runner.copied", lambda state: state)  # branches disturb each other
    with caplog.at_level(logging.WARNING):
        slow = load_member(MemberConfig(name="slow", pretrained=str(pico["bytelevel"])), "cpu")
    monkeypatch.undo()
    assert isinstance(slow.runner, PlainRunner) and "'slow'" in caplog.text and "forwarded in full" in caplog.text
    paths = [[7, 8, 9], [7, 8, 10, 11], [7, 8]]
    assert torch.allclose(slow.logp(slow.states_at(paths)), fast.logp(fast.states_at(paths)), atol=2e-4)
    rows = slow.runner.rows()
    rows.admit(slow.runner.walker().prefill(*TokenTree.of(paths))[0])
    assert torch.allclose(slow.logp(rows.advance(paths)), fast.logp(fast.states_at(paths)), atol=2e-4)


def test_temperature_divides_the_logits(pico):
    warm = load_member(MemberConfig(name="warm", pretrained=str(pico["bytelevel"]), temperature=2.0), "cpu")
    cold = load_member(MemberConfig(name="cold", pretrained=str(pico["bytelevel"])), "cpu")
    expected = torch.log_softmax(cold.logp(cold.states_at([[5, 6]])) / 2, dim=-1)
    assert torch.allclose(warm.logp(warm.states_at([[5, 6]])), expected, atol=1e-5)


def test_a_member_that_cannot_load_is_named(tmp_path):
    config = MemberConfig(name="broken", pretrained=str(tmp_path), loading=FrozenDict({"dtype": "float32"}))
    with pytest.raises(MemberError, match="'broken': cannot load"):
        load_member(config, "cpu")


def test_every_eos_of_the_configs_ends_a_text(members):
    vocab = members["padded"].codec.vocab
    assert len(members["padded"].eos_ids) == 2 and set(members["padded"].eos_ids) == set(vocab.eos)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prompt", TEXTS)
@pytest.mark.parametrize("continuation", TEXTS)
def test_following_spells_exactly_the_bytes(members, family, prompt, continuation):
    """Whole characters and parts of them; no control piece, no second BOS, no second prefix space."""
    codec = members[family].codec
    start = codec.prompt(prompt)
    data = continuation.encode()
    for end in range(len(data) + 1):
        ids = codec.follow(start, data[:end])
        assert ids is not None
        assert codec.vocab.decode(ids) == codec.vocab.decode(start.head) + start.tail.encode() + data[:end]
        assert not any(token in codec.vocab.control for token in ids[len(start.head) :])
        assert sum(token in codec.vocab.control for token in ids) <= 1


@pytest.mark.parametrize("family", FAMILIES)
def test_the_whole_text_is_encoded_canonically(members, family):
    """A prompt and a continuation give the tokens of the text written in one piece."""
    codec = members[family].codec
    pairs = [("The quick brown", " fox jumps"), ("walk", "ing away"), ("two\n", "lines"), ("café", "s 中国")]
    for left, right in pairs:
        assert codec.follow(codec.prompt(left), right.encode()) == codec.encode_prompt(left + right)


def test_bytes_that_are_no_text_are_spelt(members):
    for codec in (members[family].codec for family in FAMILIES):
        start = codec.prompt("a")
        for data in (b"\xff\xfe", b"ok \x80 ok", b"\xe4\xb8", b"\xf0\x9f\x99"):
            ids = codec.follow(start, data)
            assert ids is not None and codec.vocab.decode(ids).endswith(data)


@given(st.text(min_size=1, max_size=8))
def test_incomplete_tail_is_what_utf8_lacks(text):
    data = text.encode()
    for end in range(len(data) + 1):
        cut = incomplete_tail(data[:end])
        whole = data[: end - cut].decode()
        assert text.startswith(whole) and cut < 4
        if cut:
            character = complete_character(data[end - cut : end])
            assert character is not None and character.encode().startswith(data[end - cut : end])


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=8))
def test_a_tree_holds_each_prefix_once(paths):
    tree = TokenTree()
    ends = [tree.add(path) for path in paths]
    assert len(tree) == len({tuple(path[:n]) for path in paths for n in range(1, len(path) + 1)})
    for path, end in zip(paths, ends, strict=True):
        assert [tree.tokens[i] for i in tree.way_up(end)] == path[::-1]
        assert tree.depths[end] == len(path) - 1


@given(st.lists(st.integers(0, 1), max_size=80), st.lists(st.integers(0, 1), max_size=80))
def test_common_prefix(a, b):
    expected = 0
    while expected < min(len(a), len(b)) and a[expected] == b[expected]:
        expected += 1
    assert common_prefix(tuple(a), tuple(b)) == expected


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 16), (2, 16), (48, 16), (49, 16), (1, 5, 16), (2, 3, 16)])
def test_few_rows_meet_the_head_from_the_other_side(bias, shape):
    torch.manual_seed(0)
    head, x = torch.nn.Linear(16, 300, bias=bias), torch.randn(shape)
    expected = torch.nn.functional.linear(x, head.weight, head.bias)
    speed_up_few_rows(head)
    assert ("forward" in head.__dict__) == torch.backends.mkl.is_available()
    assert head(x).shape == expected.shape
    assert torch.allclose(head(x), expected, atol=1e-5)
    assert torch.equal(head(x.double().float()), head(x))


def test_heads_of_other_kinds_are_left_alone():
    class Quantized(torch.nn.Linear):
        pass

    other = Quantized(4, 8)
    speed_up_few_rows(other)
    assert "forward" not in other.__dict__
    speed_up_few_rows(None)


def test_an_end_that_a_tokenizer_adds_is_no_part_of_a_conversation(pico, tmp_path):
    """A continuation comes after it; `hf` itself leaves it out where it is told to add nothing."""
    shutil.copytree(pico["bytelevel"], tmp_path, dirs_exist_ok=True)
    spec = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    single = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}]
    named = {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}}
    spec["post_processor"] = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": named}
    spec["post_processor"]["pair"] = [*single, {"Sequence": {"id": "B", "type_id": 0}}]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), "utf-8")
    ends, plain = (
        load_member(MemberConfig(name="m", pretrained=str(path)), "cpu") for path in (tmp_path, pico["bytelevel"])
    )
    assert ends.lm.tok_encode("The fox")[-1] == 0 and ends.prompt("The fox") == plain.prompt("The fox")
    for asked in ("The fox", "The fox<|endoftext|>"):
        text = ends.render([{"role": "user", "content": asked}], False, "error")
        assert ends.rendered_prompt(text) == plain.rendered_prompt(text)
    assert ends.rendered_prompt("The fox<|endoftext|>").ids[-1] == 0  # which the text itself has
