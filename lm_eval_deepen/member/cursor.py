"""The tokens of a text that grows, without reading again what no later byte changes."""

from __future__ import annotations

from dataclasses import dataclass

from lm_eval_deepen.errors import VocabularyError
from lm_eval_deepen.member.text import Prompt, TextCodec, incomplete_tail
from lm_eval_deepen.vocabulary import last_safe_cut
from lm_eval_deepen.vocabulary.restarts import Restarts

BEFORE = 4  # characters before a place that decide whether it is one
SEARCHED = 256  # tokens, the last ones, among which a place to read from again is looked for


@dataclass(frozen=True)
class _Block:
    """Text since the last safe cut whose tokens are among the fixed ones, from a place to read from to the next."""

    text: str  # the text
    before: int  # how many of the fixed tokens come before it
    first: int | None  # its first token; None at the cut, before which nothing can change


class TextCursor:
    """A prompt and the bytes after it, as far as they have come: what `TextCodec.follow` gives, at the price of a word.

    Attributes:
        fixed: the first tokens: the prompt's head, and all words but the last. Tokens are added to it; where later
            bytes change any, which is rare, another list takes its place.
    """

    def __init__(self, codec: TextCodec, prompt: Prompt) -> None:
        self.codec, self.prompt = codec, prompt
        self.fixed: list[int] = list(prompt.head)
        self._rest = prompt.tail.encode()  # the bytes after `fixed`
        self._blocks: list[_Block] = []  # those before the rest, back to the last safe cut
        self._first: int | None = None  # the token with which the rest began
        self._invalid = False  # whether some byte before the end is part of no character
        self._lost = not prompt.spelt  # whether no later byte can make the text one that can be spelt

    def take(self, data: bytes) -> None:
        """Go on by some bytes."""
        self._rest += data
        text = self._text()
        if self._lost:
            return
        cut = last_safe_cut(text) if self.codec.cuts else 0
        if cut:
            settled = text[:cut].encode(errors="surrogateescape")
            end = self._spell(settled)
            if end is None:
                self._lost = True
                return
            self._keep(end[0])
            self.fixed += end[1]
            self._rest, self._blocks, self._first = self._rest[len(settled) :], [], None
            text = text[cut:]
        restarts = self.codec.restarts
        if restarts and len(text) > restarts.worth and not self._invalid and not restarts.traps.search(text):
            self._fold(text, restarts)

    def _text(self) -> str:
        """Return the whole characters after `fixed`; bytes that are part of none are escaped."""
        whole = self._rest[: len(self._rest) - incomplete_tail(self._rest)]
        try:
            return whole.decode()
        except UnicodeDecodeError:
            self._invalid = True
            return whole.decode(errors="surrogateescape")

    def _fold(self, text: str, restarts: Restarts) -> None:
        """Put the tokens before the last place to read from again among the fixed ones, if there is such a place."""
        try:
            count, ids = self._read(text)
        except VocabularyError:
            return
        while self._blocks and self._blocks[-1].before >= count:
            block = self._blocks.pop()
            text, self._rest, self._first = block.text + text, block.text.encode() + self._rest, block.first
        self._keep(count)
        pieces, data = self.codec.vocab.pieces, text.encode()
        offset = len(data)
        for at in range(len(ids) - 1, max(0, len(ids) - SEARCHED), -1):
            offset -= len(pieces[ids[at]])
            if data[offset] & 0xC0 == 0x80:  # inside a character
                continue
            place = len(text) - len(data[offset:].decode())
            if BEFORE <= place <= len(text) - restarts.margin and restarts.places.match(text, place):
                self._blocks.append(_Block(text[:place], len(self.fixed), self._first))
                self.fixed += ids[:at]
                self._rest, self._first = self._rest[offset:], ids[at]
                return

    def _keep(self, count: int) -> None:
        """Keep the first fixed tokens alone."""
        if count < len(self.fixed):
            self.fixed = self.fixed[:count]

    def _read(self, text: str) -> tuple[int, tuple[int, ...]]:
        """Return with how many of `fixed` the tokens begin if a text comes after these, and the tokens after them.

        The rest begins the text. It is read from where the rest begins, or further back until the tokens before stay.
        """
        count, first, ids = len(self.fixed), self._first, self.codec.encode(text)
        at, more = len(self._blocks), 1
        while first is not None and ids[:1] != (first,):
            blocks = self._blocks[max(0, at - more) : at]
            text = "".join(block.text for block in blocks) + text
            count, first, ids = blocks[0].before, blocks[0].first, self.codec.encode(text)
            at, more = at - len(blocks), 2 * more
        return count, ids

    def _spell(self, data: bytes) -> tuple[int, tuple[int, ...]] | None:
        """Return the same for bytes that need not be whole characters; None where they cannot be spelt."""
        count = len(self.fixed)

        def encode(text: str) -> tuple[int, ...]:
            nonlocal count
            count, ids = self._read(text)
            return ids

        ids = self.codec.spell(data, self._invalid, encode)
        return None if ids is None else (count, ids)

    def end(self, data: bytes = b"") -> tuple[int, tuple[int, ...]] | None:
        """Return the tokens of the text, and of `data` after it, which is not taken in.

        Returns:
            With how many of `fixed` they begin, and those after them; None where the text cannot be spelt.
        """
        if self._lost:
            return None
        rest = self._rest + data
        return self._spell(rest) if rest else (0, self.prompt.ids)
