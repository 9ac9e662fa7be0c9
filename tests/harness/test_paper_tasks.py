"""The six benchmarks of the DeePEn paper: they load offline from anywhere, ask as published, score known answers."""

import json
import sys
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.utils import handle_non_serializable

FOLDER = Path(__file__).resolve().parents[2] / "task_configs" / "deepen_paper"
SHARED_DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
VARIABLE = "LM_EVAL_DEEPEN_DATA"
SINGLE = ("arc_challenge", "piqa", "gsm8k", "nq", "triviaqa")
STEP = "Let's think step by step\nAnswer:"

paper_data = sys.modules[load_yaml(FOLDER / "deepen_nq.yaml")["custom_dataset"].__module__]


def manager(folder: Path = FOLDER, **metadata: Any) -> TaskManager:
    return TaskManager(include_path=folder, include_defaults=False, metadata=metadata)


def load(task: str, **metadata: Any) -> Any:
    return manager(**metadata).load(task)["tasks"][task]


def asked(task: str, doc: int = 0) -> tuple[str, dict[str, Any]]:
    """The prompt and the generation arguments of one document."""
    loaded = load(task)
    loaded.set_fewshot_seed(seed=1234)
    loaded.build_all_requests(samples=[doc])
    (request,) = loaded.instances
    return request.args


def score(task: str, doc: dict[str, Any], reply: str) -> float:
    return load_yaml(FOLDER / f"{task}.yaml")["process_results"](doc, [reply])["exact_match"]


