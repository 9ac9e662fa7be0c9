"""Text and tokens of one member: prompts, and continuations as a pure function of their bytes."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any, ClassVar

import tokenizers

from lm_eval_deepen.errors import VocabularyError
from lm_eval_deepen.member.reading_cache import content_of, kept
from lm_eval_deepen.member.tokenizer_files import FLAGS, TokenizerFiles, as_marked, with_parts
from lm_eval_deepen.vocabulary import ByteVocab
from lm_eval_deepen.vocabulary.cuts import last_safe_cut, safe_cut_allowed, safe_segments
from lm_eval_deepen.vocabulary.restarts import Restarts, find_restarts
from lm_eval_deepen.vocabulary.round_trip import check_round_trip, is_exact
from lm_eval_deepen.vocabulary.text_only import exact_encoder, reads_alike, text_only_spec
from lm_eval_deepen.vocabulary.tokenizer_json import byte_vocab_from_json, text_pieces

if TYPE_CHECKING:
    from typing_extensions import Self

    from lm_eval_deepen.member.chat import ChatPrompt

SEGMENT_CACHE = 65_536
STRETCHES = re.compile("([^\udc80-\udcff]*)([\udc80-\udcff]?)")  # text, and a byte after it that is part of none
ROLES = ("control", "unused", "byte_fallback")  # sets of ids of a vocabulary
LONGEST_CACHED = 64  # characters; longer segments seldom come again


@dataclass(frozen=True)
class Prompt:
    """A member's own prompt."""

    head: tuple[int, ...]  # token ids that no continuation can change
    tail: str  # the prompt's last text, whose tokens may merge with the continuation's first ones
    ids: tuple[int, ...]  # the tokens of the whole prompt: the head, then the tail on its own
    chat: ChatPrompt | None = None  # the conversation that it renders; None for plain text
    # whether how well a member predicts it tells what the member is worth for the request. The words before a window of
    # a long text are scored, and no prompt
    is_evidence: bool = True
    # whether the tail is a prefix space, which gives way to a space that begins the continuation
    prefix_space: bool = False
    spelt: bool = True  # whether the member's tokenizer can spell the prompt; where it cannot, the member abstains

    def before(self, continuation: bytes) -> Prompt:
        """Return the prompt before a continuation: without a prefix space where that has a space of its own."""
        return replace(self, tail="") if self.prefix_space and continuation.startswith(b" ") else self


NOTHING = Prompt((), "", ())


def incomplete_tail(data: bytes) -> int:
    """Return how many of the last bytes are the start of an unfinished UTF-8 character (0 to 3)."""
    for back in range(1, min(3, len(data)) + 1):
        lead = data[-back]
        if lead & 0xC0 == 0x80:
            continue
        length = 2 if lead >> 5 == 0b110 else 3 if lead >> 4 == 0b1110 else 4 if lead >> 3 == 0b11110 else 1
        return back if length > back else 0
    return 0


def complete_character(tail: bytes) -> str | None:
    """Return the lowest character that begins with the bytes `tail`, None where none does."""
    lead = tail[0]
    missing = (2 if lead < 0xE0 else 3 if lead < 0xF0 else 4) - len(tail)
    for first in (0x80, 0xA0, 0x90):  # E0 and F0 want a second byte from A0 and 90 on
        try:
            return (tail + bytes([first] + [0x80] * (missing - 1))).decode()
        except UnicodeDecodeError:
            continue
    return None


