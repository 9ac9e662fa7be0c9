"""Two random models of real shapes with real tokenizers, made where they are measured: nothing large has to travel.

    python benchmarks/gpu_models.py TOKENIZERS OUT [--size 1b|tiny]

TOKENIZERS has the folders `first` and `second`, which `gpu_prepare.sh` fills. `1b` is a Llama of 1.1 and a Gemma 3 of
1.0 billion parameters (262,144 pieces); `tiny` is for a rehearsal on a CPU. Weights are random and seeded: times,
memory and agreement with `hf` are those of real models of these shapes, texts and scores say nothing.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

LLAMA = {
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
           "num_key_value_heads": 4},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
             "num_key_value_heads": 2},
}  # fmt: skip
GEMMA = {
    "1b": {"hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26, "num_attention_heads": 4,
           "num_key_value_heads": 1, "head_dim": 256},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 16},
}  # fmt: skip


def main() -> None:
    """Write the two folders; what is there already stays."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizers", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", choices=sorted(LLAMA), default="1b")
    args = parser.parse_args()
    makers = {
        "first": lambda **common: LlamaForCausalLM(LlamaConfig(**LLAMA[args.size], **common)),
        "second": lambda **common: Gemma3ForCausalLM(Gemma3TextConfig(**GEMMA[args.size], **common)),
    }
    for seed, (name, make) in enumerate(makers.items()):
        folder = args.out / f"{name}-{args.size}"
        if (folder / "config.json").exists():
            continue
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizers / name)
        torch.manual_seed(seed)
        torch.set_default_dtype(torch.bfloat16)
        model = make(
            vocab_size=-(-len(tokenizer) // 64) * 64,
            max_position_embeddings=4096,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=True,
        )
        torch.set_default_dtype(torch.float32)
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)
        print(f"{folder}: {sum(p.numel() for p in model.parameters()) / 1e6:.0f} million parameters", flush=True)


if __name__ == "__main__":
    main()
