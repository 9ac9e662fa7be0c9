"""Tables and charts of rows: plain text, Markdown, a self-contained page."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser

import pytest
from browser import CHROMIUM, CONTRAST, measured

from lm_eval_deepen.results import report
from lm_eval_deepen.results.aggregation import mean_scores
from lm_eval_deepen.results.chart import Point, chart
from lm_eval_deepen.results.page import html
from lm_eval_deepen.results.rows import Measured, corrected, rows_of
from lm_eval_deepen.results.tables import printable


def sample_rows():
    found = Measured(
        "task <1>",
        "acc",
        "strict|match",
        True,
        {
            "A & co": mean_scores([1] * 40 + [0] * 60),
            "<B>": mean_scores([1] * 60 + [0] * 40),
            "C": mean_scores([1] * 41 + [0] * 59),
        },
        {"<B>": {"seconds per document": 0.125}, "C": {"seconds per document": None}},
    )
    return corrected(rows_of(found, candidates=["A & co"], pool=["A & co", "C"], resamples=500))


def test_plain_tables_align_and_say_what_is_not_significant():
    lines = report.plain(sample_rows(), 0.05, ["a note"]).splitlines()
    assert lines[0] == "task <1> acc (strict|match) (higher is better), 100 documents, reference: A & co"
    assert lines[1].split("  ")[0] == "system" and lines[1].endswith("seconds per document")
    assert len({line.rindex(line.split()[-1]) + len(line.split()[-1]) for line in lines[1:2] + lines[3:6]}) == 1
    assert "reference" in lines[3]
    assert "significantly better" in lines[4] and "<0.0001" in lines[4] and "0.125" in lines[4]
    assert "not significantly different" in lines[5]
    text = "\n".join(lines)
    assert "Significance at 0.05." in text and "oracle: the best of A & co, C on every document" in text
    assert lines[-1] == "  - a note"


def test_markdown_has_one_table_per_column_and_escapes_bars():
    text, notes = report.markdown(sample_rows(), 0.05, ["x", "y|z"]).split("| note |")
    assert notes.splitlines() == ["", "|---|", "| x |", "| y\\|z |"]
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 5 and table[1].startswith("|---|---:|")
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1
    rows = rows_of(Measured("t", "acc", "none", True, {"a|b": mean_scores([1, 0]), "c": mean_scores([1, 1])}))
    assert "| a\\|b |" in report.markdown(rows, 0.05)


def test_the_oracle_is_that_of_each_columns_pool():
    def column(task, pool, **values):
        scores = {name: mean_scores(own) for name, own in values.items()}
        return rows_of(Measured(task, "acc", "none", True, scores), pool, pool)

    a, b, c, x = [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]
    three, two = column("t", ("a", "b", "c"), a=a, b=b, c=c, x=x), column("u", ("a", "b"), a=a, b=b, x=x)
    for rows, told in (
        (three, "the best of a, b, c on"),
        (three + two, "the best of a, b, c or a, b on"),
        (column("v", None, a=a, b=b, x=x), "the best of the reference and the row's own system on"),
        (two + column("v", None, a=a, b=b, x=x), "the best of a, b or the reference and the row's own system on"),
        (column("v", None, a=a, b=b) + column("w", None, b=b, a=a), "the best of b, a on"),
    ):
        assert told in " ".join(report.reading(corrected(rows)))


def test_an_interval_and_a_p_value_may_disagree_either_way_and_the_page_says_so():
    first = [0.08, 0.36, 0.35, 0.06, 0.36, 0.11, 0.62]
    second = [0.32, 0.86, 0.48, 0.96, 0.96, 0.79, 0.46]
    [_, few] = rows_of(Measured("t", "f1", "none", True, {"a": mean_scores(first), "b": mean_scores(second)}), ["a"])
    right = {"a": mean_scores([0] * 5 + [1] * 45), "b": mean_scores([1] * 50)}
    [_, more] = rows_of(Measured("u", "acc", "none", True, right), ["a"])
    assert few.comparison.p <= 0.05 and few.comparison.low < 0 < few.comparison.high
    assert more.comparison.p > 0.05 and more.comparison.low > 0
    told = " ".join(report.reading(corrected([few, more])))
    assert "may disagree: the test is stricter or, of real-valued scores, the interval" in told


NODE = shutil.which("node")


class Checker(HTMLParser):
    """Collects tags, and fails on one that is not closed."""

    VOID = {"meta", "line", "path", "circle"}

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_is_well_formed_self_contained_and_accessible():
    page = html(sample_rows(), 0.05, ["note <b>"], title="T & U")
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    names = [tag for tag, _ in checker.tags]
    assert names.count("svg") == 2 and names.count("table") == 1 and names.count("script") == 1 and "b" not in names
    assert not [v for _, attrs in checker.tags for k, v in attrs.items() if k in ("src", "href")]
    assert re.findall(r"https?://[^\s\"<]*", page) == ["http://www.w3.org/2000/svg"] * 2
    assert "prefers-color-scheme: dark" in page and "url(" not in page
    for tag, attrs in checker.tags:
        if tag == "svg":
            assert attrs["role"] == "img"
            known = {a.get("id") for t, a in checker.tags if t in ("title", "desc")}
            assert set(attrs["aria-labelledby"].split()) <= known
        if tag == "th":
            assert attrs["scope"] in ("row", "col")
    identities = [attrs["id"] for _, attrs in checker.tags if "id" in attrs]
    assert len(identities) == len(set(identities))
    assert "A & co" in "".join(checker.text) and "<B>" in "".join(checker.text)
    # What the charts show is in the table beside them: 3 rows, every heading, nothing lost.
    assert names.count("tr") == 4 and names.count("td") == 3 * (len(report.head(sample_rows())) - 1)


def test_charts_place_values_and_error_bars_on_their_axis():
    drawing = chart(
        "c", "T", "D.", [Point("a", 0.5, 0.4, 0.6, "0.5", "dot"), Point("b", 0.2, None, None, "0.2", "hollow")]
    )
    ticks = [(float(x), float(v)) for x, v in re.findall(r'class="soft" x="([\d.]+)" [^>]*middle">([\d.-]+)<', drawing)]
    (x0, v0), (x1, v1) = ticks[0], ticks[-1]
    assert v0 <= 0.2 and v1 >= 0.6

    def at(value):
        return pytest.approx(x0 + (value - v0) / (v1 - v0) * (x1 - x0), abs=0.2)

    [bar] = re.findall(r'd="M([\d.]+) \d+H([\d.]+)M', drawing)
    assert (float(bar[0]), float(bar[1])) == (at(0.4), at(0.6))
    dots = re.findall(r'<circle class="(\w+)" cx="([\d.]+)"', drawing)
    assert [(look, float(x)) for look, x in dots] == [("dot", at(0.5)), ("hollow", at(0.2))]
    assert '<desc id="cd">D. a: 0.5; b: 0.2</desc>' in drawing


@pytest.mark.parametrize("values", [(0.0, 0.0), (1.0, 1.0), (-3e-7, 2e-7), (12345.0, 99999.0)])
def test_axes_enclose_every_scale(values):
    points = [Point(str(value), value, None, None, "", "dot") for value in values]
    drawing = chart("c", "T", "D", points, zero=True)
    placed = [float(x) for x in re.findall(r'cx="([\d.]+)"', drawing)]
    assert len(placed) == 2 and all(0 < x < 720 for x in placed)
    assert 'class="zero"' in drawing


@pytest.mark.parametrize(("values", "ends"), [((0.0, 0.0), (0, 0.06)), ((1.0, 1.0), (0.94, 1)), ((0.1, 1.0), (0, 1))])
def test_an_axis_of_shares_ends_at_0_and_1(values, ends):
    drawing = chart("c", "T", "D", [Point("a", value, None, None, "", "diamond") for value in values])
    ticks = [float(v) for v in re.findall(r'middle">([\d.-]+)<', drawing)]
    assert (ticks[0], ticks[-1]) == ends and drawing.count('class="diamond"') == 2


def test_marks_mean_one_thing_and_long_labels_keep_their_ends():
    name = "SmolLM2-135M+Gemma-3-270M-with-a-very-long-name method=deepen,inverse=em"
    scores = {"ref": mean_scores([1] * 9), name: mean_scores([0] * 9), "near": mean_scores([1] * 8 + [0])}
    page = html(corrected(rows_of(Measured("t", "acc", "none", True, scores), ["ref"])), 0.05, facts={"date": "<1>"})
    one, two = re.findall(r"(?s)<svg.*?</svg>", page)
    assert re.findall(r'class="(dot|hollow|diamond)"', one) == ["diamond", "dot", "hollow"]
    assert re.findall(r'class="(dot|hollow|diamond)"', two) == ["dot", "hollow"]
    assert f"<title>{name}: 0.0000</title>" in one and "SmolLM2-135M+Gemma-3" in one and "inverse=em</text>" in one
    assert page.index("<table") < page.index("<svg") and "<dt>date</dt><dd>&lt;1&gt;</dd>" in page


@pytest.mark.skipif(NODE is None, reason="no node to run the page's script")
def test_columns_sort(tmp_path):
    """By number, the largest first and then the smallest; by name; what has no number comes last."""
    script = re.search(r"(?s)<script>(.*)</script>", html(sample_rows(), 0.05))[1]
    rows = [["b", "0.5 [0.4, 0.6]", "-"], ["10a", "<0.0001", "-"], ["a", "0.75", "-"], ["c", "-", "-"]]
    driver = """
      const make = text => ({textContent: text, childNodes: [], attributes: {}, append() {},
        addEventListener(_, call) { this.call = call; }, getAttribute(name) { return this.attributes[name] ?? null; },
        setAttribute(name, value) { this.attributes[name] = value; },
        removeAttribute(name) { delete this.attributes[name]; }});
      const innerWidth = 1280, heads = ["system", "score", "p"].map(make), buttons = [];
      const body = {rows: ROWS.map(cells => ({cells: cells.map(make)})), append(...rows) { this.rows = rows; }};
      const document = {querySelectorAll: () => [{tBodies: [body], tHead: {rows: [{cells: heads}]}}],
        createElement: () => { const made = make(""); buttons.push(made); return made; }};
    """.replace("ROWS", json.dumps(rows))
    ask = """
      const names = () => body.rows.map(row => row.cells[0].textContent);
      const shown = [1, 1, 0, 0, 2].map(at => { buttons[at].call(); return [names(), {...heads[at].attributes}]; });
    """
    path = tmp_path / "sort.js"
    path.write_text(f"{driver}{script}{ask} process.stdout.write(JSON.stringify(shown));")
    found = subprocess.run([NODE, str(path)], capture_output=True, text=True, timeout=60, check=True)
    (down, first), (up, second), (names, third), (back, _), (same, _) = json.loads(found.stdout)
    assert down == ["a", "b", "10a", "c"] and first == {"aria-sort": "descending"}
    assert up == ["10a", "b", "a", "c"] and second == {"aria-sort": "ascending"}
    assert names == ["10a", "a", "b", "c"] and third == {"aria-sort": "ascending"} and back == names[::-1] == same


HOSTILE = (
    *("<script>alert(1)</script>", "<img src=x onerror=alert(1)", "<!-- leaderboard: end -->", "<a", "&lt;b&gt;"),
    *("a|b", "a\\|b", "a\n| b |", "`a", "**a**", "~~a~~", "[a](javascript:alert(1))"),
    *("\x1b[31ma", "a\u202eb", "\r\n# a", "a\u2028b", "\ud800"),
)


def named(name):
    """Return rows of a system, a task, a metric and a filter with this name."""
    return corrected(
        rows_of(Measured(name, name, name, True, {name: mean_scores([1, 0, 1]), "c": mean_scores([1] * 3)}))
    )


@pytest.mark.parametrize("name", HOSTILE)
def test_names_are_text_in_every_format(name):
    rows = named(name)
    text, plain = (render(rows, 0.05, [f"of {name}"]) for render in (report.markdown, report.plain))
    usual, usual_plain = (render(named("x"), 0.05, ["of x"]) for render in (report.markdown, report.plain))
    assert not re.search(r"<[A-Za-z/!?]|\]\(", text)
    assert len(text.split("\n")) == len(usual.split("\n")) and len(plain.split("\n")) == len(usual_plain.split("\n"))
    for found in (text, plain):
        assert not re.search("[\x00-\x09\x0b-\x1f\u202e\u2028\ud800]", found)
    table = [line for line in text.split("| note |")[0].split("\n") if line.startswith("|")]
    assert {len(_cells(line)) for line in table} == {len(report.head(rows))}
    assert _unescaped(_cells(table[2])[0]) == printable(name).strip()
    page = html(rows, 0.05, [name], title=name)
    checker = Checker()
    checker.feed(page)
    assert checker.open == [] and not {"img", "a"} & {tag for tag, _ in checker.tags}
    assert [tag for tag, _ in checker.tags].count("script") == 1
    assert "onerror" not in {key for _, attrs in checker.tags for key in attrs} and "<!-- " not in page


def _cells(line):
    """Return the cells of a line of a table, as GitHub cuts it: at bars without a backslash of their own."""
    return [cell.strip() for cell in re.findall(r"((?:\\.|[^|\\])*)\|", line)[1:]]


def _unescaped(cell):
    """Return what GitHub shows of a cell that was made of plain text."""
    return unescape(re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", cell))


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 400, 1280])
def test_a_phone_shows_system_and_score_first(tmp_path, width, dark):
    """Without scrolling, the names of systems in lines, not in columns of letters; every text can be read."""
    layout = f"""(() => {{
        const name = page.document.querySelector("th[scope=row]"), score = name.nextElementSibling;
        const needed = page.document.documentElement.scrollWidth, box = score.getBoundingClientRect();
        return [needed, page.innerWidth, name.offsetWidth, box.right, box.bottom, {CONTRAST},
            page.getComputedStyle(page.document.body).backgroundColor];
    }})()"""
    facts = {f"fact {n}": "some words about it, and some more of them" for n in range(12)}
    rows = sample_rows()
    summary = [["system", *{row.column: 0 for row in rows}]]
    summary += [[name, *(["0.500 [0.400, 0.600]"] * (len(summary[0]) - 1))] for name in {row.system: 0 for row in rows}]
    link = lambda row: "documents.html#task=t&show=6"  # noqa: E731
    page = html(rows, 0.05, ["note"], "Title", facts, summary, ["a sentence"], link)
    assert page.count('<a href="documents.html#task=t&amp;show=6">') == 2 * len(rows)
    found, console = measured(page, width, layout, tmp_path, dark)
    needed, there, name, right, bottom, (contrast, text), ground = found
    assert needed <= there == width and name >= 80 and right <= width and bottom <= 740 and not console
    assert contrast >= 4.5, text
    assert (ground == "rgb(255, 255, 255)") == (not dark)
