"""Checks a model when it loads: it reads from left to right, and it can or cannot walk a prefix tree.

Both checks compare forward passes that must agree, and measure how far they are apart by what would go unnoticed
otherwise: by how much an earlier token, or another position, changes what the model says. So they tell as much of flat
distributions as of peaked ones. Small models are checked on a copy in double precision, where rounding hides nothing.
Of others it is kept that they have passed, by all that decides it.
"""

from __future__ import annotations

import copy
import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lm_eval_deepen.errors import MemberError
from lm_eval_deepen.member.attention import MaskMaker
from lm_eval_deepen.member.runner import PlainRunner, TokenSequences, TreeRunner
from lm_eval_deepen.member.state_runner import LongropeRunner, StateRunner
from lm_eval_deepen.member.tree import TokenTree

SMALL_MODEL = 20_000_000  # parameters up to which the checks run on a copy in double precision
PARTS = 16  # of a weight that are added up
SHORT, LONG = 14, 160  # tokens of the paths; the long ones show what works on chunks of a text
WINDOW = 6  # of layers with a sliding window, while they are checked
AHEAD = 4  # tokens at the end of the context that are forwarded beside a path, and must not change it

# Share of the effect of a token or a position that passes may differ by, and share of the spread of the logits.
TOLERANCES = {torch.float64: (1e-3, 1e-9), torch.float32: (1e-3, 1e-5)}
HALF = {torch.bfloat16: (0.5, 2e-2), torch.float16: (0.5, 2e-2)}


def sharpest(model: nn.Module, autocast: torch.dtype | None) -> PlainRunner:
    """Return forward passes of a copy of a small model in double precision, else of the model."""
    weights = list(model.parameters())
    plain = not getattr(model, "is_quantized", False) and all(x.is_floating_point() for x in weights)
    here = not any(x.is_meta for x in weights) and not hasattr(model, "hf_device_map")
    here = here and not getattr(model, "tp_size", None)  # a copy of a slice would call the others' collectives
    if plain and here and sum(x.numel() for x in weights) <= SMALL_MODEL:
        with suppress(Exception):  # code that insists on its own precision: it is checked in that
            exact = PlainRunner(copy.deepcopy(model).double())
            exact.states_at([[0, 0]])
            return exact
    return PlainRunner(model, autocast)


def decides(model: nn.Module, autocast: torch.dtype | None, longest: int) -> list[Any] | None:
    """Return all that the outcome of `check_reading` and `check_tree` is a function of, beside this package's code.

    Weights count by sums of their bits. What touches every weight once takes a hundredth of the checks' time. None
    where nothing is kept: of small models, and of weights that are not all here, and plain.
    """
    weights = dict(chain(model.named_parameters(), model.named_buffers()))
    plain = all(type(x) in (Tensor, nn.Parameter) and x.is_contiguous() for x in weights.values())
    here = not any(x.is_meta for x in weights.values()) and not getattr(model, "tp_size", None)
    code = {getattr(sys.modules.get(type(part).__module__), "__file__", None) for part in model.modules()}
    if not (plain and here and all(code)) or sum(x.numel() for x in model.parameters()) <= SMALL_MODEL:
        return None
    sums = []
    for name, weight in weights.items():
        bits = weight.detach().flatten()
        whole = bits.nbytes % 8 == 0 and bits.storage_offset() * bits.itemsize % 8 == 0
        parts = bits.view(torch.int64 if whole else torch.uint8).chunk(PARTS)
        total = torch.stack([part.sum() for part in parts]).tolist()
        sums.append([name, list(weight.shape), str(weight.dtype), str(weight.device), total])
    config: Any = model.config
    return [
        hashlib.sha256(repr(sums).encode()).hexdigest(),
        hashlib.sha256(b"".join(Path(path).read_bytes() for path in sorted(filter(None, code)))).hexdigest(),
        repr(model),
        repr(config.to_dict()),
        [str(getattr(part, "_attn_implementation", None)) for part in (config, config.get_text_config())],
        [str(autocast), longest, torch.get_float32_matmul_precision(), torch.backends.cpu.get_cpu_capability()],
        torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    ]


def check_reading(plain: PlainRunner, name: str, length: int = SHORT) -> None:
    """Raise MemberError where what a model says after a text (`length` tokens) depends on more than that, or is NaN."""
    first, second, third = _paths(plain.model, length)
    half = length // 2
    rows = torch.tensor([first, [*first[:half], *third[half:]], second])  # alike, but for: -, their ends, one token
    said, again = (plain.forward(rows).cpu()[:, half - 1] for _ in range(2))  # [3, V]
    kind = type(plain.model).__name__
    if bool(said.isnan().any()):
        raise MemberError(f"member {name!r}: {kind} gives no numbers (NaN) for a few tokens. Check its weights.")
    effect = _apart(said[:1], said[2:])
    allowed = _allowed(effect, said)
    drifts = {
        "each time that it is asked": _apart(said, again),
        "with the text that follows": _apart(said[:1], said[1:2]),
    }
    if said.dtype not in HALF:  # passes of different lengths round differently
        alone = plain.states_at([first[:half]]).cpu()
        drifts["with the length of the text that follows"] = _apart(said[:1], alone)
    encoder = getattr(plain.model.config, "is_decoder", None) is False
    hint = " Its config.json has is_decoder: false; a decoder has true." if encoder else ""
    for what, drift in drifts.items():
        if drift > allowed:
            raise MemberError(
                f"member {name!r}: {kind} is no causal language model as it is configured: what it says after a text "
                f"changes {what} (by {drift:.2g}; another token before changes it by {effect:.2g}).{hint} Use "
                "a model that reads from left to right."
            )


