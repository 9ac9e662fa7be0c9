"""Tiny random models of any architecture that transformers knows, from its configuration class alone.

Every number that says how large a configuration is gets a tiny value by its name; what an architecture needs besides is
in `TWEAKS`. The weights are random.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

LAYERS = 4  # the usual patterns of hybrid models repeat every four layers
CONTEXT = 256
WIDE = 0.3  # standard deviation of the weights

SIZES: dict[str, Any] = {
    **dict.fromkeys("num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers".split(), LAYERS),
    **dict.fromkeys("num_encoder_layers num_decoder_layers num_blocks depth".split(), LAYERS),
    **dict.fromkeys("hidden_size d_model n_embd emb_dim embedding_size embedding_dim word_embed_proj_dim".split(), 32),
    **dict.fromkeys("attention_hidden_size lru_width input_embedding_size output_embedding_size".split(), 32),
    **dict.fromkeys("hidden_size_global mamba_d_ssm feed_forward_size backbone_hidden_size".split(), 32),
    **dict.fromkeys("intermediate_size n_inner ffn_dim decoder_ffn_dim encoder_ffn_dim d_inner dim_ff dff".split(), 64),
    **dict.fromkeys("ffn_hidden_size expert_ffn_hidden_size intermediate_size_mlp dense_intermediate_size".split(), 64),
    **dict.fromkeys("moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size".split(), 16),
    **dict.fromkeys("shared_experts_intermediate_size moe_shared_expert_intermediate_size".split(), 16),
    **dict.fromkeys("num_attention_heads n_head n_heads num_heads decoder_attention_heads attention_heads".split(), 4),
    **dict.fromkeys("encoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads".split(), 4),
    **dict.fromkeys("swa_num_attention_heads linear_num_heads n_mamba_heads".split(), 4),
    **dict.fromkeys("num_key_value_heads num_kv_heads swa_num_key_value_heads num_query_groups".split(), 2),
    **dict.fromkeys(
        "head_dim d_head dim_head kv_channels attention_head_size attention_head_dim swa_head_dim".split(), 8
    ),
    **dict.fromkeys("linear_head_dim linear_key_head_dim linear_value_head_dim qk_nope_head_dim v_head_dim".split(), 8),
    **dict.fromkeys("qk_rope_head_dim rotary_dim index_head_dim mamba_headdim mamba_d_head mamba_head_dim".split(), 8),
    **dict.fromkeys("q_lora_rank kv_lora_rank o_lora_rank adapter_rank laurel_rank gated_norm_rank".split(), 16),
    **dict.fromkeys("num_experts num_local_experts n_routed_experts moe_num_experts".split(), 4),
    **dict.fromkeys("num_experts_per_tok num_experts_per_token moe_topk moe_k".split(), 2),
    **dict.fromkeys("mamba_n_heads mamba_num_heads".split(), 8),
    **dict.fromkeys("mamba_d_state state_size ssm_state_size time_step_rank mamba_dt_rank".split(), 8),
    **dict.fromkeys("linear_num_key_heads linear_num_value_heads".split(), 2),
    **dict.fromkeys("sliding_window sliding_window_size window_size attention_window_size local_attention".split(), 8),
    **dict.fromkeys("attention_chunk_size chunk_size mamba_chunk_size local_attention_window_len".split(), 8),
    **dict.fromkeys("local_attn_chunk_length lsh_attn_chunk_length index_topk".split(), 8),
    **dict.fromkeys("max_position_embeddings n_positions n_ctx max_seq_len model_max_length".split(), CONTEXT),
    **dict.fromkeys("context_length max_target_positions max_source_positions".split(), CONTEXT),
    **dict.fromkeys(
        "vocab_size vocab_size_per_layer_input unpadded_vocab_size decoder_vocab_size".split(), "vocabulary"
    ),
    "index_n_heads": 16,  # with few of them, scores of keys are equal, and any may be chosen
    "hidden_size_per_layer_input": 8,
    "query_pre_attn_scalar": 8,
    "n_group": 1,
    "num_expert_group": 1,
    "topk_group": 1,
}


LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_blocks")
MULTI_LATENT = "kv_lora_rank"  # such attention has a key for every head

# What an architecture needs besides, by its `model_type`; a nested mapping is of a part's configuration.
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1}
_DOUBLE = {"attention_hidden_size": 64, "attention_head_dim": 16}
_HYBRID = ["linear_attention", "full_attention"] * 2
_SPARSE = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
_PARTS = ["sliding_attention", "full_attention"] * 2
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
TWEAKS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3], **_MAMBA},
    "bailing_hybrid": {"layer_group_size": 2},
    "cohere_compass_text": {
        "layer_types": _PARTS,
        "rope_parameters": {"sliding_attention": _ROPE, "full_attention": None},
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note": {
        "vision_config": {"adapter_in_dim": 32, "adapter_out_dim": 32},
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
    },
    "falcon_h1": {"mamba_d_ssm": 64, **_MAMBA},
    "gemma3n_text": {"num_kv_shared_layers": 0, "layer_types": _PARTS},
    "granitemoehybrid": {"layer_types": _HYBRID, **_MAMBA},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp": {"text_config": _SPARSE},
    "qwen4_exp_text": _SPARSE,
    "reformer": {"is_decoder": True, "axial_pos_shape": [16, 16], "axial_pos_embds_dim": [16, 16]},
    "xmod": {"default_language": "en_XX"},
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "num_heads": 4, "chunk_size": 16},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, **_DOUBLE},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "n_mamba_heads": 8, **_DOUBLE},
    "zaya": {"num_experts_per_tok": 1},
}


CORPUS = (
    "The quick brown fox jumps over the lazy dog. Question: What is the largest planet of the solar system?\nAnswer: "
    "Jupiter, and Paris is the capital of France.\nIn 1969 the first people walked on the moon.\ndef add(a, b):\n"
)


@cache
def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of any text: byte-level BPE, 320 pieces, EOS also for padding, no BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = BpeTrainer(vocab_size=320, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([CORPUS, CORPUS], trainer)
    end = {"eos_token": "<|end|>", "pad_token": "<|end|>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **end)


def tiny_config(kind: type[PretrainedConfig], vocabulary: int, **changes: Any) -> PretrainedConfig:
    """Return a tiny configuration of a class; arguments as `tiny_model`."""
    values = shrink(kind().to_dict(), vocabulary)
    return kind(**_merge(values, TWEAKS.get(kind.model_type, {}), changes))


def shrink(values: Mapping[str, Any], vocabulary: int) -> dict[str, Any]:
    """Return the values of a configuration that are to change, and those of its parts."""
    found: dict[str, Any] = {}
    layers = next((values[name] for name in LAYER_COUNTS if isinstance(values.get(name), int)), None)
    for key, value in values.items():
        if isinstance(value, Mapping) and "model_type" in value:
            found[key] = {**shrink(value, vocabulary), "model_type": value["model_type"]}
        elif key.endswith("_token_id"):
            ids = value if isinstance(value, (list, tuple)) else [value]
            if any(isinstance(token, int) and not 0 <= token < vocabulary for token in ids):
                found[key] = 0
        elif isinstance(value, (list, tuple)) and layers and len(value) == layers > LAYERS:
            found[key] = _few(list(value))
        elif key in SIZES and isinstance(value, int) and not isinstance(value, bool):
            found[key] = vocabulary if SIZES[key] == "vocabulary" else SIZES[key]
    if values.get("is_encoder_decoder"):
        found |= {"is_encoder_decoder": False, "is_decoder": True}
    if values.get(MULTI_LATENT) and "num_key_value_heads" in found:
        found["num_key_value_heads"] = found["num_attention_heads"]
    return found


def _few(of_layers: list[Any]) -> list[Any]:
    """Return the values of as many layers as are left, one of every kind among them, in their order."""
    firsts = [at for at, value in enumerate(of_layers) if value not in of_layers[:at]]
    others = [at for at in range(len(of_layers)) if at not in firsts]
    return [of_layers[at] for at in sorted((firsts + others)[:LAYERS])]


def _merge(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """Return mappings joined, the later ones first; nested ones are joined, too."""
    found: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            nested = isinstance(value, Mapping) and isinstance(found.get(key), Mapping)
            found[key] = _merge(found[key], value) if nested else value
    return found


def tiny_model(
    kind: type[PretrainedConfig], vocabulary: int, seed: int = 0, wide: bool = True, **changes: Any
) -> PreTrainedModel:
    """Return a random tiny causal language model of a configuration class.

    Args:
        kind: the configuration class, a key of ``MODEL_FOR_CAUSAL_LM_MAPPING``.
        vocabulary: number of logits.
        seed: of the weights.
        wide: whether the weights are `WIDE` and distributions peaked; else they are the class's own, and nearly flat.
        changes: values of the configuration that differ from what `shrink` and `TWEAKS` say.

    Raises:
        Exception: whatever the model's code raises for a configuration that it does not take.
    """
    config = tiny_config(kind, vocabulary, **changes)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).float().eval()
        for value in model.parameters():
            if wide and value.dim() > 1:
                value.normal_(0, WIDE)
    return model
