"""Forward passes of a model that carries a state along a text: recurrent, hybrid, or with a cache of a kind of its own.

A state is what the model's forward pass gives to the next one: keys and values, convolutions, recurrent states. It
cannot be packed into a tree, nor cut back. So a tree is walked branch by branch: the way to a node with several
branches is forwarded once, and every branch but the last goes on from a copy of the state there.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)
from typing_extensions import override

from lm_eval_deepen.member.kv_cache import Prefilled, Reads
from lm_eval_deepen.member.runner import NODES_PER_FORWARD, BodyRunner, Held, PlainRunner, TokenSequences
from lm_eval_deepen.member.tree import TokenTree, common_prefix, pad
from lm_eval_deepen.member.walk import Walker, chunks

NAMES = ("past_key_values", "cache_params", "state")  # of a state, in the arguments and outputs of models
KEPT_IN_PARTS = ("conv1d_state", "recurrent_states")  # of a state, which RecurrentGemma's layers keep themselves
TWIGS = 16  # branches without branches of their own that are forwarded at once, each from a copy of one state
TOKENS_OF_A_PASS = 8  # a pass of one token takes the time of so many of a long pass, at least
OLD_STATES = 5  # kept of a row, where rows are rolled back
OLD_READS = 64  # places of a row whose hidden states are kept


class StateRunner(BodyRunner, Walker):
    """Forwards tokens after a state that the model itself made, and walks depth first: every node is forwarded once."""

    def __init__(
        self, model: nn.Module, autocast: torch.dtype | None = None, by_token: bool = False, together: bool = True
    ) -> None:
        """Wrap a loaded causal language model.

        With `by_token` a state goes on by no more than one token in a pass, as that of the first Mamba does; with
        `together` the states of several texts are joined to a batch.

        Raises:
            NotImplementedError: the model takes no state.
        """
        super().__init__(model, autocast)
        self.by_token, self.together = by_token, together
        taken = inspect.signature(self.network.forward).parameters
        self.name = next((name for name in NAMES if name in taken), "")
        if not self.name:
            raise NotImplementedError("it takes no state of the text before")
        self.takes_positions = "position_ids" in taken
        parts = [part for part in self.network.modules() if any(name in vars(part) for name in KEPT_IN_PARTS)]
        self.kept = [(part, name) for part in parts for name in KEPT_IN_PARTS if name in vars(part)]
        self.rolls_back = False  # whether a row ever went back: older states are worth keeping then

    def forward(
        self,
        rows: TokenSequences,
        held: Sequence[int],
        state: Any,
        way: Callable[[], list[int]] | None = None,
        least: int = 1,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Any]:
        """Return the hidden states [B, N, d] of rows of tokens, padded on the right, and the state after them.

        Args:
            rows: tokens, at least one each.
            held: how many tokens come before each row.
            state: of all rows, after these; it is used up. None where nothing comes before.
            way: gives the tokens before, where they are the same ones for all rows.
            least: how many tokens a pass has at least, padding included.
            mask: which columns of a padded state, and of one token after it, are seen [B, K].
        """
        width = max(least, *map(len, rows))
        self.forwarded += sum(map(len, rows))
        size = NODES_PER_FORWARD
        if self.by_token and state is None:
            size = width
        elif self.by_token:
            size = 1
            if way is not None and width * TOKENS_OF_A_PASS > len(rows) * (held[0] + width):  # anew is faster
                before = way()
                self.forwarded += len(rows) * len(before)
                hidden, state = self._pass(pad([[*before, *row] for row in rows], len(before) + width), [0], None)
                return hidden[:, len(before) :], state
        ids, parts = pad(rows, width), []
        for start, stop in chunks(width, size):
            hidden, state = self._pass(ids[:, start:stop], [n + start for n in held], state, mask)
            parts.append(hidden)
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0], state

    def _pass(self, ids: Tensor, held: Sequence[int], state: Any, mask: Tensor | None = None) -> tuple[Tensor, Any]:
        if self.kept:
            state, own = state or (DynamicCache(config=self.model.config), [None] * len(self.kept))
            for (part, name), value in zip(self.kept, own, strict=True):
                setattr(part, name, value)
        inputs: dict[str, Any] = {self.name: state}
        if self.takes_positions:
            position = torch.tensor(held)[:, None] + torch.arange(ids.shape[1])
            inputs["position_ids"] = position.expand(len(ids), -1).to(self.device)
        if mask is not None:
            inputs["attention_mask"] = mask.to(self.device)
        with self.computing():
            out = self.network(input_ids=ids.to(self.device), use_cache=True, **inputs)
        after = getattr(out, self.name, None)
        if self.kept:
            after = state, [getattr(part, name) for part, name in self.kept]
        if after is None:
            raise NotImplementedError("it gives no state of the text")
        return out.last_hidden_state, after

    @cached_property
    def held(self) -> Held:
        """What is kept of a text: of two states that were made."""
        forwarded = self.forwarded
        short, long = (self.forward([[0] * length], [0], None)[1] for length in (8, 16))
        self.forwarded = forwarded
        windows = [(num_bytes([layer.keys, layer.values]) // layer.keys.shape[-2], layer.sliding_window - 1)
                   for layer in windowed(short)]  # fmt: skip
        sizes = [num_bytes(state) - sum(num_bytes([layer.keys, layer.values]) for layer in windowed(state))
                 for state in (short, long)]  # fmt: skip
        more = max(0, sizes[1] - sizes[0]) // 8
        return Held(sizes[0] - 8 * more, ((more, 0), *windows))

    @override
    def walker(self, nodes: int = NODES_PER_FORWARD) -> Walker:
        return self

    @override
    def rows(self, count: int = 0, width: int = 0) -> StateRows:
        return StateRows(self)

    @override
    def read(self, tree: TokenTree, nodes: Sequence[int]) -> Tensor:
        states = {node: hidden for node, hidden, _ in self._visit(tree, frozenset(nodes), frozenset())}
        return torch.stack([states[node] for node in nodes])

    @override
    def prefill(self, tree: TokenTree, ends: Sequence[int], read: Sequence[int] = ()) -> tuple[list[Prefilled], Tensor]:
        hidden: dict[int, Tensor] = {}
        states: dict[int, Any] = {}
        for node, end, state in self._visit(tree, frozenset([*ends, *read]), frozenset(ends)):
            hidden[node] = end
            if state is not None:
                states[node] = state
        texts = [Prefilled(tree.path(node), hidden[node], copied(states[node])) for node in ends]
        return texts, torch.stack([hidden[node] for node in read]) if read else torch.empty(0)

    def _visit(
        self, tree: TokenTree, wanted: frozenset[int], kept: frozenset[int]
    ) -> Iterator[tuple[int, Tensor, Any | None]]:
        """Forward a tree and yield every wanted node with its hidden state [d], and those to be kept with their state.

        Of branches at a node the largest one comes last, so that no more states wait than the logarithm of the tree.
        """
        children, sizes = tree.children(), [1] * len(tree)
        for node in reversed(range(len(tree))):
            if tree.parents[node] >= 0:
                sizes[tree.parents[node]] += sizes[node]
        todo: list[tuple[list[int], Any, bool]] = []  # a branch, the state before it, whether it may use that up

        def branch_out(node: int, state: Any, lead: list[int]) -> Iterator[tuple[int, Tensor, Any | None]]:
            """Forward branches without branches of their own after `lead`, and put off the others."""
            chains = [lead + _chain(children, child, kept) for child in sorted(children[node], key=lambda n: sizes[n])]
            ends = [not children[chain[-1]] and chain[-1] not in kept for chain in chains]
            twigs = [chain for chain, end in zip(chains, ends, strict=True) if end]
            others = [chain for chain, end in zip(chains, ends, strict=True) if not end]
            yield from self._twigs(tree, twigs, state, wanted, last=not others)
            todo.extend((chain, state, not at) for at, chain in enumerate(reversed(others)))

        yield from branch_out(-1, None, [])
        while todo:
            chain, state, last = todo.pop()
            end = chain[-1]
            if len(chain) == 1 and state is not None and end not in kept and not self.by_token:
                yield from self._twigs(tree, [chain] if end in wanted else [], state, wanted)
                yield from branch_out(end, state if last else copied(state), chain)
                continue
            hidden, state = self._forward_nodes(tree, [chain], state if last else copied(state), anew=not last)
            for at, node in enumerate(chain):
                if node in wanted:
                    yield node, hidden[0, at], (state if node in kept else None)
            yield from branch_out(end, copied(state) if end in kept and children[end] else state, [])

    def _twigs(
        self, tree: TokenTree, chains: Sequence[list[int]], state: Any, wanted: frozenset[int], last: bool = True
    ) -> Iterator[tuple[int, Tensor, None]]:
        """Forward nodes after which no state is needed, and yield those that are wanted.

        A state that goes on by several tokens at once does not go on by one alone, which some models (Zamba 2,
        Nemotron-H) compute in another way than the whole texts that scores are made of: another token comes after it.
        """
        least = 1 if self.by_token or state is None else 2
        left = len(chains)
        for some in self._batches(chains):
            left -= len(some)
            own = None if state is None else repeated(state, len(some))
            hidden, _ = self._forward_nodes(tree, some, own, least, anew=bool(left) or not last)
            for row, chain in zip(hidden, some, strict=True):
                yield from ((node, row[at], None) for at, node in enumerate(chain) if node in wanted)

    def _forward_nodes(
        self, tree: TokenTree, chains: Sequence[Sequence[int]], state: Any, least: int = 1, anew: bool = False
    ) -> tuple[Tensor, Any]:
        """Forward nodes that all come after the same one.

        The way to them may be forwarded `anew` where that is faster; for all branches but the last one, so that no more
        tokens are forwarded than those of all whole texts.
        """
        depth, parent = tree.depths[chains[0][0]], tree.parents[chains[0][0]]
        rows = [[tree.tokens[node] for node in chain] for chain in chains]
        way = (lambda: [tree.tokens[node] for node in tree.way_up(parent)][::-1]) if anew else None
        return self.forward(rows, [depth] * len(rows), state, way, least)

    def _batches(self, chains: Sequence[list[int]]) -> Iterator[list[list[int]]]:
        """Yield chains of about one length together, as many as a pass may hold."""
        some: list[list[int]] = []
        for chain in sorted(chains, key=len):
            full = len(some) == TWIGS or (len(some) + 1) * len(chain) > NODES_PER_FORWARD
            if some and (full or not self.together):
                yield some
                some = []
            some.append(chain)
        if some:
            yield some


def _chain(children: Sequence[Sequence[int]], node: int, kept: frozenset[int]) -> list[int]:
    """Return a node and those after it, up to one with several branches, with none, or whose state is kept."""
    chain = [node]
    while len(children[chain[-1]]) == 1 and chain[-1] not in kept:
        chain.append(children[chain[-1]][0])
    return chain


class StateRows:
    """B rows with a state each; rows of one length whose states are alike are forwarded together.

    A row that goes back starts again from the last state before, or from its first token. The first time no state but
    the last one is at hand; from then on a few are kept.
    """

    def __init__(self, runner: StateRunner) -> None:
        self.runner = runner
        self.tokens: list[tuple[int, ...]] = []
        self.first: list[int] = []  # tokens of each row when it was admitted
        self.states: list[dict[int, Any]] = []  # by how many of a row's tokens they are after, ascending
        self.known: list[dict[int, Tensor]] = []  # hidden states [d], likewise

    def admit(self, texts: Sequence[Prefilled], rows: Sequence[int] | None = None) -> None:
        """Put prefilled sequences into `rows`, or into new rows at the end."""
        rows = range(len(self.tokens), len(self.tokens) + len(texts)) if rows is None else rows
        for row, text in zip(rows, texts, strict=True):
            at, length = slice(row, row + 1), len(text.tokens)
            self.tokens[at], self.first[at] = [text.tokens], [length]
            self.states[at], self.known[at] = [{length: text.kv}], [{length: text.state}]

    def advance(self, sequences: TokenSequences, reads: Reads | None = None) -> Tensor:
        """Make each row hold its sequence; return the hidden states at the places read, as `RowCache.advance`."""
        places = [[len(tokens)] for tokens in sequences] if reads is None else reads
        groups: dict[Hashable, list[tuple[int, int, Any]]] = {}  # rows, where they go on, their states there
        for row, (tokens, lengths) in enumerate(zip(sequences, places, strict=True)):
            begin = self._roll_back(row, tuple(tokens), lengths)
            if begin == len(tokens):
                continue
            state = self.states[row].get(begin)
            if self.runner.rolls_back:
                state = copied(state)
            else:
                self.states[row] = {}
            count = len(tokens) - begin
            alike: Hashable = begin if self.runner.takes_positions else shapes(state)
            if count == 1 and self.runner.takes_positions and can_be_padded(state):
                alike = ""
            groups.setdefault((count, alike) if self.runner.together else row, []).append((row, begin, state))
        for group in groups.values():
            rows, begins, states = zip(*group, strict=True)
            fresh = [self.tokens[row][begin:] for row, begin in zip(rows, begins, strict=True)]
            longest, mask = max(begins), None
            if self.runner.takes_positions and min(begins) < longest:
                states = tuple(padded(s, longest - begin, longest) for s, begin in zip(states, begins, strict=True))
                mask = (torch.arange(longest + 1) >= longest - torch.tensor(begins)[:, None]).long()  # [B, K]
            state = mapped(states, torch.cat) if len(rows) > 1 else states[0]
            hidden, state = self.runner.forward(fresh, begins, state, mask=mask)
            for at, (row, begin) in enumerate(zip(rows, begins, strict=True)):
                length = len(self.tokens[row])
                read = {*range(length - OLD_READS + 1, length + 1), *places[row]}
                self.known[row] = {n: old for n, old in self.known[row].items() if n in read}
                self.known[row] |= {n: hidden[at, n - begin - 1].clone() for n in read if n > begin}
                own = part(state, at) if len(rows) > 1 else state
                self.states[row][length] = own if mask is None else padded(own, begin - longest, length)
                self._forget(row)
        return torch.stack([self.known[row][n] for row, lengths in enumerate(places) for n in lengths])

    def _roll_back(self, row: int, tokens: tuple[int, ...], lengths: Sequence[int]) -> int:
        """Drop what `tokens` does not share with the row, and return after how many of them it goes on."""
        shared = common_prefix(self.tokens[row], tokens)
        self.tokens[row] = tokens
        self.known[row] = {n: hidden for n, hidden in self.known[row].items() if n <= shared}
        self.states[row] = {n: state for n, state in self.states[row].items() if n <= shared}
        unknown = [n for n in lengths if n not in self.known[row]]
        if shared == len(tokens) and not unknown:
            return shared
        last = min([shared, len(tokens) - 1, *(n - 1 for n in unknown)])
        begin = max((n for n in self.states[row] if n <= last), default=0)
        self.runner.rolls_back |= begin < last
        return begin

    def _forget(self, row: int) -> None:
        """Keep the last state, that after the prompt, and old ones, the sparser the older."""
        last, first = len(self.tokens[row]), self.first[row]
        old = [n for n in self.states[row] if n not in (first, last) and not n % (1 << ((last - n).bit_length() // 2))]
        kept = [first, *sorted(old)[-OLD_STATES:], last] if self.runner.rolls_back else [last]
        self.states[row] = {n: self.states[row][n] for n in kept if n in self.states[row]}

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these rows, in this order."""
        for name in ("tokens", "first", "states", "known"):
            setattr(self, name, [getattr(self, name)[row] for row in rows])


