"""Rolling windows over a long text, the same text for every member."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from lm_eval_deepen.engine.base import EnsembleBase
from lm_eval_deepen.engine.prompts import Span, frozen, require_text, same_text
from lm_eval_deepen.errors import WindowError
from lm_eval_deepen.member.text import incomplete_tail


def windows(total: int, size: int) -> Iterator[tuple[int, int, int]]:
    """Yield (context start, target start, end) over `total` tokens, as the harness cuts them.

    Each token is scored once. A window takes in at most `size` tokens: one of context before a full window,
    and as many as fit before the last one. The first window starts with a prefix token (context start -1).
    """
    if not total:
        return
    end = min(size, total)
    yield -1, 0, end
    while end < total:
        start, end = end, min(end + size, total)
        yield end - size - 1, start, end


def rolling_spans(ensemble: EnsembleBase, text: str) -> list[Span]:
    """Return the spans whose scores add up to the score of a whole text.

    With several members control tokens are conditioned on, never scored, and windows shrink until every member takes
    in the same text. A member with too little context for the shortest windows, of one token after another one, is
    left out of account: it abstains where the text does not fit.

    Raises:
        RequestError: what is no text, or that the main member cannot spell; its context is too short for any window.
    """
    require_text(text, "the text")
    main = ensemble.main
    if len(ensemble.active) == 1:
        tokens = tuple(main.lm.tok_encode(text))
        main.require_known(tokens)
        return [
            Span((frozen(tokens[begin:start] if start else (main.lm.prefix_token_id,)),), tokens[start:end])
            for begin, start, end in windows(len(tokens), main.max_length)
        ]
    tokens = main.codec.encode_prompt(text)[len(main.codec.automatic_prefix) :]
    longest = main.max_length - len(main.codec.automatic_prefix)
    members, size = list(range(len(ensemble.active))), longest
    while size > 0 and 0 in members:
        spans = [_span(ensemble, tokens, text, window) for window in windows(len(tokens), size)]
        largest = dict.fromkeys(members, 0.0)  # shares of contexts that spans take up
        for span in spans:
            taken = span.tokens(ensemble, len(span.target) - 1)
            for m in members:
                largest[m] = max(largest[m], len(taken[m] or ()) / ensemble.active[m].max_length)
        ratio = max(largest.values())
        if ratio <= 1:
            return spans
        if size == 1:
            members, size = [m for m in members if largest[m] <= 1], longest
        else:
            size = max(1, min(size - 1, math.floor(size / ratio)))
    raise WindowError(
        f"no window of a text of {len(text)} characters fits into the context of {main.max_length} tokens of member "
        f"{main.name!r}. Raise max_length."
    )


def _span(ensemble: EnsembleBase, tokens: tuple[int, ...], text: str, window: tuple[int, int, int]) -> Span:
    begin, start, end = window
    codec = ensemble.main.codec
    if start == 0:
        skip = len(codec.vocab.decode(tokens)) - len(text.encode())
        first = codec.vocab.decode(tokens[:end])[skip:]
        prompts = tuple(prompt.before(first) for prompt in same_text(ensemble, codec.prefix_ids, ""))
        return Span(prompts, tokens[:end], skip, is_window=True)
    while begin > 0 and codec.vocab.decode(tokens[begin:start]) and codec.vocab.pieces[tokens[begin]][0] & 0xC0 == 0x80:
        begin -= 1  # never begin inside a character
    seen = codec.vocab.decode(tokens[begin:start])
    lead = seen[len(seen) - incomplete_tail(seen) :]
    words = seen[: len(seen) - len(lead)].decode()
    prompts = same_text(ensemble, codec.automatic_prefix + tokens[begin:start], words)
    return Span(
        tuple(replace(prompt, is_evidence=False) for prompt in prompts), tokens[start:end], lead=lead, is_window=True
    )
