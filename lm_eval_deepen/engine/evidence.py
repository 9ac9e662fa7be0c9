"""The tokens of a request's prompts on which members are compared: those of the same bytes for every member.

Members read one text differently: one has a BOS before its first word, another has nothing, a third puts a space
there; chat templates wrap the same messages in words of their own. A loss compares members only where all of them
predict the same bytes. So the first bytes, which some member cannot predict, are conditioned on by all, and of a
conversation only the messages count.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from lm_eval_deepen.engine.base import EnsembleBase
from lm_eval_deepen.member import Member, Prompt
from lm_eval_deepen.member.chat import ChatPrompt

Stretch = tuple[int, int]  # first byte, and the byte after the last one


@dataclass(frozen=True)
class Read:
    """A token of a prompt."""

    before: int  # how many of the prompt's tokens come before it
    token: int  # its id


def evidence(ensemble: EnsembleBase, prompts: Sequence[Prompt], last: int | None = None) -> list[list[Read] | None]:
    """Return the tokens of every active member's prompt [M] that are evidence: they spell the same bytes.

    In each stretch of text that all prompts have, they are the tokens between the first and the last byte at which
    all members' tokens are cut alike, and before which every member has something to condition on. Control tokens
    are never evidence. Where nothing is left (a prompt of one token, an empty prompt, a window of a long text), all
    lists are empty. A member that cannot take in its prompt has None; the others are compared without it.

    With `last`, only so many stretches at the end are evidence, between places where all members' tokens are cut alike.
    """
    if any(member.generates_only for member in ensemble.active):  # it reads a source, and predicts none of it
        return [[] for _ in prompts]
    here = [m for m, prompt in enumerate(prompts) if ensemble.path(m, prompt, (), b"") is not None]
    given = [prompts[m] for m in here]
    members = [ensemble.active[m] for m in here]
    own = iter(_evidence(members, given, ensemble.config.chat_fallback, last, ensemble.by_stretches))
    return [next(own) if m in here else None for m in range(len(prompts))]


def _evidence(
    members: Sequence[Member], prompts: Sequence[Prompt], fallback: str, last: int | None, by_stretches: bool
) -> list[list[Read]]:
    reads: list[list[Read]] = [[] for _ in members]
    if by_stretches and prompts[0].chat is not None:  # as where a continuation of a conversation is scored
        return reads
    edges: list[dict[int, int]] = []  # where tokens begin, and the last one ends, in bytes of the prompt
    for member, prompt in zip(members, prompts, strict=True):
        pieces = member.codec.vocab.pieces
        places = accumulate((len(pieces[token]) for token in prompt.ids), initial=0)
        # nothing comes before the first token: it cannot be predicted
        edges.append({at: place for at, place in enumerate(places) if at})
    parts: list[tuple[list[Stretch], list[int]]] = []  # texts that all have, and where all tokens are cut in them
    left = last
    for stretches in reversed(_stretches(members, prompts, fallback)):
        cuts = [
            {edge - start for edge in own.values() if start <= edge <= end}
            for own, (start, end) in zip(edges, stretches, strict=True)
        ]
        common = sorted(set.intersection(*cuts) - ({0} if by_stretches else set()))  # the first stretch is none there
        if left is not None and common:
            common = common[-left - 1 :]
            left -= len(common) - 1
        if common:
            parts.append((stretches, common))
    for stretches, common in reversed(parts):
        for m, (prompt, own, (start, _)) in enumerate(zip(prompts, edges, stretches, strict=True)):
            first, end = start + common[0], start + common[-1]
            control = members[m].codec.vocab.control
            for at, token in enumerate(prompt.ids):
                if at in own and token not in control and first <= own[at] and own[at + 1] <= end:
                    reads[m].append(Read(at, token))
    return reads


def _stretches(members: Sequence[Member], prompts: Sequence[Prompt], fallback: str) -> list[list[Stretch]]:
    """Return the stretches of text that all prompts have, each as every member's bytes [M]."""
    if not all(prompt.is_evidence for prompt in prompts):
        return []
    texts = [member.codec.vocab.decode(prompt.ids) for member, prompt in zip(members, prompts, strict=True)]
    chat = prompts[0].chat
    if chat is None:
        size = min(map(len, texts))  # all end alike; a longer one begins with a tokenizer's own space
        return [[(len(text) - size, len(text)) for text in texts]]
    said = [_said(member, chat, text, fallback) for member, text in zip(members, texts, strict=True)]
    return [
        [stretch for stretch in stretches if stretch is not None]
        for stretches in zip(*said, strict=True)
        if None not in stretches
    ]


def _said(member: Member, chat: ChatPrompt, text: bytes, fallback: str) -> list[Stretch | None]:
    """Return where a member's prompt has every message of a conversation, and what was appended to it, in bytes.

    What a template puts around the messages is learnt from its rendering of other messages. The spaces at both ends
    of a message do not count: some templates drop them. A message that the template does not give as it is, and those
    after it, are None.
    """
    marks = [f"xqzj{n}jzqx" for n in range(len(chat.messages))]
    others = [{**message, "content": mark} for message, mark in zip(chat.messages, marks, strict=True)]
    marked = ChatPrompt("", others, chat.add_generation_prompt, chat.appended, chat.trimmed)
    rendered = member.codec.vocab.decode(member.conversation(marked, fallback).ids)
    around = re.split("|".join(marks).encode(), rendered) if marks else [rendered]  # what comes before each, and last
    appended = (chat.appended.rstrip() if chat.trimmed else chat.appended).encode()
    end = (len(text) - len(appended), len(text)) if appended and text.endswith(appended) else None
    stretches: list[Stretch | None] = []
    at = len(around[0]) if text.startswith(around[0]) else None
    for message, after in zip(chat.messages, around[1:], strict=False):
        if at is None or not isinstance(message["content"], str):
            break
        raw = message["content"].encode()
        spelt = (raw, raw.strip(), raw.lstrip(), raw.rstrip())
        own = next((way for way in spelt if text.startswith(way + after, at)), None)
        if own is None:
            break
        begin = at + own.index(raw.strip())
        stretches.append((begin, begin + len(raw.strip())))
        at += len(own) + len(after)
    return [*stretches, *[None] * (len(chat.messages) - len(stretches)), end]
