"""Configuration: weightings and pooling methods, their options, and where they are meaningless."""

from __future__ import annotations

import json
from typing import Any

import pytest
from config_helpers import PAIR, Beta, catalogue, registry, write

from lm_eval_deepen.config import EnsembleConfig, Options, parse_config
from lm_eval_deepen.errors import ConfigError
from lm_eval_deepen.harness.model import configure
from lm_eval_deepen.pooling import POOLINGS
from lm_eval_deepen.weighting import WEIGHTINGS


def parse(raw: dict | None = None, /, **keys: Any) -> EnsembleConfig:
    return parse_config({**(raw or {}), **keys}, catalogue(weighting=WEIGHTINGS, pooling=POOLINGS))


def refuse(match: str, raw: dict | None = None, /, **keys: Any) -> None:
    with pytest.raises(ConfigError, match=match):
        parse(raw, **keys)


# ---- weighting


def test_what_a_prompt_teaches_is_asked_for_where_it_is_learnt() -> None:
    for key, value in (("prompt_stretches", 5), ("prior_share", 0.5)):
        refuse(f"{key}={value} is about what a prompt teaches", PAIR, weighting="bayes", **{key: value})
        config = parse(PAIR, weighting="bayes", learn_from="prompt", **{key: value})
        assert getattr(config.weighting_options, key) == value
    assert parse(parse(PAIR, weighting="bayes").to_dict()).weighting == "bayes"


def test_without_a_weighting_weights_are_given_or_equal() -> None:
    config = parse(PAIR, weights=[0.6, 0.4])
    assert (config.weighting, config.weights_change, config.weights) == (None, False, (0.6, 0.4))
    assert "weighting" not in config.to_dict()


def test_weightings_give_the_members_weights() -> None:
    assert parse(PAIR, weighting="uniform").weights == (0.5, 0.5)
    assert parse(PAIR, weighting="explicit", weights="0.7+0.3").weights == (0.7, 0.3)
    assert parse(PAIR, weighting="adaptive", dev_scores=[0.2, 0.6]).weights == pytest.approx((0.25, 0.75))
    assert parse(PAIR, weighting="adaptive", dev_scores="0.2+0.6").weights == pytest.approx((0.25, 0.75))
    assert parse(PAIR, weighting="perplexity").weights == (0.5, 0.5)
    config = parse(PAIR, weighting="confidence", weights=[0.7, 0.3], entropy_temperature=2)
    assert config.weights == (0.7, 0.3) and config.weighting_options.entropy_temperature == 2.0
    assert config.weights_change and not parse(PAIR, weighting="uniform").weights_change


B = {"pretrained": "B"}
REFUSED = {
    "weighting 'perplex' is unknown. Did you mean 'perplexity'.? Weightings: ad": {"weighting": "perplex"},
    "weighting 3 is unknown": {"weighting": 3},
    "unknown key 'weightin'. Did you mean 'weighting'": {"weightin": "uniform"},
    "unknown key 'dev_score'. Did you mean 'dev_scores'": {"weighting": "adaptive", "dev_score": [1, 1]},
    "dev_scores is an option of weighting adaptive, not of 'perplexity', which has: loss_temperature, loss_per": {
        "weighting": "perplexity", "dev_scores": [1, 1],
    },
    "loss_per is an option of weighting perplexity, and no weighting is given; remove loss_per, or give "
    "weighting=perplexity": {"loss_per": "byte"},
    "loss_per must be 'token' or 'byte'; got 'bite'. Did": {"weighting": "perplexity", "loss_per": "bite"},
    "weighting 'adaptive' needs the option 'dev_scores'": {"weighting": "adaptive"},
    "dev_scores has 3 values for 2 members": {"weighting": "adaptive", "dev_scores": [1, 2, 3]},
    "loss_per is an option of weighting 'perplexity'; give it beside": {"members": ["A", {**B, "loss_per": "byte"}]},
    r"members\[0\] \(B\): weighting belongs beside": {"pretrained": "B", "members": [{**B, "weighting": "uniform"}]},
    "pooling 'votes' is unknown. Did you mean 'vote'.? Poolings: logp-mean, mbr, rerank, vote": {"pooling": "votes"},
    "utility is an option of pooling mbr, not of 'vote', which has: ": {"pooling": "vote", "utility": "f1"},
    "with_fused is an option of pooling mbr and vote, and no pooling is given": {"with_fused": True},
    "with_fused is an option of pooling mbr and vote, not of 'logp-mean', which has: none": {
        "pooling": "logp-mean", "with_fused": True,
    },
    r"answer_pattern '\(' is no regular expression": {"pooling": "vote", "answer_pattern": "("},
}  # fmt: skip


