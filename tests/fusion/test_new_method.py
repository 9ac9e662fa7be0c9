"""docs/add_a_fusion_method.md: its file, put on the path of discovery, is a method everywhere, with no other edit."""

from __future__ import annotations

import importlib.util
import inspect
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from dropped_in import dropped_in
from harness import deepen, requests

from lm_eval_deepen.cli import main as cli
from lm_eval_deepen.errors import ConfigError
from lm_eval_deepen.fusion import METHODS
from lm_eval_deepen.fusion._linear import LinearFuser
from lm_eval_deepen.harness.model import configure
from lm_eval_deepen.pooling.base import Pooled, Scored
from lm_eval_deepen.pooling.logp_mean import LogpMean
from lm_eval_deepen.weighting.confidence import Confidence
from lm_eval_deepen.weighting.perplexity import Perplexity

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "add_a_fusion_method.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    """The page's only block of a language."""
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.M | re.S)
    return found


@pytest.fixture
def folder(tmp_path: Path):
    """A folder with the page's file, on the path of discovery for one test."""
    place = tmp_path / "methods"
    place.mkdir()
    (place / "shared.py").write_text(block("python"), encoding="utf-8")
    with dropped_in(METHODS, place):
        yield place


def test_the_example_is_one_short_file() -> None:
    assert "shared" not in METHODS
    assert len([line for line in block("python").splitlines() if line.strip()]) <= 45


def test_an_ensemble_file_takes_the_method_and_its_option(folder: Path) -> None:
    file = folder.parent / "ensemble.yaml"
    file.write_text(block("yaml"), encoding="utf-8")
    config = configure({"pretrained": str(file)})
    assert (config.method, config.options_dict()) == ("shared", {"min_bytes": 2})
    with pytest.raises(ConfigError, match="unknown key 'min_byte'. Did you mean 'min_bytes'"):
        configure({"pretrained": str(file), "min_byte": 3})
    with pytest.raises(ConfigError, match="min_bytes must be a whole number of at least 1; got 0"):
        configure({"pretrained": str(file), "min_bytes": 0})
    with pytest.raises(ConfigError, match="method 'share' is unknown. Did you mean 'shared'"):
        configure({"pretrained": str(file), "method": "share"})
    with pytest.raises(ConfigError, match="min_bytes is an option of method shared, not of 'gac'"):
        configure({"pretrained": str(file), "method": "gac"})


def test_help_and_the_list_know_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["methods", "--help"])
    assert "shared: Shared: average over the main" in capsys.readouterr().out
    assert cli.main(["methods"]) == 0
    assert "min_bytes: a whole number of at least 1 (default 1)" in capsys.readouterr().out


def test_a_run_uses_it(folder: Path, pico, tmp_path: Path) -> None:
    pair = [pico["bytelevel"], pico["metaspace"]]
    model = deepen(*pair, method="shared", matrix_dir=str(tmp_path))
    batch = requests("loglikelihood", ("The quick brown", " fox"), ("Rome is", " the capital"))
    alone = deepen(pair[0]).loglikelihood(batch)
    for (logp, _), (own, _) in zip(model.loglikelihood(batch), alone, strict=True):
        assert -100 < logp < 0 and logp != pytest.approx(own, abs=1e-3)


def test_the_contract_runs_on_it(folder: Path, pico, tmp_path: Path) -> None:
    source = Path(__file__).with_name("test_fusion_contract.py")
    spec = importlib.util.spec_from_file_location("contract_with_the_new_method", source)
    contract = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = contract  # dataclasses look their module up
    try:
        spec.loader.exec_module(contract)
    finally:
        del sys.modules[spec.name]
    cases = [case for case in contract.CASES if case[1] == "shared"]
    assert [world for world, *_ in cases] == ["synthetic", *contract.FAMILIES]
    tests = [test for name, test in vars(contract).items() if name.startswith("test_") and _takes_a_case(test)]
    assert len(tests) >= 10
    views, store = contract.pico_views(pico), contract.MatrixStore(tmp_path, progress=False)
    for parameters in cases:
        case = contract.make_case(parameters, store, views)
        for test in tests:
            fillers = contract.FILLERS if "filler" in inspect.signature(test).parameters else [None]
            for filler in fillers:
                test(case, *([] if filler is None else [filler]))


def _takes_a_case(test) -> bool:
    return next(iter(inspect.signature(test).parameters), None) == "case"


def _fused(change):
    """Return a `fuse` whose rows are changed."""
    real = LinearFuser.fuse
    return lambda self, logp, weights: replace(made := real(self, logp, weights), logp=change(made.logp))


LEARNT = {"method": "gac", "weighting": "bayes"}


@pytest.mark.parametrize(
    ("options", "owner", "name", "wrong", "message"),
    [
        ({"method": "gac"}, LinearFuser, "fuse", _fused(lambda rows: rows + 1), "do not sum to 1 .1 nats off"),
        ({"method": "gac"}, LinearFuser, "fuse", _fused(lambda rows: rows * math.nan), "that are no numbers"),
        ({"method": "gac"}, LinearFuser, "fuse", _fused(lambda rows: rows[:, :-3]), r"a tensor of .* for \("),
        (LEARNT, LinearFuser, "fuse", _fused(lambda rows: rows + 1), "do not sum to 1 .1 nats off"),
        (LEARNT, LinearFuser, "fuse", _fused(lambda rows: rows * math.nan), "that are no numbers"),
        (LEARNT, LinearFuser, "fuse", _fused(lambda rows: rows[:, :-3]), r"a tensor of .* for \("),
        (
            {"method": "gac"},
            LinearFuser,
            "skip",
            lambda self, logp, weights: weights[:, 0],
            "skips .* torch.float32",
        ),
        (
            LEARNT,
            LinearFuser,
            "skip",
            lambda self, logp, weights: weights > 2,
            r"skips .*\(5, 2\) for 5",
        ),
        ({"weighting": "confidence"}, Confidence, "weights", lambda _, logp, base: base * 2, r"\[1.0, 1.0\]"),
        ({"weighting": "confidence"}, Confidence, "weights", lambda _, logp, base: base * math.nan, "nan, nan"),
        ({"weighting": "confidence"}, Confidence, "weights", lambda _, logp, base: base[:1, :1], r"\(1, 1\)"),
        ({"weighting": "perplexity"}, Perplexity, "prepare", lambda _, losses, own: own, r"tensor of \(2,\)"),
        ({"weighting": "perplexity"}, Perplexity, "prepare", lambda *_: [[1, 0]], "gives a list"),
        ({"weighting": "confidence"}, Confidence, "start", lambda _, given, count: [1.0] * count, "starts from"),
        ({"weighting": "confidence"}, Confidence, "start", lambda *_: None, "starts from the weights None"),
        ({"pooling": "logp-mean"}, LogpMean, "combine", lambda *_: Pooled(Scored(math.nan)), "combines answers into"),
        ({"pooling": "logp-mean"}, LogpMean, "combine", lambda _, answers, weights: answers[0], "combines answers"),
    ],
)
def test_what_a_method_of_ones_own_may_not_give_is_an_error(pico, monkeypatch, options, owner, name, wrong, message):
    """Weights that were none left rows to the main member; rows that do not sum to 1 were scores."""
    monkeypatch.setattr(owner, name, wrong)
    with pytest.raises(ConfigError, match=f"^{next(iter(options))}={next(iter(options.values()))} .*{message}"):
        model = deepen(pico["bytelevel"], pico["padded"], **options)
        model.loglikelihood(requests("loglikelihood", ("The quick brown fox", " jumps")), disable_tqdm=True)
