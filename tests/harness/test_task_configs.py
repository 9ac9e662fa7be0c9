"""Task configurations: the data is sound, every task loads from anywhere and runs, the scoring is right."""

import json
import re
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

TASK_CONFIGS = Path(__file__).resolve().parents[2] / "task_configs"
SHARED_DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
VARIABLE = "LM_EVAL_DEEPEN_DATA"
DEMO_TASKS = {"deepen_demo_choice", "deepen_demo_short"}
SAMPLE_TASKS = {f"deepen_sample_{name}" for name in ("arc", "piqa", "nq", "gsm8k", "rolling", "mmlu")}
PAPER_TASKS = {path.stem for path in (TASK_CONFIGS / "deepen_paper").rglob("deepen_*.yaml")}  # see test_paper_tasks.py
CATEGORIES = {"geography", "science", "history", "nature", "language", "everyday", "maths", "arts"}


def function(yaml: str, field: str) -> Any:
    """The function a task's YAML refers to, imported the way the harness imports it."""
    return load_yaml(TASK_CONFIGS / yaml)[field]


normalise = function("demo/deepen_demo_short.yaml", "process_results").__globals__["normalise"]
last_number = function("samples/deepen_sample_gsm8k.yaml", "process_results").__globals__["last_number"]
score_short_answer = function("demo/deepen_demo_short.yaml", "process_results")
score_last_number = function("samples/deepen_sample_gsm8k.yaml", "process_results")


def rows(name: str) -> list[dict[str, Any]]:
    text = (TASK_CONFIGS / "demo" / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def manager(folder: Path = TASK_CONFIGS, **metadata: Any) -> TaskManager:
    return TaskManager(include_path=folder, include_defaults=False, metadata=metadata)


def load_sample(task: str, folder: Path) -> Any:
    return manager(data_dir=str(folder)).load(task)["tasks"][task]


def evaluate(task: str, **metadata: Any) -> dict[str, Any]:
    results = lm_eval.simple_evaluate(
        model="dummy", tasks=[task], task_manager=manager(**metadata), limit=4, bootstrap_iters=0
    )
    assert results is not None
    return results


def write_jsonl(path: Path, content: list[dict[str, Any]]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content), encoding="utf-8")


