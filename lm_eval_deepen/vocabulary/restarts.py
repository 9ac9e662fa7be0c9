"""Where the tokens of a text without safe cuts can be found again from a place in its middle: with BPE.

BPE merges, again and again, the adjacent pair of the lowest rank, the leftmost of several. What it does on one side of
a boundary that stays to the end does not depend on the other side. Two facts follow, for any table of merges:

1. Where a text has a token boundary, both sides have the same tokens on their own.
2. Tokens are those of their text if each two adjacent ones are those of theirs. For the first merge that crosses a
   boundary would be made in the text of the two tokens beside it, too.

So a text that has grown is read again from one of its old tokens on: if that token comes first again, it fits to the
token before it, and all earlier tokens stay what they were. If not, one begins further back.

(Proper and incremental tokenization by BPE: Berglund and van der Merwe, arXiv 2309.08715; the second fact is what the
crate `bpe` is built on.)

BPE reads words, though, which a pre-tokenizer finds. A text may be read from a place if the same words are found after
it as in the whole text, but that its own word begins there; and if no later text changes the words before it. This is
shown here for two families of patterns, place by place. Elsewhere a text without safe cuts is read as a whole.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval_deepen.vocabulary.tokenizer_json import read_decoder, stages

LEAST = 16  # characters; no contraction, and nothing else that the patterns look at beyond a word, is longer
# Letters in every version of Unicode: Latin, Cyrillic, Hebrew, Arabic, Thai, kana, Chinese, Hangul
LETTERS = (
    "A-Za-z\u0400-\u0481\u05d0-\u05ea\u0621-\u063a\u0641-\u064a\u0e01-\u0e30"
    "\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3"
)
DIGITS, SPACES = "0-9", " \n\t"
MARKS = '!"#$%&()*+,\\-./:;<=>?@\\[\\\\\\]\\^_`{|}~'  # not the apostrophe, which begins a contraction

ANYWHERE = ""  # BPE reads the whole text, or what begins with a space
# Inside a run of letters a word of letters is read: to the end of the run, from wherever in it. A contraction, which
# may end there, is too far away.
IN_LETTERS = rf"(?<=[{LETTERS}])(?=[{LETTERS}])(?<!')(?<!'.)(?<!'..)"
# GPT-2's words are an optional space and a run of one class; or white space, of which the next word may take the last.
IN_A_RUN = "|".join([IN_LETTERS, *(rf"(?<=[{own}])(?=[{own}])(?<!'.)(?<!'..)" for own in (DIGITS, MARKS, SPACES))])

OF_GPT_4 = re.compile(  # GPT-3.5, GPT-4, Llama 3, Qwen 2 and 3
    re.escape(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}")
    + r"(\{1,3\})?"
    + re.escape(r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
)


@dataclass(frozen=True)
class Restarts:
    """Where a text may be read from."""

    places: re.Pattern[str]  # matches at each of these places, given what is around it
    margin: int  # characters at the end of a text among which there are none: later text may change what is found there
    traps: re.Pattern[str]  # matches what only a whole text tells how to read (see `exact_encoder`)

    @property
    def worth(self) -> int:
        """Characters of a text that are read again sooner than a place in it is looked for."""
        return 64 + 2 * self.margin


def find_restarts(spec: Mapping[str, Any], spelling: Mapping[str, Any]) -> Restarts | None:
    """Return where a text may be read from, None where nothing is proven for a tokenizer.

    Args:
        spec: its ``tokenizer.json``, rewritten by `text_only_spec`; a model of None is BPE without exceptions.
        spelling: its decoder, and what `exact_encoder` reads of its model.
    """
    model = spec["model"] or {"type": "BPE"}
    added = [token for token in spec["added_tokens"] if not token["special"]]
    if model["type"] != "BPE" or model.get("ignore_merges") or model.get("dropout"):
        return None
    if any(token["single_word"] for token in added):  # it looks at what is beside it
        return None
    replaced = [
        (step["pattern"].get("String"), len(step["content"])) if step["type"] == "Replace" else None
        for step in stages(spec["normalizer"], "normalizers")
    ]
    if any(step is None or step[0] is None or len(step[0]) != 1 or step[1] != 1 for step in replaced):
        return None
    spaces = any(step is not None and step[0] == " " for step in replaced)
    places = _places(stages(spec["pre_tokenizer"], "pretokenizers"), spaces)
    if places is None:
        return None
    marks = read_decoder(spelling, name="").space_marks
    traps = re.compile("|".join(map(re.escape, [*marks, "<0x"])))
    # an added token that ends in later text begins in the margin
    return Restarts(re.compile(places), LEAST + max((len(token["content"]) for token in added), default=0), traps)


def _places(steps: Sequence[Mapping[str, Any]], spaces: bool) -> str | None:
    """Return the pattern of places for the steps of a pre-tokenizer; `spaces`: whether a normalizer leaves none."""
    if not steps:
        return ANYWHERE
    first, *others = steps
    if first["type"] == "ByteLevel" and not others:
        return IN_A_RUN if first.get("use_regex", True) else ANYWHERE
    if first["type"] == "Metaspace" and not others:
        return ANYWHERE
    if first["type"] != "Split":
        return None
    pattern = first["pattern"]
    if pattern.get("String") == " " and spaces and not others:
        return ANYWHERE
    splits = (first["behavior"], first["invert"]) in (("Isolated", False), ("Removed", True))
    byte_level = [step["type"] == "ByteLevel" and not step.get("use_regex", True) for step in others]
    known = splits and byte_level == [True] and OF_GPT_4.fullmatch(pattern.get("Regex", ""))
    return IN_LETTERS if known else None
