"""Vocabularies as bytes, the anchors they share, and tokenizers that encode text alone."""

from lm_eval_deepen.vocabulary.anchors import AnchorSet, anchor_ids
from lm_eval_deepen.vocabulary.byte_vocab import ByteVocab
from lm_eval_deepen.vocabulary.cuts import last_safe_cut, safe_segments
from lm_eval_deepen.vocabulary.round_trip import SAMPLE_TEXTS

__all__ = ["SAMPLE_TEXTS", "AnchorSet", "ByteVocab", "anchor_ids", "last_safe_cut", "safe_segments"]
