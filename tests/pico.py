"""The pico ensemble: three random 2-layer models whose tokenizers are trained here, offline.

* ``bytelevel``: Llama, byte-level BPE, ChatML template, EOS is also the padding token, no BOS.
* ``metaspace``: Gemma 3 with a sliding-window layer; SentencePiece-style BPE with byte fallback,
  no prefix space, BOS added by the post-processor.
* ``padded``: GPT-NeoX whose embedding has 37 rows more than the tokenizer has pieces (the last 5
  are zero); SentencePiece-style BPE with byte fallback and a prefix space; two EOS ids; no BOS added.

Everything is seeded: two builds give the same weights and the same tokenizers.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

PADDED_ROWS = 37  # embedding rows of `padded` beyond its tokenizer's length
ZERO_ROWS = 5  # of these, the last ones are zero vectors
CONTEXT = 512  # positions of every model
SPACE = "\u2581"

CORPUS = """\
The quick brown fox jumps over the lazy dog. The dog did not mind, and the fox walked away.
Sofia is the capital of Bulgaria. Paris is the capital of France, and Rome is the capital of Italy.
She was walking and talking while they were singing in the rain; nothing was said after that.
Question: What is the largest planet of the solar system?
Answer: Jupiter is the largest planet of the solar system.

Question: How many days are there in a week?
Answer: There are 7 days in a week, 24 hours in a day and 365 days in most years.

In 1969 the first people walked on the moon; in 2024 the population was over 8,000,000,000.
10 + 20 = 30, 12 * 12 = 144, 3.14159 and 2.71828 are numbers. 0123456789 1000 100 10 1
def add(a, b):
    # return the sum of two numbers
    return a + b

for i in range(10):
    if i % 2 == 0:
        print("even", i)
    else:
        print("odd", i)
Water boils at 100 degrees and freezes at 0 degrees. It is made of hydrogen and oxygen.
There is no place like home, said the other one, and the others were there with them.
"""
FOREIGN = """\
Le café est très bon, la crème brûlée aussi; où est la forêt? Ça va, señor Muñoz? El niño y la niña.
Über die Brücke fährt der grüne Bus nach Köln und München; schöne Grüße aus Österreich.
中国的首都是北京。日本の首都は東京です。 Привет, мир! Москва. Καλημέρα κόσμε.
Smile 🙂 and wave 👋🏽, then party 🎉🎉 with the family 👨‍👩‍👧.
\ttabs\tand  double  spaces\r\nand other lines
"""
ROUND_TRIP = (
    "Hello world, the answer is 42.",
    "café 中国 🙂👨‍👩‍👧 naïve",
    "def f(x):\n    return x  + 1\n\n\tend ",
    "ends with a newline\n",
    "null \x00 and control \x7f bytes, ₿ ∮",
    "",
)

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def train_bytelevel() -> PreTrainedTokenizerFast:
    """Byte-level BPE over the GPT-2 alphabet, about 400 pieces, no BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([CORPUS, CORPUS, FOREIGN], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=CHATML,
        clean_up_tokenization_spaces=False,
    )


def train_byte_fallback(texts: list[str], specials: list[str], pieces: int) -> Tokenizer:
    """SentencePiece-style BPE: specials, 256 byte pieces, then characters and merges.

    The library's trainer knows no byte pieces, so its merges are moved into a vocabulary that has them.
    """
    draft = Tokenizer(models.BPE())
    draft.normalizer = normalizers.Replace(" ", SPACE)
    draft.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d|\n+|\W?[^\W\d]+|[^\w\n]+"), "isolated"),
            pre_tokenizers.Split(Regex(f"{SPACE}+(?={SPACE})"), "isolated"),
        ]
    )
    head = specials + [f"<0x{value:02X}>" for value in range(256)]
    trainer = BpeTrainer(vocab_size=pieces - len(head), initial_alphabet=[SPACE], show_progress=False)
    draft.train_from_iterator(texts, trainer)
    learned = json.loads(draft.to_str())["model"]
    tail = sorted(learned["vocab"], key=lambda piece: learned["vocab"][piece])
    vocab = {piece: index for index, piece in enumerate(head + tail)}
    merges = [tuple(merge) for merge in learned["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in specials])
    return tokenizer


def train_metaspace() -> PreTrainedTokenizerFast:
    """Gemma's arrangement: spaces replaced, no prefix space, BOS from the post-processor."""
    tokenizer = train_byte_fallback([CORPUS, FOREIGN], ["<pad>", "<eos>", "<bos>", "<unk>"], 560)
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def train_padded() -> PreTrainedTokenizerFast:
    """Llama 2's arrangement: a prefix space before the first word, stripped by the decoder."""
    texts = [line for line in CORPUS.splitlines(keepends=True)[::2]]
    tokenizer = train_byte_fallback(texts, ["<unk>", "<s>", "</s>", "<|end|>"], 460)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<|end|>"],
        clean_up_tokenization_spaces=False,
    )


SIZES = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=CONTEXT,
    initializer_range=0.3,  # wide enough that distributions are peaked and argmaxes stable
)


def make_bytelevel(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A Llama with untied embeddings and grouped key-value heads."""
    end = tokenizer.eos_token_id
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=end,
        **SIZES,
    )
    return LlamaForCausalLM(config)


def make_metaspace(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A Gemma 3: tied embeddings, one sliding-window layer of 16 positions, one full layer."""
    config = Gemma3TextConfig(
        vocab_size=len(tokenizer),
        num_key_value_heads=2,
        head_dim=8,
        query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **SIZES,
    )
    return Gemma3ForCausalLM(config)


def make_padded(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A GPT-NeoX with more embedding rows than pieces and two EOS ids."""
    ends = tokenizer.convert_tokens_to_ids(["</s>", "<|end|>"])
    config = GPTNeoXConfig(
        vocab_size=len(tokenizer) + PADDED_ROWS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends[0],
        **SIZES,
    )
    model = GPTNeoXForCausalLM(config)
    model.generation_config.eos_token_id = ends
    with torch.no_grad():
        model.get_input_embeddings().weight[-ZERO_ROWS:] = 0.0
    return model


RECIPES = {
    "bytelevel": (train_bytelevel, make_bytelevel),
    "metaspace": (train_metaspace, make_metaspace),
    "padded": (train_padded, make_padded),
}


def build_pico(folder: str | Path) -> dict[str, Path]:
    """Write the three models under `folder` and return name -> model folder.

    A model whose folder is complete is kept, so a subprocess may call this on a built folder.
    """
    paths = {name: Path(folder) / name for name in RECIPES}
    for seed, (name, (train, make)) in enumerate(RECIPES.items(), start=1):
        done = paths[name] / "pico.done"
        if done.exists():
            continue
        tokenizer = train()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = make(tokenizer).to(torch.float32).eval()
        model.save_pretrained(paths[name])
        tokenizer.save_pretrained(paths[name])
        done.touch()
    return paths


if __name__ == "__main__":
    for model_name, path in build_pico(sys.argv[1]).items():
        print(model_name, path)
