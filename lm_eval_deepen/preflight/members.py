"""Facts about a recipe's members that are known before their weights are loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from lm_eval_deepen.config import MemberConfig
from lm_eval_deepen.engine.memory import kv_bytes_by
from lm_eval_deepen.errors import DeepenError
from lm_eval_deepen.member.configuration import held_when_loaded, is_encoder_decoder
from lm_eval_deepen.member.encoder_decoder import DecoderCodec, check_languages, decoder_start
from lm_eval_deepen.member.member import ends_of_text
from lm_eval_deepen.member.runner import Held
from lm_eval_deepen.member.text import Prompt, TextCodec
from lm_eval_deepen.member.tokenizer_files import files_of, load_tokenizer
from lm_eval_deepen.preflight.files import DTYPE_BYTES, STORED_BYTES, HubUnreachable, ModelFiles, look_up
from lm_eval_deepen.vocabulary import SAMPLE_TEXTS

SPREAD = "all GPUs"


@dataclass(frozen=True)
class Inspected:
    """One member."""

    config: MemberConfig  # how it would be loaded
    device: str  # where
    files: ModelFiles | None = None  # what its files say; None where they could not be had
    codec: TextCodec | None = None  # its tokenizer as bytes; None where that could not be had
    eos: tuple[int, ...] = ()  # ids that end a text
    chat_template: bool | None = None  # whether it can render a conversation; None where that is unknown
    # how its tokenizer spells the control tokens at both ends of a text
    labels: Mapping[int, str] = field(default_factory=dict)
    generates_only: bool = False  # whether it is an encoder-decoder model, which scores no text
    # the first tokens of an encoder-decoder model's decoder; empty where it cannot be started
    start: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """The member's name."""
        return self.config.name

    @property
    def parameters(self) -> int | None:
        """Number of parameters, as far as its files tell."""
        return None if self.files is None or self.files.parameters is None else self.files.parameters[0]

    @property
    def active(self) -> int | None:
        """Parameters that one token passes through: fewer than all in a mixture of experts."""
        return None if self.files is None else self.files.active

    @property
    def dtype(self) -> str:
        """The dtype it would be loaded in."""
        asked = self.config.loading_dict().get("dtype")
        if asked not in (None, "auto"):
            return str(asked).removeprefix("torch.")
        return self.files.dtype if self.files else "float32"

    @property
    def weight_bytes(self) -> int | None:
        """Bytes of its weights when loaded."""
        if self.files is None:
            return None
        stored = sum(header.count * STORED_BYTES.get(header.dtype, 4) for header in self.files.tensors.values())
        if self.files.quantised or self.parameters is None:
            return stored or None
        given = {**self.config.loading_dict(), **self.config.hf_kwargs_dict()}
        if given.get("load_in_4bit") or given.get("load_in_8bit"):
            return self.parameters // (2 if given.get("load_in_4bit") else 1)
        if self.dtype in DTYPE_BYTES:
            return self.parameters * DTYPE_BYTES[self.dtype]
        return stored

    @cached_property
    def held(self) -> Held | None:
        """What it will keep of a text; None where no empty model of its type says it."""
        if self.files is None:
            return None
        dtype = getattr(torch, self.dtype) if self.dtype in DTYPE_BYTES else torch.bfloat16
        return held_when_loaded(self.files.config, dtype)

    def kv_bytes(self, tokens: int) -> int | None:
        """Bytes of keys and values, or states, that a text takes up."""
        if self.files is None:
            return None
        if self.held is not None:
            return self.held.num_bytes(tokens)
        return kv_bytes_by(self.files.get, DTYPE_BYTES.get(self.dtype, 2), tokens)

    @property
    def spelt(self) -> int:
        """How many of the sample texts its tokenizer spells exactly."""
        assert self.codec is not None
        if not self.generates_only:
            return len(SAMPLE_TEXTS)  # else `codec` could not be built
        return sum(self.codec.follow(Prompt((), "", ()), text.encode()) is not None for text in SAMPLE_TEXTS)

    def to_dict(self) -> dict[str, Any]:
        """Return the facts as JSON data."""
        codec, files = self.codec, self.files
        facts: dict[str, Any] = {
            "name": self.name,
            "pretrained": self.config.pretrained,
            "weight": self.config.weight,
            "device": self.device,
            "parameters": self.parameters,
            "active_parameters": self.active,
            "parameters_from": None if files is None else "weights" if files.counted else "configuration",
            "dtype": self.dtype,
            "weight_bytes": self.weight_bytes,
            "kv_bytes_per_token": self.kv_bytes(1) if self.held is None else self.held.per_token,
            "context": files.get("max_position_embeddings") if files else None,
            "chat_template": self.chat_template,
        }
        if codec is not None:
            facts["vocabulary"] = {
                "logits": len(codec.vocab),
                "pieces": len(codec.vocab.ids_of),
                "control": len(codec.vocab.control),
                "unused": len(codec.vocab.unused),
            }
            facts["eos"] = {str(i): self.labels[i] for i in self.eos}
            edges = {"bos": codec.opening.control}
            if self.generates_only:
                edges = {"source_prefix": codec.opening.control, "decoder_start": self.start}
            facts |= {key: {str(i): self.labels[i] for i in ids} for key, ids in edges.items()}
            facts["dummy_space"] = codec.opening.prefix_space
            facts["round_trip_texts"] = self.spelt
        return facts


