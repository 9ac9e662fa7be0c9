"""Vocabularies as bytes, the anchors they share, and tokenizers that encode text alone."""

from lm_eval_deepen.vocabulary.anchors import AnchorSet, anchor_ids, duplicates, find_anchors
from lm_eval_deepen.vocabulary.byte_vocab import ByteVocab
from lm_eval_deepen.vocabulary.cuts import last_safe_cut, safe_cut_allowed, safe_cuts, safe_segments
from lm_eval_deepen.vocabulary.restarts import Restarts, find_restarts
from lm_eval_deepen.vocabulary.round_trip import SAMPLE_TEXTS, check_round_trip, is_exact, require_exact
from lm_eval_deepen.vocabulary.text_only import exact_encoder, reads_alike, text_only_spec
from lm_eval_deepen.vocabulary.tokenizer_json import byte_vocab_from_json, text_pieces, unknown_id

__all__ = [
    "SAMPLE_TEXTS",
    "AnchorSet",
    "ByteVocab",
    "Restarts",
    "anchor_ids",
    "byte_vocab_from_json",
    "check_round_trip",
    "duplicates",
    "exact_encoder",
    "find_anchors",
    "find_restarts",
    "is_exact",
    "last_safe_cut",
    "reads_alike",
    "require_exact",
    "safe_cut_allowed",
    "safe_cuts",
    "safe_segments",
    "text_pieces",
    "text_only_spec",
    "unknown_id",
]
