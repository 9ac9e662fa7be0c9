"""Requests as spans of main-member tokens, and the text that every member sees before them.

One member alone follows the harness's ``HFLM`` token by token. With several, continuation bytes start
where the main member's continuation tokens start, and a cut on the left falls on one of its tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lm_eval_deepen.engine.base import EnsembleBase
from lm_eval_deepen.errors import RequestError, WindowError
from lm_eval_deepen.member import Member, Prompt
from lm_eval_deepen.member.chat import ChatPrompt
from lm_eval_deepen.member.text import incomplete_tail


@dataclass(frozen=True)
class Span:
    """Tokens to score after each member's own prompt."""

    prompts: tuple[Prompt, ...]  # one per active member, the main member first
    target: tuple[int, ...]  # the main member's continuation tokens
    skip: int = 0  # how many of the target's first bytes are a prefix space and no text
    lead: bytes = b""  # an unfinished character that the other members' prompts leave out
    traced: bool = False  # whether its score comes with its steps
    is_window: bool = False  # whether it goes on with the text of its prompts, of which it is a window

    def paths(self, ensemble: EnsembleBase, count: int) -> tuple[tuple[int, ...] | None, ...]:
        """Return every active member's tokens before target number `count`; None where it abstains."""
        ids, data = self._text(ensemble, count)
        return tuple(ensemble.path(m, prompt, ids, data) for m, prompt in enumerate(self.prompts))

    def tokens(self, ensemble: EnsembleBase, count: int) -> tuple[tuple[int, ...] | None, ...]:
        """Return the same, but None for a member that cannot spell its text alone."""
        ids, data = self._text(ensemble, count)
        return tuple(ensemble.tokens(m, prompt, ids, data) for m, prompt in enumerate(self.prompts))

    def _text(self, ensemble: EnsembleBase, count: int) -> tuple[tuple[int, ...], bytes]:
        """Return the first `count` target tokens, and what they are to the other members."""
        ids, data = self.target[:count], b""
        if len(self.prompts) > 1:
            data = self.lead + ensemble.main.codec.vocab.decode(ids)[self.skip :]
        return ids, data


def require_text(value: object, what: str) -> None:
    """Raise RequestError unless a part of a request is text that has bytes; `what` says which part."""
    if not isinstance(value, str):
        raise RequestError(
            f"{what} is no text but {_short(value)} of type {type(value).__name__}. Correct the task: doc_to_text, "
            "doc_to_target and doc_to_choice have to give text."
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{what} has the lone surrogate U+{ord(value[error.start]):04X} at character {error.start}, after "
            f"{_short(value[max(0, error.start - 20) : error.start])}: half of a UTF-16 pair, which has no bytes and "
            "so no tokens. Mend the document, or the program that decoded it."
        ) from None
    if isinstance(value, ChatPrompt) and value.failure:
        raise RequestError(value.failure)
    if isinstance(value, ChatPrompt):  # what the main member's template leaves out, another one's may show
        for message in value.messages:
            for key, part in message.items():
                if isinstance(part, str):
                    require_text(part, f"{what}: the {key} of a message")


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:60]}..."


def frozen(ids: Sequence[int]) -> Prompt:
    """Return a prompt of fixed tokens."""
    return Prompt(tuple(ids), "", tuple(ids))


def same_text(ensemble: EnsembleBase, ids: tuple[int, ...], text: str) -> tuple[Prompt, ...]:
    """Return prompts of one text: the main member's tokens, its siblings' same tokens, the others' own."""
    main = frozen(ids)
    others = [
        main if m in ensemble.siblings else member.codec.prompt(text)
        for m, member in enumerate(ensemble.active)
        if m > 0
    ]
    return (main, *others)