def needs_a_pass_alone(plain: PlainRunner, longest: int) -> bool:
    """Return whether other texts in a forward pass change what a model says, as where positions follow the longest."""
    first, second, third = _paths(plain.model)
    short, changed = first[: SHORT // 2], second[: SHORT // 2]
    alone = plain.states_at([short])
    allowed = _allowed(_apart(plain.states_at([changed]), alone), alone)
    if _apart(plain.states_at([short, third])[:1], alone) > allowed:
        return True
    rows, places = torch.tensor([short, short]), torch.arange(len(short))
    try:
        near, far = (
            plain.forward(rows, position_ids=torch.stack([places, places + ahead]))[:1, -1]
            for ahead in (0, max(longest - len(short), 0))
        )
    except Exception:  # it takes no positions, so that none can be far
        return False
    return _apart(near, far) > allowed


def generates_as_it_reads(plain: PlainRunner, longest: int) -> bool:
    """Return whether the model's own ``generate``, which `--model hf` calls, follows what it says of a whole text.

    Some classes count positions from elsewhere in ``generate``, add a token, or drop keys that their masks still show.
    """
    model, steps = plain.model, 3
    prompt = _paths(model, min(longest - steps, LONG))[0]
    settings: dict[str, Any] = dict(max_new_tokens=steps, min_new_tokens=steps, do_sample=False, pad_token_id=0)
    ids = torch.tensor([prompt], device=plain.device)
    with plain.computing(), _short_window(model.config.get_text_config()):
        try:
            made = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                use_cache=True,
                output_logits=True,
                return_dict_in_generate=True,
                **settings,
            )
        except Exception:  # it fails under hf too, so that there is no text of hf to differ from
            return True
        whole = made.sequences[0].tolist()
        said = plain.states_at([whole[: len(prompt) + step] for step in range(steps)])
        other = plain.states_at([[*prompt[:-2], prompt[0], prompt[-1]]])
    return _apart(torch.cat(made.logits), said) <= _allowed(_apart(said[:1], other), said)