def write_jsonl(path: Path, content: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content), encoding="utf-8")


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of six tiny benchmarks, named in the variable; two of the 57 subjects; another working directory."""
    folder = tmp_path / "data"
    for split in ("fewshot", "dev", "test"):
        numbers = range(6 if split == "fewshot" else 3)
        options = {"A": "one ", "B": "two", "C": "three"}
        letters = [{"question": f"{split} {n}?", **options, "answer": "ABC"[n % 3]} for n in numbers]
        answers = [{"question": f"{split} {n}", "answer": ["Ada", "Ada Lovelace"]} for n in numbers]
        sums = [{"question": f"{split} {n} + 1?", "answer": f"Add.\nThe answer is {n + 1}\n"} for n in numbers]
        for subject in ("high_school_physics", "anatomy"):
            rows = [{**row, "question": f"{subject} {row['question']}", "D": "four"} for row in letters]
            write_jsonl(folder / "mmlu" / subject / f"{split}.jsonl", rows)
        if split != "fewshot":
            write_jsonl(folder / "arc_challenge" / f"{split}.jsonl", letters)
            pairs = [{key: row[key] for key in ("question", "A", "B")} | {"answer": "B"} for row in letters]
            write_jsonl(folder / "piqa" / f"{split}.jsonl", pairs)
            write_jsonl(folder / "nq" / f"{split}.jsonl", answers)
            write_jsonl(folder / "triviaqa" / f"{split}.jsonl", answers)
            write_jsonl(folder / "gsm8k" / f"{split}.jsonl", sums)
    monkeypatch.setenv(VARIABLE, str(folder))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    return folder


def shots(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / "fewshot" / f"{name}.jsonl").read_text("utf-8").splitlines()]


# --- what there is


def test_mmlu_has_the_57_subjects_of_the_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    theirs = Path(lm_eval.__file__).parent / "tasks" / "mmlu" / "default"
    names = {load_yaml(path, resolve_func=False)["dataset_name"] for path in theirs.glob("mmlu_*.yaml")}
    assert len(names) == 57
    assert set(paper_data.SUBJECTS) == names
    assert set(paper_data.SUBJECT_TASKS) == {f"deepen_mmlu_{name}" for name in names}
    for name in names:
        config = load_yaml(FOLDER / "mmlu" / f"deepen_mmlu_{name}.yaml")
        assert (config["task"], config["dataset_kwargs"]) == (f"deepen_mmlu_{name}", {"subject": name})


def test_groups_load_from_another_working_directory_with_the_subjects_that_are_there(data: Path) -> None:
    loaded = manager().load(["deepen_paper", "deepen_paper_dev"])
    subjects = {"deepen_mmlu_anatomy", "deepen_mmlu_high_school_physics"}
    test_tasks = {f"deepen_{name}" for name in SINGLE} | subjects
    dev_tasks = {f"deepen_{name}_dev" for name in (*SINGLE, "mmlu")}
    assert set(loaded["tasks"]) == test_tasks | dev_tasks
    assert all(task.config.metadata["version"] == 1.0 for task in loaded["tasks"].values())
    assert list(Path.cwd().iterdir()) == []


def test_the_harness_runs_all_of_it_and_weighs_subjects_by_size(data: Path) -> None:
    write_jsonl(data / "mmlu" / "anatomy" / "test.jsonl", [
        {"question": f"q{n}", "A": "1", "B": "2", "C": "3", "D": "4", "answer": "B"} for n in range(9)])  # fmt: skip
    results = lm_eval.simple_evaluate(
        model="dummy", tasks=["deepen_paper", "deepen_paper_dev"], task_manager=manager(), bootstrap_iters=0
    )
    assert results is not None
    assert all("exact_match,none" in found for name, found in results["results"].items() if "paper" not in name)
    assert results["results"]["deepen_mmlu"]["sample_len"] == 12
    shots_used = {name: count for name, count in results["n-shot"].items() if "dev" not in name}
    assert shots_used["deepen_gsm8k"] == 4 and shots_used["deepen_mmlu_anatomy"] == 5
    assert shots_used["deepen_nq"] == shots_used["deepen_triviaqa"] == 5
    assert shots_used["deepen_arc_challenge"] == shots_used["deepen_piqa"] == 0
    json.dumps(results, default=handle_non_serializable)


@pytest.mark.parametrize("name", SINGLE)
def test_dev_and_test_have_no_document_in_common(data: Path, name: str) -> None:
    """Documents that occur in two splits, or among the examples, stay in one."""
    examples = shots(name)[:1] if (FOLDER / "fewshot" / f"{name}.jsonl").exists() else []
    for split in ("dev", "test"):
        path = data / name / f"{split}.jsonl"
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        both = [{**rows[0], "question": "in both"}]
        write_jsonl(path, rows + both + [{**rows[0], "question": row["question"]} for row in examples])
    test, dev = load(f"deepen_{name}"), load(f"deepen_{name}_dev")
    questions = [doc["question"] for doc in test.eval_docs]
    assert "in both" in questions and len(questions) == 4
    assert len(dev.eval_docs) == 3
    assert not set(questions) & {doc["question"] for doc in dev.eval_docs}
    assert list(test.validation_docs()) == list(dev.eval_docs)  # what `tune` looks at


def test_questions_that_differ_in_their_options_are_two_documents(data: Path) -> None:
    row = {"question": "Which is a chemical change?", "A": "ice melts", "B": "iron rusts", "answer": "B"}
    write_jsonl(data / "arc_challenge" / "dev.jsonl", [row])
    write_jsonl(data / "arc_challenge" / "test.jsonl", [{**row, "A": "water boils"}])
    task = load("deepen_arc_challenge")
    assert (len(task.eval_docs), len(task.validation_docs())) == (1, 1)
    write_jsonl(data / "arc_challenge" / "test.jsonl", [row])
    with pytest.raises(ValueError, match="arc_challenge, dev: no usable row"):
        load("deepen_arc_challenge")


# --- prompts


def test_published_nq_and_triviaqa_prompts(data: Path) -> None:
    for name in ("nq", "triviaqa"):
        examples = "".join(f"Question:{row['question']}\nAnswer:{row['answer']}\n" for row in shots(name))
        for task, split in ((f"deepen_{name}", "test"), (f"deepen_{name}_dev", "dev")):
            context, arguments = asked(task)
            assert context == f"Answer this questions:\n{examples}Question:{split} 0\nAnswer:"
            assert arguments == {"until": ["\n"], "max_gen_toks": 10, "do_sample": False}
        assert len(shots(name)) == 5


def test_published_gsm8k_prompt(data: Path) -> None:
    context, arguments = asked("deepen_gsm8k")
    examples = "".join(f"Question: {row['question']}\n{STEP}{row['answer'].strip()}\n\n" for row in shots("gsm8k"))
    assert context == f"{examples}Question: test 0 + 1?\n{STEP}"
    assert arguments == {"until": ["\n\n"], "max_gen_toks": 512, "do_sample": False}
    assert len(shots("gsm8k")) == 4


def test_published_letter_prompts(data: Path) -> None:
    one_token = {"until": ["\n"], "max_gen_toks": 1, "do_sample": False}
    assert asked("deepen_arc_challenge") == ("test 0?\nA. one \nB. two\nC. three\nAnswer:", one_token)
    released = asked("deepen_arc_challenge_released")
    assert released == ("Question: test 0?\nA. one \nB. two\nC. three\nAnswer:", one_token)
    assert asked("deepen_piqa") == ("test 0?\nA. one \nB. two\nAnswer:", one_token)
    assert asked("deepen_piqa_dev", 1) == ("dev 1?\nA. one \nB. two\nAnswer:", one_token)


def test_published_mmlu_prompt_in_the_subject_and_in_the_development_task(data: Path) -> None:
    def question(split: str, n: int, subject: str = "high school physics") -> str:
        return (
            f"There is a single choice question about {subject}. Answer the question by replying A, B, C or D.\n"
            f"Question: {subject.replace(' ', '_')} {split} {n}?\nA. one \nB. two\nC. three\nD. four\nAnswer:"
        )

    examples = "".join(f"{question('fewshot', n)} {'ABC'[n % 3]}\n" for n in range(5))
    context, arguments = asked("deepen_mmlu_high_school_physics", 1)
    assert context == examples + question("test", 1)
    assert arguments == {"until": ["\n"], "max_gen_toks": 1, "do_sample": False}
    development = load("deepen_mmlu_dev").eval_docs
    assert [doc["prompt"].count("about anatomy") > 0 for doc in development] == [True, False] * 3  # in turns
    assert development[1]["prompt"] == examples + question("dev", 0)
    assert asked("deepen_mmlu_dev")[0] == development[0]["prompt"]


def test_a_local_folder_may_have_examples_of_its_own(data: Path) -> None:
    rows = [{"question": f"own {n}", "answer": f"answer {n}"} for n in range(5)]
    write_jsonl(data / "nq" / "fewshot.jsonl", rows)
    examples = "".join(f"Question:own {n}\nAnswer:answer {n}\n" for n in range(5))
    assert asked("deepen_nq")[0] == f"Answer this questions:\n{examples}Question:test 0\nAnswer:"


# --- scores


@pytest.mark.parametrize(
    ("task", "doc", "reply", "expected"),
    [
        ("deepen_arc_challenge", {"answer": "C"}, " C", 1.0),
        ("deepen_arc_challenge", {"answer": "C"}, "C", 1.0),
        ("deepen_piqa", {"answer": "A"}, " B", 0.0),
        ("deepen_piqa", {"answer": "A"}, " a", 0.0),
        ("deepen_piqa", {"answer": "A"}, "", 0.0),
        ("deepen_mmlu_dev", {"answer": "D"}, " D", 1.0),
        ("mmlu/deepen_mmlu_anatomy", {"answer": "D"}, " The", 0.0),
        ("deepen_gsm8k", {"answer": "Add.\n#### 1,000"}, "So 999 + 1 = 1000.\nThe answer is 1000", 1.0),
        ("deepen_gsm8k", {"answer": "#### 18"}, "The answer is $18.00.", 1.0),
        ("deepen_gsm8k", {"answer": "#### 18"}, "The answer is 18 of 20", 0.0),
        ("deepen_nq", {"answers": ["the Beatles", "Fab Four"]}, " Beatles!", 1.0),
        ("deepen_triviaqa", {"answers": ["Ada Lovelace", "Ada"]}, " ada", 1.0),
        ("deepen_triviaqa", {"answers": ["Ada Lovelace", "Ada"]}, " Ada Byron", 0.0),
    ],
)
def test_known_answers(task: str, doc: dict[str, Any], reply: str, expected: float) -> None:
    assert score(task, doc, reply) == expected


# --- the hub


def fake_hub(rows: dict[tuple[str, str | None, str], list[dict[str, Any]]]) -> Any:
    asked_for = []

    def load_dataset(path: str, name: str | None = None, *, split: str) -> list[dict[str, Any]]:
        asked_for.append((path, name, split))
        return rows[path, name, split]

    load_dataset.asked_for = asked_for  # type: ignore[attr-defined]
    return load_dataset


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Stands in for the hub, with rows in its columns."""
    arc = ("allenai/ai2_arc", "ARC-Challenge")
    qa = "google-research-datasets/nq_open"
    choices = {"text": ["one", "two", "three"], "label": ["1", "2", "3"]}
    goal = {"goal": "how", "sol1": "this", "sol2": "that"}
    lettered = {"text": ["x", "y"], "label": ["A", "B"]}
    mmlu = {"question": "q", "choices": ["w", "x", "y", "z"], "subject": "anatomy"}
    trivia = [{"question": f"t{n}", "answer": {"aliases": [f"a{n}"], "value": "v"}} for n in range(6000)]
    trivia[5999]["answer"]["aliases"] = []
    found = fake_hub(
        {
            (*arc, "train"): [{"question": "dev", "choices": lettered, "answerKey": "B"}],
            (*arc, "test"): [{"question": "test", "choices": choices, "answerKey": "3"}],
            ("baber/piqa", None, "train"): [{**goal, "goal": f"g{n}", "label": 0} for n in range(2100)],
            ("baber/piqa", None, "validation"): [{**goal, "label": 1}],
            ("openai/gsm8k", "main", "train"): [{"question": f"g{n}", "answer": f"#### {n}"} for n in range(400)],
            ("openai/gsm8k", "main", "test"): [{"question": "t", "answer": "One.\n#### 1"}],
            (qa, None, "train"): [{"question": f"q{n}", "answer": ["a"]} for n in range(1700)],
            (qa, None, "validation"): [{"question": "t", "answer": ["a", "b"]}],
            ("mandarjoshi/trivia_qa", "rc.wikipedia.nocontext", "validation[:6000]"): trivia,
            ("cais/mmlu", "anatomy", "dev"): [{**mmlu, "question": f"e{n}", "answer": n % 4} for n in range(5)],
            ("cais/mmlu", "anatomy", "validation"): [{**mmlu, "question": "v", "answer": 1}],
            ("cais/mmlu", "anatomy", "test"): [{**mmlu, "answer": 3}],
        }
    )
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(paper_data.datasets, "load_dataset", found)
    return found


