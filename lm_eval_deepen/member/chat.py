"""A rendered conversation that still knows its messages."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any


class ChatPrompt(str):
    """The main member's rendering of a conversation, with what the other members render themselves.

    It is an ordinary string to the harness, and survives its request caches and text put after it.
    """

    messages: list[dict[str, Any]]  # the conversation, ``[{"role": ..., "content": ...}, ...]``
    add_generation_prompt: bool  # whether an assistant turn is opened at the end; otherwise the last message goes on
    appended: str  # text put after the rendering
    trimmed: bool  # whether spaces at the end are left to the continuation, in every member's rendering
    # why some member's template cannot render the conversation; empty where all can. The request has no answer then
    failure: str
    # a digest of the other members' renderings, empty where there is none; None where they were not rendered
    others: str | None

    def __new__(
        cls,
        text: str,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool,
        appended: str = "",
        trimmed: bool = False,
        failure: str = "",
        others: str | None = None,
    ) -> ChatPrompt:
        """Attach a conversation to its rendering."""
        prompt = super().__new__(cls, text)
        prompt.messages, prompt.add_generation_prompt, prompt.appended = messages, add_generation_prompt, appended
        prompt.trimmed, prompt.failure, prompt.others = trimmed, failure, others
        return prompt

    def __getnewargs_ex__(self) -> tuple[Any, ...]:
        """Give pickle what `__new__` needs."""
        return (str(self),), vars(self)

    def __add__(self, text: str) -> ChatPrompt:
        """Return the conversation with `text` after it; every member appends it to its own rendering."""
        if not isinstance(text, str):
            return NotImplemented
        changed = {"appended": self.appended + str(text), "trimmed": False}
        return ChatPrompt(str(self) + str(text), **{**vars(self), **changed})

    @property
    def continued(self) -> bool:
        """Whether the rendering ends in text of the conversation, not in a template's own words."""
        return bool(self.appended) or not self.add_generation_prompt

    def split_spaces(self) -> tuple[ChatPrompt, str]:
        """Return the conversation without the spaces at its end, and these spaces."""
        text = self.rstrip()
        return ChatPrompt(text, **{**vars(self), "trimmed": True}), str(self)[len(text) :]

    def rendered(self, text: str) -> str:
        """Return another rendering of the messages, with what was done to this one."""
        text += self.appended
        return text.rstrip() if self.trimmed else text


def distinct(arguments: Iterable[Any]) -> tuple[Any, ...]:
    """Return a request's arguments, and what tells its conversation from one that the main member renders alike."""
    own = tuple(arguments)
    chat = next((one for one in own if isinstance(one, ChatPrompt)), None)
    if chat is None or chat.others == "":
        return own
    return (*own, chat.others or digest([json.dumps(chat.messages, sort_keys=True, default=str)]))


def digest(texts: Iterable[str]) -> str:
    """Return a digest of texts, empty for none."""
    known = list(texts)
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16] if known else ""


def plain_rendering(messages: Iterable[Mapping[str, Any]], add_generation_prompt: bool) -> str:
    r"""Return a conversation as plain text, for members without a chat template.

    A turn is its role on a line of its own and then its text; turns are an empty line apart:
    ``System:\n...\n\nUser:\n...\n\nAssistant:\n``.
    """
    turns = [f"{message['role'].capitalize()}:\n{message['content']}" for message in messages]
    return "\n\n".join([*turns, "Assistant:\n"] if add_generation_prompt else turns)
