"""Encoder-decoder members: against one row, one step, one full forward pass at a time; and what they refuse."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import lm_eval
import pico_seq2seq
import pytest
import torch
import yaml
from harness import STATIC, requests
from lm_eval.tasks import TaskManager

from lm_eval_deepen.cli import main as cli
from lm_eval_deepen.config import MemberConfig
from lm_eval_deepen.engine.prompts import Prompter
from lm_eval_deepen.errors import ConfigError, MemberError, RequestError
from lm_eval_deepen.harness.ensemble_recipe import find_recipe
from lm_eval_deepen.harness.model import DeepenLM, configure
from lm_eval_deepen.member import Member, Prompt
from lm_eval_deepen.member.encoder_decoder import as_source, divide
from lm_eval_deepen.vocabulary import SAMPLE_TEXTS

ROOT = Path(__file__).resolve().parents[2]
PATTERN = r"English: (.*)\nGerman:"
LANGUAGES = {"source_language": "eng_Latn", "target_language": "deu_Latn"}
PROMPTS = (
    "English: The fox walked away.\nGerman:",
    "English: dog\nGerman: Hund\nEnglish: Paris is the capital of France, and Rome is the capital of Italy.\nGerman:",
    "English: dog\nGerman:",
    "Translate this.\nEnglish: Water boils at 100 degrees.\nGerman:",
)
ORDERS = [
    ("bytelevel", "translator"),
    ("metaspace", "t5"),
    ("padded", "translator"),
    ("translator", "bytelevel"),
    ("t5", "metaspace"),
    ("t5", "translator", "bytelevel"),
]


@pytest.fixture(scope="module")
def folders(pico: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {**pico, **pico_seq2seq.build(tmp_path_factory.mktemp("seq2seq"))}


def entry(name: str, folder: Path, **keys: Any) -> dict[str, Any]:
    source = {"source_pattern": PATTERN} if name in ("t5", "translator") else {}
    return {"name": name, "pretrained": str(folder), **source, **(LANGUAGES if name == "translator" else {}), **keys}


@pytest.fixture(scope="module")
def ensemble(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    matrices = str(tmp_path_factory.mktemp("matrices"))

    def load(*names: str, change: dict[str, Any] | None = None, **keys: Any) -> DeepenLM:
        members = [entry(name, folders[name]) for name in names]
        members[-1] |= change or {}
        static = {"covers": "off"} if "weights" in keys or any("weight" in member for member in members) else STATIC
        keys = {"self_check": False, "matrix_dir": matrices, **static, **keys}
        return DeepenLM(pretrained=members[0]["pretrained"], members=members, device="cpu", **keys)

    return load


def texts(model: DeepenLM, prompts: tuple[str, ...] = PROMPTS, until: str = "\n\n", **keys: Any) -> list[str]:
    arguments = {"until": [until], "max_gen_toks": 7, "do_sample": False, **keys}
    return model.generate_until(
        requests("generate_until", *((prompt, arguments) for prompt in prompts)), disable_tqdm=True
    )


# --- the reference


def decoder_tokens(member: Member, data: bytes) -> list[int] | None:
    """The tokenizer's own tokens of a text, as it would be encoded alone; None where they do not spell it."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return None
    ids = member.lm.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
    spelt = b"".join(member.codec.vocab.pieces[i] for i in ids)
    return ids if spelt.removeprefix(b" ") == data.removeprefix(b" ") else None


def forward(member: Member, prompt: str, after: list[int]) -> torch.Tensor:
    """Next-token log-probabilities [1, V] by one full pass of encoder and decoder over unpadded tokens."""
    source = re.findall(PATTERN, prompt)[-1]
    config, tokenizer = member.lm.model.config, member.lm.tokenizer
    start = [config.decoder_start_token_id]
    if member.name == "translator":
        start.append(tokenizer.convert_tokens_to_ids("deu_Latn"))
    with torch.no_grad():
        logits = member.lm.model(
            input_ids=torch.tensor([tokenizer(source)["input_ids"]]),
            decoder_input_ids=torch.tensor([start + after]),
            use_cache=False,
        ).logits[:, -1]
    return torch.log_softmax(logits, dim=-1)