@pytest.mark.parametrize("match", REFUSED)
def test_unknown_weightings_poolings_and_options(match: str) -> None:
    refuse(match, PAIR, **REFUSED[match])


def test_scores_that_are_none() -> None:
    for bad in ("a+b", [0.5, "x"], [], True, {"a": 1}, [float("nan"), 1]):
        refuse("dev_scores must be a list of finite numbers", PAIR, weighting="adaptive", dev_scores=bad)


@pytest.mark.parametrize("name", ["uniform", "perplexity"])
def test_weights_beside_a_weighting_that_computes_them_are_refused(name: str) -> None:
    match = f"weights are given, but weighting={name} computes them; remove the weights, or remove weighting"
    refuse(match, PAIR, weighting=name, weights=[0.5, 0.5])
    members = [{"pretrained": "A", "weight": 0.4}, {"pretrained": "B", "weight": 0.6}]
    refuse(match, members=members, weighting=name)


def test_weightings_that_have_nothing_to_weigh_are_refused() -> None:
    refuse("weighting=explicit needs weights for 2 members, and none are given", PAIR, weighting="explicit")
    for name in ("perplexity", "confidence"):
        refuse(f"weighting={name} has nothing to weigh: there is one member", pretrained="A", weighting=name)
    assert parse(pretrained="A", weighting="uniform").weights == (1.0,)


def test_what_experts_have_no_use_for_is_refused() -> None:
    """By the configuration alone, before anything is loaded."""
    bayes = {"weighting": "bayes", "averages": "linear"}
    for method in ("gac", "unite", "mined", "eva", "mixture"):
        with pytest.raises(ConfigError, match=f"averages=linear has no effect beside method={method}.*remove averages"):
            configure({**PAIR, "method": method, **bayes})
        assert configure({**PAIR, "method": method, **bayes, "averages": "both"}).weighting == "bayes"
    assert configure({**PAIR, **bayes}).weighting_options.averages == "linear"
    for keys, count in (({}, 13), ({"averages": "linear"}, 5), ({"method": "mixture"}, 10), ({"method": "gac"}, 5)):
        own = {**PAIR, "weighting": "bayes", **keys}
        assert configure({**own, "prior": [1] * count}).weighting == "bayes"
        with pytest.raises(ConfigError, match=f"prior has 4 values for {count} experts; give one for each"):
            configure({**own, "prior": [1] * 4})


def test_what_fuses_steps_is_refused_of_one_member(tmp_path) -> None:
    """What the defaults say may be said; a file whose members are given beside it keeps what it says of several."""
    idle = {
        "method": "gac", "compat": "reference", "covers": "on", "skip_when": "agree", "sampling": "member",
        "rows": "prefix", "average": "geometric", "support": 64, "trust_region": 0.5,
    }  # fmt: skip
    for key, value in idle.items():
        for one in ({"pretrained": "A"}, {"members": ["A"]}):
            with pytest.raises(ConfigError, match=f"{key}={value!r} is about fusing steps, and there is one member"):
                configure({**one, key: value})
    with pytest.raises(ConfigError) as told:
        configure({"pretrained": "A", "method": "gac", "threshold": 0.5})
    assert [one.key for one in told.value.problems] == ["method", "threshold"]
    alone = configure({"pretrained": "A", "method": "deepen", "rows": "canonical", "covers": "off", "seed": 3})
    assert configure(alone.to_dict()) == alone
    file = write(tmp_path / "pair.yaml", "kind: ensemble\nmembers: [A, B]\nweights: [0.5, 0.5]\nrows: prefix\n")
    cut = {"pretrained": str(file), "members": "B", "weights": "1"}
    assert [member.name for member in configure(cut).members] == ["B"]
    with pytest.raises(ConfigError, match="rows='exact' is about fusing steps, and there is one member"):
        configure({**cut, "rows": "exact"})


