"""Values of the fields of transformers' `GenerationConfig`, and what becomes of them."""

from __future__ import annotations

import math

# A neutral value and two others or more. What is not listed, a field of a newer transformers too, gets the last line's.
VALUES = {
    "max_length": [40, 12, 5],
    "max_new_tokens": [6, 3, 9],
    "min_length": [0, 1, 14, 40],
    "min_new_tokens": [0, 1, 5],
    "early_stopping": [False, True, "never"],
    "max_time": [None, 1000.0, 0.0],
    "stop_strings": [None, ["e"], "a", []],
    "do_sample": [False, True, "false", "true", 0, 1, None],
    "num_beams": [1, 2, 0],
    "cache_implementation": [None, "static", "dynamic", "quantized", "paged", "nonsense"],
    "cache_config": [None, {"nbits": 4}],
    "max_cache_len": [None, 100],
    "temperature": [1.0, 0.5, 3.0, 0, -1.0, "0.7", None, math.nan, 1e-40],
    "top_k": [50, 0, 2, 1, None, -1],
    "top_p": [1.0, 0.5, 0.0, 2.0],
    "min_p": [None, 0.3, 0.0, 5],
    "top_h": [None, 0.5, 0.1, 2.0],
    "typical_p": [1.0, 0.3, 0.9],
    "epsilon_cutoff": [0.0, 0.05, 0.3],
    "eta_cutoff": [0.0, 0.1, 0.5],
    "repetition_penalty": [1.0, 1.3, 0.7, 1, 2, 0.0, "1.2", None],
    "encoder_repetition_penalty": [1.0, 5.0, 0.3, 0.0],
    "length_penalty": [1.0, 2.0, 0.0],
    "no_repeat_ngram_size": [0, 1, 2, "2"],
    "encoder_no_repeat_ngram_size": [0, 1, 2],
    "bad_words_ids": [None, [[5]], "the first", [], [[99999]]],
    "suppress_tokens": [None, [1, 2], list(range(0, 400, 2))],
    "begin_suppress_tokens": [None, [1, 2], list(range(200, 400))],
    "sequence_bias": [None, [[[260], 25.0]], [[[261], -5.0]], [[[99999], 5.0]]],
    "forced_bos_token_id": [None, 0, 7, 99999],
    "forced_eos_token_id": [None, 0, 7, [0, 9], 99999],
    "exponential_decay_length_penalty": [None, [2, 1.5], [0, 9.0], "x"],
    "renormalize_logits": [False, True],
    "remove_invalid_values": [False, True],
    "guidance_scale": [1, 1.5, 3.0, None],
    "watermarking_config": [None, {"greenlist_ratio": 0.3, "bias": 9.0}, {"seeding_scheme": "selfhash"}, {"x": 1}],
    "num_return_sequences": [1, 2, 0],
    "return_dict_in_generate": [False, True],
    "eos_token_id": [0, None, [0, 7], 7, "the first"],
    "use_mtp": [None, True],
    "is_assistant": [False, True],
    "num_assistant_tokens_schedule": ["constant", "heuristic"],
    "assistant_confidence_threshold": [0.4, 0.0],
    "prompt_lookup_num_tokens": [None, 3, 0],
    "assistant_early_exit": [None, 1],
    "assistant_ensemble_weight": [None, 0.5, 2.0],
    "speculation_type": [None, "dflash"],
    "compile_config": [None, {"mode": "default"}],
    "penalty_alpha": [0.0, 0.6],
    "dola_layers": [None, "high", [1], 0],
    "constraints": [None, [1], []],
    "force_words_ids": [None, [[5]], []],
    "prefill_chunk_size": [None, 4],
    "another": [None, 1, True],
}
DRAWN = {"temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"}
# Where `hf` has a text and a refusal is as right: another way of decoding, what depends on the clock, and what `hf`
# reads as something else than it says.
REFUSED = {
    ("max_time", 1000.0),
    ("max_time", 0.0),
    ("num_beams", 2),
    ("prompt_lookup_num_tokens", 3),
    ("assistant_early_exit", 1),
    ("cache_implementation", "paged"),
    ("forced_bos_token_id", 99999),  # `hf` fails only where a prompt is one token,
    ("forced_eos_token_id", 99999),  # and only where a text comes to its last token
    ("do_sample", "false"),
    ("do_sample", "true"),
}
# Where `hf` fails and there is a text: the setting changes none, or what is missing is left to the model.
ANSWERED = {"use_cache", "pad_token_id", "num_beams", "num_return_sequences", "prefill_chunk_size", "do_sample"}
