"""Recipes, text and stored distributions: what is checked before any model is loaded, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_eval_deepen.build import distill
from lm_eval_deepen.build.distill import DistillRecipe, corpus
from lm_eval_deepen.build.distill.corpus import blocks_of, neutral_documents, read_corpus, training_order
from lm_eval_deepen.build.distill.store import GROUP, BlockRows, DistributionStore
from lm_eval_deepen.errors import ConfigError, MatrixError, ResultError

MEMBERS = {"smollm2": "no/such-model", "gemma": "no/such-model-either"}
FUSELLM = {"method": "fusellm", "target": "smollm2", "sources": ["gemma"]}
CLM = {"method": "clm", "target": "smollm2"}


@pytest.mark.parametrize(  # values of other types are in tests/config/test_recipe_values.py
    ("recipe", "message"),
    [
        ({**FUSELLM, "fusoin": "mince"}, "unknown key 'fusoin'. Did you mean 'fusion'"),
        (
            {**FUSELLM, "method": "fusellmm"},
            "method must be 'fusellm' or 'clm'; got 'fusellmm'. Did you mean 'fusellm'",
        ),
        ({"target": "smollm2"}, "method is missing; it must be 'fusellm' or 'clm'"),
        (
            {**FUSELLM, "target": "smollm"},
            "target 'smollm' is not among its models: smollm2, gemma. Did you mean 'smollm2'",
        ),
        (
            {**FUSELLM, "sources": ["gema"]},
            "sources 'gema' is not among its models: smollm2, gemma. Did you mean 'gemma'",
        ),
        ({**FUSELLM, "sources": ["gemma", "gemma"]}, "sources gemma, gemma name a model twice"),
        ({**FUSELLM, "sources": []}, "method fusellm needs 'sources'"),
        ({"method": "clm"}, "target is missing"),
        ({**CLM, "sources": ["gemma"]}, "method clm trains on text alone, but 'sources' is given"),
        ({**CLM, "clm_weight": 0.9}, "method clm trains on text alone, but 'clm_weight' is given"),
        ({**FUSELLM, "fusion": "mince2"}, "fusion must be 'mince' or 'avgce'; got 'mince2'. Did you mean 'mince'"),
        ({**FUSELLM, "alignment": "byte"}, "alignment must be 'bytes' or 'dtw'; got 'byte'. Did you mean 'bytes'"),
        ({**FUSELLM, "tail": "drop"}, "tail must be 'rest' or 'renormalised'; got 'drop'"),
        ({**FUSELLM, "clm_weight": 1.1}, "clm_weight must be a number from 0 to 1; got 1.1"),
        ({**FUSELLM, "seed": 2**32}, "seed must be a whole number from 0 to 4294967295; got 4294967296"),
        ({**FUSELLM, "learning_rate": 0}, "learning_rate must be a number above 0 and up to 1; got 0"),
        ({**FUSELLM, "held_out": 0}, "held_out must be a number above 0 and up to 0.9; got 0"),
        ({**FUSELLM, "held_out": 0.95}, "held_out must be a number above 0 and up to 0.9; got 0.95"),
        ({**FUSELLM, "shard": [3, 3]}, r"shard must be \[i, n\] with 0 <= i < n; got \[3, 3\]"),
        ({**FUSELLM, "shard": 2}, "shard must be"),
        ({**FUSELLM, "text": "missing.txt"}, "text 'missing.txt' is no file"),
        ({**FUSELLM, "device": "cuda:1"}, "device cuda:1: a training takes the first cuda device that is visible"),
        ({**FUSELLM, "adam_betas": [0.9]}, "adam_betas must be two numbers from 0 to below 1"),
        ({**FUSELLM, "adam_betas": [0.9, 1]}, "adam_betas must be two numbers from 0 to below 1"),
        ({**FUSELLM, "precision": "fp8"}, "precision must be 'float32' or 'bfloat16'; got 'fp8'"),
    ],
)
def test_a_recipe_is_refused_before_any_model_loads(recipe: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        distill.build(recipe, tmp_path / "out", MEMBERS)
    assert not list(tmp_path.iterdir())


def test_defaults_are_those_of_the_paper_where_it_names_them() -> None:
    found = DistillRecipe.parse({**FUSELLM, "title": "a title", "models": MEMBERS, "note": None}, MEMBERS)
    assert (found.clm_weight, found.fusion) == (0.9, "mince")
    assert DistillRecipe.parse(CLM, MEMBERS).clm_weight == 1
    later = {"adam_betas": (0.9, 0.95), "precision": "bfloat16", "gradient_checkpointing": True}
    for key, value in later.items():  # keys that came later: models that were built without them are the same builds
        assert key not in found.identity()
        assert key in DistillRecipe.parse({**FUSELLM, key: value}, MEMBERS).identity()
    assert DistillRecipe.parse({**CLM, "learning_rate": "1e-5"}, MEMBERS).learning_rate == 1e-5  # YAML 1.1: a text


def test_a_folder_that_holds_another_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds another model already"):
        distill.build(CLM, tmp_path, MEMBERS)


WORDS = st.text(alphabet="ab \n中,", min_size=1, max_size=60)


@settings(max_examples=200, deadline=None)
@given(WORDS, st.integers(1, 9))
def test_blocks_join_to_the_document_and_are_short_enough(text: str, limit: int) -> None:
    blocks = list(blocks_of(text, limit, len))
    assert "".join(blocks) == text
    assert all(0 < len(block) <= limit for block in blocks)


def test_held_out_documents_do_not_depend_on_shard_or_seed_and_shards_share_nothing(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"document {n % 37}" for n in range(41)))  # four of them twice
    base = DistillRecipe(method="clm", target="x", text=(str(path),), held_out=0.25)
    found = [read_corpus(base.replace(shard=(i, 3), seed=i)) for i in range(3)]
    whole = read_corpus(base)
    assert len(whole.held_out) == 9 and len(whole.train) == 28
    assert all(one.held_out == whole.held_out for one in found)
    assert sorted(text for one in found for text in one.train) == sorted(whole.train)
    assert not set(whole.train) & set(whole.held_out)
    with pytest.raises(ConfigError, match="37 documents, 9 of them held out, leave none for shard 28 of 29"):
        read_corpus(base.replace(shard=(28, 29)))
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"text": "one"}\n{"text": "Sofia", "context": "The capital of Bulgaria is"}\n')
    with pytest.raises(ConfigError, match="'Sofia', has a context, 'The capital of Bulgaria is', and a training reads"):
        read_corpus(base.replace(text=(str(lines),)))


def test_the_default_text_repeats_no_paragraph(monkeypatch) -> None:
    documents = neutral_documents()
    paragraphs = [paragraph for document in documents for paragraph in document.split("\n\n")]
    assert len(documents) > 30 and len(set(paragraphs)) == len(paragraphs)
    assert all(len(document) >= corpus.SHORTEST_DOCUMENT for document in documents)
    monkeypatch.setitem(__import__("sys").modules, "pydoc_data.topics", None)
    with pytest.raises(ConfigError, match="this Python has no pydoc_data"):
        neutral_documents()


def test_training_takes_blocks_until_there_are_enough_tokens_and_repeats_passes() -> None:
    sizes = [5, 7, 3]
    once = training_order(sizes, None, 0)
    assert sorted(once) == [0, 1, 2] and once == training_order(sizes, None, 0)
    assert {tuple(training_order(sizes, None, seed)) for seed in range(20)} != {tuple(once)}
    longer = training_order(sizes, 31, 0)
    assert longer[:3] == once and sorted(longer[3:6]) == [0, 1, 2]
    assert sum(sizes[i] for i in longer) >= 31 > sum(sizes[i] for i in longer[:-1])


def rows(seed: int, count: int = 3) -> BlockRows:
    generator = np.random.default_rng(seed)
    ids = generator.integers(1000, size=(count, 2), dtype=np.int32)
    return BlockRows(ids, generator.normal(size=(count, 2)).astype(np.float16), float(seed))


def test_stored_distributions_come_back_and_missing_groups_are_known(tmp_path: Path) -> None:
    blocks = [rows(seed, 1 + seed % 3) for seed in range(GROUP + 2)]
    store = DistributionStore(tmp_path, "a source", {"x": 1}, len(blocks))
    first, last = store.missing()
    store.write(last, [blocks[i] for i in last])
    assert store.missing() == [first]
    store.write(first, [blocks[i] for i in first])
    again = DistributionStore(tmp_path, "a source", {"x": 1}, len(blocks))
    assert again.missing() == []
    for index, block in enumerate(blocks):
        found = again.block(index)
        assert found.nats == block.nats
        np.testing.assert_array_equal(found.ids, block.ids)
        np.testing.assert_array_equal(found.logp, block.logp)
    assert again.occurring() == sorted({int(i) for block in blocks for i in block.ids.ravel()})
    assert DistributionStore(tmp_path, "a source", {"x": 2}, len(blocks)).missing() == [first, last]


def test_damaged_distributions_are_refused_and_made_anew(tmp_path: Path) -> None:
    store = DistributionStore(tmp_path, "s", {}, 1)
    store.write([0], [rows(0)])
    path = store.folder / "000000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(MatrixError, match="is damaged: its checksum differs."):
        store.block(0)
    assert store.missing() == [[0]]
    path.write_bytes(b"cut")
    with pytest.raises(MatrixError, match="cannot be read"):
        DistributionStore(tmp_path, "s", {}, 1).block(0)
    assert store.missing() == [[0]]
    store.write([0], [rows(0)])
    assert store.missing() == []


def test_a_store_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MatrixError, match="cannot be written"):
        DistributionStore(tmp_path / "file", "s", {}, 1)


def test_builds_on_other_held_out_documents_are_not_compared() -> None:
    first = {"held_out": {"text_sha256": "a" * 64, "bits": [8.0, 24.0, 9.0] * 4, "document_bytes": [8, 16, 8] * 4}}
    second = {"held_out": {**first["held_out"], "bits": [4.0, 20.0, 7.0] * 4}}
    found = distill.held_out_difference(first, second)
    assert found.estimate == pytest.approx((31 - 41) / 32) and found.low <= found.estimate <= found.high < 0
    second["held_out"]["text_sha256"] = "b" * 64
    with pytest.raises(ResultError, match="held out different documents"):
        distill.held_out_difference(first, second)
