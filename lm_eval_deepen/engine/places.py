"""Where the tokens of a span are read: nodes of every member's tree of token prefixes, in time linear in the text."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lm_eval_deepen.engine.base import EnsembleBase
from lm_eval_deepen.engine.covers import LONGEST_WORD, TOKENS_READ, CoverReader, Plan, reach
from lm_eval_deepen.engine.prompts import Span
from lm_eval_deepen.member import Prompt, TextCodec
from lm_eval_deepen.member.cursor import TextCursor
from lm_eval_deepen.member.tree import TokenTree, common_prefix


@dataclass(frozen=True)
class Place:
    """The beginning of a text that comes before one of its main tokens."""

    nodes: tuple[int | None, ...]  # the node of every active member's tokens [M] in its tree; None where it abstains
    outgrown: tuple[int, ...]  # the members that abstain because the text has outgrown their contexts
    back: int  # how many bytes behind it covers may begin, at most `LONGEST_WORD`

    def last(self, trees: Sequence[TokenTree]) -> list[list[int] | None]:
        """Return every member's last tokens, as many as are read of a text; None where it abstains."""
        pairs = zip(trees, self.nodes, strict=True)
        return [None if node is None else tree.last(node, TOKENS_READ)[0] for tree, node in pairs]

    def plan(self, reader: CoverReader, trees: Sequence[TokenTree], m: int) -> Plan | None:
        """Return the covers of member `m`, whose sources are nodes of its tree."""
        main, own = self.nodes[0], self.nodes[m]
        if main is None or own is None:
            return None
        tree = trees[m]
        tokens, nodes = tree.last(own, TOKENS_READ)

        def source(count: int, more: tuple[int, ...]) -> int | None:
            node = nodes[count - 1]
            return tree.extend(node, more) if tree.depths[node] + len(more) < reader.longest else None

        return reader.plan(trees[0].last(main, TOKENS_READ)[0], tokens, source, self.back)


def places(
    ensemble: EnsembleBase, span: Span, trees: Sequence[TokenTree], covered: bool | None = None
) -> Iterator[Place]:
    """Yield the place before every target token of a span, and add what the members take in to their trees.

    `covered` says whether any ensemble that shares the places has covers; without it, this ensemble alone decides.
    """
    covered = bool(ensemble.covers) if covered is None else covered
    ways: list[_OwnWay | _TextWay] = []
    for m, (member, prompt, tree) in enumerate(zip(ensemble.active, span.prompts, trees, strict=True)):
        longest = sys.maxsize if ensemble.is_hf else member.max_length
        is_own = m in ensemble.siblings
        ways.append(_OwnWay(tree, prompt, longest) if is_own else _TextWay(tree, member.codec, prompt, longest))
    several = len(ways) > 1
    pieces, head = ensemble.main.codec.vocab.pieces, span.prompts[0].ids
    skip, data, back = span.skip, span.lead, 0
    last: tuple[int, ...] = ()
    if covered:
        back = LONGEST_WORD if span.is_window else reach(pieces, head, len(head))
    for target in span.target:
        for way in ways:
            way.take(last, data)
        outgrown = tuple(m for m, way in enumerate(ways) if way.outgrown)
        yield Place(tuple(way.node() for way in ways), outgrown, back)
        if several:  # one member alone needs no bytes
            data, skip = pieces[target][skip:], max(0, skip - len(pieces[target]))
            back = min(LONGEST_WORD, back + len(data)) if covered else 0
        last = (target,)


class _OwnWay:
    """The way of a member whose tokens are the main member's."""

    def __init__(self, tree: TokenTree, prompt: Prompt, longest: int) -> None:
        self.tree, self.longest = tree, longest
        self.tokens: list[int] = list(prompt.ids)
        self.added, self.at = 0, -1  # how many tokens are in the tree, and the node of the last of them
        self.outgrown = False

    def take(self, tokens: tuple[int, ...], data: bytes) -> None:
        """Go on by some of the main member's tokens."""
        self.tokens += tokens

    def node(self) -> int | None:
        """Return the node of all tokens so far, None where they are too many."""
        self.outgrown = len(self.tokens) > self.longest
        if self.outgrown:
            return None
        self.added, self.at = len(self.tokens), _grown(self.tree, self.at, self.tokens, self.added, len(self.tokens))
        return self.at


class _TextWay:
    """The way of a member with a tokenizer of its own."""

    def __init__(self, tree: TokenTree, codec: TextCodec, prompt: Prompt, longest: int) -> None:
        self.tree, self.cursor, self.longest = tree, TextCursor(codec, prompt), longest
        self.fixed, self.added, self.at = self.cursor.fixed, 0, -1
        self.rest: tuple[int, ...] = ()  # what was last added after `at`
        self.nodes: list[int] = []
        self.outgrown = False

    def take(self, tokens: tuple[int, ...], data: bytes) -> None:
        """Go on by some bytes."""
        if data:
            self.cursor.take(data)

    def node(self) -> int | None:
        """Return the node of the tokens of all bytes so far, None where they are too many or cannot be spelt."""
        end = self.cursor.end()
        self.outgrown = end is not None and end[0] + len(end[1]) > self.longest
        if end is None or self.outgrown:
            return None
        count, rest = end
        if self.fixed is not self.cursor.fixed or count < self.added:  # tokens have changed
            self.fixed, self.added, self.at, self.rest, self.nodes = self.cursor.fixed, 0, -1, (), []
        if count != self.added:
            self.at = _grown(self.tree, self.at, self.cursor.fixed, self.added, count)
            self.added, self.rest, self.nodes = count, (), []
        shared = common_prefix(self.rest, rest)
        del self.nodes[shared:]
        for token in rest[shared:]:
            self.nodes.append(self.tree.extend(self.nodes[-1] if self.nodes else self.at, (token,)))
        self.rest = rest
        return self.nodes[-1] if self.nodes else self.at


def _grown(tree: TokenTree, node: int, tokens: Sequence[int], added: int, count: int) -> int:
    """Return the node of the first `count` tokens, of which `added` are in the tree and end at `node`."""
    return tree.add(tokens[:count]) if not added else tree.extend(node, tokens[added:count])