@pytest.mark.parametrize("said", ["weighting: bayes\nlearn_from: prompt", "pooling: vote\nwith_fused: true"])
def test_what_combines_several_in_a_file_is_left_out_where_its_members_are_cut_to_one(tmp_path, said) -> None:
    """Nothing that is given beside the file could remove it."""
    file = write(tmp_path / "pair.yaml", f"kind: ensemble\nmembers: [A, B]\n{said}\n")
    alone = configure({"pretrained": str(file), "members": "A"})
    assert alone == configure({"members": "A"})
    assert configure({"pretrained": str(file), "members": "A", "weights": "1"}) == alone
    kind, option = (line.partition(": ")[0] for line in said.splitlines())
    value = {"learn_from": "prompt", "with_fused": True}[option]
    with pytest.raises(ConfigError, match=f"^{option}={value!r} is an option of {kind}, and there is one member; rem"):
        configure({"pretrained": str(file), "members": "A", option: value})
    own = {"weighting": "bayes", "pooling": "vote"}[kind]
    with pytest.raises(ConfigError, match=f"^{kind}={own} has nothing to .*: there is one member; remove {kind}"):
        configure({"pretrained": str(file), "members": "A", kind: own})
    assert getattr(configure({"pretrained": str(file), "members": "A+C"}), kind) == own
    wrong = write(tmp_path / "wrong.yaml", f"kind: ensemble\nmembers: [A, B]\n{said}x\n")
    with pytest.raises(ConfigError, match=f"wrong.yaml: .*{option}"):
        configure({"pretrained": str(wrong), "members": "A"})


@pytest.mark.parametrize("said", ["sampling: member", "method: adafuse"])
def test_what_has_no_effect_on_one_member_excludes_no_trace(tmp_path, said) -> None:
    file = write(tmp_path / "pair.yaml", f"kind: ensemble\nmembers: [A, B]\n{said}\n")
    assert configure({"pretrained": str(file), "members": "A", "trace": True}).trace is True
    with pytest.raises(ConfigError, match="trace=True"):
        configure({"pretrained": str(file), "trace": True})


def test_a_key_of_a_file_is_not_removed_from_beside_it(tmp_path) -> None:
    file = write(tmp_path / "pair.yaml", "kind: ensemble\nmembers: [A, B]\nmethod: gac\nthreshold: 0.5\n")
    with pytest.raises(ConfigError) as told:
        configure({"pretrained": str(file), "pooling": "logp-mean"})
    assert str(told.value) == (
        f"{file}: method='gac' is about fusing steps, and pooling=logp-mean combines the members' own answers; remove "
        "method. What is given beside a file cannot remove a key of it: leave method out of a copy of pair.yaml"
    )
    with pytest.raises(ConfigError, match="leave threshold out of a copy of pair.yaml"):
        configure({"pretrained": str(file), "method": "deepen"})
    own = write(tmp_path / "own.yaml", file.read_text() + "pooling: vote\n")
    with pytest.raises(ConfigError, match="remove method$"):
        configure({"pretrained": str(own)})


def test_the_fingerprint_knows_what_changes_weights() -> None:
    plain = parse(PAIR).fingerprint()
    assert parse(PAIR, weighting="uniform").fingerprint() == plain  # the weights say all
    assert parse(PAIR, weighting="adaptive", dev_scores=[2, 2]).fingerprint() == plain
    assert parse(PAIR, weighting="adaptive", dev_scores=[1, 2]).fingerprint() != plain
    changing = [
        parse(PAIR, weighting="perplexity"),
        parse(PAIR, weighting="perplexity", loss_per="byte"),
        parse(PAIR, weighting="confidence"),
        parse(PAIR, weighting="confidence", weights=[0.7, 0.3]),
    ]
    assert len({plain, *(config.fingerprint() for config in changing)}) == 5


# ---- pooling


def test_a_pooling_method_and_its_options() -> None:
    config = parse(PAIR, pooling="vote", answer_pattern=r"\d+", weights=[0.7, 0.3])
    assert config.pooling == "vote" and not config.fuses_steps and config.weights == (0.7, 0.3)
    assert config.pooling_options.to_dict() == {"answer_pattern": r"\d+", "with_fused": False}
    assert parse(PAIR).fuses_steps and parse(PAIR, pooling="mbr", with_fused=True).fuses_steps
    assert parse(PAIR, pooling="logp-mean").pooling_options.to_dict() == {}