def naive(model: DeepenLM, prompt: str, steps: int) -> list[int]:
    """Greedy main tokens, step by step."""
    members, ids = model.ensemble.members, []
    vocab = members[0].codec.vocab
    for _ in range(steps):
        data, rows, present = vocab.decode(ids), [], []
        for m, member in enumerate(members):
            if not member.generates_only:
                own = member.codec.prompt(prompt)
                found = own.ids + tuple(ids) if m == 0 else member.codec.follow(own, data)
                with torch.no_grad():
                    logits = member.lm.model(torch.tensor([list(found or own.ids)])).logits[:, -1]
                rows.append(torch.log_softmax(logits, dim=-1))
            else:
                found = ids if m == 0 else decoder_tokens(member, data)
                rows.append(forward(member, prompt, list(found or [])))
            present.append(found is not None)
        weights = model.ensemble.weights * torch.tensor(present)
        fused = rows[0] if sum(present) == 1 else model.ensemble.fuser.fuse(rows, (weights / weights.sum())[None]).logp
        token = int(fused[0].argmax())
        if token in members[0].eos_ids:
            break
        ids.append(token)
    return ids


# --- generation


@pytest.mark.parametrize("names", ORDERS, ids="+".join)
def test_texts_are_those_of_full_forward_passes(ensemble: Any, names: tuple[str, ...]) -> None:
    model = ensemble(*names, batch_size=3)
    expected = [model.tok_decode(naive(model, prompt, 7)) for prompt in PROMPTS]
    assert texts(model) == expected
    assert len(set(expected)) > 1  # the source matters
    model = ensemble(*names, batch_size=1)
    assert texts(model, PROMPTS[::-1]) == expected[::-1]


@pytest.mark.parametrize("name", ["translator", "t5"])
def test_one_alone_generates_what_transformers_generates(ensemble: Any, name: str) -> None:
    model = ensemble(name, batch_size=4)
    member = model.ensemble.main
    forced = {"forced_bos_token_id": member.start[1]} if name == "translator" else {}
    for prompt, text in zip(PROMPTS, texts(model), strict=True):
        inputs = member.lm.tokenizer(re.findall(PATTERN, prompt)[-1], return_tensors="pt")
        ids = member.lm.model.generate(**inputs, max_new_tokens=7 + len(forced), do_sample=False, **forced)[0]
        assert text == member.lm.tokenizer.decode(ids[1:], skip_special_tokens=True)


@pytest.mark.parametrize("name", ["translator", "t5"])
def test_batches_of_unequal_rows_give_each_row_alone(ensemble: Any, name: str) -> None:
    member = ensemble(name).ensemble.main
    vocab = member.codec.vocab
    tokens = [i for i in range(len(vocab)) if vocab.pieces[i]][5:25]
    paths = [member.prompt(prompt).ids + tuple(tokens[:size]) for prompt in PROMPTS for size in (0, 1, 2, 9)]
    member.lm.model.double()  # these random weights amplify rounding
    got = member.states_at([*paths, paths[3], paths[0]])
    for row, path in zip(got, [*paths, paths[3], paths[0]], strict=True):
        source, after = divide(path)
        assert as_source(source) + after == path and member.length(path) == len(after)
        with torch.no_grad():
            logits = member.lm.model(
                input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([after]), use_cache=False
            ).logits[0, -1]
        torch.testing.assert_close(row, logits, atol=1e-9, rtol=1e-9)


