"""Models that carry a state along a text: walks, rows and copies against plain forward passes."""

from __future__ import annotations

import sys
import weakref
from pathlib import Path

import pytest
import torch
from harness import by_default, requests
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from transformers import CONFIG_MAPPING, Cache

from lm_eval_deepen.member import state_runner as states
from lm_eval_deepen.member.loading_check import check_state
from lm_eval_deepen.member.runner import PlainRunner
from lm_eval_deepen.member.state_runner import StateRunner
from lm_eval_deepen.member.tree import TokenTree

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from architectures import REQUESTS  # noqa: E402
from tiny_models import byte_level_tokenizer, tiny_model  # noqa: E402

KINDS = {
    "mamba": {"by_token": True},
    "mamba2": {},
    "falcon_h1": {},
    "lfm2": {},
    "rwkv": {"together": False},
    "bart": {},
}
QUICK = settings(max_examples=6, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
tokens = st.lists(st.integers(4, 399), min_size=1, max_size=12)


@pytest.fixture(scope="module", params=KINDS)
def runner(request):
    model = tiny_model(CONFIG_MAPPING[request.param], 400).double()
    return StateRunner(model, **KINDS[request.param])


def plain(runner, sequences):
    reference = PlainRunner(runner.model)
    return reference.logits(reference.states_at([tuple(path) for path in sequences]))


def agree(runner, hidden, sequences):
    return torch.allclose(runner.logits(hidden), plain(runner, sequences), atol=1e-4)


@QUICK
@given(data=st.data())
def test_a_walk_equals_plain_passes(runner, data):
    trunk = data.draw(tokens)
    paths = [trunk[: data.draw(st.integers(1, len(trunk)))] + data.draw(tokens) for _ in range(5)] + [trunk, trunk[:1]]
    read = data.draw(st.permutations(paths))[:3]
    runner.forwarded = 0
    assert agree(runner, runner.states_at(paths), paths)
    assert runner.forwarded <= sum(map(len, paths))
    tree, ends = TokenTree.of(paths)
    texts, found = runner.walker().prefill(tree, ends, [tree.add(path) for path in read])
    assert agree(runner, torch.stack([text.state for text in texts]), paths)
    assert agree(runner, found, read)


@QUICK
@given(data=st.data())
def test_rows_go_on_and_back_like_plain_passes(runner, data):
    """Rows of one length go on together; others go back by any number of tokens, or leave."""
    sequences = [data.draw(tokens) for _ in range(4)]
    sequences[1] = [*sequences[0][:-1], 9]
    rows = runner.rows()
    rows.admit(runner.walker().prefill(*TokenTree.of(sequences))[0])
    for step in range(4):
        back = 0 if step < 2 else data.draw(st.integers(0, 3))
        sequences = [(path[: max(1, len(path) - back)]) + data.draw(tokens)[: step % 2 + 1] for path in sequences]
        reads = [sorted({max(1, len(path) - 1), len(path)}) for path in sequences]
        read = [path[:n] for path, lengths in zip(sequences, reads, strict=True) for n in lengths]
        assert agree(runner, rows.advance(sequences, reads), read)
        if step == 1:
            rows.keep([2, 0, 1])
            sequences = [sequences[at] for at in (2, 0, 1)]
            rows.admit(runner.walker().prefill(*TokenTree.of([[7, 8, 9]]))[0], [1])
            sequences[1] = [7, 8, 9]
        assert all(len(kept) <= states.OLD_STATES + 2 for kept in rows.states)


def test_a_text_that_only_grows_is_forwarded_once_and_its_state_is_never_copied(monkeypatch):
    runner = StateRunner(tiny_model(CONFIG_MAPPING["mamba2"], 400))
    rows, text = runner.rows(), list(range(5, 25))
    rows.admit(runner.walker().prefill(*TokenTree.of([text]))[0])
    monkeypatch.setattr(states, "copied", None)
    for token in range(30, 40):
        text = [*text, token]
        rows.advance([text])
    assert runner.forwarded == len(text) and [list(kept) for kept in rows.states] == [[len(text)]]


@pytest.mark.parametrize("comb", [False, True])
def test_few_states_wait_however_large_the_tree(monkeypatch, comb):
    """A branch at every token of a long text, and a full binary tree."""
    runner = StateRunner(tiny_model(CONFIG_MAPPING["mamba2"], 400))
    paths = [[code >> bit & 1 for bit in range(6) for _ in range(2)] for code in range(64)]
    if comb:
        paths = [[*range(5, 5 + n), 300, 301] for n in range(1, 100)]
    alive: weakref.WeakSet[Cache] = weakref.WeakSet()
    most = [0]
    run = StateRunner._pass

    def counted(*args):
        hidden, state = run(*args)
        alive.add(state)
        most[0] = max(most[0], len(alive))
        return hidden, state

    monkeypatch.setattr(StateRunner, "_pass", counted)
    assert torch.allclose(runner.logp(runner.states_at(paths)), plain(runner, paths).log_softmax(-1), atol=1e-3)
    assert 1 < most[0] <= 8


def test_the_check_notices_states_that_are_shared_and_passes_that_forget(monkeypatch):
    runner = StateRunner(tiny_model(CONFIG_MAPPING["mamba2"], 400).double())
    check_state(runner, 256)
    assert runner.forwarded == 0
    with monkeypatch.context() as patched:
        patched.setattr(states, "copied", lambda state: state)
        with pytest.raises(ArithmeticError, match="a walk from copied states differs"):
            check_state(runner, 256)
    first_mamba = tiny_model(CONFIG_MAPPING["mamba"], 400).double()
    with pytest.raises(ArithmeticError, match="differs from a plain forward pass"):
        check_state(StateRunner(first_mamba), 256)
    check_state(StateRunner(first_mamba, by_token=True), 256)


def test_a_state_takes_the_bytes_that_are_counted(runner):
    """A recurrent state has one size, keys and values grow with the text."""
    state = runner.held
    prefilled = runner.walker().prefill(*TokenTree.of([list(range(4, 4 + n)) for n in (30, 100)]))[0]
    held = [states.num_bytes(text.kv) for text in prefilled]
    assert held == [state.num_bytes(n) for n in (30, 100)] and all(held)
    if isinstance(prefilled[0].kv, Cache):
        layers = [layer for layer in prefilled[1].kv.layers if hasattr(layer, "keys")]
        assert state.per_token * 100 == sum(
            layer.keys.nbytes + layer.values.nbytes for layer in layers if layer.keys is not None
        )


@pytest.mark.parametrize("kind", ["mamba", "falcon_h1"])
def test_a_second_member_with_a_state_answers_as_by_whole_texts(kind, pico, tmp_path, monkeypatch):
    """Its words are cut anew as the text grows, so that its rows go back, and covers read states of before."""
    model = tiny_model(CONFIG_MAPPING[kind], len(byte_level_tokenizer()))
    model.save_pretrained(tmp_path)
    byte_level_tokenizer().save_pretrained(tmp_path)
    asked = {request: requests(request, *arguments[:3:2]) for request, arguments in REQUESTS.items()}

    def answers():
        lm = by_default(pico["metaspace"], tmp_path, batch_size=3)
        found = [getattr(lm, request)(asked[request], disable_tqdm=True) for request in REQUESTS]
        return found, lm.ensemble.members[1].runner

    (scores, rolling, texts), runner = answers()
    assert isinstance(runner, StateRunner)

    def refuse(*_):
        raise ArithmeticError

    monkeypatch.setattr("lm_eval_deepen.member.member.check_state", refuse)
    (other_scores, other_rolling, other_texts), plain_runner = answers()
    assert isinstance(plain_runner, PlainRunner) and runner.forwarded < plain_runner.forwarded / 3
    assert texts == other_texts
    assert [greedy for _, greedy in scores] == [greedy for _, greedy in other_scores]
    assert [logp for logp, _ in scores] == pytest.approx([logp for logp, _ in other_scores], abs=1e-3)
    assert rolling == pytest.approx(other_rolling, abs=1e-3)
