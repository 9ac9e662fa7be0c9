"""Loads a tokenizer, and compares it with the files that it was loaded from.

transformers rebuilds some tokenizers from the vocabulary in ``tokenizer.json`` and the name of a class, and takes the
class's pre-tokenizer, normalizer and decoder for the file's. Pieces still spell every text, so nothing fails: texts
are cut otherwise than in the model's training. Added tokens may get other ids than in the file as well, and roles
(padding, end of text) mark ordinary pieces as special. So parts are compared by what they do to probes, and what is
special is read off the file.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import logging
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import cached_property
from itertools import chain, product
from pathlib import Path
from typing import Any

import tokenizers
from transformers.tokenization_utils_base import get_fast_tokenizer_file
from transformers.utils import cached_file

from lm_eval_deepen.config import MemberConfig
from lm_eval_deepen.errors import MemberError, VocabularyError, one_line
from lm_eval_deepen.member.reading_cache import content_of, kept
from lm_eval_deepen.storage import sha256
from lm_eval_deepen.vocabulary import SAMPLE_TEXTS
from lm_eval_deepen.vocabulary.text_only import without_prefix_space
from lm_eval_deepen.vocabulary.tokenizer_json import model_pieces, read_decoder, split_merge, stages, text_pieces

log = logging.getLogger(__name__)

ALLOW = "allow_altered_tokenizer"
FILE, CONFIG = "tokenizer.json", "tokenizer_config.json"
MAX_PIECES = 20_000  # pieces of a vocabulary that serve as probes
STEPS = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}
STEPS["post_processor"] = "processors"
FLAGS = ("lstrip", "rstrip", "single_word")
CHARACTERS = (*"aA1 \n\t\r'./_-(", "\u4e2d", "\u00e9", "\u0416", "\u0663", "\U0001f642", "\u0301", "\u3000")
PROBES = (
    "foo\t\tbar",
    "12345678 1234.5678 3,000,000",
    "I'M they'Re it's 'tis WE'LL x'y",
    "camelCase HTTPServer snake_case kebab-case a.b.c",
    "end.\n\n\n  next\r\n\r\n\tlast \n",
    "//comment\n/* x */ a+=b; if(!c){d--;}",
    "\u4e2d\u65871\u6587ab\u3042\u30a2 \ud55c\uad6d",
    *SAMPLE_TEXTS,
)
OPENINGS = ("a", "\na", "1", "<x>a", "a<x>b")  # ``<x>`` is a control token
SPACED = (" a", "  a", "a<x> b")  # they have a space already: whether they get another one depends on the class


@contextlib.contextmanager
def garbage_kept() -> Iterator[None]:
    """Collect no garbage while tokenizers are read.

    Every merge of a ``tokenizer.json`` is a list, so some hundred thousand objects come to stay at once. Python then
    looks through all objects of torch and transformers again and again, which is half of the time of reading.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@dataclass(frozen=True)
class TokenizerFiles:
    """What a tokenizer's own files say."""

    path: Path  # its ``tokenizer.json``
    config: Mapping[str, Any]  # its parsed ``tokenizer_config.json``; empty where there is none

    @classmethod
    def find(cls, name: str, *, revision: str = "main", subfolder: str = "") -> TokenizerFiles | None:
        """Return the files of a folder, or of a hub name in the cache; None where there is no ``tokenizer.json``."""
        if not name or Path(name).is_file():
            return None
        given = {"revision": revision, "subfolder": subfolder, "local_files_only": not Path(name).is_dir()}
        missing = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}

        def look_up(file: str) -> str | None:
            try:
                return cached_file(name, file, **given, **missing)
            except (OSError, ValueError):  # nothing of that name is here: the tokenizer was made in memory
                return None

        config_file = look_up(CONFIG)
        config = json.loads(Path(config_file).read_text(encoding="utf-8")) if config_file else {}
        versions = config.get("fast_tokenizer_files")
        path = look_up(get_fast_tokenizer_file(versions) if versions else FILE)
        return None if path is None else cls(Path(path), config)

    @cached_property
    def digest(self) -> str:
        """A hex digest of both files."""
        return sha256(self.path) + hashlib.sha256(json.dumps(self.config, sort_keys=True).encode()).hexdigest()

    @cached_property
    def added_tokens(self) -> list[dict[str, Any]]:
        """The added tokens that the file lists."""
        return list(self.read().get("added_tokens") or ())

    def read(self) -> dict[str, Any]:
        """Return the parsed ``tokenizer.json``; it is large, and not kept."""
        spec: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
        return spec