@dataclass(frozen=True)
class Opening:
    """What a tokenizer does to the beginning of a text, and to its end."""

    control: tuple[int, ...] = ()  # the control tokens that it puts first
    prefix_space: bool = False  # whether it adds a space to a text that begins without one
    doubles: bool = False  # whether it adds that space to a text that begins with one, too
    bos: tuple[int, str] | None = None  # the BOS token and its literal, where there is one
    end: tuple[int, ...] = ()  # what it puts last; no text that goes on has it

    @classmethod
    def of(cls, tokenizer: Any, vocab: ByteVocab, add_special: bool) -> Opening:
        """Observe a transformers tokenizer; `add_special` as in the harness."""

        def parts(text: str) -> tuple[tuple[int, ...], bytes, tuple[int, ...]]:
            ids, bare = (
                tuple(tokenizer(text, add_special_tokens=given)["input_ids"]) for given in (add_special, False)
            )
            begin = next((n for n in range(len(ids)) if ids[n : n + len(bare)] == bare), None)
            at = begin or 0
            while at < len(ids) and ids[at] in vocab.control:
                at += 1
            end = () if begin is None else ids[begin + len(bare) :]
            return ids[:at], vocab.decode(token for token in bare if token < len(vocab)), end

        (control, bare, end), (_, spaced, _) = parts("a"), parts(" a")
        token, literal = tokenizer.bos_token_id, tokenizer.bos_token
        bos = (token, literal) if token in vocab.control and literal else None
        return cls(control, bare == b" a", spaced == b"  a", bos, end)


class TextEncoder:
    """Encodes text with a tokenizer that reads nothing else."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> Sequence[int]:
        """Return the tokens of a text."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def all(self, texts: Sequence[str]) -> list[Sequence[int]]:
        """Return the tokens of each of some texts, in less time than one by one."""
        return [one.ids for one in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]


class Backend:
    """A tokenizer as its JSON, and its pieces as bytes; large ones are read once, see `kept`.

    Attributes:
        vocab: its pieces [V].
        cuts: whether texts can be cut at spaces; see `safe_cut_allowed`.
        source: a digest of the JSON, with what its file marks as special.
        spelling: what the JSON says of how pieces are spelt: its decoder, and what `exact_encoder` reads of the model.
    """

    def __init__(
        self,
        tokenizer: Any,
        files: TokenizerFiles | None,
        *,
        size: int,
        known: int | None = None,
        eos: Sequence[int],
        name: str,
    ) -> None:
        """Read a transformers tokenizer; arguments and errors as `TextCodec.build`."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise VocabularyError(
                f"member {name!r}: tokenizer {type(tokenizer).__name__} has no fast (tokenizers) backend, so its "
                "pieces cannot be mapped to bytes exactly. Use a checkpoint with a tokenizer.json, or "
                "use_fast_tokenizer=True."
            )
        self._backend, self._files, self._name = backend, files, name
        self._roles = [*tokenizer.all_special_ids, *eos]
        digest, self._length = content_of(backend)
        self._decides = [digest, files and files.digest, self._roles, size, known, list(eos)]
        body = kept("vocabulary", self._decides, lambda: self._read(size, known, eos), self._length)
        line, _, pieces = body.partition(b"\n")
        head = json.loads(line)
        ends = accumulate(head["lengths"])
        self.vocab = ByteVocab(
            pieces=tuple([pieces[end - n : end] for n, end in zip(head["lengths"], ends, strict=True)]),
            eos=tuple(head["eos"]),
            **{name: frozenset(head[name]) for name in ROLES},
        )
        self.cuts, self.source, self.spelling = head["cuts"], head["source"], head["spelling"]

    @cached_property
    def spec(self) -> dict[str, Any]:
        """The tokenizer's JSON; special is what its file marks as special."""
        return as_marked(json.loads(self._backend.to_str()), self._files)

    @cached_property
    def _control_and_text(self) -> tuple[tuple[int, ...], frozenset[int]]:
        """Ids that are control pieces, whether or not the file marks them; ids that have a role and are text."""
        marked = [token["id"] for token in self.spec["added_tokens"] if token["special"]]
        roles = dict.fromkeys([*self._roles, *marked])
        text = text_pieces(self.spec, roles)
        return tuple(i for i in roles if i not in text), text

    def _read(self, size: int, known: int | None, eos: Sequence[int]) -> bytes:
        """Return the vocabulary as a line of JSON, then its pieces."""
        written = self._backend.to_str()
        loaded, spec, (control, text) = json.loads(written)["added_tokens"], self.spec, self._control_and_text
        source = hashlib.sha256(written.encode())
        if spec["added_tokens"] != loaded:
            source.update(json.dumps(spec["added_tokens"]).encode())
        vocab = byte_vocab_from_json(
            spec, size=size, eos=eos, extra_control=control, text=text, known=known, name=self._name
        )
        model = {key: spec["model"].get(key) for key in ("type", "byte_fallback")}
        head = {
            "lengths": list(map(len, vocab.pieces)),
            "eos": vocab.eos,
            **{name: sorted(getattr(vocab, name)) for name in ROLES},
            "cuts": safe_cut_allowed(vocab),
            "source": source.hexdigest(),
            "spelling": {"decoder": spec.get("decoder"), "model": model},
        }
        return json.dumps(head).encode() + b"\n" + b"".join(vocab.pieces)

    def text_only(self, size: int) -> tuple[TextEncoder, Restarts | None]:
        """Return what encodes text alone, with ids below `size`, and from where it may do so."""

        def rewritten() -> bytes:
            control, text = self._control_and_text
            spec = text_only_spec(self.spec, control=control, text=text, size=size, name=self._name)
            return json.dumps({**spec, "model": None} if reads_alike(spec, self.spec) else spec).encode()

        spec = json.loads(kept("text", [*self._decides, size], rewritten, self._length))
        if spec["model"] is None:
            text_only = tokenizers.Tokenizer(self._backend.model)  # shared: reading a large one takes a second
            small = with_parts(spec)
            text_only.normalizer, text_only.pre_tokenizer = small.normalizer, small.pre_tokenizer
            given = [token for token in spec["added_tokens"] if not token["special"]]
            keys = ("content", "normalized", *FLAGS)
            text_only.add_tokens([tokenizers.AddedToken(**{key: token[key] for key in keys}) for token in given])
        else:
            text_only = tokenizers.Tokenizer.from_str(json.dumps(spec))
        text_only.encode_special_tokens = True
        return TextEncoder(text_only), find_restarts(spec, self.spelling)