def test_every_source_is_encoded_once(ensemble: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ensemble("bytelevel", "translator", batch_size=2)
    runner, seen = model.ensemble.members[1].runner, []
    encode = runner._encode
    monkeypatch.setattr(runner, "_encode", lambda sources: (seen.extend(sources), encode(sources)))
    texts(model, (*PROMPTS, PROMPTS[2]))
    assert len(seen) == len(set(seen)) == len(PROMPTS)


def test_held_encodings_are_bounded_and_do_not_change_texts(ensemble: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = texts(ensemble("bytelevel", "translator", batch_size=4))
    monkeypatch.setattr("lm_eval_deepen.member.encoder_decoder.SOURCES_KEPT", 1)
    monkeypatch.setattr("lm_eval_deepen.member.encoder_decoder.TOKENS_PER_FORWARD", 8)
    model = ensemble("bytelevel", "translator", batch_size=4)
    assert texts(model) == expected
    assert len(model.ensemble.members[1].runner._encoded) == 1


def test_stop_strings_and_the_repetition_penalty_see_the_decoders_text_alone(ensemble: Any) -> None:
    model = ensemble("t5", "metaspace")
    (whole,) = texts(model, PROMPTS[:1])
    stop = whole[len(whole) // 2 :][:2]
    assert texts(model, PROMPTS[:1], until=stop) == [whole.split(stop)[0]]
    (other,) = texts(model, PROMPTS[:1], repetition_penalty=50.0)
    ids = model.tok_encode(other, add_special_tokens=False)
    assert other != whole and len(ids) == len(set(ids))


def wants(member: Member, token: int, mass: float) -> Any:
    def logp(states: torch.Tensor) -> torch.Tensor:
        rows = torch.full((len(states), member.vocab_size), (1 - mass) / (member.vocab_size - 1))
        rows[:, token] = mass
        return rows.log()

    return logp


@pytest.mark.parametrize("names", ORDERS[:4], ids="+".join)
def test_ends_of_text_meet_at_one_event(ensemble: Any, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]) -> None:
    model = ensemble(*names)
    for member in model.ensemble.members:
        monkeypatch.setattr(member, "logp", wants(member, member.eos_ids[0], 0.9))
    assert texts(model, PROMPTS[:1]) == [""]


def test_what_it_cannot_spell_it_sits_out(ensemble: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The translator's tokenizer has no piece for a character that the main member writes."""
    model = ensemble("bytelevel", "translator")
    main, other = model.ensemble.members
    (token,) = main.lm.tokenizer.encode("\t", add_special_tokens=False)
    monkeypatch.setattr(main, "logp", wants(main, token, 1 - 1e-6))
    monkeypatch.setattr(other, "logp", lambda states: torch.full((len(states), 304), -math.log(304)))
    assert other.codec.follow(other.prompt(PROMPTS[0]), b"\t") is None
    assert other.codec.follow(other.prompt(PROMPTS[0]), b"\xe4\xb8") is None  # half a character
    assert texts(model, PROMPTS[:1], max_gen_toks=3) == ["\t\t\t"]
    assert model.ensemble.counters.summary()["steps_sat_out"] == {"bytelevel": 0, "translator": 2}


def test_the_first_word_has_one_space_however_it_is_written(ensemble: Any) -> None:
    member = ensemble("bytelevel", "translator").ensemble.members[1]
    prompt = member.prompt(PROMPTS[0])
    words = member.lm.tokenizer("The fox", add_special_tokens=False)["input_ids"]
    for data in (b" The fox", b"The fox"):
        assert member.codec.follow(prompt, data) == prompt.ids + tuple(words)
    assert member.codec.follow(prompt, b"") == prompt.ids == prompt.head
    assert divide(prompt.ids)[0] == tuple(member.lm.tokenizer("The fox walked away.")["input_ids"])
    assert divide(prompt.ids)[1] == (2, member.lm.tokenizer.convert_tokens_to_ids("deu_Latn"))


@pytest.mark.parametrize("name", ["translator", "t5"])
def test_literal_control_text_in_a_source_is_text(ensemble: Any, name: str) -> None:
    member = ensemble(name).ensemble.main
    tokenizer = member.lm.tokenizer

    def source(text: str) -> tuple[int, ...]:
        return divide(member.source_prompt(text).ids)[0]

    for text in ("The fox walked away.", " dog  and\ncat ", *SAMPLE_TEXTS):
        if not any(literal in text for literal in tokenizer.all_special_tokens):
            assert source(text) == tuple(tokenizer(text)["input_ids"])
    template = source("The")
    control = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    expected = [token for token in template if token in control]
    assert tokenizer.eos_token_id in expected and tokenizer.eos_token_id in tokenizer("ab </s> cd")["input_ids"][1:-1]
    for literal in tokenizer.all_special_tokens:
        for text in (f"ab {literal} cd", f"ab{literal}cd", literal, f"{literal} dog"):
            found = source(text)
            assert [token for token in found if token in control] == expected
            assert found[0] == template[0] or template[0] not in control
            assert found[-1] == template[-1] == tokenizer.eos_token_id and len(found) > len(template)


def test_a_conversation_gives_it_a_source_from_plain_text(ensemble: Any) -> None:
    for names in (("bytelevel", "translator"), ("translator", "bytelevel")):
        model = ensemble(*names)
        chat = model.apply_chat_template([{"role": "user", "content": "English: The fox walked away.\nGerman:"}])
        assert ("<|im_start|>" in chat) == (names[0] == "bytelevel")
        found = zip(model.ensemble.members, Prompter(model.ensemble).prompts(chat, 5), strict=True)
        member, prompt = next(pair for pair in found if pair[0].generates_only)
        assert divide(prompt.ids)[0] == tuple(member.lm.tokenizer("The fox walked away.")["input_ids"])


def test_the_source_is_cut_out_of_the_whole_prompt_even_where_it_is_cut_for_others(ensemble: Any) -> None:
    model = ensemble("bytelevel", "translator", max_length=60)
    prompt = "English: The fox\nGerman: " + "so " * 80 + "and German:"
    model.ensemble.members[1].config = model.ensemble.members[1].config.replace(
        source_pattern=r"English: (.*)\nGerman", source_language="eng_Latn", target_language="deu_Latn"
    )
    prompts = Prompter(model.ensemble).prompts(prompt, 5)
    assert len(prompts[0].ids) <= 55
    assert divide(prompts[1].ids)[0] == tuple(model.ensemble.members[1].lm.tokenizer("The fox")["input_ids"])


@pytest.mark.parametrize("names", [("bytelevel", "translator"), ("t5", "metaspace")], ids="+".join)
def test_a_translator_proposes_words(ensemble: Any, names: tuple[str, ...]) -> None:
    model = ensemble(*names, method="adafuse", batch_size=3, candidates=2)
    together = texts(model)
    assert any(together) and together == [texts(model, (prompt,))[0] for prompt in PROMPTS]


# --- what it refuses


def test_scoring_is_refused_before_anything_is_computed(ensemble: Any) -> None:
    for names in (("bytelevel", "translator"), ("translator", "bytelevel"), ("t5",)):
        model = ensemble(*names)
        before = [member.runner.forwarded for member in model.ensemble.members]
        with pytest.raises(RequestError, match="encoder-decoder model, which takes part in generation only"):
            model.loglikelihood(requests("loglikelihood", ("a", " b")), disable_tqdm=True)
        with pytest.raises(RequestError, match="loglikelihood_rolling requests have no answer"):
            model.loglikelihood_rolling(requests("loglikelihood_rolling", ("a b",)), disable_tqdm=True)
        assert [member.runner.forwarded for member in model.ensemble.members] == before


def test_with_all_weight_on_a_causal_main_member_scoring_works(ensemble: Any) -> None:
    model = ensemble("bytelevel", "translator", weights=[1.0, 0.0])
    ((total, _),) = model.loglikelihood(requests("loglikelihood", ("The", " fox")), disable_tqdm=True)
    assert total < 0


def test_the_self_check_scores_nothing_of_such_ensembles(ensemble: Any) -> None:
    model = ensemble("bytelevel", "translator", self_check=True)
    texts(model, PROMPTS[:1])
    assert model.findings == {}
    flat = {"rows": "embedding", "relative_temperature": 0.01, "top_m": 0, "self_check": True}
    model = ensemble("bytelevel", "translator", **flat)
    texts(model, PROMPTS[:1])
    assert set(model.findings) == {"warnings"}
    assert [warning["code"] for warning in model.findings["warnings"]] == ["flat_space"] * 2


@pytest.mark.parametrize(
    ("names", "keys", "message"),
    [
        (("bytelevel", "translator"), {"weighting": "perplexity"}, "weighting=perplexity needs every member's loss"),
        (("bytelevel", "translator"), {"speculate": "draft"}, "speculate=draft drafts tokens"),
        (("translator", "bytelevel"), {"speculate": "lookup"}, "speculate=lookup drafts tokens"),
        (("bytelevel", "translator"), {"change": {"target_language": "deu_Lat"}}, "Did you mean 'deu_Latn'"),
        (("bytelevel", "t5"), {"change": {"source_language": "eng_Latn"}}, "has no source language. Leave it out"),
        (("bytelevel", "metaspace"), {"change": {"source_pattern": "(.*)"}}, "source_pattern belong to encoder-dec"),
    ],
)
def test_what_cannot_be_honoured_is_named(ensemble: Any, names: Any, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ensemble(*names, **keys)


def test_a_decoder_that_cannot_be_started_is_named(ensemble: Any, folders: dict[str, Path]) -> None:
    member = ensemble("t5").ensemble.main
    member.lm.model.config.decoder_start_token_id = member.lm.model.generation_config.decoder_start_token_id = None
    with pytest.raises(MemberError, match="has decoder_start_token_id, so its decoder cannot be started"):
        type(member)(member.config, member.lm)


def test_prompts_without_a_source_and_sources_that_are_too_long(ensemble: Any) -> None:
    """A translator abstains from a source that it has no room for, and answers nothing of its own without one."""
    long = "English: " + "dog " * 100 + "\nGerman:"
    model = ensemble("bytelevel", "translator")
    with pytest.raises(RequestError, match=r"'translator': source_pattern .* finds no source text in the prompt that"):
        texts(model, (*PROMPTS, "French: chien\nGerman:"))
    together = texts(model, (long, *PROMPTS))
    assert [texts(model, (prompt,))[0] for prompt in (long, *PROMPTS)] == together
    told = model.get_model_info()["deepen"]["steps_beyond_context"]
    assert told == {"translator": told["translator"]} and told["translator"] > 0
    model = ensemble("translator", "bytelevel", max_length=96)
    with pytest.raises(RequestError, match="a source of .* tokens does not fit into the context of 96 tokens"):
        texts(model, (long,))
    assert texts(model, ("so it is. " * 60 + PROMPTS[0],))[0]  # prompts are not cut: the other one abstains
    assert model.get_model_info()["deepen"]["steps_beyond_context"]["bytelevel"] > 0


# --- in the tools, and under the harness


def inspected(capsys: pytest.CaptureFixture, path: Path) -> tuple[int, dict[str, Any]]:
    status = cli.main(["inspect", str(path), "--json"])
    return status, json.loads(capsys.readouterr().out)


def recipe(tmp_path: Path, folders: dict[str, Path], *names: str, change: Any = None, **keys: Any) -> Path:
    members = [entry(name, folders[name]) for name in names]
    members[-1] |= change or {}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"pretrained": members[0]["pretrained"], "members": members, **keys}))
    return path


@pytest.mark.parametrize("name", ["translator", "t5"])
def test_inspect_reports_such_a_member_as_it_is_when_loaded(tmp_path, folders, ensemble, capsys, name):
    status, found = inspected(capsys, recipe(tmp_path, folders, "bytelevel", name, task="deepen_demo_short"))
    assert status == 0, found["problems"]
    (fact,) = [member for member in found["members"] if member["name"] == name]
    member = ensemble(name).ensemble.main
    assert fact["vocabulary"]["logits"] == member.vocab_size
    assert fact["parameters"] == sum(p.numel() for p in member.lm.model.parameters())
    assert fact["eos"].keys() == {str(i) for i in member.eos_ids}
    spelt = [member.codec.follow(Prompt((), "", ()), text.encode()) is not None for text in SAMPLE_TEXTS]
    assert 0 < fact["round_trip_texts"] == sum(spelt) < len(SAMPLE_TEXTS)
    assert any("takes part in generation only" in note for note in found["notes"])
    assert cli.main(["inspect", str(tmp_path / "recipe.yaml"), "--no-tasks"]) == 0
    shown = capsys.readouterr().out
    assert f"{name}: spells {sum(spelt)} of {len(SAMPLE_TEXTS)} sample texts" in shown
    assert [int(i) for i in fact["source_prefix"]] == list(member.codec.opening.control) and "bos" not in fact
    assert [int(i) for i in fact["decoder_start"]] == list(member.start)
    if name == "t5":
        assert "t5: of the source nothing in front, then a space; its decoder starts with 0 (<pad>); ends" in shown
    else:
        assert "translator: of the source in front 301 (eng_Latn), then a space; its decoder" in shown
        assert "; its decoder starts with 2 (</s>), 302 (deu_Latn); ends with" in shown


def test_inspect_shows_the_source_language_that_is_given(tmp_path, folders, capsys):
    path = recipe(tmp_path, folders, "bytelevel", "translator", change={"source_language": "fra_Latn"})
    _, found = inspected(capsys, path)
    assert found["members"][1]["source_prefix"] == {"303": "fra_Latn"}


@pytest.mark.parametrize("name", ["translator", "t5"])
def test_a_decoder_that_cannot_be_started_is_a_numbered_problem(tmp_path, folders, capsys, name):
    """Where no file says how, the configuration's class may: M2M100's does, T5's does not."""
    silent = tmp_path / name
    shutil.copytree(folders[name], silent)
    for file in ("config.json", "generation_config.json"):
        content = json.loads((silent / file).read_text())
        content.pop("decoder_start_token_id", None)
        (silent / file).write_text(json.dumps(content))
    path = recipe(tmp_path, {**folders, name: silent}, "bytelevel", name)
    status, found = inspected(capsys, path)
    if name == "translator":
        assert status == 0, found["problems"]
        assert found["members"][1]["decoder_start"] == {"2": "</s>", "302": "deu_Latn"}
        DeepenLM(pretrained=str(path), device="cpu", matrix_dir=str(tmp_path))
        return
    assert status == 1 and found["members"][1]["decoder_start"] == {}
    with pytest.raises(MemberError) as raised:
        DeepenLM(pretrained=str(path), device="cpu", matrix_dir=str(tmp_path))
    assert found["problems"] == [str(raised.value)] and "its decoder cannot be started" in found["problems"][0]


@pytest.mark.parametrize(
    ("names", "keys", "problem"),
    [
        (("bytelevel", "translator"), {"task": "deepen_demo_choice"}, "deepen_demo_choice asks for loglikelihoods"),
        (("translator", "bytelevel"), {"task": "deepen_demo_choice"}, "deepen_demo_choice asks for loglikelihoods"),
        (("bytelevel", "translator"), {"change": {"target_language": "deu"}}, "is no token of its tokenizer"),
        (("bytelevel", "metaspace"), {"change": {"source_pattern": "(.*)"}}, "belong to encoder-decoder members"),
    ],
)
def test_what_would_fail_is_a_numbered_problem(tmp_path, folders, capsys, names, keys, problem):
    status, found = inspected(capsys, recipe(tmp_path, folders, *names, **keys))
    assert status == 1 and any(problem in one for one in found["problems"]), found["problems"]


def test_the_translators_recipe_runs_under_the_harness(tmp_path, folders, monkeypatch):
    """As deepen_llama2_13b_nllb_en_de, on its task, with pico models in the place of its members."""
    data = tmp_path / "flores" / "eng_Latn-deu_Latn"
    data.mkdir(parents=True)
    for split, count in (("dev", 5), ("test", 2)):
        rows = [{"source": f"The fox {split} {n}.", "target": f"Der Fuchs {n}."} for n in range(count)]
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv("LM_EVAL_DEEPEN_DATA", str(tmp_path))
    shipped = find_recipe("deepen_llama2_13b_nllb_en_de")
    config = shipped.configure({"Llama-2-13b-hf": str(folders["bytelevel"]),
                                "nllb-200-distilled-600M": str(folders["translator"])})  # fmt: skip
    arguments = config.to_dict() | {"matrix_dir": str(tmp_path)}
    results = lm_eval.simple_evaluate(
        model="deepen", model_args=arguments, tasks=list(shipped.task), device="cpu", bootstrap_iters=0, limit=2,
        task_manager=TaskManager(include_path=str(ROOT / "task_configs"), include_defaults=False),
        gen_kwargs={"max_gen_toks": 6},
    )  # fmt: skip
    assert results is not None and results["results"][shipped.task[0]]["chrf,none"] >= 0
    asked = results["samples"][shipped.task[0]][0]["arguments"][0][0]
    assert asked.startswith("English: The fox dev 0.\nGerman: Der Fuchs 0.\n\n")
    counts = results["config"]["deepen"]
    assert counts["steps_fused"] + counts["steps_skipped"] > 0
    assert [member["name"] for member in counts["members"]] == ["Llama-2-13b-hf", "nllb-200-distilled-600M"]


# --- configuration


def configured(**keys: Any) -> Any:
    members = [{"pretrained": "org/llm"}, {"pretrained": "org/nllb", **keys}]
    return configure({"pretrained": "org/llm", "members": members})


def test_keys_of_a_source_are_part_of_the_ensemble() -> None:
    plain, config = configured(), configured(source_pattern=PATTERN, **LANGUAGES)
    assert isinstance(config.members[1], MemberConfig)
    said = {"source_pattern": PATTERN, "source_language": "eng_Latn", "target_language": "deu_Latn"}
    assert config.members[1].source == said and not plain.members[1].source
    assert configure(config.to_dict()) == config
    prints = {c.fingerprint() for c in (plain, config, configured(source_pattern=PATTERN), configured(**LANGUAGES))}
    assert len(prints) == 4


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"source_pattern": "(a"}, r"members\[1\] \(org/nllb\): source_pattern '\(a' is no regular expression"),
        ({"source_pattern": "a"}, "has 0 groups; it needs one"),
        ({"source_pattern": "(a)(b)"}, "has 2 groups; it needs one"),
        ({"target_language": 3}, "target_language must be non-empty text; got 3"),
        ({"source_patern": "(a)"}, "unknown key 'source_patern'. Did you mean 'source_pattern'"),
    ],
)
def test_wrong_keys_of_a_source(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configured(**keys)


def test_a_source_key_beside_members_is_told_where_it_belongs() -> None:
    with pytest.raises(ConfigError, match="belongs inside a member"):
        configure({"pretrained": "org/nllb", "source_pattern": PATTERN})
