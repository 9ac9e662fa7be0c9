"""Bits per byte: against plain forward passes and loglikelihood, controls, search, and what evaluation warns of."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
import yaml
from harness import by_default, deepen, requests
from naive import member_logp, score_span

from lm_eval_deepen.cli import main as cli
from lm_eval_deepen.cli.bpb import measure
from lm_eval_deepen.config import FrozenDict
from lm_eval_deepen.engine import calibration as texts
from lm_eval_deepen.engine import self_check
from lm_eval_deepen.engine.bits_per_byte import Document, Reading, Variant, ensemble_bits
from lm_eval_deepen.engine.projection_loss import projection_losses, read_with_covers
from lm_eval_deepen.engine.prompts import Prompter
from lm_eval_deepen.engine.self_check import examine, flat_spaces, judge
from lm_eval_deepen.errors import ConfigError, RequestError
from lm_eval_deepen.harness.model import DeepenLM, configure
from lm_eval_deepen.tuning.by_score import placed
from lm_eval_deepen.tuning.comparison import TEMPERATURES, Own, controls, orders, own
from lm_eval_deepen.tuning.comparison_table import Line, compare, table
from lm_eval_deepen.tuning.search import Candidate, Chosen, Fusers, search
from lm_eval_deepen.weighting.bayes import Bayes

DOCUMENTS = (
    Document("Paris is the capital of France."),
    Document(" the largest planet, 中国 café 🙂.", "Question: What is Jupiter?\nAnswer:"),
    Document("ing in the rain; nothing was said", "She was walk"),
)


@pytest.fixture(scope="module")
def pair(pico):
    return deepen(pico["metaspace"], pico["bytelevel"], weights=[0.6, 0.4]).ensemble


@pytest.fixture(scope="module")
def reading(pair) -> Reading:
    return Reading.of(pair, DOCUMENTS)


def test_weight_one_on_the_main_member_is_exactly_its_own_figure(pair, reading) -> None:
    one = replace(Variant.of(pair).ensemble, weights=torch.tensor([1.0, 0.0]))
    (through,) = reading.logp([Variant(one, (1.0, 1.0))])
    assert torch.equal(through, reading.own_logp([1.0])[0])
    (cooler,) = reading.logp([Variant(one, (0.8, 1.3))])
    assert torch.equal(cooler, reading.own_logp([0.8])[0])


def test_own_figures_are_a_plain_forward_pass_over_text_tokens_alone(pair, reading) -> None:
    main = pair.main
    for index, document in enumerate(DOCUMENTS[:1]):
        prefix, ids = main.codec.prefix_ids, main.codec.encode(document.text)
        for temperature in (1.0, 1.4):
            logits = member_logp
            expected = sum(
                float(torch.log_softmax(logits(main, (*prefix, *ids[:at])) / temperature, dim=-1)[0, token])
                for at, token in enumerate(ids)
            )
            bits = reading.bits(reading.own_logp([temperature]))[0, index]
            assert float(bits) == pytest.approx(-expected / math.log(2), rel=1e-5)
    assert not set(position.target for position in reading.positions) & main.codec.vocab.control


def test_fused_bits_are_those_of_scoring(pair, reading) -> None:
    bits = ensemble_bits(reading, reading.ensemble)
    model = deepen(*(m.config.pretrained for m in pair.members), weights=[0.6, 0.4])
    rolling = model.loglikelihood_rolling(requests("loglikelihood_rolling", (DOCUMENTS[0].text,)), True)[0]
    assert float(bits[0]) == pytest.approx(-rolling / math.log(2), rel=1e-5)
    for index in (1, 2):
        context, text = DOCUMENTS[index].context, DOCUMENTS[index].text
        ((score, _),) = model.loglikelihood(requests("loglikelihood", (context, text)), True)
        assert float(bits[index]) == pytest.approx(-score / math.log(2), rel=1e-5)
        slow = score_span(pair, Prompter(pair).span(context, text))
        assert float(bits[index]) == pytest.approx(-sum(slow) / math.log(2), rel=1e-5)


@pytest.mark.parametrize("options", [{"weights": [0.6, 0.4]}, {"weighting": "bayes"}], ids=["static", "learning"])
def test_bits_of_a_mixture_are_those_of_its_scores_by_stretches(pico, options, tmp_path) -> None:
    """In either order of the members, in windows too; the table has one line of it, and the self-check this figure."""
    long = Document("Paris is the capital of France, and the fox walked away. " * 4)
    given = {"method": "mixture", "max_length": 64, "matrix_dir": str(tmp_path), **options}
    model = deepen(pico["metaspace"], pico["bytelevel"], **given)
    documents = (*DOCUMENTS, long)
    lines, _ = measure(model.ensemble, documents, None)
    (line,) = [line for line in lines if line.system.startswith("ensemble")]
    assert "scored_by_stretches" not in model.ensemble.counters.summary()
    rolled = model.loglikelihood_rolling(requests("loglikelihood_rolling", *((documents[i].text,) for i in (0, 3))))
    pairs = [(document.context, document.text) for document in DOCUMENTS[1:]]
    given = [score for score, _ in model.loglikelihood(requests("loglikelihood", *pairs))]
    scores = [rolled[0], *given, rolled[1]]
    assert line.bits.tolist() == pytest.approx([-score / math.log(2) for score in scores], abs=1e-3)
    (bits_of, _) = self_check.measure(model.ensemble, documents)
    assert bits_of["ensemble"] * sum(d.num_bytes for d in documents) == pytest.approx(float(line.bits.sum()), abs=1e-3)
    if model.ensemble.weigher is None:  # what `tune` reports
        at = Candidate(FrozenDict(), (0.6, 0.4), (1.0, 1.0))
        bits = Chosen(Fusers(model.ensemble), at, replace(at, temperatures=(0.5, 1.5)), ()).before(documents)
        assert bits.tolist() == pytest.approx(line.bits.tolist(), abs=1e-3)


def test_a_prior_goes_with_the_members_into_another_order(pico, tmp_path) -> None:
    names, documents = ("bytelevel", "metaspace"), DOCUMENTS[:1]
    keys = {
        "method": "deepen",
        "weighting": "bayes",
        "averages": "linear",
        "matrix_dir": str(tmp_path),
        "covers": "off",
    }
    given = deepen(*(pico[name] for name in names), prior=[1, 2, 3, 4, 5], **keys).ensemble
    points = given.experts.weights.tolist()  # of the first member, for [1, 2, 3, 4, 5]
    mirrored = [1 + points.index(point[::-1]) for point in points]
    turned = deepen(*(pico[name] for name in names[::-1]), prior=mirrored, **keys).ensemble
    there, here = (ensemble_bits(Reading.of(one, documents), one) for one in (turned, orders(given)[1]))
    assert mirrored != [1, 2, 3, 4, 5] and torch.equal(there, here)
    for method in ("deepen", "mixture"):
        keys = {"method": method, "weighting": "bayes", "matrix_dir": str(tmp_path)}
        three = deepen(*(pico[name] for name in (*names, "padded")), **keys).ensemble
        points, kinds = three.experts.weights, three.experts.kinds()
        bayes = Bayes(prior=tuple(range(1, len(points) + 1)))
        numbered = replace(three, config=three.config.replace(weighting_options=bayes))
        for one, order in zip(orders(numbered), ([0, 1, 2], [1, 0, 2], [2, 0, 1]), strict=True):
            places = [int(number) - 1 for number in one.config.weighting_options.prior]
            assert [kinds[at] for at in places] == one.experts.kinds() == kinds
            assert torch.equal(points[places][:, order], one.experts.weights)


def test_exponents_go_with_the_members_into_another_order(pico, tmp_path) -> None:
    names, documents = ("bytelevel", "metaspace"), DOCUMENTS[:1]
    keys = {"method": "deepen", "matrix_dir": str(tmp_path), "covers": "off"}
    given = deepen(*(pico[name] for name in names), average=[1, 0.25], **keys).ensemble
    turned = deepen(*(pico[name] for name in names[::-1]), average=[0.25, 1], **keys).ensemble
    there, here = (ensemble_bits(Reading.of(one, documents), one) for one in (turned, orders(given)[1]))
    assert torch.equal(there, here)


def test_measuring_leaves_the_counts_of_an_evaluation_alone(pair) -> None:
    before = pair.counters.summary()
    ensemble_bits(Reading.of(pair, DOCUMENTS[:1]), pair)
    assert pair.counters.summary() == before


def test_every_byte_of_a_document_is_counted_once(reading) -> None:
    for index, document in enumerate(DOCUMENTS):
        lefts = [position.left for position in reading.positions if position.document == index]
        assert lefts == sorted(lefts, reverse=True) and lefts[-1] == 0 and lefts[0] < document.num_bytes + 2


def test_variants_share_a_pass_and_do_not_influence_each_other(pair, reading) -> None:
    variants = [Variant(replace(Variant.of(pair).ensemble, weights=torch.tensor(w)), t) for w, t in
                (([0.5, 0.5], (1.0, 1.0)), ([0.1, 0.9], (1.2, 0.9)))]  # fmt: skip
    together = reading.logp(variants)
    for variant, row in zip(variants, together, strict=True):
        assert torch.equal(reading.logp([variant])[0], row)


def test_controls_of_two_equal_members_are_that_member(pico) -> None:
    twins = deepen(pico["bytelevel"], pico["bytelevel"], weights=[0.3, 0.7]).ensemble
    readings = [Reading.of(one, DOCUMENTS) for one in orders(twins)]
    alone = own(readings[0]).bits
    for bits in controls(readings).values():
        torch.testing.assert_close(bits, alone, atol=1e-4, rtol=1e-6)
    torch.testing.assert_close(ensemble_bits(readings[0], readings[0].ensemble), alone, atol=1e-4, rtol=1e-6)


def test_controls_against_sums_between_common_ends(pair) -> None:
    readings = [Reading.of(one, DOCUMENTS) for one in orders(pair)]
    assert [r.ensemble.main.name for r in readings] == ["m0", "m1"]
    expected = {"linear": 0.0, "geometric": 0.0}
    tokens = []
    for r in readings:
        values = r.own_logp([1.0])[0].double().tolist()
        tokens.append([(p.left, v) for p, v in zip(r.positions, values, strict=True) if p.document == 1])
    common = sorted({left for left, _ in tokens[0]} & {left for left, _ in tokens[1]}, reverse=True)
    start = float("inf")
    for end in common:
        a, b = (sum(v for left, v in own_tokens if end <= left < start) for own_tokens in tokens)
        expected["linear"] -= math.log2(0.6 * math.exp(a) + 0.4 * math.exp(b))
        expected["geometric"] -= (0.6 * a + 0.4 * b) / math.log(2)
        start = end
    assert len(common) > 3
    for name, bits in controls(readings).items():
        assert float(bits[1]) == pytest.approx(expected[name], rel=1e-9)


def test_a_fitted_temperature_is_never_fitted_on_what_it_scores() -> None:
    grid = torch.full((len(TEMPERATURES), 4), 9.0)
    grid[2, [0, 2]], grid[5, [1, 3]] = 1.0, 1.0  # each half has its own best temperature
    bits, chosen = Own("m", grid[0], grid).fitted()
    assert bits.tolist() == [9.0] * 4 and sorted(chosen) == sorted([TEMPERATURES[5], TEMPERATURES[2]])
    other = Own("m", grid[0], grid.roll(1, 0))
    other.by_temperature[:, [1, 3]] = 9.0
    bits, chosen = Own("m", grid[0], grid).fitted(other)
    assert chosen == [TEMPERATURES[3]] and bits.tolist() == grid[3].tolist()


def test_comparisons_are_paired_and_repeatable() -> None:
    b = torch.rand(40, generator=torch.Generator().manual_seed(0)).double() * 100 + 1
    change = compare(0.98 * b, b)
    assert change.share == pytest.approx(-0.02) and change.low == pytest.approx(-0.02) and change.better
    noisy = compare(b.roll(1), b)
    assert noisy.low < 0 < noisy.high and not noisy.better and not noisy.worse
    assert compare(b.roll(1), b) == noisy
    assert compare(b[:1], b[:1]).high == math.inf
    line = Line("a alone", b)
    assert "-2.00 % [-2.00, -2.00]" in table([line, Line("mixed", 0.98 * b)], line, 1000)


def test_texts_are_read_or_refused_with_their_place(tmp_path) -> None:
    plain, lines = tmp_path / "a.txt", tmp_path / "b.jsonl"
    plain.write_text("one\nline\n\n \n two \n")
    lines.write_text('{"text": " x", "context": "c"}\n\n{"text": "y"}\n')
    found = texts.load_documents([plain, lines])
    assert found == [Document("one\nline"), Document("two"), Document(" x", "c"), Document("y")]
    assert texts.load_documents([plain, lines], 1) == [found[0], found[2]]
    assert texts.digest(found) != texts.digest(found[::-1])
    for content, message in (("[1]", "line 1: expected"), ("{", "line 1, is not JSON"), ('{"text": ""}', "expected")):
        lines.write_text(content)
        with pytest.raises(RequestError, match=message):
            texts.load_documents([lines])
    plain.write_text("\n")
    with pytest.raises(RequestError, match="holds no document"):
        texts.load_documents([plain])
    with pytest.raises(RequestError, match=r"missing.txt cannot be read \(No such file or directory\)\. Give"):
        texts.load_documents([tmp_path / "missing.txt"])


def test_one_member_has_nothing_to_compare(pico) -> None:
    with pytest.raises(RequestError, match="at least two members"):
        Reading.of(deepen(pico["bytelevel"]).ensemble, DOCUMENTS)
    by_prompt = deepen(pico["bytelevel"], pico["metaspace"], weighting="perplexity").ensemble
    with pytest.raises(RequestError, match="'perplexity' depends on each request's prompt"):
        Reading.of(by_prompt, DOCUMENTS)
    taught = deepen(pico["bytelevel"], pico["metaspace"], weighting="bayes", learn_from="prompt").ensemble
    assert len(Reading.of(taught, DOCUMENTS[:1]).positions) > 0
    with pytest.raises(RequestError, match="learn_from 'prompt' begins with what a document's context teaches"):
        Reading.of(taught, [Document(" fox", "The quick brown")])


def test_the_search_finds_weights_that_the_text_speaks_for(pico) -> None:
    ensemble = deepen(pico["bytelevel"], pico["metaspace"]).ensemble
    documents = texts.load_documents([texts.default_text()], 4)
    chosen = search(Reading.of(ensemble, documents))
    assert float(chosen.after(documents).sum()) < float(chosen.before(documents).sum())
    assert [line.split(":")[0] for line in chosen.log][:3] == ["space and weights", "weights", "common temperature"]
    assert sum(chosen.best.weights) == pytest.approx(1, abs=1e-4)
    assert configure(chosen.config.to_dict()).fingerprint() == chosen.config.fingerprint()


@pytest.fixture
def few_stages(monkeypatch):
    """A search of one stage, which chooses weights alone."""
    stages = {"with_spaces": lambda at, _: (), "_common_temperature": lambda at: (), "_temperatures": lambda at: (),
              "_finer_weights": lambda at: ()}  # fmt: skip
    for name, stage in stages.items():
        monkeypatch.setattr(f"lm_eval_deepen.tuning.search.{name}", stage)


@pytest.mark.parametrize("keys", [{"weighting": "adaptive", "dev_scores": [0.3, 0.2]}, {"weighting": "uniform"}])
def test_chosen_weights_outlive_a_weighting_that_made_the_first_ones(pico, few_stages, keys) -> None:
    ensemble = deepen(pico["bytelevel"], pico["metaspace"], **keys).ensemble
    chosen = search(Reading.of(ensemble, DOCUMENTS[:1]))
    assert chosen.first.weights == ensemble.config.weights
    chosen = replace(chosen, best=replace(chosen.best, weights=(0.45, 0.55)))
    again = configure(chosen.config.to_dict())
    assert again.weights == (0.45, 0.55) and again.weighting is None
    assert again.fingerprint() == chosen.config.fingerprint()


@pytest.mark.parametrize("weighting", ["perplexity", "confidence"])
def test_weights_that_are_made_anew_cannot_be_tuned(pico, tmp_path, capsys, weighting) -> None:
    spelt = {"members": [str(pico["bytelevel"]), str(pico["metaspace"])], "weighting": weighting}
    assert cli.main(["tune", json.dumps(spelt), "--output", str(tmp_path / "tuned.yaml")]) == 2
    assert f"weighting={weighting} makes the weights by request or step" in capsys.readouterr().err
    assert not (tmp_path / "tuned.yaml").exists()
    by_step = deepen(pico["bytelevel"], pico["metaspace"], weighting="confidence").ensemble
    with pytest.raises(ConfigError, match="weighting=confidence makes the weights by request or step"):
        search(Reading.of(by_step, DOCUMENTS))


def test_a_tuned_file_is_read_from_anywhere(pico, tmp_path, monkeypatch, few_stages) -> None:
    """Folders as they were found from one place, the file in another, read from a third."""
    here, away = tmp_path / "here", tmp_path / "away"
    (here / "out").mkdir(parents=True)
    away.mkdir()
    for name in ("bytelevel", "metaspace"):
        (here / name).symlink_to(pico[name])
    monkeypatch.chdir(here)
    members = [{"pretrained": "bytelevel"}, {"pretrained": "metaspace", "tokenizer": "metaspace"}]
    (here / "pair.yaml").write_text(yaml.safe_dump({"members": members, "matrix_dir": "matrices"}))
    (here / "text.txt").write_text("one fox\n\ntwo dogs\n\nthree")
    tuned = here / "out" / "tuned.yaml"
    assert cli.main(["tune", "pair.yaml", "--text", "text.txt", "--output", "out/tuned.yaml"]) == 0
    monkeypatch.chdir(away)
    config = configure({"pretrained": str(tuned)})
    assert [member.pretrained for member in config.members] == [str(here / "bytelevel"), str(here / "metaspace")]
    assert config.members[1].loading_dict()["tokenizer"] == str(here / "metaspace")
    assert config.matrix_dir == str(here / "matrices")
    assert DeepenLM(pretrained=str(tuned), device="cpu").ensemble.fuser is not None


def test_paths_of_a_file_are_those_of_folders_that_exist(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("model", "adapter"):
        (tmp_path / name).mkdir()
    here = {"pretrained": "model", "peft": "adapter", "add_bos_token": True}
    members = [here, {"pretrained": "org/model", "peft": "org/a"}]
    found = placed({"pretrained": "model", "members": members, "matrix_dir": "not/yet", "seed": 1})
    assert found == {
        "pretrained": str(tmp_path / "model"),
        "members": [
            {"pretrained": str(tmp_path / "model"), "peft": str(tmp_path / "adapter"), "add_bos_token": True},
            {"pretrained": "org/model", "peft": "org/a"},
        ],
        "matrix_dir": str(tmp_path / "not" / "yet"),
        "seed": 1,
    }


def test_bpb_and_tune_from_the_command_line(pico, tmp_path, capsys) -> None:
    text, figures, tuned = tmp_path / "t.jsonl", tmp_path / "f.json", tmp_path / "tuned.yaml"
    text.write_text("".join(json.dumps({"text": d.text, "context": d.context}) + "\n" for d in DOCUMENTS))
    spelt = json.dumps({"pretrained": str(pico["bytelevel"]), "matrix_dir": str(tmp_path),
                        "members": [str(pico["bytelevel"]), str(pico["metaspace"])]})  # fmt: skip
    assert cli.main(["bpb", spelt, "--text", str(text), "--dev", str(text), "--json", str(figures)]) == 0
    systems, lost = (json.loads(figures.read_text())[key] for key in ("systems", "projection_loss"))
    names = ["bytelevel", "metaspace"]
    assert [(one["main"], one["member"]) for one in lost] == [tuple(names), tuple(names[::-1])]
    assert [s["system"] for s in systems][:6] == [
        *(f"{n} alone" for n in names), *(f"{n} alone, fitted" for n in names), *(f"ensemble, {n} main" for n in names)
    ]  # fmt: skip
    shown = capsys.readouterr().out
    assert all(s["system"] in shown for s in systems[:1])
    assert f"metaspace through bytelevel: {100 * lost[0]['no_covers']:+.1f} % without covers" in shown
    twice = [str(text), str(text)]  # nothing is reported of what was chosen on
    assert cli.main(["tune", spelt, "--text", *twice, "--output", str(tuned)]) == 0
    written = yaml.safe_load(tuned.read_text())
    assert written["evidence"]["documents"] == {"chosen_on": 2, "reported_on": 1}
    config = configure({"pretrained": str(tuned)})
    assert config.options_dict()["rows"] in ("canonical", "prefix") and config.evidence["objective"] == "bpb"


@pytest.mark.parametrize(
    ("compat", "skipping"), [(None, {}), ("reference", {}), (None, {"skip_when": "confident", "skip_above": 0.3})]
)
def test_what_is_lost_is_what_all_weight_on_the_other_member_costs(pico, tmp_path, compat, skipping) -> None:
    """Against scoring through the whole package, with covers and without; a published method has none."""
    pair, keys = [pico["bytelevel"], pico["metaspace"]], {"matrix_dir": str(tmp_path), "compat": compat}
    ensemble = by_default(*pair, **keys, **skipping).ensemble
    own = {"m1": 100.0}
    (lost,) = projection_losses(read_with_covers(ensemble, DOCUMENTS), own)
    found = {}
    for covers in ("off", "on") if compat is None else ("off",):
        other = by_default(*pair, **keys, covers=covers, weights=[0.0, 1.0]).ensemble
        reading = Reading.of(other, DOCUMENTS)
        found[covers] = float(reading.bits(reading.logp([Variant.of(other)])).sum())
    assert lost.plain == pytest.approx(found["off"] / 100 - 1, rel=1e-4)
    assert lost.covered == (None if compat else pytest.approx(found["on"] / 100 - 1, rel=1e-4))
    assert ("with them" in str(lost)) == (compat is None)


def codes(warnings) -> list[str]:
    return [warning.code for warning in warnings]


@pytest.mark.parametrize(
    "options",
    [{"average": "consistent"}, {"average": [1.0, -0.3]}, {"average": "min"}, {"trust_region": 0.01}],
    ids=str,
)
def test_what_a_member_loses_through_another_does_not_depend_on_the_average(pico, tmp_path, options) -> None:
    """Neither on a trust region: with all weight on it the member alone is projected."""
    names, found = ("bytelevel", "metaspace"), []
    for keys in ({}, options):
        keys = {"matrix_dir": str(tmp_path), "weighting": None, "covers": "off", **keys}
        ensemble = deepen(*(pico[name] for name in names), **keys).ensemble
        (lost,) = projection_losses(read_with_covers(ensemble, DOCUMENTS[:2]), {"m1": 100.0})
        found.append((lost.plain, lost.covered))
    assert found[1] == pytest.approx(found[0], abs=1e-5)


def test_warnings_follow_the_figures() -> None:
    equal = {"ensemble": 0.99, "a": 1.0, "b": 1.1}
    assert judge(equal, {"a": 0.5, "b": 0.5}) == []
    worse = judge({**equal, "ensemble": 1.05}, {"a": 0.5, "b": 0.5})
    assert codes(worse) == ["worse_than_best_member"] and "5.0 % more than member 'a'" in worse[0].message
    unequal = {"ensemble": 0.99, "a": 1.0, "b": 1.3}
    assert codes(judge(unequal, {"a": 0.5, "b": 0.5})) == ["unequal_members", "weights_ignore_quality"]
    assert codes(judge(unequal, {"a": 0.8, "b": 0.2})) == ["unequal_members"]
    assert codes(judge(unequal, {})) == ["unequal_members"]
    facts = {"matrices": [{"member": "a", "row_entropy_share": 0.99}, {"member": "b", "row_entropy_share": 0.1}]}
    assert codes(flat_spaces(facts)) == ["flat_space"] and "'a' have 0.990" in flat_spaces(facts)[0].message


def test_evaluation_reports_its_self_check_in_the_log_and_the_results(pico, caplog) -> None:
    model = deepen(pico["bytelevel"], pico["metaspace"], self_check=True, evidence={"objective": "bpb"})
    assert model.get_model_info()["deepen"]["self_check"] is None  # nothing was asked yet
    model.loglikelihood(requests("loglikelihood", ("a", " b")), True)
    found = model.get_model_info()["deepen"]
    assert set(found["self_check"]["bits_per_byte"]) == {"ensemble", "m0", "m1"}
    (lost,) = found["self_check"]["projection_loss"]
    assert (lost["main"], lost["member"]) == ("m0", "m1") and lost["no_covers"] != lost["covers"]
    expected = examine(model.ensemble)
    assert found["self_check"] == expected and found["evidence"] == {"objective": "bpb"}
    for warning in expected["warnings"]:
        assert warning["code"] in caplog.text
    assert json.dumps(found["self_check"])


def test_flat_rows_are_told_where_no_text_can_be_scored(pico, tmp_path) -> None:
    flat = {"rows": "embedding", "relative_temperature": 0.01, "top_m": 0, "matrix_dir": str(tmp_path)}
    pair = [pico["bytelevel"], pico["metaspace"]]
    by_prompt = deepen(*pair, weighting="perplexity", **flat).ensemble
    warned = [{"code": found.code, "message": found.message} for found in flat_spaces(by_prompt.fuser.facts)]
    assert len(warned) == 2 and examine(by_prompt) == {"warnings": warned}
    assert examine(deepen(*pair, weighting="perplexity").ensemble) == {}


def test_no_self_check_without_fusion_or_where_it_is_switched_off(pico) -> None:
    assert examine(deepen(pico["bytelevel"]).ensemble) == {}
    off = deepen(pico["bytelevel"], pico["metaspace"])
    off.loglikelihood(requests("loglikelihood", ("a", " b")), True)
    assert off.get_model_info()["deepen"]["self_check"] is None