@dataclass(frozen=True)
class Difference:
    """A part of a tokenizer that is not what its file says, and what comes of it."""

    part: str  # its name in ``tokenizer.json``
    file: str  # what the file has there, in short
    loaded: str  # what was loaded
    effect: str  # an example


def as_marked(spec: Mapping[str, Any], files: TokenizerFiles | None) -> dict[str, Any]:
    """Return a loaded tokenizer's JSON with the added tokens that its file marks as special, and no others.

    Ordinary pieces that have become added tokens by a role alone are pieces again; the tokens of a role that no file
    has (a new padding token) stay.
    """
    if files is None:
        return dict(spec)
    listed = {token["content"]: token for token in files.added_tokens}
    unlisted = [token["id"] for token in spec.get("added_tokens") or () if token["content"] not in listed]
    ordinary = text_pieces({**spec, "added_tokens": []}, unlisted)
    added = [
        {**token, "special": listed.get(token["content"], token)["special"]}
        for token in spec.get("added_tokens") or ()
        if token["content"] in listed or token["id"] not in ordinary
    ]
    return {**spec, "added_tokens": added}


def require_same(
    tokenizer: Any, files: TokenizerFiles | None, *, name: str, allowed: bool = False, asked: Container[str] = ()
) -> None:
    """Raise MemberError where a loaded transformers tokenizer gives other tokens than its files, if any, say.

    A difference that is `allowed` is a warning. Of the loading arguments that were `asked` for, ``add_bos_token`` is a
    reason for other control tokens.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if files is None or backend is None:
        return
    own_edges = "add_bos_token" in asked or hasattr(tokenizer, "src_lang")  # a translator's depend on the language

    def compared() -> bytes:
        if backend.to_str(pretty=True) == files.path.read_text(encoding="utf-8"):
            return b"[[], []]"
        differing, notes = differences(json.loads(backend.to_str()), files, edges=not own_edges)
        return json.dumps([[astuple(difference) for difference in differing], notes]).encode()

    content, length = content_of(backend)
    listed = json.loads(kept("same", [content, files.digest, own_edges], compared, length))
    differing, notes = [Difference(*difference) for difference in listed[0]], listed[1]
    for note in notes:
        log.warning("member %r: its tokenizer is not quite the one of %s: %s", name, files.path, note)
    if not differing:
        return
    effects = "; ".join(dict.fromkeys(difference.effect for difference in differing))
    sides = "; ".join(f"{own.part} of the file: {own.file}, loaded: {own.loaded}" for own in differing)
    kind, sides = type(tokenizer).__name__, f"{sides}. So {effects}"
    if allowed:
        log.warning("member %r: its tokenizer is not the one of %s (%s): %s", name, files.path, ALLOW, sides)
        return
    remedy = (
        f"Copy {FILE} and {CONFIG} to a folder without config.json, write "
        '"tokenizer_class": "PreTrainedTokenizerFast" there, and give the member tokenizer=FOLDER'
    )
    if all(difference.part == "added_tokens" for difference in differing):
        remedy = f"Correct the added tokens of {FILE} and {CONFIG}: no id may be left out between them"
    parts = " and its ".join(dict.fromkeys(difference.part for difference in differing))
    raise MemberError(
        f"member {name!r}: the tokenizer that was loaded is not the one of {files.path}. The class {kind} replaced its "
        f"{parts} ({sides}). {remedy}; or take it as it was loaded, with {ALLOW}=True."
    )


@garbage_kept()
def load_tokenizer(config: MemberConfig) -> Any | None:
    """Return a member's tokenizer as ``HFLM`` loads it; None where only loading the model gives it (GGUF).

    Raises MemberError where it cannot be loaded (the cause is chained), or is not what its file says.
    """
    from lm_eval.models.huggingface import HFLM

    given = config.loading_dict()
    if given.get("gguf_file") and not given.get("tokenizer"):
        return None
    loader = object.__new__(HFLM)
    try:
        loader._create_tokenizer(
            config.pretrained,
            given.get("tokenizer"),
            revision=str(given.get("revision", "main")),
            trust_remote_code=given.get("trust_remote_code", False),
            use_fast_tokenizer=given.get("use_fast_tokenizer", True),
            add_bos_token=given.get("add_bos_token"),
            subfolder=given.get("subfolder", ""),
        )
    except Exception as error:
        raise MemberError(
            f"member {config.name!r}: cannot load the tokenizer of {config.pretrained!r}: "
            f"{type(error).__name__}: {one_line(error)}. Check the path or hub name and the member's loading arguments."
        ) from error
    require_same(
        loader.tokenizer,
        files_of(config),
        name=config.name,
        allowed=config.allow_altered_tokenizer,
        asked=[key for key, value in given.items() if value is not None],
    )
    if type(loader.tokenizer).__module__.startswith("transformers."):
        for copied in ("_vocab", "_merges"):  # Python's copies of what the tokenizer was made of, which nothing reads
            vars(loader.tokenizer).pop(copied, None)
    return loader.tokenizer


def files_of(config: MemberConfig) -> TokenizerFiles | None:
    """Return the files of a member's tokenizer; None where it has no ``tokenizer.json``."""
    given = config.loading_dict()
    if given.get("gguf_file") and not given.get("tokenizer"):
        return None
    return TokenizerFiles.find(
        given.get("tokenizer") or config.pretrained,
        revision=str(given.get("revision") or "main"),
        subfolder=given.get("subfolder") or "",
    )


