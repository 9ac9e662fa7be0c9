"""One member: a causal language model with its tokenizer and KV cache, or an encoder-decoder that generates only.

The only layer that knows ``transformers``; models load through the harness's own ``HFLM``.
"""

from lm_eval_deepen.member.loading import load_member
from lm_eval_deepen.member.member import Member
from lm_eval_deepen.member.text import Prompt, TextCodec

__all__ = ["Member", "Prompt", "TextCodec", "load_member"]
