"""A model's files before it is loaded: its configuration, and the headers of its weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lm_eval_deepen.config import MemberConfig
from lm_eval_deepen.errors import MemberError, StorageError, one_line
from lm_eval_deepen.member.configuration import class_defaults, completed, empty_shapes, is_left_out
from lm_eval_deepen.storage import read_json, reason

STORED_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
                "I8": 1, "U8": 1, "BOOL": 1}  # fmt: skip
STORED_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_PACKED = ("I64", "I32", "U8")
DTYPE_BYTES = {"float64": 8, "float32": 4, "float": 4, "float16": 2, "half": 2, "bfloat16": 2}
INDEX = "model.safetensors.index.json"
_ALIASES = {
    "hidden_size": ("n_embd", "d_model", "dim"),
    "num_hidden_layers": ("n_layer", "num_layers", "n_layers", "decoder_layers"),
    "num_attention_heads": ("n_head", "n_heads", "decoder_attention_heads"),
    "intermediate_size": ("n_inner", "d_ff", "ffn_dim", "decoder_ffn_dim"),
    "max_position_embeddings": ("n_positions", "max_seq_len", "seq_length"),
    "num_local_experts": ("num_experts", "n_routed_experts", "moe_num_experts"),
    "num_experts_per_tok": ("num_experts_per_token", "moe_k", "moe_topk"),
    "num_shared_experts": ("n_shared_experts", "moe_num_shared_experts"),
    "shared_expert_intermediate_size": ("shared_intermediate_size", "moe_shared_expert_intermediate_size"),
    "dtype": ("torch_dtype",),
}


@dataclass(frozen=True)
class TensorHeader:
    """What a safetensors header says of one tensor: type as stored, and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class ModelFiles:
    """What is known of a model without its weights."""

    folder: Path | None  # where its files are, None where they are on the hub only
    # config.json, with what its model type adds to it; its text part where the model has several
    config: Mapping[str, Any]
    generation: Mapping[str, Any] = field(default_factory=dict)  # generation_config.json, empty where there is none
    # headers of its weights by name, of tied ones once; empty where no safetensors file could be looked at
    tensors: Mapping[str, TensorHeader] = field(default_factory=dict)
    why_not: str = ""  # why there are no headers

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value of the configuration, by any of the names that models give it."""
        names = (key, *_ALIASES.get(key, ()))
        return next((self.config[name] for name in names if self.config.get(name) is not None), default)

    def setting(self, key: str) -> Any:
        """Return what the model has when it is loaded: of its generation config, else of its config or its class."""
        sources = (self.generation, self.config, class_defaults(self.config.get("model_type")))
        return next((source[key] for source in sources if source.get(key) is not None), None)

    @property
    def embedding(self) -> str | None:
        """The name of the input embedding among `tensors`: one row per logit, or more."""
        return self._table(_is_embedding)

    @property
    def output_embedding(self) -> str | None:
        """The name of the output head among `tensors`; of the input embedding where no head is stored.

        A head that is stored with other values is the one that transformers loads, whatever ``tie_word_embeddings``
        says.
        """
        return self._table(_is_head) or self.embedding

    def _table(self, called: Callable[[str], bool]) -> str | None:
        rows, width = self.get("vocab_size", 0), self.get("hidden_size", 0)
        tables = [name for name, header in self.tensors.items()
                 if len(header.shape) == 2 and header.shape[0] >= rows and header.shape[1] == width]  # fmt: skip
        named = [name for name in tables if called(name)]
        return min(named, key=len) if named else None

    @property
    def quantised(self) -> bool:
        """Whether its weights are stored, and loaded, in few bits."""
        return bool(self.tensors) and bool(self.config.get("quantization_config"))

    @property
    def counted(self) -> bool:
        """Whether headers tell the number of its weights: none of their numbers stands for several."""
        packed = self.quantised and any(header.dtype in _PACKED for header in self.tensors.values())
        return bool(self.tensors) and not packed

    @cached_property
    def parameters(self) -> tuple[int, int] | None:
        """Numbers of parameters: all, and those of experts of which a token chooses some; None where nobody can say.

        By the headers of its weights, else by an empty model of its type, else by `estimate_parameters`.
        """
        headers = {name: header.shape for name, header in self.tensors.items()} if self.counted else {}
        if not (shapes := headers or empty_shapes(self.config)):
            return estimate_parameters(self)
        experts = self.get("num_local_experts")
        chosen = [
            shape for name, shape in shapes.items()
            if "experts" in name.split(".") or (len(shape) == 3 and shape[0] == experts)
        ]  # fmt: skip
        return sum(map(math.prod, shapes.values())), sum(map(math.prod, chosen))

    @property
    def active(self) -> int | None:
        """Parameters that one token passes through: fewer than all in a mixture of experts."""
        if self.parameters is None:
            return None
        total, chosen = self.parameters
        experts, used = self.get("num_local_experts"), self.get("num_experts_per_tok")
        if not (isinstance(experts, int) and isinstance(used, int)):
            return total
        return total - round(chosen * (1 - used / experts))

    @property
    def dtype(self) -> str:
        """The dtype of its weights, as its configuration says, else as its first tensor is stored."""
        first = next((header.dtype for header in self.tensors.values() if header.dtype in STORED_DTYPES), "F32")
        return str(self.get("dtype") or STORED_DTYPES[first])

    def load_embedding(self, which: str = "input") -> Tensor | None:
        """Return the ``input`` or ``output`` embedding rows [>= V, d] alone, None where they are not here."""
        name = self.output_embedding if which == "output" else self.embedding
        return None if name is None else self._load(name)

    def as_loaded(self) -> ModelFiles:
        """Return these facts without what is stored and not loaded: layers that predict further tokens, and copies."""
        left_out = is_left_out(self.config)
        kept = {name: header for name, header in self.tensors.items() if not left_out(name)}
        return replace(self, tensors=kept)._without_copies()

    def _without_copies(self) -> ModelFiles:
        """Return these facts without the tables that are stored beside the embedding and tied to it when loaded.

        So are those with its values, where ``tie_word_embeddings`` is true; where only headers are known, those with
        its shape.
        """
        table = self.embedding
        if table is None or not self.get("tie_word_embeddings"):
            return self
        shape = self.tensors[table].shape
        like_it = [name for name, header in self.tensors.items() if name != table and header.shape == shape]
        copies = {name for name in like_it if (_is_embedding(name) or _is_head(name)) and self._are_equal(name, table)}
        kept = {name: header for name, header in self.tensors.items() if name not in copies}
        return replace(self, tensors=kept)

    def _are_equal(self, name: str, other: str) -> bool:
        """Tell whether two tensors of one shape have the same values, as far as files are here."""
        one, two = self._load(name), self._load(other)
        return one is None or two is None or bool((one == two).all())

    def _load(self, name: str) -> Tensor | None:
        """Return a tensor of the model; None where its files are not here."""
        if self.folder is None:
            return None
        for path in weight_files(self.folder):
            with safe_open(path, framework="pt") as file:
                if name in file.keys():
                    return file.get_tensor(name)
        return None


def estimate_parameters(files: ModelFiles) -> tuple[int, int] | None:
    """Return the parameters of a decoder with gated feed-forward layers; None where its configuration says too little.

    Embedding and head, and per layer query, key, value, output and three feed-forward matrices (per expert, of those
    that every token passes through as well); norms and biases are left out, below 0.1 %.

    Returns:
        Those of all, and of them those of experts of which a token chooses some.
    """
    width, layers, vocabulary = files.get("hidden_size"), files.get("num_hidden_layers"), files.get("vocab_size")
    experts, dense = files.get("num_local_experts") or 0, files.get("intermediate_size")
    inner = files.get("moe_intermediate_size") or dense
    if not (width and layers and vocabulary and (inner if experts else dense)):
        return None
    heads = files.get("num_attention_heads", 1)
    head = files.get("head_dim") or width // heads
    kv = (files.get("num_key_value_heads") or heads) * head
    attention = 2 * width * heads * head + 2 * width * kv
    tables = 1 if files.get("tie_word_embeddings") else 2
    without = min(layers, files.get("first_k_dense_replace", 0)) if experts and dense else 0
    mixed = layers - without if experts else 0
    shared = files.get("shared_expert_intermediate_size") or (files.get("num_shared_experts") or 0) * (inner or 0)
    chosen = mixed * experts * 3 * width * (inner or 0)
    feed_forward = 3 * width * (mixed * shared + (layers - mixed) * (dense or 0))
    return tables * vocabulary * width + layers * attention + feed_forward + chosen, chosen


def _is_embedding(name: str) -> bool:
    """Tell whether a tensor is called like an input embedding, and not like a head or a table of positions."""
    module = name.split(".")[-2] if "." in name else name
    other = any(word in module for word in ("out", "head", "pos"))
    return not other and any(word in module for word in ("emb", "wte", "shared"))


def _is_head(name: str) -> bool:
    module = name.split(".")[-2] if "." in name else name
    return any(word in module for word in ("lm_head", "embed_out", "output"))


class HubUnreachable(MemberError):
    """There is no way to the hub, and its cache lacks the model."""


def look_up(member: MemberConfig, offline: bool = False) -> ModelFiles:
    """Return what a member's files say; of a model on the hub, configuration and headers alone are fetched.

    `offline`: the hub is not asked, its cache alone is looked into.

    Raises:
        HubUnreachable: as it says.
        MemberError: there is no configuration, or no way to the hub.
    """
    folder = Path(member.pretrained).expanduser()
    local = folder.is_dir()
    if local:
        folder = folder / str(member.loading.get("subfolder") or "")
        config = _read(folder / "config.json", member)
    else:
        path = _fetch(member, "config.json", offline=offline)
        assert path is not None  # a missing one is an error there
        folder, config = path.parent, _read(path, member)
    name = "generation_config.json"
    generation = folder / name if local else _fetch(member, name, needed=False, offline=offline)
    here = weight_files(folder)
    if absent := [path.name for path in here if not path.is_file()]:
        if local:
            raise MemberError(
                f"member {member.name!r}: {folder} lacks {absent[0]}, which its {INDEX} names; fetch the model again."
            )
        here = []
    tensors: dict[str, TensorHeader] = {}
    why_not = ""
    if here:
        for file in here:
            tensors |= read_header(file)
    elif local:
        why_not = f"{folder} has no safetensors file"
    elif offline:
        why_not = "the hub cannot be reached"
    else:
        tensors, why_not = remote_headers(member)
    written = text if isinstance(text := config.get("text_config"), dict) and text else config
    full = completed(written)
    settled = {} if full is None else {key: value for key, value in full.to_dict().items() if value is not None}
    return ModelFiles(
        folder=folder if here else None,
        config={**written, **settled},
        generation=_read(generation, member) if generation is not None and generation.is_file() else {},
        tensors=tensors,
        why_not=why_not,
    ).as_loaded()


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that are loaded from a folder, there or not; others may lie beside."""
    index = folder / INDEX
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    try:
        return [folder / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    except (StorageError, LookupError, TypeError, AttributeError) as error:
        raise MemberError(f"{index} is no index of weights ({one_line(error)}); fetch it again") from error


def read_header(path: Path) -> dict[str, TensorHeader]:
    """Return the headers of a safetensors file, by tensor; raises MemberError where it is none, or was cut short."""
    try:
        with safe_open(path, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            return {name: TensorHeader(one.get_dtype(), tuple(one.get_shape())) for name, one in slices.items()}
    except (OSError, SafetensorError) as error:
        raise MemberError(f"{path} is no complete safetensors file ({one_line(error)}); fetch it again") from error


def _read(path: Path, member: MemberConfig) -> dict[str, Any]:
    try:
        content = read_json(path)
    except StorageError as error:
        raise MemberError(
            f"member {member.name!r}: {path} cannot be read ({reason(error)}). Give a folder with a model, or a hub "
            "name."
        ) from error
    if not isinstance(content, dict):
        raise MemberError(f"member {member.name!r}: {path} holds no JSON object; it is no model's configuration.")
    return content


def _hub_arguments(member: MemberConfig) -> dict[str, Any]:
    given = {**member.loading_dict(), **member.hf_kwargs_dict()}
    return {key: given[key] for key in ("revision", "token") if given.get(key) is not None}


def _fetch(member: MemberConfig, name: str, needed: bool = True, offline: bool = False) -> Path | None:
    """Return a small file of a hub model from the hub or its cache; None for one that it need not have."""
    given = {**member.loading_dict(), **member.hf_kwargs_dict()}
    extra = {key: given[key] for key in ("cache_dir", "local_files_only", "subfolder") if given.get(key)}
    extra |= {"local_files_only": True} if offline else {}
    try:
        return Path(huggingface_hub.hf_hub_download(member.pretrained, name, **_hub_arguments(member), **extra))
    except Exception as error:
        if not needed and isinstance(error, (EntryNotFoundError, LocalEntryNotFoundError)):
            return None
        kind = HubUnreachable if isinstance(error, LocalEntryNotFoundError) else MemberError
        raise kind(
            f"member {member.name!r}: {name} of {member.pretrained!r} cannot be had from the hub: {first_line(error)} "
            f"Check the name and your access, or give a folder: --member {member.name}=FOLDER."
        ) from error


def remote_headers(member: MemberConfig) -> tuple[dict[str, TensorHeader], str]:
    """Return the headers of a hub model's weights; none, and why not, where it has none."""
    if {**member.loading_dict(), **member.hf_kwargs_dict()}.get("subfolder"):
        return {}, "the headers of a hub model's subfolder are not asked for"
    try:
        metadata = huggingface_hub.get_safetensors_metadata(member.pretrained, **_hub_arguments(member))
    except Exception as error:  # no safetensors files, no access: the configuration still gives an estimate
        return {}, f"no safetensors header of {member.pretrained!r}: {first_line(error)}"
    return {
        name: TensorHeader(info.dtype, tuple(info.shape))
        for file in metadata.files_metadata.values()
        for name, info in file.tensors.items()
    }, ""


def first_line(error: BaseException) -> str:
    """Return an error's kind and the first line of its message, which libraries wrap over many."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
