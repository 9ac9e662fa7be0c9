"""The tokens of a text that grows, without reading again what no later byte changes."""

from __future__ import annotations

from lm_eval_deepen.member.text import Prompt, TextCodec, incomplete_tail
from lm_eval_deepen.vocabulary import last_safe_cut


class TextCursor:
    """A prompt and the bytes after it, as far as they have come: what `TextCodec.follow` gives, at the price of a word.

    Attributes:
        fixed: tokens that no later byte changes: the prompt's head, and all words but the last.
    """

    def __init__(self, codec: TextCodec, prompt: Prompt) -> None:
        """Start behind a prompt."""
        self.codec, self.prompt = codec, prompt
        self.fixed: list[int] = list(prompt.head)
        self._rest = prompt.tail.encode()  # the bytes after `fixed`
        self._invalid = False  # whether some byte before the end is part of no character
        self._lost = not prompt.spelt  # whether no later byte can make the text one that can be spelt

    def take(self, data: bytes) -> None:
        """Go on by some bytes."""
        self._rest += data
        text = self._text()
        cut = last_safe_cut(text) if self.codec.cuts and not self._lost else 0
        if not cut:
            return
        settled = text[:cut].encode(errors="surrogateescape")
        ids = self.codec.spell(settled, self._invalid)
        if ids is None:
            self._lost = True
            return
        self.fixed += ids
        self._rest = self._rest[len(settled) :]

    def _text(self) -> str:
        """Return the whole characters after `fixed`; bytes that are part of none are escaped."""
        whole = self._rest[: len(self._rest) - incomplete_tail(self._rest)]
        try:
            return whole.decode()
        except UnicodeDecodeError:
            self._invalid = True
            return whole.decode(errors="surrogateescape")

    def end(self, data: bytes = b"") -> tuple[int, tuple[int, ...]] | None:
        """Return the tokens of the text, and of `data` after it, which is not taken in.

        Returns:
            With how many of `fixed` they begin, and those after them; None where the text cannot be spelt.
        """
        if self._lost:
            return None
        rest = self._rest + data
        if not rest:
            return 0, self.prompt.ids
        ids = self.codec.spell(rest, self._invalid)
        return None if ids is None else (len(self.fixed), ids)