def test_the_hub_is_the_default_and_its_columns_become_the_same_documents(hub: Any) -> None:
    sizes = {"arc_challenge": (1, 1), "piqa": (2000, 1), "gsm8k": (300, 1), "nq": (1600, 1), "triviaqa": (1900, 4100)}
    for name, (dev, test) in sizes.items():
        task = load(f"deepen_{name}")
        assert (len(task.validation_docs()), len(task.eval_docs)) == (dev, test), name
    arc = load("deepen_arc_challenge").eval_docs[0]
    assert arc == {"question": "test", "options": "A. one\nB. two\nC. three", "answer": "C"}  # labels 1, 2, 3
    assert load("deepen_piqa").eval_docs[0] == {"question": "how", "options": "A. this\nB. that", "answer": "B"}
    assert load("deepen_nq").eval_docs[0]["answers"] == ["a", "b"]
    assert load("deepen_triviaqa").eval_docs[4099] == {"question": "t5999", "answers": ["v"]}
    assert load("deepen_gsm8k").eval_docs[0]["answer"] == "One.\n#### 1"
    anatomy = load("deepen_mmlu_anatomy")
    assert anatomy.eval_docs[0] == {
        "domain": "anatomy", "question": "q", "options": "A. w\nB. x\nC. y\nD. z", "answer": "D",
    }  # fmt: skip
    assert [row["answer"] for row in anatomy.dataset["fewshot"]] == ["A", "B", "C", "D", "A"]