class LongropeRunner(PlainRunner):
    """Scores by whole texts, and generates with a state as long as a text is on one side of `switch`.

    Longrope takes other frequencies for all positions where a text is longer: the state is then made anew, as under hf.
    """

    def __init__(self, model: nn.Module, autocast: torch.dtype | None, switch: int) -> None:
        """Wrap a loaded causal language model whose longest text with short frequencies has `switch` tokens."""
        super().__init__(model, autocast, alone=True)
        self.carrier = StateRunner(model, autocast, by_token=True, together=False)
        self.switch = switch

    @override
    def prefill(self, tree: TokenTree, ends: Sequence[int], read: Sequence[int] = ()) -> tuple[list[Prefilled], Tensor]:
        texts = []
        for path in map(tree.path, ends):
            hidden, state = self.carrier.forward([path], [0], None)
            texts.append(Prefilled(path, hidden[0, -1], state))
            self.forwarded += len(path)
        return texts, self.read(tree, read) if read else torch.empty(0)

    @override
    def rows(self, count: int = 0, width: int = 0) -> StateRows:
        return _LongropeRows(self)


class _LongropeRows(StateRows):
    def __init__(self, runner: LongropeRunner) -> None:
        super().__init__(runner.carrier)
        self.whole = runner

    def advance(self, sequences: TokenSequences, reads: Reads | None = None) -> Tensor:
        before = self.runner.forwarded
        logits = self.runner.logits(super().advance(sequences, reads))
        self.whole.forwarded += self.runner.forwarded - before
        return logits

    def _roll_back(self, row: int, tokens: tuple[int, ...], lengths: Sequence[int]) -> int:
        begin = super()._roll_back(row, tokens, lengths)
        return 0 if begin <= self.whole.switch < len(tokens) else begin


