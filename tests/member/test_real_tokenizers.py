"""Tokenizers of published models: which of them can be members, and that their tokens are what they should be.

They are read from the folder that LM_EVAL_DEEPEN_TOKENIZERS names; ``benchmarks/real_tokenizers.py --fetch`` fills it.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import real_tokenizers  # noqa: E402

FOLDER = os.environ.get(real_tokenizers.FOLDER)
REFUSED = {
    "gpt4o": "The class GPT2Tokenizer replaced its pre_tokenizer .*'foo\\\\t\\\\tbar' becomes 4 tokens .* instead of 3",
    "claude": "does not spell 'cafe\u0301",  # its normalizer is NFKC
}
pytestmark = pytest.mark.skipif(FOLDER is None, reason=f"{real_tokenizers.FOLDER} names no folder of tokenizers")


@pytest.mark.parametrize("name", real_tokenizers.NAMES)
def test_it_is_accepted_or_refused_for_a_reason_and_what_it_spells_is_right(name: str) -> None:
    path = Path(FOLDER or "") / name
    if not path.is_dir():
        pytest.skip(f"{path} is not there")
    found = real_tokenizers.measure(path, 300)
    assert bool(found.refused) == (name in REFUSED), found.refused
    if name in REFUSED:
        assert re.search(REFUSED[name], found.refused)
    assert not found.wrong, found.examples
    assert found.strings == (0 if name == "claude" else 300) and not found.sits_out


def test_a_prompt_of_one_word_grows_as_the_whole_is_spelt() -> None:
    path = Path(FOLDER or "") / "llama2"
    if not path.is_dir():
        pytest.skip(f"{path} is not there")
    _, tokenizer, codec = real_tokenizers.load(path)
    assert codec is not None
    for prompt, rest in (
        ("\u043b", "\u0438"),
        ("\u4e2d", "\u56fd"),
        ("\U0001f642", "\U0001f642"),
        ("w", "alk"),
        ("\n", "a"),
    ):
        assert codec.follow(codec.prompt(prompt), rest.encode()) == tuple(tokenizer(prompt + rest).input_ids)
    assert codec.follow(codec.prompt("\u043b"), "\u0438".encode()) == (1, 5952)