def test_a_sample_of_the_hub_is_the_same_whatever_the_order(hub: Any) -> None:
    rows = [{"question": f"q{n}"} for n in range(50)]
    taken = paper_data._sample(rows, 7)
    assert len(taken) == 7
    assert paper_data._sample(rows[::-1], 7) == taken


def test_a_hub_that_cannot_be_reached_is_an_error_that_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(paper_data.datasets, "load_dataset", unreachable)
    with pytest.raises(RuntimeError, match=rf"nq_open .*ConnectionError: no route.*set {VARIABLE}"):
        load("deepen_nq")


# --- translation


def pairs(split: str, count: int) -> list[dict[str, str]]:
    return [{"source": f"{split} {n}.", "target": f"{split.upper()} number {n} of some."} for n in range(count)]


def test_translation_asks_after_four_examples_that_are_not_in_the_development_split(data: Path) -> None:
    folder = data / "flores" / "eng_Latn-deu_Latn"
    folder.mkdir(parents=True)
    for split, count in (("dev", 6), ("test", 2)):
        write_jsonl(folder / f"{split}.jsonl", pairs(split, count))
    task = load("deepen_flores_en_de")
    assert [doc["source"] for doc in task.validation_docs()] == ["dev 4.", "dev 5."]
    context, arguments = asked("deepen_flores_en_de")
    examples = "".join(f"English: dev {n}.\nGerman: DEV number {n} of some.\n\n" for n in range(4))
    assert context == f"{examples}English: test 0.\nGerman:"
    assert arguments["until"] == ["\n"]
    found = task.process_results(task.eval_docs[0], ["TEST number 0 of some."])
    assert task.aggregation()["bleu"]([found["bleu"]]) == pytest.approx(100)
    write_jsonl(folder / "dev.jsonl", pairs("dev", 4))
    with pytest.raises(ValueError, match="4 pairs in dev and 2 in test; dev needs more than 4"):
        load("deepen_flores_en_de")
    write_jsonl(folder / "dev.jsonl", [{"source": "a"}])
    with pytest.raises(ValueError, match=r"dev\.jsonl: fields source and target are needed"):
        load("deepen_flores_en_de")
    (folder / "dev.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=rf"dev\.jsonl does not exist.*{VARIABLE}"):
        load("deepen_flores_en_de")


@pytest.mark.parametrize("task", ["deepen_flores_de_en", "deepen_flores_en_ro", "deepen_flores_ro_en"])
def test_the_other_directions_ask_as_the_first_does(data: Path, task: str) -> None:
    names = {"en": ("English", "eng_Latn"), "de": ("German", "deu_Latn"), "ro": ("Romanian", "ron_Latn")}
    (read, source), (written, target) = (names[code] for code in task.rsplit("_", 2)[1:])
    for split in ("dev", "test"):
        write_jsonl(data / "flores" / f"{source}-{target}" / f"{split}.jsonl", pairs(split, 5))
    context, arguments = asked(task)
    examples = "".join(f"{read}: dev {n}.\n{written}: DEV number {n} of some.\n\n" for n in range(4))
    assert context == f"{examples}{read}: test 0.\n{written}:"
    assert arguments["until"] == ["\n"] and arguments["max_gen_toks"] == 256
    assert set(load(task).aggregation()) == {"bleu", "chrf"}


def test_translation_pairs_the_hubs_sentences_by_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {
        ("facebook/flores", language, split): [{"id": n, "sentence": f"{language} {split} {n}"} for n in order]
        for language, order in (("eng_Latn", range(6)), ("deu_Latn", range(5, -1, -1)))
        for split in ("dev", "devtest")
    }
    flores_data = sys.modules[load_yaml(FOLDER / "deepen_flores_en_de.yaml")["custom_dataset"].__module__]
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(flores_data.datasets, "load_dataset", fake_hub(rows))
    task = load("deepen_flores_en_de")
    assert task.eval_docs[5] == {"source": "eng_Latn devtest 5", "target": "deu_Latn devtest 5"}
    assert len(task.validation_docs()) == 2
    monkeypatch.setattr(flores_data.datasets, "load_dataset", fake_hub({}))
    with pytest.raises(RuntimeError, match=rf"facebook/flores \(eng_Latn, dev\) cannot be loaded.*set {VARIABLE}"):
        load("deepen_flores_en_de")


# --- bad input


def test_metadata_names_the_folder_too_and_a_missing_subject_is_an_error(data, monkeypatch):
    monkeypatch.delenv(VARIABLE)
    assert len(load("deepen_nq", data_dir=str(data)).eval_docs) == 3
    with pytest.raises(FileNotFoundError, match=rf"no MMLU subject 'virology'; there are: anatomy, .*{VARIABLE}"):
        load("deepen_mmlu_virology", data_dir=str(data))
    with pytest.raises(FileNotFoundError, match=f"{VARIABLE}: .*nowhere is not a folder"):
        load("deepen_nq", data_dir=str(data / "nowhere"))
    (data / "nq" / "dev.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"nq/dev\.jsonl does not exist"):
        load("deepen_nq", data_dir=str(data))


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("piqa", '{"question": "q", "answer": ', "line 1: not a JSON object"),
        ("piqa", '{"question": "q"}', "line 1: fields question and answer are needed"),
        ("piqa", '{"question": "q", "A": "x", "B": "y", "answer": "C"}', "answer 'C' is none of the options"),
        ("nq", '{"question": "who?", "answer": [" "]}', "answer of 'who\\?' must be texts"),
    ],
)
def test_malformed_rows_are_refused(data: Path, name: str, line: str, message: str) -> None:
    (data / name / "test.jsonl").write_text(line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load(f"deepen_{name}")


def test_rows_with_an_empty_option_are_dropped_and_counted(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    row = {"question": "q", "A": "x", "B": "y", "answer": "B"}
    write_jsonl(data / "arc_challenge" / "test.jsonl", [{**row, "A": " "}, row])
    assert len(load("deepen_arc_challenge").eval_docs) == 1
    assert "1 of 2 rows dropped" in caplog.text


# --- the samples beside the checkout


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="the benchmark samples are not beside the checkout")
def test_all_tasks_load_the_samples_and_references_score_against_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(SHARED_DATA))
    loaded = manager().load(["deepen_paper", "deepen_paper_dev"])["tasks"]
    assert len([name for name in loaded if name.startswith("deepen_mmlu_")]) == 9  # eight subjects, and dev
    for name, task in loaded.items():
        assert len(task.eval_docs) >= 40, name
        for doc in task.eval_docs:
            reply = doc["answers"][0] if "answers" in doc else doc["answer"]
            assert task.process_results(doc, [reply]) == {"exact_match": 1.0}, (name, doc)
    for name in ("nq", "triviaqa", "gsm8k"):
        beside = (SHARED_DATA / name / "fewshot.jsonl").read_text("utf-8")
        assert shots(name) == [json.loads(line) for line in beside.splitlines()]