def differences(
    spec: Mapping[str, Any], files: TokenizerFiles, *, edges: bool = True
) -> tuple[list[Difference], list[str]]:
    """Return where a loaded tokenizer, as JSON, does otherwise than its file, and differences too small to refuse it.

    With `edges`, the control tokens around a text are compared as well.
    """
    compared = _Compared(spec, files.read(), files.config)
    differing = [*compared.added_tokens(), *compared.splits(), *compared.decoder()]
    differing += compared.openings() if not differing else []
    differing += compared.edges() if edges else []
    return differing, compared.notes


class _Compared:
    """Two tokenizers as JSON, and what their parts do to probes."""

    def __init__(self, loaded: Mapping[str, Any], file: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        self.loaded, self.file, self.config = loaded, file, config
        self.parts = {"loaded": _normal(loaded), "file": _normal(file)}
        self.notes: list[str] = []

    def differ(self, part: str) -> bool:
        """Tell whether a part is written differently."""
        return bool(self.parts["file"][part] != self.parts["loaded"][part])

    def difference(self, part: str, effect: str) -> Difference:
        """Return a difference in a part."""
        return Difference(part, _steps(self.parts["file"][part]), _steps(self.parts["loaded"][part]), effect)

    def added_tokens(self) -> list[Difference]:
        """Compare the ids of added tokens, and whether they take the spaces beside them."""
        decoder = self.config.get("added_tokens_decoder") or {}
        configured = [{**token, "id": int(key)} for key, token in decoder.items() if isinstance(token, Mapping)]
        listed: dict[str, list[Mapping[str, Any]]] = {}
        for token in [*(self.file.get("added_tokens") or ()), *configured]:
            listed.setdefault(token["content"], []).append(token)
        loaded = {token["content"]: token for token in self.loaded.get("added_tokens") or ()}
        differing = []
        for content, expected in listed.items():
            ids, flags = [token["id"] for token in expected], [[key for key in FLAGS if t.get(key)] for t in expected]
            if (got := loaded.get(content)) is None:
                sides = f"{content!r} (id {min(ids)})", "none", "it is lost"
            elif got["id"] not in ids:
                effect = f"{content!r} gets an id that stands for something else"
                sides = f"id {min(ids)}", f"id {got['id']}", effect
            elif (own := [key for key in FLAGS if got.get(key)]) not in flags:
                effect = f"{content!r} takes other spaces beside it, or is found elsewhere"
                sides = str(flags[0]), str(own), effect
            else:
                continue
            differing.append(Difference("added_tokens", *sides))
        return differing[:3]

    def decoder(self) -> list[Difference]:
        """Compare what the pieces spell."""
        if not self.differ("decoder"):
            return []
        try:
            ours, theirs = read_decoder(self.loaded, name="loaded"), read_decoder(self.file, name="file")
            pieces = model_pieces(self.file, name="file").values()
        except VocabularyError:  # no exact mapping to bytes: refused for that, where bytes matter
            return []
        if ours == theirs:
            return []
        piece = next((piece for piece in pieces if ours.bytes_of(piece) != theirs.bytes_of(piece)), None)
        if piece is None:
            return []
        effect = f"the piece {piece!r} spells {ours.bytes_of(piece)!r} instead of {theirs.bytes_of(piece)!r}"
        return [self.difference("decoder", effect)]

    def splits(self) -> list[Difference]:
        """Compare how texts are normalised, cut and divided into pieces, prefix spaces left aside."""
        parts = [part for part in ("normalizer", "pre_tokenizer") if self.differ(part)]
        file, loaded = _options(self.file), _options(self.loaded)
        options = {key for key in file.keys() | loaded.keys() if file.get(key) != loaded.get(key)}
        options -= set() if "type" in file else {"type"}  # older files leave it out
        if not parts and not options:
            return []
        ours, theirs = _Splitter(self.loaded), _Splitter(self.file)
        probe = self._telling(ours, theirs, anywhere=bool(options))
        if probe is None:
            return []
        read, wanted = ours.encode(probe), theirs.encode(probe)
        got, expected = read.tokens, wanted.tokens
        effect = f"{probe[:60]!r} becomes {len(got)} tokens {_short(got)} instead of {len(expected)} {_short(expected)}"
        if got == expected:
            effect = f"{probe[:60]!r} becomes {read.ids[:20]} instead of {wanted.ids[:20]}"
        differing = [self.difference(part, effect) for part in parts]
        if options:
            shown = [_short({key: given.get(key) for key in sorted(options)}) for given in (file, loaded)]
            differing.append(Difference("model", shown[0], shown[1], effect))
        return differing

    def _telling(self, ours: _Splitter, theirs: _Splitter, *, anywhere: bool) -> str | None:
        """Return a short text that becomes other tokens; `anywhere`: even where both cut it alike."""
        triples = map("".join, product(CHARACTERS, repeat=3))  # of different kinds
        for probe in chain(PROBES, triples, self._pieces()):
            suspect = anywhere or ours.split(probe) != theirs.split(probe)
            if suspect and ours.encode(probe).ids != theirs.encode(probe).ids:
                return probe
        return None

    def _pieces(self) -> Iterator[str]:
        """Yield pieces of the vocabulary as text, within other text: a pre-tokenizer keeps some of them whole."""
        with contextlib.suppress(VocabularyError):
            decoder, pieces = read_decoder(self.file, name="file"), model_pieces(self.file, name="file")
            step = max(1, len(pieces) // MAX_PIECES)
            spelt = (decoder.bytes_of(pieces[i]).decode(errors="ignore") for i in sorted(pieces)[::step])
            yield from (f"a{text}a" for text in spelt if len(text) > 1)

    def openings(self) -> list[Difference]:
        """Compare what is put before a text, and before what follows a control token."""
        parts = [part for part in ("normalizer", "pre_tokenizer") if self.differ(part)]
        if not parts:
            return []
        ours, theirs = _toy(self.loaded), _toy(self.file)

        def differs(text: str) -> bool:
            return bool(ours.encode(text).tokens != theirs.encode(text).tokens)

        text = next((text for text in OPENINGS if differs(text)), None)
        if text is not None and self.config.get("add_prefix_space") is None:
            got, expected = ours.encode(text).tokens, theirs.encode(text).tokens
            effect = f"the text {text!r} begins as {got[:2]} instead of {expected[:2]}"
            return [self.difference(part, effect) for part in parts]
        spaced = next((text for text in SPACED if differs(text)), None)
        if spaced is not None:
            got, expected = ours.encode(spaced).tokens, theirs.encode(spaced).tokens
            self.notes.append(f"the text {spaced!r} begins as {got}, by the file as {expected}.")
        return []

    def edges(self) -> list[Difference]:
        """Compare the control tokens that are put around a text; ``tokenizer_config.json`` may ask for others."""
        if not self.differ("post_processor") or "add_bos_token" in self.config or "add_eos_token" in self.config:
            return []
        got, expected = (_toy(spec, edges=True).encode("a").ids for spec in (self.loaded, self.file))
        if got == expected:
            return []
        return [self.difference("post_processor", f"the text 'a' is put between {got} instead of {expected}")]


def with_parts(spec: Mapping[str, Any], vocabulary: Sequence[str] = (), **parts: Any) -> tokenizers.Tokenizer:
    """Return a tokenizer with the parts of another one, and these pieces."""
    model: dict[str, Any] = {"type": "BPE", "vocab": {piece: i for i, piece in enumerate(vocabulary)}, "merges": []}
    made: dict[str, Any] = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "model": model}
    return tokenizers.Tokenizer.from_str(json.dumps({**made, **{part: spec.get(part) for part in STEPS}, **parts}))


def _normal(spec: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Return the steps of a tokenizer's parts as the library writes them, without what changes no token."""
    whole = json.loads(with_parts(spec).to_str())
    parts = {part: stages(whole[part], key) for part, key in STEPS.items()}
    for part, steps in parts.items():
        for step in steps:
            step.pop("trim_offsets", None)  # of where a token lies in a text
            if step["type"] == "ByteLevel" and part in ("decoder", "post_processor"):
                step.pop("add_prefix_space", None)
                step.pop("use_regex", None)
    parts["post_processor"] = [step for step in parts["post_processor"] if step != {"type": "ByteLevel"}]
    return parts


def _options(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the model of a tokenizer is, without empty options."""
    model = dict(spec["model"])
    if model.get("byte_fallback") and all(f"<0x{byte:02X}>" in model["vocab"] for byte in range(256)):
        model.pop("unk_token", None), model.pop("fuse_unk", None)  # nothing is unknown
    merges = model.pop("merges", None)
    if merges is not None:
        model["merges"] = list(map(split_merge, merges))
    return {key: value for key, value in model.items() if value}


def _toy(spec: Mapping[str, Any], *, edges: bool = False) -> tokenizers.Tokenizer:
    """Return a tokenizer of single characters with another one's parts and the control token ``<x>``."""
    pieces = [*"ab1\n <x>", "\u2581", "\u0120", "\u010a"]
    added = {"id": len(pieces), "content": "<x>", "special": True, "normalized": False}
    added |= {"single_word": False, "lstrip": False, "rstrip": False}
    return with_parts(spec, pieces, added_tokens=[added], **({} if edges else {"post_processor": None}))


class _Splitter:
    """How a tokenizer cuts text, prefix spaces and added tokens left aside."""

    def __init__(self, spec: Mapping[str, Any]) -> None:
        self.spec = {**spec, **without_prefix_space(spec), "added_tokens": [], "post_processor": None}
        self.small = with_parts(self.spec)

    def split(self, text: str) -> list[str]:
        """Return the parts of a text that are divided into pieces one by one."""
        normal = self.small.normalizer.normalize_str(text) if self.small.normalizer is not None else text
        if self.small.pre_tokenizer is None:
            return [normal]
        return [part for part, _ in self.small.pre_tokenizer.pre_tokenize_str(normal)]

    @cached_property
    def whole(self) -> tokenizers.Tokenizer:
        """The tokenizer with its vocabulary."""
        return tokenizers.Tokenizer.from_str(json.dumps({**self.spec, "truncation": None, "padding": None}))

    def encode(self, text: str) -> tokenizers.Encoding:
        """Return the tokens of a text."""
        return self.whole.encode(text, add_special_tokens=False)


def _steps(steps: Sequence[Mapping[str, Any]]) -> str:
    """Return the steps of a part as text."""
    shown = []
    for step in steps:
        options = {key: value for key, value in step.items() if key != "type"}
        shown.append(f"{step['type']}({_short(options)})" if options else step["type"])
    return " + ".join(shown) or "none"


def _short(value: Any) -> str:
    shown = json.dumps(value, ensure_ascii=False)
    return shown if len(shown) <= 100 else f"{shown[:70]} ... {shown[-25:]}"