def test_what_fuses_steps_is_refused_where_no_step_is_fused() -> None:
    refuse(
        "method='gac' is about fusing steps, and pooling=vote combines the members' own answers; give "
        "with_fused=true to let the fused ensemble answer too, or remove method",
        PAIR,
        pooling="vote",
        method="gac",
    )
    refuse("steps=3 is about fusing steps.*own answers; remove steps", PAIR, pooling="logp-mean", steps=3)
    refuse("compat='reference' is about fusing steps", PAIR, pooling="mbr", compat="reference")
    for keys in ({"skip_when": "agree"}, {"covers": True}, {"sampling": "member"}):
        (key,) = keys
        refuse(
            f"{key}=.* is about fused steps, and pooling=vote combines.*; remove {key}", PAIR, pooling="vote", **keys
        )
        assert parse(PAIR, pooling="vote", with_fused=True, **keys).fuses_steps
    assert parse(PAIR, pooling="rerank", method="gac", covers=True).fuses_steps  # it scores the members' texts
    refuse("sampling=member is about fused steps, and pooling=rerank", PAIR, pooling="rerank", sampling="member")
    config = parse(PAIR, pooling="vote", with_fused=True, method="gac", threshold=0.5)
    assert (config.method, config.options.threshold) == ("gac", 0.5)
    refuse("weighting=confidence weighs fused steps, and pooling=vote", PAIR, pooling="vote", weighting="confidence")
    assert parse(PAIR, pooling="vote", weighting="adaptive", dev_scores=[1, 3]).weights == (0.25, 0.75)
    refuse("pooling=vote has nothing to combine: there is one member", pretrained="A", pooling="vote")


def test_the_fingerprint_knows_the_pooling() -> None:
    configs = [
        parse(PAIR),
        parse(PAIR, pooling="vote"),
        parse(PAIR, pooling="vote", with_fused=True),
        parse(PAIR, pooling="mbr"),
        parse(PAIR, pooling="logp-mean"),
    ]
    assert len({config.fingerprint() for config in configs}) == 5


# ---- both


@pytest.mark.parametrize(
    "keys",
    [
        {"weighting": "uniform"},
        {"weighting": "explicit", "weights": [0.7, 0.3]},
        {"weighting": "adaptive", "dev_scores": [0.2, 0.7]},
        {"weighting": "perplexity", "loss_per": "byte", "loss_temperature": 0.5},
        {"weighting": "confidence", "weights": [0.9, 0.1]},
        {"pooling": "vote", "answer_pattern": "x", "weights": [0.9, 0.1]},
        {"pooling": "logp-mean", "weighting": "adaptive", "dev_scores": [0.2, 0.7]},
        {"pooling": "mbr", "with_fused": True, "method": "gac", "threshold": 0.25},
    ],
)
def test_the_json_form_parses_to_an_equal_configuration(keys: dict, tmp_path) -> None:
    config = parse(PAIR, **keys)
    shown = json.loads(json.dumps(config.to_dict()))
    assert parse(shown) == config and parse(shown).fingerprint() == config.fingerprint()
    hash(config)
    file = write(tmp_path / "ensemble.yaml", json.dumps(shown))
    assert parse(pretrained=str(file)) == config


def test_options_of_different_seams_may_not_share_a_name() -> None:
    class Clash(Options):
        threshold: float = 1.0

    class Gamma(Beta):
        pass

    methods = registry("method", deepen=Gamma)
    with pytest.raises(ValueError, match="is method 'gac' already"):
        registry("method", deepen=Beta)
    with pytest.raises(TypeError, match="weighting 'x': option 'threshold' is one of a method as well; rename it"):
        parse_config({"pretrained": "A"}, catalogue(method=methods, weighting=registry("weighting", x=Clash)))

    class Seed(Options):
        seed: int = 1

    with pytest.raises(TypeError, match="pooling 'x': options .'seed'. are keys of the ensemble"):
        parse_config({"pretrained": "A"}, catalogue(method=methods, pooling=registry("pooling", x=Seed)))


def test_the_host_knows_all_of_them() -> None:
    from lm_eval_deepen.harness.model import configure

    assert configure({**PAIR, "weighting": "confidence", "method": "unite", "top_k": 5}).options.top_k == 5
    with pytest.raises(ConfigError, match="Poolings: logp-mean, mbr, rerank, vote"):
        configure({**PAIR, "pooling": "none"})
