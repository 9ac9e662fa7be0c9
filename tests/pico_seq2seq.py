"""Two random encoder-decoder models whose tokenizers are trained here, offline; neither has byte pieces.

* ``translator``: M2M100 with NLLB's tokenizer (BPE, language codes), in which the source begins with its language and
  the decoder with </s> and the language to be written.
* ``t5``: T5 with a Unigram tokenizer without languages, and more logits than pieces.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from pico import CORPUS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer, UnigramTrainer
from transformers import (
    M2M100Config,
    M2M100ForConditionalGeneration,
    NllbTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

LANGUAGES = ["eng_Latn", "deu_Latn", "fra_Latn"]


def train_translator() -> NllbTokenizer:
    draft = Tokenizer(models.BPE(unk_token="<unk>"))
    draft.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always")
    trainer = BpeTrainer(vocab_size=300, special_tokens=["<s>", "<pad>", "</s>", "<unk>"], show_progress=False)
    draft.train_from_iterator(CORPUS.splitlines(), trainer)
    learned = json.loads(draft.to_str())["model"]
    merges = [tuple(merge) for merge in learned["merges"]]
    return NllbTokenizer(vocab=learned["vocab"], merges=merges, extra_special_tokens=LANGUAGES, src_lang="eng_Latn")


def train_t5() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace("▁", prepend_scheme="always")
    specials = ["<pad>", "</s>", "<unk>", "<extra_id_0>"]
    trainer = UnigramTrainer(vocab_size=260, special_tokens=specials, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(CORPUS.splitlines(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=["<extra_id_0>"], clean_up_tokenization_spaces=False,
    )  # fmt: skip


def make_translator(size: int) -> M2M100ForConditionalGeneration:
    config = M2M100Config(
        vocab_size=size, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=96, init_std=0.3,
        bos_token_id=0, pad_token_id=1, eos_token_id=2, decoder_start_token_id=2, scale_embedding=True,
    )  # fmt: skip
    return M2M100ForConditionalGeneration(config)


def make_t5(size: int) -> T5ForConditionalGeneration:
    config = T5Config(
        vocab_size=size + 11, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, n_positions=128,
        pad_token_id=0, eos_token_id=1, decoder_start_token_id=0, initializer_factor=3.0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


def build(folder: Path) -> dict[str, Path]:
    """Write both models under `folder` and return name -> model folder."""
    paths = {"translator": folder / "translator", "t5": folder / "t5"}
    for seed, (path, train, make) in enumerate(
        [(paths["translator"], train_translator, make_translator), (paths["t5"], train_t5, make_t5)], start=11
    ):
        tokenizer = train()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = make(len(tokenizer)).to(torch.float32).eval()
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
    return paths
