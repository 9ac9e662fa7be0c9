"""A rendered conversation that still knows its messages."""

from __future__ import annotations

from typing import Any


class ChatPrompt(str):
    """The main member's rendering of a conversation, with what the other members render themselves.

    It is an ordinary string to the harness, and survives its request caches.

    Attributes:
        messages: the conversation, ``[{"role": ..., "content": ...}, ...]``.
        add_generation_prompt: whether an assistant turn is opened at the end.
    """

    messages: list[dict[str, Any]]
    add_generation_prompt: bool

    def __new__(cls, text: str, messages: list[dict[str, Any]], add_generation_prompt: bool) -> ChatPrompt:
        """Attach a conversation to its rendering."""
        prompt = super().__new__(cls, text)
        prompt.messages = messages
        prompt.add_generation_prompt = add_generation_prompt
        return prompt

    def __getnewargs__(self) -> tuple[str, list[dict[str, Any]], bool]:  # type: ignore[override]
        """Give pickle what `__new__` needs."""
        return str(self), self.messages, self.add_generation_prompt