@dataclass(eq=False)
class TextCodec:
    """Maps between text, bytes and the token ids of one tokenizer."""

    name: str  # the member's name, for messages
    vocab: ByteVocab  # the pieces as bytes, one per logit [V]
    # encodes text alone, exactly: no BOS, no prefix space, special-token text is text
    pure: Callable[[str], Sequence[int]]
    many: Callable[[Sequence[str]], list[Sequence[int]]]  # encodes several texts at once, not always exactly
    opening: Opening  # what the tokenizer does to the beginning of a text
    prefix_ids: tuple[int, ...]  # what an empty prompt is conditioned on (the harness's prefix token)
    identity: tuple[Any, ...]  # equal for tokenizers that give every prompt the same tokens
    cuts: bool  # whether a text can be cut before a space after a letter or digit, and both sides spelt on their own
    restarts: Restarts | None = None  # where else a text that grows is read from again; None where it is nowhere
    _segment: Callable[[str], tuple[int, ...]] = field(init=False)
    CHECKED: ClassVar[bool] = True  # whether a tokenizer must spell every text exactly

    def __post_init__(self) -> None:
        """Derive what depends on the tokenizer alone."""
        cached = lru_cache(SEGMENT_CACHE)(lambda text: tuple(self.pure(text)))
        self._segment = lambda text: cached(text) if len(text) <= LONGEST_CACHED else tuple(self.pure(text))

    @classmethod
    def build(
        cls,
        tokenizer: Any,
        *,
        size: int,
        known: int | None = None,
        eos: Sequence[int],
        prefix_id: int,
        add_special: bool,
        name: str,
        files: TokenizerFiles | None = None,
    ) -> Self:
        """Map a transformers tokenizer to bytes and check the map on a sample of texts.

        Args:
            tokenizer: the member's tokenizer.
            size: number of logits of the model.
            known: number of ids that the model can be given, where that is less.
            eos: every id that ends a text.
            prefix_id: the harness's prefix token id.
            add_special: whether prompts get the tokenizer's automatic special tokens.
            name: the member's name, for messages.
            files: the tokenizer's files, which say what is special; see `require_same`.

        Raises:
            VocabularyError: it has no exact byte mapping.
        """
        read = Backend(tokenizer, files, size=size, known=known, eos=eos, name=name)
        vocab, limit = read.vocab, size if known is None else min(size, known)
        text_only, restarts = read.text_only(limit)
        pure = exact_encoder(read.spelling, vocab, text_only, name=name)
        if cls.CHECKED:
            check_round_trip(vocab, pure, name=name)
        opening = Opening.of(tokenizer, vocab, add_special)
        for token in (*opening.control, prefix_id):
            if token >= limit:
                literal = tokenizer.convert_ids_to_tokens(token)
                raise VocabularyError(
                    f"member {name!r}: its tokenizer puts {literal!r} (id {token}) before a text, and the model knows "
                    f"{limit} ids alone. Give the tokenizer that belongs to the model (member argument tokenizer=...), "
                    "or leave the token out (add_bos_token=False)."
                )
        identity = (read.source, vocab.fingerprint, opening, prefix_id)
        return cls(name, vocab, pure, text_only.all, opening, (prefix_id,), identity, read.cuts, restarts)

    @property
    def prefix_space(self) -> bool:
        """Whether the tokenizer puts a space before a text."""
        return self.opening.prefix_space

    @property
    def automatic_prefix(self) -> tuple[int, ...]:
        """The control tokens that the tokenizer itself puts before any prompt."""
        return self.opening.control

    def leading(self, ids: Sequence[int]) -> int:
        """Return how many of a prompt's first tokens stand before its text: control tokens, or what serves as one."""
        count, automatic = 0, self.opening.control
        if tuple(ids[: len(automatic)]) == automatic:
            count = len(automatic)
        while count < len(ids) and ids[count] in self.vocab.control:
            count += 1
        return count

    def encode(self, text: str) -> tuple[int, ...]:
        """Return the tokens of `text` on its own: no BOS, no prefix space, nothing parsed as control.

        Raises:
            VocabularyError: the tokenizer cannot spell the text.
        """
        if not self.cuts:
            return self._segment(text)
        return tuple(chain.from_iterable(map(self._segment, safe_segments(text))))

    def encode_prompt(self, text: str, bos: bool = False) -> tuple[int, ...]:
        """Return the tokens of a prompt: automatic control tokens, prefix space, special-token text as text.

        `bos`: whether the prompt began with the BOS literal (see `strip_bos`); it has one BOS then, none added.

        Raises:
            VocabularyError: the tokenizer cannot spell the text.
        """
        prefix = (self.opening.bos[0],) if bos and self.opening.bos else self.opening.control
        return prefix + self.encode(self.opened(text))

    def opened(self, text: str) -> str:
        """Return a text with the prefix space that the tokenizer puts before it."""
        space = self.opening.prefix_space and (self.opening.doubles or not text.startswith(" "))
        return " " + text if space and text else text

    def strip_bos(self, text: str) -> tuple[str, bool]:
        """Return the text without a BOS literal at its start, and whether there was one."""
        literal = self.opening.bos[1] if self.opening.bos else ""
        begins = bool(literal) and text.startswith(literal)
        return (text[len(literal) :] if begins else text), begins

    def prompt(self, text: str) -> Prompt:
        """Return the prompt for plain text; an empty text is conditioned on the prefix token."""
        if not text:
            space = " " if self.prefix_space else ""
            return Prompt(self.prefix_ids, space, self.prefix_ids, prefix_space=not self.opening.doubles)
        opened = self.opened(text)
        cut = last_safe_cut(opened) if self.cuts else 0
        try:
            head, tail = self.opening.control + self.encode(opened[:cut]), self.encode(opened[cut:])
        except VocabularyError:
            return self.silent()
        return Prompt(head, opened[cut:], head + tail)

    def silent(self) -> Prompt:
        """Return what stands for a prompt that the tokenizer cannot spell: the member abstains."""
        return Prompt(self.prefix_ids, "", self.prefix_ids, is_evidence=False, spelt=False)

    def rendered_prompt(self, text: str, ids: Sequence[int], literals: Iterable[str]) -> Prompt:
        """Return the prompt for text in which control tokens were parsed, as `ids` says.

        Only what follows the last control literal can merge with a continuation.
        """
        start = max((text.rfind(x) + len(x) for x in literals if x and x in text), default=0)
        ids, tail = tuple(ids), text[start:]
        if self.cuts:
            tail = tail[last_safe_cut(tail) :]
        # a space in front is a prefix space; a control token may eat one
        for candidate in (" " + tail, tail, tail.lstrip(" ")):
            try:
                encoded = self.encode(candidate)
            except VocabularyError:  # a template's text, which was normalised
                continue
            if encoded and ids[-len(encoded) :] == encoded:
                return Prompt(ids[: -len(encoded)], candidate, ids)
        return Prompt(ids, "", ids)

    def follow(self, prompt: Prompt, continuation: bytes) -> tuple[int, ...] | None:
        """Return the tokens of a prompt and the continuation's bytes after it.

        A pure function of its arguments. Text is encoded canonically; a last, unfinished character is
        given by the tokens that begin some character with these bytes, or byte by byte.

        Returns:
            The token ids, or None where this vocabulary cannot spell the bytes.
        """
        if not prompt.spelt:
            return None
        data = prompt.tail.encode() + continuation
        if not data:
            return prompt.ids
        ids = self.spell(data)
        return None if ids is None else prompt.head + ids

    def follow_all(self, texts: Sequence[bytes]) -> list[tuple[int, ...] | None]:
        """Return what `follow` gives for each of some byte strings after nothing, in less time than one by one."""
        read = {data: data.decode(errors="replace") for data in texts}  # no tokens of U+FFFD spell what it replaces
        tokens = zip(read, self.many(list(read.values())), strict=True)
        ids = {data: tuple(own) for data, own in tokens if is_exact(self.vocab, data, own)}
        return [ids[data] if data in ids else self.follow(NOTHING, data) for data in texts]

    def spell(
        self, data: bytes, invalid: bool = False, encode: Callable[[str], tuple[int, ...]] | None = None
    ) -> tuple[int, ...] | None:
        """Return the tokens of some bytes that need not be whole characters, None where they cannot be spelt.

        Args:
            data: the bytes.
            invalid: whether they follow bytes that are not UTF-8.
            encode: encodes text with which the data begins; by default `encode`.
        """
        encode = encode or self.encode
        try:
            return self._spell_invalid(data, encode) if invalid else self._continue(data, encode)
        except VocabularyError:  # a text that the tokenizer alters
            return None

    def _continue(self, data: bytes, encode: Callable[[str], tuple[int, ...]]) -> tuple[int, ...] | None:
        unfinished = incomplete_tail(data)
        try:
            text = data[: len(data) - unfinished].decode()
        except UnicodeDecodeError:
            return self._spell_invalid(data, encode)
        if not unfinished:
            return encode(text)
        tail = data[-unfinished:]
        ids = self._begin_character(text, tail, encode)
        if ids is not None:
            return ids
        spelt = self.vocab.spell(tail)
        return None if spelt is None else encode(text) + spelt

    def _begin_character(
        self, text: str, tail: bytes, encode: Callable[[str], tuple[int, ...]]
    ) -> tuple[int, ...] | None:
        """Return the tokens that reach exactly the end of `tail` when it is completed to a character."""
        character = complete_character(tail)
        if character is None:
            return None
        try:
            whole = encode(text + character)
        except VocabularyError:  # a character that the tokenizer alters; those that are meant may be others
            return None
        beyond, count = len(character.encode()) - len(tail), len(whole)
        while beyond > 0:
            count -= 1
            beyond -= len(self.vocab.pieces[whole[count]])
        return whole[:count] if beyond == 0 else None

    def _spell_invalid(self, data: bytes, encode: Callable[[str], tuple[int, ...]]) -> tuple[int, ...] | None:
        """Encode bytes that are not UTF-8: valid stretches as text, the others byte by byte."""
        ids: list[int] = []
        for stretch, byte in STRETCHES.findall(data.decode(errors="surrogateescape")):
            spelt = self.vocab.spell(byte.encode(errors="surrogateescape"))
            if spelt is None:
                return None
            ids += [*encode(stretch), *spelt]
            encode = self.encode
        return tuple(ids)
