"""A model folder with code of its own (`auto_map`), and one GGUF file, both made from the pico Llama."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own_llama"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 0.5  # what only this code does
        return out
"""
GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_custom_code(source: Path, folder: Path) -> Path:
    """Copy a model folder and give it a model class of its own."""
    shutil.copytree(source, folder)
    (folder / "own_llama.py").write_text(CODE)
    settings = json.loads((folder / "config.json").read_text())
    settings["model_type"], settings["architectures"] = "own_llama", ["OwnForCausalLM"]
    settings["auto_map"] = {"AutoConfig": "own_llama.OwnConfig", "AutoModelForCausalLM": "own_llama.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def write_gguf(lm, path: Path) -> None:
    """Write the weights of a Llama inside an ``HFLM`` as a GGUF file, unquantised."""
    import gguf

    config, writer = lm.model.config, gguf.GGUFWriter(path, "llama")
    heads, key_heads = config.num_attention_heads, config.num_key_value_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(key_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // heads)
    writer.add_vocab_size(config.vocab_size)
    for name, tensor in lm.model.state_dict().items():
        stem = name.removesuffix(".weight")
        layer = ""
        if stem.startswith("model.layers."):
            _, _, number, stem = stem.split(".", 3)
            layer = f"blk.{number}."
        if stem.endswith(("q_proj", "k_proj")):  # GGUF interleaves the halves that rotary embeddings pair
            count = heads if stem.endswith("q_proj") else key_heads
            tensor = tensor.view(count, 2, -1, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)
        writer.add_tensor(f"{layer}{GGUF_NAMES[stem]}.weight", tensor.to(torch.float32).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