@pytest.fixture
def tiny_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder laid out like the benchmark samples, five rows a file; no environment variable."""
    monkeypatch.delenv(VARIABLE, raising=False)
    folder = tmp_path / "data"
    folder.mkdir()
    for split in ("fewshot", "dev", "test"):
        numbers = range(5)
        arc = [{"question": f"{split} {n}?", "A": "one", "B": "two ", "C": "three", "answer": "B"} for n in numbers]
        piqa: list[dict[str, Any]] = [
            {"question": f"{split} {n}", "A": "do this", "B": "do that", "answer": "A"} for n in numbers
        ]
        qa = [{"question": f"{split} {n}", "answer": ["Ada", "Ada Lovelace"]} for n in numbers]
        if split == "fewshot":
            qa = [{**row, "answer": "Ada"} for row in qa]
        sums = [{"question": f"{split}: {n} + 1?", "answer": f"Add.\nThe answer is {n + 1}\n"} for n in numbers]
        for domain in ("logic", "law"):
            letters = [{**row, "D": "four", "domain": domain, "question": f"{domain} {row['question']}"} for row in arc]
            (folder / "mmlu").mkdir(exist_ok=True)
            write_jsonl(folder / "mmlu" / domain / f"{split}.jsonl", letters)
        write_jsonl(folder / "arc_challenge" / f"{split}.jsonl", arc)
        write_jsonl(folder / "piqa" / f"{split}.jsonl", piqa)
        write_jsonl(folder / "nq" / f"{split}.jsonl", qa)
        write_jsonl(folder / "gsm8k" / f"{split}.jsonl", sums)
    return folder


# --- the demo's data


def test_choice_items_are_complete_and_balanced() -> None:
    items = rows("choice.jsonl")
    assert len(items) >= 80
    assert Counter(item["category"] for item in items) == dict.fromkeys(CATEGORIES, len(items) // 8)
    assert Counter(item["answer"] for item in items) == dict.fromkeys(range(4), len(items) // 4)


@pytest.mark.parametrize("name", ["choice.jsonl", "choice_fewshot.jsonl"])
def test_choice_items_have_four_distinct_options(name: str) -> None:
    for item in rows(name):
        assert set(item) == {"category", "question", "choices", "answer"}
        assert len(item["choices"]) == 4
        assert len({option.casefold() for option in item["choices"]}) == 4, item
        assert item["answer"] in range(4)
        for text in (item["question"], *item["choices"]):
            assert text and text == text.strip()


def test_short_items_are_complete() -> None:
    items = rows("short.jsonl")
    assert len(items) >= 40
    assert Counter(item["category"] for item in items) == dict.fromkeys(CATEGORIES, len(items) // 8)


@pytest.mark.parametrize("name", ["short.jsonl", "short_fewshot.jsonl"])
def test_short_items_accept_only_meaningful_answers(name: str) -> None:
    for item in rows(name):
        assert set(item) == {"category", "question", "answers"}
        spellings = [normalise(answer) for answer in item["answers"]]
        assert spellings and all(spellings), item
        assert len(set(spellings)) == len(spellings), item
        assert item["question"] == item["question"].strip() != ""


def test_no_question_occurs_twice_in_any_file() -> None:
    files = ("choice.jsonl", "choice_fewshot.jsonl", "short.jsonl", "short_fewshot.jsonl")
    seen = Counter(normalise(item["question"]) for name in files for item in rows(name))
    assert [question for question, times in seen.items() if times > 1] == []


def test_fewshots_cover_the_number_of_shots() -> None:
    for kind in ("choice", "short"):
        config = load_yaml(TASK_CONFIGS / "demo" / f"deepen_demo_{kind}.yaml")
        assert config["num_fewshot"] == len(rows(f"{kind}_fewshot.jsonl"))


# --- loading


def test_all_tasks_and_tags_are_found() -> None:
    tasks = manager()
    reviews = {f"deepen_reviews_{name}" for name in ("drugs", "yelp", "apps")}
    assert set(tasks.all_subtasks) - PAPER_TASKS == DEMO_TASKS | SAMPLE_TASKS | reviews
    assert set(tasks.all_tags) == {"deepen_demo", "deepen_samples"}


@pytest.mark.parametrize("folder", [TASK_CONFIGS, TASK_CONFIGS / "demo"])
def test_demo_loads_from_another_working_directory(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loaded = manager(folder).load("deepen_demo")["tasks"]
    assert {name: len(task.eval_docs) for name, task in loaded.items()} == {
        "deepen_demo_choice": len(rows("choice.jsonl")),
        "deepen_demo_short": len(rows("short.jsonl")),
    }
    assert all(task.config.metadata["version"] == 1.0 for task in loaded.values())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("folder", [TASK_CONFIGS, TASK_CONFIGS / "samples"])
def test_samples_load_from_another_working_directory(folder, tiny_data, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    loaded = manager(folder, data_dir=str(tiny_data)).load("deepen_samples")["tasks"]
    assert set(loaded) == SAMPLE_TASKS
    for name, task in loaded.items():
        count = 10 if name == "deepen_sample_mmlu" else 5  # two subjects of five rows each
        assert len(task.test_docs()) == len(task.validation_docs()) == count
        assert task.eval_docs == task.test_docs()


def test_model_arguments_do_not_disturb_the_loaders(tiny_data: Path) -> None:
    arguments: dict[str, Any] = {
        "pretrained": "A",
        "members": [{"pretrained": "A"}],
        "weights": "1",
        "data_dir": str(tiny_data),
    }
    loaded = manager(**arguments).load(["deepen_demo", "deepen_samples"])["tasks"]
    assert set(loaded) == DEMO_TASKS | SAMPLE_TASKS


# --- prompts


def requests(task: str, **metadata: Any) -> list[Any]:
    loaded = manager(**metadata).load(task)["tasks"][task]
    loaded.set_fewshot_seed(seed=1234)
    loaded.build_all_requests(limit=1)
    return [instance.args for instance in loaded.instances]


def test_choice_prompt() -> None:
    item = rows("choice.jsonl")[0]
    shots = "".join(
        f"Question: {shot['question']}\nAnswer: {shot['choices'][shot['answer']]}\n\n"
        for shot in rows("choice_fewshot.jsonl")
    )
    context = f"{shots}Question: {item['question']}\nAnswer:"
    assert requests("deepen_demo_choice") == [(context, f" {option}") for option in item["choices"]]


def test_short_prompt() -> None:
    ((context, arguments),) = requests("deepen_demo_short")
    shots = "".join(
        f"Question: {shot['question']}\nAnswer: {shot['answers'][0]}\n\n" for shot in rows("short_fewshot.jsonl")
    )
    assert context == f"{shots}Question: {rows('short.jsonl')[0]['question']}\nAnswer:"
    assert arguments == {"until": ["\n"], "max_gen_toks": 12, "do_sample": False}


def test_published_nq_prompt(tiny_data: Path) -> None:
    ((context, arguments),) = requests("deepen_sample_nq", data_dir=str(tiny_data))
    shots = "".join(f"Question:fewshot {n}\nAnswer:Ada\n" for n in range(5))
    assert context == f"Answer this questions:\n{shots}Question:test 0\nAnswer:"
    assert (arguments["until"], arguments["max_gen_toks"]) == (["\n"], 10)


def test_published_gsm8k_prompt(tiny_data: Path) -> None:
    ((context, arguments),) = requests("deepen_sample_gsm8k", data_dir=str(tiny_data))
    step = "Let's think step by step\nAnswer:"
    shots = "".join(f"Question: fewshot: {n} + 1?\n{step}Add.\nThe answer is {n + 1}\n\n" for n in range(4))
    assert context == f"{shots}Question: test: 0 + 1?\n{step}"
    assert (arguments["until"], arguments["max_gen_toks"]) == (["\n\n"], 256)


def test_sample_choice_prompts(tiny_data: Path) -> None:
    arc = requests("deepen_sample_arc", data_dir=str(tiny_data))
    assert arc == [("Question: test 0?\nAnswer:", f" {option}") for option in ("one", "two", "three")]
    piqa = requests("deepen_sample_piqa", data_dir=str(tiny_data))
    assert piqa == [("Question: test 0\nAnswer:", f" {option}") for option in ("do this", "do that")]


def test_published_letter_prompt_with_the_subjects_own_examples(tiny_data: Path) -> None:
    found = requests("deepen_sample_mmlu", data_dir=str(tiny_data))

    def asked(split: str, n: int) -> str:
        return (
            "There is a single choice question about law. Answer the question by replying A, B, C or D.\n"
            f"Question: law {split} {n}?\nA. one\nB. two \nC. three\nD. four\nAnswer:"
        )

    context = "".join(f"{asked('fewshot', n)} B\n\n" for n in range(5)) + asked("test", 0)
    assert found == [(context, f" {letter}") for letter in "ABCD"]
    docs = load_sample("deepen_sample_mmlu", tiny_data).eval_docs
    assert ["law" in doc["prompt"] for doc in docs][:4] == [True, False, True, False]  # subjects take turns
    (tiny_data / "mmlu" / "law" / "test.jsonl").write_text('{"question": "q", "A": "x", "answer": "A"}\n')
    with pytest.raises(ValueError, match="law: options A to D and a letter among them are needed"):
        load_sample("deepen_sample_mmlu", tiny_data)


def test_rolling_document_is_problem_and_solution(tiny_data: Path) -> None:
    assert requests("deepen_sample_rolling", data_dir=str(tiny_data)) == [("test: 0 + 1?\nAdd.\nThe answer is 1",)]


# --- running in the harness


def test_demo_runs_and_reports_its_metrics() -> None:
    results = evaluate("deepen_demo")
    metrics = {task: {name.split(",")[0] for name in found} for task, found in results["results"].items()}
    assert {"acc", "acc_norm"} <= metrics["deepen_demo_choice"]
    assert {"exact_match"} <= metrics["deepen_demo_short"]
    assert results["results"]["deepen_demo_short"]["exact_match,none"] == 0.0
    assert results["n-shot"] == {"deepen_demo_choice": 3, "deepen_demo_short": 5}


def check_sample_results(results: dict[str, Any]) -> None:
    metrics = {task: {name.split(",")[0] for name in found} for task, found in results["results"].items()}
    assert {"acc", "acc_norm"} <= metrics["deepen_sample_arc"] & metrics["deepen_sample_piqa"]
    assert "exact_match" in metrics["deepen_sample_nq"] & metrics["deepen_sample_gsm8k"]
    assert {"word_perplexity", "byte_perplexity", "bits_per_byte"} <= metrics["deepen_sample_rolling"]
    assert {found["effective"] for found in results["n-samples"].values()} == {4}


def test_samples_run_with_the_folder_in_the_metadata(tiny_data: Path) -> None:
    check_sample_results(evaluate("deepen_samples", data_dir=str(tiny_data)))


def test_samples_run_with_the_folder_in_the_environment(tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tiny_data))
    check_sample_results(evaluate("deepen_samples"))


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="the benchmark samples are not beside the checkout")
def test_samples_run_on_the_benchmark_files() -> None:
    check_sample_results(evaluate("deepen_samples", data_dir=str(SHARED_DATA)))


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="the benchmark samples are not beside the checkout")
def test_every_benchmark_reference_scores_against_itself() -> None:
    loaded = manager(data_dir=str(SHARED_DATA)).load(["deepen_sample_nq", "deepen_sample_gsm8k"])["tasks"]
    for doc in loaded["deepen_sample_gsm8k"].eval_docs:
        assert score_last_number(doc, [doc["answer"]]) == {"exact_match": 1.0}
    unreachable = [
        doc["answers"]
        for doc in loaded["deepen_sample_nq"].eval_docs
        if not score_short_answer(doc, [doc["answers"][0]])["exact_match"]
    ]
    assert unreachable == []


def test_metadata_takes_precedence_over_the_environment(tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tiny_data / "absent"))
    assert len(load_sample("deepen_sample_arc", tiny_data).eval_docs) == 5


# --- bad input


def test_no_folder_is_an_error_naming_both_ways_to_give_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(ValueError, match=f"no folder was given; .*--metadata .*{VARIABLE}"):
        manager().load("deepen_sample_arc")


def test_absent_folder_and_file_are_named(tiny_data: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder; .*--metadata"):
        load_sample("deepen_sample_arc", tiny_data / "nowhere")
    absent = tiny_data / "nq" / "dev.jsonl"
    absent.unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(f"{absent} does not exist")):
        load_sample("deepen_sample_nq", tiny_data)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "q", "answer": ', "line 2: not a JSON object"),
        ('["question", "answer"]', "line 2: fields question and answer are needed"),
        ('{"question": "q"}', "line 2: fields question and answer are needed"),
        ('{"question": "q", "A": "x", "B": "y", "answer": "C"}', "answer 'C' is none of the options"),
    ],
)
def test_malformed_choice_rows_are_refused(tiny_data: Path, line: str, message: str) -> None:
    good = '{"question": "q", "A": "x", "B": "y", "answer": "A"}'
    (tiny_data / "piqa" / "test.jsonl").write_text(f"{good}\n{line}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_sample("deepen_sample_piqa", tiny_data)


@pytest.mark.parametrize("answer", [[], [" "], [3], None])
def test_answer_lists_without_text_are_refused(tiny_data: Path, answer: Any) -> None:
    write_jsonl(tiny_data / "nq" / "test.jsonl", [{"question": "who?", "answer": answer}])
    with pytest.raises(ValueError, match="answer of 'who\\?' must be texts, at least one"):
        load_sample("deepen_sample_nq", tiny_data)


def test_rows_with_an_empty_option_are_dropped_and_counted(tiny_data: Path, caplog: pytest.LogCaptureFixture) -> None:
    full = {"question": "q", "A": "x", "B": "y", "C": "z", "answer": "C"}
    path = tiny_data / "arc_challenge" / "test.jsonl"
    write_jsonl(path, [{**full, "B": " "}, full, {**full, "answer": "1", "A": ""}])
    task = load_sample("deepen_sample_arc", tiny_data)
    assert [dict(doc) for doc in task.eval_docs] == [{"question": "q", "choices": ["x", "y", "z"], "answer": 2}]
    assert "2 of 3 rows dropped" in caplog.text
    write_jsonl(path, [{**full, "B": ""}])
    with pytest.raises(ValueError, match="no usable row"):
        load_sample("deepen_sample_arc", tiny_data)


def test_line_separators_inside_a_text_do_not_split_a_row(tiny_data: Path) -> None:
    row = {"question": "one\u2028two", "answer": "The answer is 3"}
    write_jsonl(tiny_data / "gsm8k" / "test.jsonl", [row])
    assert list(load_sample("deepen_sample_gsm8k", tiny_data).eval_docs) == [row]


# --- scoring


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Beatles!", "beatles"),
        (" an Apple a day", "apple day"),
        ("U.S.A.", "usa"),
        ("theatre", "theatre"),
        ("Zürich", "zürich"),
        ("the", ""),
        ("", ""),
    ],
)
def test_normalise(text: str, expected: str) -> None:
    assert normalise(text) == expected


@pytest.mark.parametrize(
    ("prediction", "score"),
    [
        (" William Shakespeare", 1.0),
        ("shakespeare.", 1.0),
        ("The Shakespeare\nQuestion: and more", 1.0),
        ("\nShakespeare", 1.0),
        ("It was William Shakespeare", 0.0),
        ("Marlowe\nShakespeare", 0.0),
        ("Shake speare", 0.0),
        ("", 0.0),
        ("the", 0.0),
    ],
)
def test_short_answers_match_any_alias_exactly(prediction: str, score: float) -> None:
    doc = {"answers": ["William Shakespeare", "Shakespeare"]}
    assert score_short_answer(doc, [prediction]) == {"exact_match": score}


def test_empty_reply_never_matches_an_alias_that_normalises_to_nothing() -> None:
    assert score_short_answer({"answers": ["The"]}, [""]) == {"exact_match": 0.0}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("15 + 7 = 22. The answer is 22.", "22"),
        ("$1,200.50 in all", "1200.50"),
        ("It costs $18.00", "18"),
        ("1,234,567", "1234567"),
        ("between 3, 4", "4"),
        ("60-15-25=20", "20"),
        ("from 10-12", "12"),
        ("(4)-7", "7"),
        ("a loss of -7 degrees", "-7"),
        ("a loss of -$7", "-7"),
        ("a part of .5", "0.5"),
        ("The answer is 3982", "3982"),
        ("50% of 8 is 4", "4"),
    ],
)
def test_last_number(text: str, expected: str) -> None:
    assert last_number(text) == Decimal(expected)


def test_last_number_of_a_text_without_one() -> None:
    assert last_number("no idea.") is None


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("So 8 / 4 = 2.\nThe answer is 2.", 1.0),
        ("2.0", 1.0),
        ("The answer is 2, not 3", 0.0),
        ("The answer is 22", 0.0),
        ("no idea", 0.0),
        ("", 0.0),
    ],
)
def test_arithmetic_replies_are_judged_by_their_last_number(reply: str, score: float) -> None:
    assert score_last_number({"answer": "Halve 4.\nThe answer is 2"}, [reply]) == {"exact_match": score}


def test_a_reference_without_a_number_is_an_error() -> None:
    with pytest.raises(ValueError, match="no number in the reference 'unknown'"):
        score_last_number({"answer": "unknown"}, ["5"])
