"""Write the table of docs/conformance.md from the names of the tests: which test shows which item.

    python tests/conformance/make_table.py           # write
    python tests/conformance/make_table.py --check   # exit 1 where the document is stale

A test belongs to the item whose number its name begins with (``test_12_...``), or else the name of its file.
Only the part between the two marks is generated; the rest of the document is written by hand.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
DOCUMENT = HERE.parents[1] / "docs" / "conformance.md"
MARKS = ("<!-- table: make_table.py -->", "<!-- end of table -->")
ITEMS = {
    "01": "`lm_eval`, `python -m lm_eval`, `accelerate launch` and `simple_evaluate` know `deepen`",
    "02": "the same from a wheel and from an editable install",
    "03": "`hf` and the other built-in models still resolve",
    "04": "start-up imports neither torch nor the harness; a failing hook breaks nothing",
    "05": "inline, JSON, file, YAML and API spellings are one configuration",
    "06": "`device` and `batch_size` inside model_args; `auto`, `auto:N`; no `--device` on a CPU",
    "07": "loading arguments reach the member they are meant for",
    "08": "unknown arguments are refused; the output folder is stable and named after `pretrained`",
    "09": "multiple-choice sets score as in `hf`; `is_greedy` is exact",
    "10": "spaces at the boundary, empty contexts, prefix tokens, merging continuations",
    "11": "left truncation as in `hf`; a continuation that does not fit is an error",
    "12": "duplicates, several splits of one text, batch sizes, the naive scorer, types, no request",
    "13": "every kind of task, `acc_mutual_info` and several-context tasks among them",
    "14": "rolling scores as in `hf`, over several windows and with a BOS",
    "15": "greedy text as in `hf`, exactly; every form of `until`",
    "16": "aliases of `max_gen_toks`; no room is an error; left truncation",
    "17": "rows end independently; mixed arguments stay apart and are not modified",
    "18": "seeded sampling, `--gen_kwargs`, unsupported arguments are errors",
    "19": "`think_end_token` as text and as id; thinking refuses loglikelihood",
    "20": "the rendered conversation is that of `hf`; one BOS; `chat_template`, `tokenizer_name`",
    "21": "every member gets the conversation in its own template",
    "22": "`--use_cache`: nothing is computed twice, also after a kill",
    "23": "`--cache_requests` with chat, in a fresh process",
    "24": "two processes give the result of one; uneven shares do not hang",
    "25": "results with samples, predictions, prompts; every member is described; loggers are fed",
    "26": "progress bars, instances, groups, tags, few-shots",
    "bos": "the ground of the harness's own `test_bos_handling.py`",
    "max_length": "the ground of the harness's own `test_max_length.py`",
}
PREFIX = re.compile(r"test_(\d\d|bos|max_length)_")


def tests_by_item(folder: Path) -> dict[str, list[tuple[str, str]]]:
    """Return item -> (file, test) in the order of the files; raises ValueError for a test without an item."""
    found: dict[str, list[tuple[str, str]]] = {item: [] for item in ITEMS}
    for path in sorted(folder.glob("test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if not isinstance(node, ast.FunctionDef) or not node.name.startswith("test_"):
                continue
            match = PREFIX.match(node.name) or PREFIX.match(path.name)
            if match is None or match[1] not in found:
                raise ValueError(f"{path.name}: neither its name nor {node.name} begins with an item's number")
            found[match[1]].append((path.name, node.name))
    if empty := [item for item, tests in found.items() if not tests]:
        raise ValueError(f"no test shows item {', '.join(empty)}")
    return found


def readable(name: str) -> str:
    """Return a test's name as words."""
    return PREFIX.sub("", name).removeprefix("test_").replace("_", " ")


def table(folder: Path = HERE) -> str:
    """Return the table as Markdown."""
    lines = ["| item | what | tests |", "|---|---|---|"]
    for item, tests in tests_by_item(folder).items():
        cells = []
        for file in dict.fromkeys(file for file, _ in tests):
            names = ", ".join(readable(name) for where, name in tests if where == file)
            cells.append(f"[{file}](../tests/conformance/{file}): {names}")
        label = str(int(item)) if item.isdigit() else ""
        lines.append(f"| {label} | {ITEMS[item]} | {'<br>'.join(cells)} |")
    return "\n".join(lines)


def filled(document: str, content: str) -> str:
    """Return the document with the text between the marks replaced; raises ValueError where they are missing."""
    head, start, rest = document.partition(MARKS[0])
    _, end, tail = rest.partition(MARKS[1])
    if not start or not end:
        raise ValueError(f"{DOCUMENT.name} lacks the marks {' and '.join(MARKS)}")
    return f"{head}{start}\n{content}\n{end}{tail}"


def main(arguments: list[str]) -> int:
    """Write or check the document and return the exit status."""
    before = DOCUMENT.read_text(encoding="utf-8")
    after = filled(before, table())
    if arguments == ["--check"]:
        if before != after:
            print(f"{DOCUMENT} is stale: run python tests/conformance/make_table.py", file=sys.stderr)
        return int(before != after)
    DOCUMENT.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