class Prompter:
    """Turns request strings into prompts and spans for the active members."""

    def __init__(self, ensemble: EnsembleBase) -> None:
        self.ensemble = ensemble
        self.members: tuple[Member, ...] = ensemble.active
        self.main = self.members[0]
        self.solo = len(self.members) == 1

    def span(self, context: str, continuation: str) -> Span:
        """Return the span for a loglikelihood request.

        Raises:
            RequestError: what is no text, that the main member cannot spell, or that does not fit into its context.
        """
        require_text(context, "the context")
        require_text(continuation, "the continuation")
        context, spaces = self._split_spaces(context)  # they belong to the continuation's first word
        continuation = spaces + continuation
        if self.solo:
            head, target = self._split_solo(context, continuation, bool(spaces))
            self.main.require_known((*head, *target))
            self._check_target(target)
            return Span((frozen(head[-(self.main.max_length + 1 - len(target)) :]),), target)
        bos = False
        if not isinstance(context, ChatPrompt):
            context, bos = self.main.codec.strip_bos(context)
        head, target, skip = self._split(context, continuation, bos)
        self._check_target(target)
        room = self.main.max_length + 1 - len(target)
        if isinstance(context, ChatPrompt):
            prompts = self._conversations(context, head, room)
        else:
            prompts = self._fit(context, head, room, target[:-1], skip)
        first = self.main.codec.vocab.decode(target)[skip:]
        return Span(tuple(prompt.before(first) for prompt in prompts), target, skip)

    def _split_spaces(self, context: str) -> tuple[str, str]:
        """Return a context without the spaces at its end, and these; a template's own spaces stay with it."""
        if self.solo or not isinstance(context, ChatPrompt):
            stripped = context.rstrip()
            return stripped, context[len(stripped) :]
        return context.split_spaces() if context.continued else (context, "")

    def _check_target(self, target: tuple[int, ...]) -> None:
        if len(target) > self.main.max_length:
            raise WindowError(
                f"a continuation of {len(target)} tokens does not fit into the context of {self.main.max_length} "
                f"tokens of member {self.main.name!r}. Score it with loglikelihood_rolling, or raise max_length."
            )

    def _split_solo(self, context: str, continuation: str, spaces: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Split as the harness's ``_encode_pair`` and ``loglikelihood`` do; `spaces`: the context ended in some."""
        lm = self.main.lm
        if not context and not spaces:
            ids = tuple(lm.tok_encode(continuation, add_special_tokens=False))
            if ids and ids[0] == lm.prefix_token_id:
                return ids[:1], ids[1:]
            return (lm.prefix_token_id,), ids
        whole, head = tuple(lm.tok_encode(context + continuation)), tuple(lm.tok_encode(context))
        if len(whole) > len(head):
            return head or (lm.prefix_token_id,), whole[len(head) :]
        # the continuation merged into the context's last token: score that token too
        shared = next((i for i, (a, b) in enumerate(zip(whole, head, strict=False)) if a != b), len(whole))
        return whole[:shared] or (lm.prefix_token_id,), whole[shared:]

    def _split(self, context: str, continuation: str, bos: bool) -> tuple[tuple[int, ...], tuple[int, ...], int]:
        """Split at the last main-token boundary, and whole character, inside the context.

        Returns:
            Prompt tokens, continuation tokens, and the length of a prefix space in the latter.
        """
        codec = self.main.codec
        if isinstance(context, ChatPrompt):
            # The members' prompts are different texts: a token across the end of one has no place in the others.
            return self.main.rendered_prompt(context).ids, codec.encode(continuation), 0
        whole = codec.encode_prompt(context + continuation, bos)
        fixed = 1 if bos else len(codec.automatic_prefix)
        prefix_space = len(codec.vocab.decode(whole[fixed:])) - len((context + continuation).encode())
        if not context:
            return whole[:fixed] if bos else codec.prefix_ids, whole[fixed:], prefix_space
        size, cut, data = len(context.encode()) + prefix_space, fixed, b""
        for at in range(fixed, len(whole)):
            data += codec.vocab.pieces[whole[at]]
            if len(data) > size:
                break
            if not incomplete_tail(data):
                cut = at + 1
        return whole[:cut] or codec.prefix_ids, whole[cut:], 0

    def prompts(self, context: str, reserve: int = 0) -> tuple[Prompt, ...]:
        """Return the members' prompts for a text to continue, leaving `reserve` tokens of room.

        Raises:
            RequestError: what is no text, or that the main member cannot spell; no room is left in its context.
        """
        require_text(context, "the prompt")
        if reserve >= self.main.max_length:
            raise WindowError(
                f"max_gen_toks={reserve} leaves no room for a prompt in the context of {self.main.max_length} tokens "
                f"of member {self.main.name!r}. Lower max_gen_toks or raise max_length."
            )
        if self.main.generates_only:
            return self._whole(context)
        room = self.main.max_length - reserve
        if self.solo:
            lm = self.main.lm
            ids, _ = lm.tok_batch_encode([context], truncation=lm.truncation)  # as `hf` for this request type
            kept = ids[0].tolist()[-room:] or [lm.prefix_token_id]
            self.main.require_known(kept)
            return (frozen(kept),)
        if isinstance(context, ChatPrompt):
            return self._conversations(context, self.main.rendered_prompt(context).ids, self.main.max_length)
        context, bos = self.main.codec.strip_bos(context)
        head = self.main.codec.encode_prompt(context, bos) if context or bos else self.main.codec.prefix_ids
        return self._fit(context, head, room, reserve=reserve)

    def _whole(self, context: str) -> tuple[Prompt, ...]:
        """Return prompts of an uncut text: the tokens of an encoder-decoder main member are no place to cut at.

        Raises:
            WindowError: its source does not fit into its context.
        """
        if isinstance(context, ChatPrompt):
            prompts = tuple(m.conversation(context, self.ensemble.config.chat_fallback) for m in self.members)
        else:
            prompts = tuple(m.prompt(context) for m in self.members)
        main = prompts[0]
        if not self.main.fits(main.ids):
            raise WindowError(
                f"a source of {len(main.ids) - self.main.length(main.ids)} tokens does not fit into the context of "
                f"{self.main.max_length} tokens of member {self.main.name!r}. Leave the document out, or narrow "
                "source_pattern."
            )
        return prompts

    def _conversations(self, context: ChatPrompt, head: tuple[int, ...], room: int) -> tuple[Prompt, ...]:
        """Return every member's own rendering of a conversation, which cannot be cut.

        Raises:
            WindowError: the main member's, the tokens `head`, are more than it has `room` for.
        """
        if len(head) > room:
            raise WindowError(
                f"a conversation of {len(head)} tokens does not fit into the context of {self.main.max_length} tokens "
                f"of member {self.main.name!r}, and a rendered chat template cannot be cut. Use fewer few-shots or a "
                "larger max_length."
            )
        fallback = self.ensemble.config.chat_fallback
        others = [member.conversation(context, fallback) for member in self.members[1:]]
        return tuple(replace(prompt, chat=context) for prompt in (frozen(head), *others))

    def _fit(
        self,
        context: str,
        head: tuple[int, ...],
        room: int,
        following: tuple[int, ...] = (),
        skip: int = 0,
        reserve: int = 0,
    ) -> tuple[Prompt, ...]:
        """Return prompts of the same text for all members, cut on the left until every member has room.

        A member that has none even for the shortest prompt is not cut for: it takes part for as long as the text fits
        into its context, and abstains from the rest.

        The main member's tokens of the context are `head`, of which it can take as many as it has `room` for. Every
        member must take in the continuation tokens `following`, which begin with a prefix space of `skip` bytes, and
        have `reserve` tokens left after that.
        """
        controls = self.main.codec.leading(head) if context else len(head)
        text = head[controls:]
        longest = min(len(text), room - controls) if len(head) > room else len(text)
        members, kept = set(range(len(self.members))), longest
        while True:
            prompts = self._same_text(context, head[:controls], text, kept)
            span = Span(prompts, (*following, -1), skip)
            lengths = span.tokens(self.ensemble, len(following))
            # a member that cannot spell the text is in nobody's way
            sizes = {m: self.members[m].length(lengths[m] or ()) for m in members}
            excess = {m: size + reserve - self.members[m].max_length for m, size in sizes.items()}
            if max(excess.values()) <= 0 and len(prompts[0].ids) <= room:
                return prompts
            if kept > 0:
                kept = max(0, kept - max(1, max(excess.values()) // 2))
                continue
            members -= {m for m in members if excess[m] > 0}
            if 0 not in members or len(prompts[0].ids) > room:
                raise WindowError(
                    f"a continuation of {len(following) + 1} tokens leaves member {self.main.name!r} no room for any "
                    f"context in its {self.main.max_length} tokens. Raise max_length, or lower max_gen_toks."
                )
            kept = longest

    def _same_text(
        self, context: str, controls: tuple[int, ...], text: tuple[int, ...], kept: int
    ) -> tuple[Prompt, ...]:
        codec = self.main.codec
        if kept < len(text):
            data, start = codec.vocab.decode(text), len(text) - kept
            offset = len(codec.vocab.decode(text[:start]))
            while start < len(text) and data[offset] & 0xC0 == 0x80:  # never begin inside a character
                offset += len(codec.vocab.pieces[text[start]])
                start += 1
            text = text[start:]
            seen = codec.vocab.decode(text)
        else:
            seen = codec.vocab.decode(text)
            if not context.encode().startswith(seen):
                seen = seen[1:]  # the prefix space
        words = seen.decode()
        return (
            frozen(controls + text or codec.prefix_ids),
            *(m.prompt(context if m.generates_only else words) for m in self.members[1:]),
        )