def inspect_members(
    configs: Sequence[MemberConfig], device: str, problems: list[str], notes: list[str]
) -> list[Inspected]:
    """Return what can be known of members; what goes wrong is added to `problems`, what to know to `notes`."""
    inspected, offline = [], False
    for config in configs:
        try:
            inspected.append(_inspect(config, device, problems, notes, offline))
        except HubUnreachable as error:  # every further try would take as long
            offline = True
            problems.append(str(error))
            inspected.append(Inspected(config, device))
    return inspected


def numbered(device: str) -> str:
    """Return the one name of a device: ``cuda`` is the first GPU, which is ``cuda:0`` to another member."""
    kind, _, index = device.partition(":")
    return "cpu" if kind == "cpu" else f"{kind}:{index or 0}"


def _inspect(config: MemberConfig, device: str, problems: list[str], notes: list[str], offline: bool) -> Inspected:
    given = config.loading_dict()
    named = numbered(str(given.get("device") or device))
    device = SPREAD if given.get("parallelize") else named  # it overrides a device
    if given.get("gguf_file"):
        notes.append(f"member {config.name!r} is a GGUF file: only loading it tells its size and tokenizer.")
        return Inspected(config, device)
    try:
        files = look_up(config, offline)
    except HubUnreachable:
        raise
    except DeepenError as error:
        problems.append(str(error))
        return Inspected(config, device)
    if files.why_not:
        notes.append(f"member {config.name!r}: its size is estimated from its configuration ({files.why_not}).")
    generates_only = is_encoder_decoder(given, files.config)
    if generates_only:
        notes.append(
            f"member {config.name!r} is an encoder-decoder model: it reads "
            f"{'the whole prompt' if config.source_pattern is None else 'what source_pattern finds'}, and takes "
            "part in generation only. Of the sample texts it spells some; where it cannot spell a text, it abstains."
        )
    elif config.source:
        problems.append(
            f"member {config.name!r}: {', '.join(config.source)} belong to encoder-decoder members. Leave them out."
        )
    known = Inspected(config, device, files, generates_only=generates_only)
    try:
        return _with_tokenizer(known, files, problems)
    except DeepenError as error:
        problems.append(" ".join(str(error).split()))
        return known


def _with_tokenizer(member: Inspected, files: ModelFiles, problems: list[str]) -> Inspected:
    """Return the member with its tokenizer mapped to bytes, which checks it on the sample texts."""
    tokenizer: Any = load_tokenizer(member.config)
    start: tuple[int, ...] = ()
    if member.generates_only:
        check_languages(member.config, tokenizer)
        if member.config.source_language is not None:
            tokenizer.src_lang = member.config.source_language
        try:
            start = decoder_start(member.config, tokenizer, files.setting)
        except DeepenError as error:
            problems.append(str(error))
    eos = ends_of_text(files.generation.get("eos_token_id"), files.config.get("eos_token_id"), tokenizer.eos_token_id)
    given = member.config.loading_dict()
    asked = given.get("prefix_token_id")
    prefix = next((i for i in (asked, tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None), 0)
    if files.embedding is None:
        logits = int(files.get("vocab_size", len(tokenizer)))
    else:
        logits = files.tensors[files.embedding].shape[0]  # rows of the embedding, where its header is known
    codec = (DecoderCodec if member.generates_only else TextCodec).build(
        tokenizer,
        size=logits,
        eos=eos,
        prefix_id=prefix,
        add_special=given.get("add_bos_token") is None or bool(given["add_bos_token"]),
        name=member.name,
        files=files_of(member.config),
    )
    template = getattr(tokenizer, "chat_template", None) is not None
    labels = {i: str(tokenizer.convert_ids_to_tokens(i)) for i in (*eos, *codec.opening.control, *start)}
    return replace(member, codec=codec, eos=eos, chat_template=template, labels=labels, start=start)