def mapped(states: Sequence[Any], join: Callable[[list[Tensor]], Tensor]) -> Any:
    """Return a state built like some others, its tensors made of theirs; what else it holds is the first one's."""
    with torch.inference_mode():
        return _mapped(states, join, {})


def _mapped(parts: Sequence[Any], join: Callable[[list[Tensor]], Tensor], made: dict[int, Any]) -> Any:
    first = parts[0]
    if isinstance(first, Tensor):
        return join(list(parts)) if first.dim() else first
    if isinstance(first, (list, tuple)):
        return type(first)([_mapped(own, join, made) for own in zip(*parts, strict=True)])
    if isinstance(first, dict):
        return {key: _mapped([own[key] for own in parts], join, made) for key in first}
    plain = isinstance(first, (nn.Module, PretrainedConfig))
    if plain or not type(first).__module__.startswith("transformers"):  # and its folder of models' own code
        return first
    if id(first) not in made:
        new = made[id(first)] = copy.copy(first)
        vars(new).update({name: _mapped([vars(own)[name] for own in parts], join, made) for name in vars(first)})
    return made[id(first)]


def copied(state: Any) -> Any:
    """Return a state that shares no tensor with another."""
    return mapped([state], lambda one: one[0].clone())


def part(state: Any, row: int) -> Any:
    """Return one row's part of a state."""
    return mapped([state], lambda one: one[0][row : row + 1])