def check_tree(runner: TreeRunner, longest: int) -> None:
    """Raise ArithmeticError where packed trees and rolled-back caches differ from plain forward passes.

    By more than rounding, in a context of `longest` tokens; or where positions are not those that are given.
    """
    plain = PlainRunner(runner.whole, runner.autocast)
    first, second, third = _paths(runner.model)
    trunk = first[: SHORT // 2]
    paths = [first, [*trunk, *second[-3:]], [*trunk, *third[2:7]], third, trunk]
    try:
        with _short_window(runner.model.config.get_text_config(), runner.masks):
            expected = plain.states_at(paths)
            given, misplaced = _packed(runner, paths, longest), _packed(runner, paths, longest, by_column=True)
            if given.shape != expected.shape:
                raise ArithmeticError("its head does not read what its body returns")
            allowed = _allowed(_apart(given, misplaced), expected)
            _compare("a packed tree", given, expected, allowed)
            if _apart(given, misplaced) == 0:
                raise ArithmeticError("its positions are not those that it is given")
            _compare("a walk", runner.logits(runner.walker(20).states(paths)), expected, allowed)
            rows = runner.rows()
            rows.admit(runner.walker().prefill(*TokenTree.of([first, trunk, third]))[0])
            state = rows.advance([paths[1], first, paths[2]])
            _compare("a rolled-back cache", runner.logits(state), expected[[1, 0, 2]], allowed)
    finally:
        runner.forwarded = 0


def check_state(runner: StateRunner, longest: int) -> None:
    """Check walks from copied states, and rows that go on, join and go back, as `check_tree` does."""
    plain = PlainRunner(runner.whole, runner.autocast)
    length = min(longest, LONG)
    first, second, third = _paths(runner.model, length)
    trunk, near = first[: length // 2], first[: length // 2 + 3]
    paths = [first, [*trunk, *second[-3:]], [*trunk, *third[2:7]], [*trunk, third[0]], near, third, trunk]
    paths += [[*near, second[0]], [*trunk, *third[2:4], second[0]]]  # two branches with branches of their own
    longer = [[*near, *third[2:4]], [*near, *third[2:4], third[5]], [*trunk, *third[2:4]]]
    try:
        with _short_window(runner.model.config.get_text_config()):
            expected, further = plain.states_at(paths), plain.states_at(longer)
            changed = plain.states_at([[*first[:-2], third[0], first[-1]]])
            given = runner.logits(runner.states_at(paths))
            if given.shape != expected.shape:
                raise ArithmeticError("its head does not read what its body returns")
            allowed = _allowed(_apart(expected[:1], changed), expected)
            _compare("a walk from copied states", given, expected, allowed)
            rows = runner.rows()
            rows.admit(runner.walker().prefill(*TokenTree.of([near, near, trunk]))[0])
            rows.advance([longer[0], longer[0], [*trunk, third[2]]])
            _compare("a state that goes on", runner.logits(rows.advance(longer)), further, allowed)
            back = runner.logits(rows.advance([paths[4], paths[2], paths[1]]))
            _compare("a state that goes back", back, expected[[4, 2, 1]], allowed)
    finally:
        runner.forwarded, runner.rolls_back = 0, False


def check_growing(runner: LongropeRunner) -> None:
    """Check a text that grows by a state, as `check_tree` does."""
    first, second, _ = _paths(runner.model)
    rows = runner.rows()
    rows.admit(runner.walker().prefill(*TokenTree.of([first[:-2]]))[0])
    grown = [rows.advance([first[:-at] if at else first]) for at in (1, 0)]
    expected = runner.states_at([first, first[:-1], second])
    allowed = _allowed(_apart(expected[:1], expected[2:]), expected)
    _compare("a state that goes on", torch.cat(grown[::-1]), expected[:2], allowed)
    runner.forwarded = 0


def _paths(model: Any, length: int = SHORT) -> tuple[list[int], list[int], list[int]]:
    """Return three token paths, the first two alike but for their second token; all hold a padding token."""
    size: int = model.get_input_embeddings().weight.shape[0]
    pad = getattr(model.config.get_text_config(), "pad_token_id", None)
    pad = pad if isinstance(pad, int) and 0 <= pad < size else 0
    first = [(7 + 13 * at * at + size * at // SHORT) % size for at in range(length)]
    third = [(11 + 29 * at * at + size * (length - at) // SHORT) % size for at in range(length)]
    first[4] = third[5] = pad
    return first, [first[0], (first[1] + size // 2) % size, *first[2:]], third


def _packed(runner: TreeRunner, paths: TokenSequences, longest: int, by_column: bool = False) -> Tensor:
    """Return the logits [n, V] after paths that lie scattered in one forward pass, with others at the context's end.

    By column, positions are those in the pass, which are wrong, instead of those in the paths.
    """
    tree = TokenTree()
    ends = [tree.add(path) for path in paths]
    ahead = torch.arange(max(longest - AHEAD, 0), max(longest, AHEAD))
    depths = torch.cat([ahead, torch.tensor(tree.depths)])
    allowed = torch.zeros(len(depths), len(depths), dtype=torch.bool)
    allowed[:AHEAD, :AHEAD] = torch.ones(AHEAD, AHEAD, dtype=torch.bool).tril()
    for node in range(len(tree)):
        allowed[AHEAD + node, [AHEAD + above for above in tree.way_up(node)]] = True
    ids = torch.tensor([[*tree.tokens[:AHEAD], *tree.tokens]])
    position = torch.arange(len(depths)) if by_column else depths
    place = position if runner.alibi else depths  # what alibi counts by, but not the windows of layers
    hidden = runner.body(ids, position[None], allowed[None], place[None], place[None])
    return runner.logits(hidden[0, [AHEAD + end for end in ends]])


@contextmanager
def _short_window(config: Any, masks: MaskMaker | None = None) -> Iterator[None]:
    """Let layers with a sliding window have one that the paths outgrow, in the model's own masks and in ours."""
    window = getattr(config, "sliding_window", None)
    if not window:
        yield
        return
    before = (masks.window, masks.slack) if masks is not None else (None, 0)
    config.sliding_window = min(WINDOW, window)
    if masks is not None:
        masks.window, masks.slack = masks.window and config.sliding_window, AHEAD
    try:
        yield
    finally:
        config.sliding_window = window
        if masks is not None:
            masks.window, masks.slack = before


def _apart(a: Tensor, b: Tensor) -> float:
    """Return how far logits [n, V] are apart, whatever constant is added to a row: the largest root mean square."""
    difference = torch.where(a == b, 0.0, a.double() - b.double())
    difference = difference - difference.mean(-1, keepdim=True)
    return difference.square().mean(-1).sqrt().max().item()


def _allowed(effect: float, logits: Tensor) -> float:
    """Return how far apart logits may be that must agree, where something that matters moves them by `effect`."""
    share, floor = {**TOLERANCES, **HALF}[logits.dtype]
    spread = logits.double().clamp(-1e4, 1e4)
    return max(share * effect, floor * spread.std(-1).max().item())


def _compare(what: str, got: Tensor, expected: Tensor, allowed: float) -> None:
    drift = _apart(got, expected)
    if not drift <= allowed:
        raise ArithmeticError(
            f"{what} differs from a plain forward pass by {drift:.2g}, where {allowed:.2g} is rounding"
        )
