"""A member abstains from what its tokenizer cannot spell, counted; nothing that was accepted at load ends a run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import naive
import pytest
from harness import deepen, requests
from transformers import AutoConfig, GenerationConfig

from lm_eval_deepen.engine.prompts import Prompter
from lm_eval_deepen.engine.scoring import score
from lm_eval_deepen.engine.windows import rolling_spans
from lm_eval_deepen.errors import DeepenError, MemberError

QUOTE = "\u2019"
PAIRS = [
    (f"It{QUOTE}s", " walking"),
    ("It", f"{QUOTE}s walking away"),
    ("The dog", " walked"),
    ("", f"{QUOTE}"),
    ("", " a\n\nb"),
    ("two\n", "lines\n\n"),
    ("line\n", "\n"),
]
LONG = f"She was walking.\nIt{QUOTE}s in the rain; they were <extra> singing\n\nand talking."


def altered(source: Path, folder: Path, change: Any) -> Path:
    """Return a copy of a model whose tokenizer.json was changed in place."""
    shutil.copytree(source, folder)
    path = folder / "tokenizer.json"
    spec = json.loads(path.read_text())
    change(spec)
    path.write_text(json.dumps(spec))
    return folder


def lossy(spec: dict[str, Any]) -> None:
    """Make a quotation mark an apostrophe."""
    steps = [{"type": "Replace", "pattern": {"String": QUOTE}, "content": "'"}]
    steps += [spec["normalizer"]] if spec["normalizer"] else []
    spec["normalizer"] = {"type": "Sequence", "normalizers": steps}


def extended(spec: dict[str, Any]) -> None:
    """Add a token that the model has no logit for."""
    size = max(spec["model"]["vocab"].values()) + 1
    token = {"id": size, "content": "<extra>", "special": False, "normalized": False}
    spec["added_tokens"].append({**token, "single_word": False, "lstrip": False, "rstrip": False})


def ending_in_newlines(source: Path, folder: Path) -> Path:
    """Return a copy of a model whose end of text is the newline's piece."""
    shutil.copytree(source, folder)
    spec = json.loads((folder / "tokenizer.json").read_text())
    piece = "\u010a" if "\u010a" in spec["model"]["vocab"] else "<0x0A>"
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": piece}))
    for kind in (AutoConfig, GenerationConfig):
        written = kind.from_pretrained(folder)
        written.eos_token_id = spec["model"]["vocab"][piece]
        written.save_pretrained(folder)
    return folder


def check_scores(model: Any, pairs: list[tuple[str, str]]) -> None:
    """Compare scores with those of plain forward passes, and that they add up."""
    prompter = Prompter(model.ensemble)
    spans = [prompter.span(*pair) for pair in pairs] + rolling_spans(model.ensemble, LONG)
    found = dict(score(model.ensemble, spans, 4))
    for i, span in enumerate(spans):
        assert found[i].logp == pytest.approx(naive.score_span(model.ensemble, span), abs=2e-4)
        assert all(value < 0 and value > -1e9 for value in found[i].logp)


@pytest.mark.parametrize("main", ["bytelevel", "padded"])
@pytest.mark.parametrize("speculate", ["off", "draft"])
def test_a_lossy_member_sits_out(pico: dict[str, Path], tmp_path: Path, main: str, speculate: str) -> None:
    other = altered(pico["metaspace"], tmp_path / "lossy", lossy)
    model = deepen(pico[main], other, matrix_dir=str(tmp_path), speculate=speculate)
    check_scores(model, PAIRS)
    sat_out = model.ensemble.counters.summary()["steps_sat_out"]
    assert sat_out["m0"] == 0 and sat_out["m1"] > 10
    alone = deepen(pico[main])
    asked = requests("loglikelihood", PAIRS[0])  # its prompt cannot be spelt: all is left to the main member
    assert model.loglikelihood(asked)[0][0] == pytest.approx(alone.loglikelihood(asked)[0][0], abs=1e-4)
    contexts = [f"It{QUOTE}s raining and", "The dog did not mind, and"]
    asked = requests("generate_until", *[(context, {"until": ["\n"], "max_gen_toks": 8}) for context in contexts])
    texts = model.generate_until(asked)
    assert texts[0] == alone.generate_until(asked)[0]


def test_a_text_that_the_lossy_main_member_cannot_spell_is_set_aside(pico: dict[str, Path], tmp_path: Path) -> None:
    main = altered(pico["metaspace"], tmp_path / "lossy", lossy)
    model = deepen(main, pico["bytelevel"], matrix_dir=str(tmp_path), speculate="draft")
    with pytest.raises(DeepenError, match=r"U\+2019") as error:
        model.loglikelihood(requests("loglikelihood", *PAIRS))
    assert "3 requests cannot be answered" in str(error.value)
    assert len(model.loglikelihood(requests("loglikelihood", *[pair for pair in PAIRS if QUOTE not in "".join(pair)])))
    asked = requests("generate_until", ("The dog", {"until": [], "max_gen_toks": 30}))
    assert QUOTE not in model.generate_until(asked)[0]


@pytest.mark.parametrize("method", ["deepen", "unite"])
@pytest.mark.parametrize("order", [("ending", "metaspace"), ("metaspace", "ending")])
def test_a_newline_may_end_texts_and_occur_in_them(pico, tmp_path, order, method):
    paths = {**pico, "ending": ending_in_newlines(pico["bytelevel"], tmp_path / "ending")}
    model = deepen(*(paths[name] for name in order), matrix_dir=str(tmp_path), method=method)
    check_scores(model, [pair for pair in PAIRS if "\n" in "".join(pair)])
    member = model.ensemble.members[order.index("ending")]
    assert member.codec.vocab.ids_of[b"\n"] == member.eos_ids[:1] and not member.codec.vocab.events.ids_of.get(b"\n")
    asked = requests("generate_until", ("The dog\n", {"until": [], "max_gen_toks": 20}))
    ids, _ = naive.generate_ids(model, "The dog\n", 20)
    assert model.generate_until(asked)[0] == model.tok_decode(ids)


def test_a_token_without_a_logit_is_text_to_several_and_a_named_refusal_to_one(pico, tmp_path):
    larger = altered(pico["bytelevel"], tmp_path / "larger", extended)
    text = ("They <extra> were", " singing <extra>")
    for paths in ((larger, pico["metaspace"]), (pico["metaspace"], larger)):
        model = deepen(*paths, matrix_dir=str(tmp_path))
        check_scores(model, [text])
        assert model.ensemble.counters.summary()["steps_sat_out"] == {"m0": 0, "m1": 0}
    alone = deepen(larger)
    for kind, asked in (
        ("loglikelihood", text),
        ("loglikelihood_rolling", text[1:]),
        ("generate_until", (text[0], {"until": [], "max_gen_toks": 2})),
    ):
        with pytest.raises(DeepenError, match=r"the token '<extra>' \(id 400\), and the model knows 400 ids alone"):
            getattr(alone, kind)(requests(kind, asked))
    assert alone.loglikelihood(requests("loglikelihood", PAIRS[2]))[0][0] < 0


def test_ids_that_the_file_has_elsewhere_are_refused(pico: dict[str, Path], tmp_path: Path) -> None:
    def shifted(spec: dict[str, Any]) -> None:
        extended(spec)
        spec["added_tokens"][-1]["id"] += 7

    with pytest.raises(MemberError, match="'<extra>' gets an id that stands for something else"):
        deepen(altered(pico["padded"], tmp_path / "shifted", shifted))