def repeated(state: Any, rows: int) -> Any:
    """Return a state of so many rows from that of one; it shares no tensor with it."""
    return mapped([state], lambda one: one[0].repeat(rows, *[1] * (one[0].dim() - 1)))


def tensors(state: Any) -> list[Tensor]:
    """Return the tensors of a state, but for those without dimensions."""
    found: list[Tensor] = []
    mapped([state], lambda one: found.extend(one) or one[0])  # type: ignore[func-returns-value]
    return found


def shapes(state: Any) -> tuple[tuple[int, ...], ...]:
    """Return the shapes of a row's tensors in a state, without the dimension of rows."""
    return tuple(tuple(tensor.shape[1:]) for tensor in tensors(state))


def num_bytes(state: Any) -> int:
    """Return the bytes of a state's tensors."""
    return sum(tensor.nbytes for tensor in tensors(state))


def windowed(state: Any) -> list[DynamicSlidingWindowLayer]:
    """Return the layers of a state that keep the last keys and values alone."""
    cache = state[0] if isinstance(state, tuple) else state
    layers = getattr(cache, "layers", ())
    return [layer for layer in layers if isinstance(layer, DynamicSlidingWindowLayer) and layer.is_initialized]


def can_be_padded(state: Any) -> bool:
    """Return whether the layers of a state are of kinds that `padded` knows."""
    known = (DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer, LinearAttentionAndFullAttentionLayer)
    return type(state) is DynamicCache and all(type(layer) in known for layer in state.layers)


def padded(state: DynamicCache, more: int, length: int) -> DynamicCache:
    """Put `more` columns before a state's keys and values, in place, as in a batch that is padded on the left.

    Negative ones are taken away. There are `length` afterwards; a sliding window keeps no more than its own.
    """
    for layer in state.layers:
        if not isinstance(layer, DynamicLayer) or not layer.is_initialized:
            continue
        columns = more
        if isinstance(layer, DynamicSlidingWindowLayer):
            columns = min(length, layer.sliding_window - 1) - layer.keys.shape[2]
            layer.cumulative_length = length
        layer.keys = nn.functional.pad(layer.keys, (0, 0, columns, 0))
        layer.values = nn.functional.pad(layer.values, (0, 0, columns, 0))
    return state
