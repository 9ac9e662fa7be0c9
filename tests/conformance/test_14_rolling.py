"""Item 14: loglikelihood_rolling."""

from __future__ import annotations

import naive
import pytest
from harness import deepen, hf, requests

from lm_eval_deepen.engine.windows import rolling_spans

FAMILIES = ["bytelevel", "metaspace", "padded"]
TEXTS = ["The quick brown fox.", "café 中国 🙂 and 10 + 20 = 30\n\n\tend", "a", " leading", "<bos>literal"]
LONG = "In 1969 the first people walked on the moon; über 中国 🙂 there were many. " * 2


def ask(model, *texts):
    return model.loglikelihood_rolling(requests("loglikelihood_rolling", *((text,) for text in texts)))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("max_length", [None, 16])
def test_14_texts_score_as_in_hf(pico, family, max_length):
    """`metaspace` adds a BOS, which `hf` scores as well; in 16 tokens there are at least three windows."""
    ours, theirs = deepen(pico[family], max_length=max_length, batch_size=4), hf(pico[family], max_length=max_length)
    if max_length:
        assert len(rolling_spans(ours.ensemble, LONG)) >= 3
    for text, got, expected in zip([*TEXTS, LONG], ask(ours, *TEXTS, LONG), ask(theirs, *TEXTS, LONG), strict=True):
        assert type(got) is float
        assert got == pytest.approx(expected, abs=1e-4 * max(4, len(theirs.tok_encode(text)))), text


def test_14_the_empty_text_scores_zero(pico, tmp_path):
    for model in (deepen(pico["bytelevel"]), deepen(pico["metaspace"], pico["padded"], matrix_dir=str(tmp_path))):
        assert ask(model, "", "a", "")[::2] == [0.0, 0.0]
        assert ask(model) == []


@pytest.mark.parametrize("max_length", [None, 24])
def test_14_several_members_equal_the_naive_scorer(pico, tmp_path, max_length):
    names = ("metaspace", "bytelevel")
    model = deepen(*(pico[name] for name in names), max_length=max_length, matrix_dir=str(tmp_path))
    spans = rolling_spans(model.ensemble, LONG)
    assert len(spans) >= (3 if max_length else 1)
    expected = sum(sum(naive.score_span(model.ensemble, span)) for span in spans)
    assert ask(model, LONG)[0] == pytest.approx(expected, abs=1e-3)


def test_14_a_bos_is_never_scored_with_several_members(pico, tmp_path):
    model = deepen(pico["metaspace"], pico["metaspace"], matrix_dir=str(tmp_path))
    (span,) = rolling_spans(model.ensemble, TEXTS[0])
    assert not set(span.target) & model.ensemble.main.codec.vocab.control
    scored_by_hf = hf(pico["metaspace"]).tok_encode(TEXTS[0])
    assert list(span.target) == scored_by_hf[1:] and scored_by_hf[0] == 2


def test_14_a_request_with_an_empty_context_is_answered_by_a_pair(pico, tmp_path):
    """So harness 0.5 asks; earlier ones ask for the text alone and take a number."""
    asked = requests("loglikelihood_rolling", *(("", text) for text in [*TEXTS, ""]))
    pair = deepen(pico["bytelevel"], pico["metaspace"], matrix_dir=str(tmp_path))
    pooled = deepen(pico["bytelevel"], pico["metaspace"], pooling="logp-mean")
    for model in (deepen(pico["bytelevel"]), pair, pooled):
        assert model.loglikelihood_rolling(asked) == [(score, False) for score in ask(model, *TEXTS, "")]
