"""The table of a leaderboard: every row against the best single member, paired by document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any
from urllib.parse import urlencode

from lm_eval_deepen.build.architecture import DIFFERENCES
from lm_eval_deepen.errors import ConfigError, NotPairedError, ResultError, StorageError
from lm_eval_deepen.harness.tasks import LoadedTask
from lm_eval_deepen.leaderboard.cells import Cell
from lm_eval_deepen.leaderboard.execution import Key, Plan
from lm_eval_deepen.leaderboard.provenance import provenance
from lm_eval_deepen.leaderboard.published import DISTANCE, PUBLISHED, distance, figure, told_apart
from lm_eval_deepen.leaderboard.recipe import LeaderboardRecipe
from lm_eval_deepen.leaderboard.seeds import SEEDS, SPREAD, averaged, spread
from lm_eval_deepen.results import report
from lm_eval_deepen.results.aggregation import to_number
from lm_eval_deepen.results.files import Run, TaskRun
from lm_eval_deepen.results.page import html
from lm_eval_deepen.results.pairing import groups, measured_group, wanted_columns
from lm_eval_deepen.results.pairing import measure as paired
from lm_eval_deepen.results.rows import Measured, ScoreRow, compare, corrected, rows_of
from lm_eval_deepen.results.statistics.paired import RESAMPLES
from lm_eval_deepen.results.statistics.power import paired_needs
from lm_eval_deepen.results.tables import aligned, literal, markdown_table, printable
from lm_eval_deepen.results.trace_page import shown_runs
from lm_eval_deepen.storage import json_text, read_text, write_text

DOCUMENTS = "documents.html"
FEWEST, MOST = 20, 50_000  # documents of a task that are shown at least; of all rows and tasks together at most
GAINED = 6  # the filter "right here, wrong there" of the page
BEGIN, END = "<!-- leaderboard: begin -->", "<!-- leaderboard: end -->"
SECONDS, FUSING, TOKENS = "s/doc", "fusing s/doc", "tokens/doc"
PARAMETERS, SPEED, TRAINED = "parameters (M)", "tokens/s", "training tokens (k)"
READING_BUILDS = (
    f"{PARAMETERS}: millions, of all models that a row runs. {SPEED}: tokens per model and second. {TRAINED}: "
    "thousands of tokens of the trainings by recipes here from which the row's models descend, each training once.",
    f"{SEEDS}: a row over several seeds shows the mean of every document. {SPREAD}: the standard deviation of the "
    "seeds' scores (n - 1), which the intervals do not contain.",
)
READING_PUBLISHED = (
    f"{PUBLISHED}: the published score. {DISTANCE}: the measured score less the published one, in standard errors of "
    "the measured one, which are over documents (where it is 0, of the published score on as many documents); within 2 "
    "they agree. A published score is of all documents."
)
READING = (
    "A member alone is an ensemble of one, which gives what `--model hf` gives.",
    "The reference of a column is the best single member on these documents. A row without a mark is not significantly "
    "better.",
    f"{SECONDS}: seconds per document (of a group: of all its tasks) as if the row had run alone. In scoring tasks, "
    "rows of the same members in the same order share forward passes (rows weighted by prompts, and rows of "
    f"`mixture`, among themselves); a row pays for everything but the other rows' fusing. {FUSING}: its own fusing of "
    f"rows; `mixture` fuses none where it scores texts (-). {TOKENS}: tokens that all members forwarded.",
    "A row that pools answers pays for the rows whose answers it takes.",
)
SEEN, NEEDED = "detectable difference", "documents needed"
READING_POWER = (
    f"{SEEN}: the smallest true difference to the reference that these documents would show with a chance of "
    f"{{power:g}}. {NEEDED}: how many documents would show a true difference as large as the measured one. Both are at "
    "the level {alpha:g} of one comparison; a correction over the table needs more."
)
_MARKS = {"better": " ▲", "worse": " ▼", "not significant": "", None: " (ref)"}
_KEY = "▲, ▼: significantly better, worse than the best single member (ref) after correction at {alpha:g}."


@dataclass(frozen=True)
class Reported:
    """A score of a metric that cannot be compared by document (BLEU), as the harness gives it; over seeds the mean."""

    system: str  # the row
    column: str  # task and metric
    score: float  # the score
    # the harness's own standard error, of which the mean of several seeds has no larger one; None where it gives none
    stderr: float | None
    published: float | None  # the published score, in the same unit; None where there is none
    seeds: int = 1  # how many
    spread: float | None = None  # the standard deviation (n - 1) of the seeds' scores; None of one


@dataclass(frozen=True)
class Table:
    """A measured leaderboard."""

    recipe: LeaderboardRecipe  # what was asked for
    rows: Sequence[ScoreRow]  # a line per system and column, corrected over all of them
    meaningless: Mapping[tuple[str, str], str]  # reasons, by system and column
    notes: Sequence[str]  # what else is to be said
    reported: Sequence[Reported] = ()  # published metrics that cannot be compared by document
    provenance: Mapping[str, str] = field(default_factory=dict)  # where the numbers come from, by name
    # the rows whose documents stand in `DOCUMENTS`, in its order, and their tasks
    shown: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def tags(self) -> dict[str, str]:
        """What stands in a cell for each reason: what differs between models, else the number of its note."""
        tags = {}
        for number, reason in enumerate(dict.fromkeys(self.meaningless.values()), 1):
            label = reason.partition(": ")[0]
            tags[reason] = label if label in DIFFERENCES else str(number)
        return tags


def measure(plan: Plan, cells: Mapping[Key, Cell]) -> Table:
    """Return the table of finished cells; ResultError for files that cannot be read, or a metric of no task."""
    recipe = plan.recipe
    repeated = {row.name for row in recipe.rows if row.name != row.group}
    failed = {key: f"{key[0]}: " * (key[0] in repeated) + " ".join(why.split()) for key, why in plan.failed.items()}
    empty = {**plan.meaningless, **failed}
    rows: list[ScoreRow] = []
    meaningless: dict[tuple[str, str], str] = {}
    notes, reported = list(recipe.notes), list[Reported]()
    evaluations: list[Mapping[str, Any]] = []
    for task in plan.tasks:
        # the mean of some of the seeds is no score of the row
        whole = {
            name for names in _groups(recipe, task.name).values() for name in names
            if all((one, task.name) in cells for one in names)
        }  # fmt: skip
        runs = [
            Run(row.name, cells[row.name, task.name].mark.parent, cells[row.name, task.name].runs())
            for row in recipe.rows
            if row.name in whole
        ]
        if not runs:  # encoder-decoder members alone and a task that scores given texts, or no cell was finished
            reasons = {reason for row in recipe.rows if (reason := empty.get((row.name, task.name))) is not None}
            notes.append(f"{task.name}: no row has an answer: {'; '.join(sorted(reasons))}")
            continue
        evaluations += [next(iter(run.tasks.values())).results for run in runs]
        own = _columns(plan, task, runs, cells, notes, meaningless, reported)
        members = [row.name for row in recipe.alone if (row.name, task.name) in cells]
        notes += groups(runs, members or [run.label for run in runs])
        rows += own
        for row in recipe.rows:
            if (cell := cells.get((row.name, task.name))) is not None:
                notes += [f"{row.group}: {warning}" for warning in cell.facts.get("warnings", ())]
            if (reason := empty.get((row.name, task.name))) and row.has(task.name):
                meaningless |= {(row.group, line.column): reason for line in own}
    if not rows and not reported:
        raise ResultError("nothing to show:\n  " + "\n  ".join(notes))
    for one in reported:
        known = "" if one.spread is None else f" ({one.seeds} seeds, {SPREAD} {report.number(one.spread)})"
        known += "" if one.published is None else f", published {report.number(one.published)}"
        notes.append(f"{one.column}, as reported, without a test: {one.system} {report.number(one.score)}{known}")
    where_from = provenance(recipe, evaluations)
    shown = {name: list(tasks) for name, tasks in _runs(plan, cells).items()}
    return Table(recipe, corrected(rows), meaningless, list(dict.fromkeys(notes)), reported, where_from, shown)


def _runs(plan: Plan, cells: Mapping[Key, Cell]) -> dict[str, dict[str, TaskRun]]:
    """Return what was evaluated, by row and task of the harness."""
    runs: dict[str, dict[str, TaskRun]] = {}
    for row in plan.recipe.rows:
        for task in plan.tasks:
            if (cell := cells.get((row.name, task.name))) is not None:
                runs.setdefault(row.name, {}).update(cell.runs())
    return runs


def documents(plan: Plan, cells: Mapping[Key, Cell]) -> str:
    """Return the page of all rows' documents, which the cells of the leaderboard's own page lead to."""
    runs = _runs(plan, cells)
    limit = max(FEWEST, MOST // max(1, sum(map(len, runs.values()))))
    return shown_runs(runs, limit).html(f"{plan.recipe.title}: documents")


def _link(table: Table, row: ScoreRow) -> str | None:
    """Return where a cell's documents are: those that are right there and wrong in the reference."""
    systems = list(table.shown)
    places = {one.group: systems.index(one.name) for one in reversed(table.recipe.rows) if one.name in table.shown}
    if row.system not in places or row.task not in table.shown[systems[places[row.system]]]:
        return None
    reference = places.get(row.comparison.reference, -1) if row.comparison else -1
    score = row.metric if row.flt == "none" else f"{row.metric},{row.flt}"
    asked = {"system": places[row.system], "beside": reference, "task": row.task, "score": score, "show": GAINED}
    return f"{DOCUMENTS}#{urlencode(asked)}"


def _columns(
    plan: Plan,
    task: LoadedTask,
    runs: Sequence[Run],
    cells: Mapping[Key, Cell],
    notes: list[str],
    meaningless: dict[tuple[str, str], str],
    reported: list[Reported],
) -> list[ScoreRow]:
    """Return the rows of a task's columns; those without a score in one go to `meaningless`, by column.

    A published metric that cannot be compared by document goes to `reported`.
    """
    recipe = plan.recipe
    alone = [row.name for row in recipe.alone if (row.name, task.name) in cells]
    grouped = _groups(recipe, task.name)
    rows: list[ScoreRow] = []
    wanted = wanted_columns(runs, list(task.leaves), task.spec.metric)
    shown = dict.fromkeys((metric, flt) for _, metric, flt in wanted)
    expected, unclear = told_apart(recipe.expected, task.name, shown)
    recipe = replace(recipe, expected=expected)
    notes += unclear
    # A group is one column where that is asked for, or where a published score is of the whole group.
    published = any(task.name in one.scores for one in plan.recipe.expected)
    whole = task.name not in task.leaves and (task.spec.whole or published)
    if whole:
        wanted = list(dict.fromkeys((task.name, metric, flt) for _, metric, flt in wanted))
    for column in wanted:
        name, metric, flt = column
        kept, empty = list(runs), dict[str, str]()
        try:
            for leaf in task.leaves if whole else [name]:
                if not whole or all((metric, flt) in run.task(leaf).columns for run in kept):
                    kept, without = _with_scores(kept, leaf, metric, flt, grouped)
                    empty |= without
            measured = measured_group(kept, name, f"{metric},{flt}")[0] if whole else paired(kept, *column, notes)
            if measured is None:
                raise NotPairedError(
                    f"{name} {metric}: the score of the whole group is no mean over documents of its tasks"
                )
        except NotPairedError as error:
            as_reported = _as_reported(recipe, runs, *column, task)
            if task.spec.metric and not as_reported:
                raise
            reported += as_reported
            notes.append(f"not compared: {error}")
            continue
        extra = {run.label: _costs(cells[run.label, task.name], bool(recipe.builds.recipes)) for run in kept}
        for row in (row for row in recipe.rows if row.alone and row.name in extra):  # nothing is fused
            extra[row.name][FUSING] = None
        for label, built in recipe.builds.recipes.items():
            if label in extra and not built.is_merge:
                extra[label][SEEDS] = 1.0
        measured = with_published(averaged(replace(measured, extra=extra), grouped), recipe, task.name)
        notes += against_controls(measured, recipe)
        here = [member for member in alone if member in measured.scores]
        if alone and not here:
            notes.append(f"not compared: {name} {metric}: no single member has a score, the reference")
            continue
        if not alone:
            notes.append(
                f"{measured.task} {measured.metric}: no single member is evaluated there; the reference is the best row"
            )
        compared = rows_of(measured, here, here, resamples=recipe.resamples or RESAMPLES)
        if recipe.power is not None:
            compared = [_with_needs(row, measured, recipe.alpha, recipe.power) for row in compared]
        meaningless |= {(group, compared[0].column): reason for group, reason in empty.items()}
        rows += compared
    return rows


def _with_needs(row: ScoreRow, measured: Measured, alpha: float, power: float) -> ScoreRow:
    """Return a row with what its comparison can see, and what it would need."""
    if row.comparison is None:
        return replace(row, extra={**row.extra, SEEN: None, NEEDED: None})
    differences = measured.scores[row.system].shares - measured.scores[row.comparison.reference].shares
    seen, needed = paired_needs(differences, alpha, power)
    return replace(row, extra={**row.extra, SEEN: seen, NEEDED: needed})


def _as_reported(
    recipe: LeaderboardRecipe, runs: Sequence[Run], name: str, metric: str, flt: str, task: LoadedTask
) -> list[Reported]:
    """Return what the harness gives for a metric of which some score was published; nothing where none was."""
    found: dict[str, Mapping[str, Any]] = {}  # the figures by run
    for run in runs:
        results = next(iter(run.tasks.values())).results
        found[run.label] = (results["results"].get(name) or {}) | ((results.get("groups") or {}).get(name) or {})

    def means(key: str, rows: Sequence[str]) -> tuple[float | None, float | None]:
        values = [value for row in rows if (value := to_number(found.get(row, {}).get(key))) is not None]
        return (fmean(values), spread(values)) if len(values) == len(rows) else (None, None)

    reported = []
    for group, rows in _groups(recipe, task.name).items():
        score, apart = means(f"{metric},{flt}", rows)
        if score is None:  # the mean of some of the seeds is no score of the row
            continue
        stderr, _ = means(f"{metric}_stderr,{flt}", rows)
        known = figure(recipe.expected, group, task.name, metric, flt)
        reported.append(Reported(group, f"{name} {metric}", score, stderr, known, len(rows), apart))
    return reported if any(one.published is not None for one in reported) else []


def with_published(measured: Measured, recipe: LeaderboardRecipe, task: str) -> Measured:
    """Return the metric with the published scores beside those measured, and how far the latter are from them."""
    extra = dict(measured.extra)
    for name, scores in measured.scores.items():
        if (known := figure(recipe.expected, name, task, measured.metric, measured.flt)) is not None:
            away = distance(scores.score, scores.stderr, scores.documents if scores.binary else 0, known)
            extra[name] = {**extra.get(name, {}), PUBLISHED: known, DISTANCE: away}
    return replace(measured, extra=extra)


def _with_scores(
    runs: Sequence[Run], task: str, metric: str, flt: str, groups: Mapping[str, Sequence[str]]
) -> tuple[list[Run], dict[str, str]]:
    """Return the runs whose every document has a finite value, and why the rows of the others have no score."""
    reasons: dict[str, str] = {}
    for run in runs:
        one = run.task(task)
        table = one.samples.under(flt)
        try:
            one.scores(metric, flt, [key for key, sample in table.items() if metric in sample.values])
        except NotPairedError:
            raise
        except ResultError as error:
            reasons[run.label] = str(error)
    empty = {group: reasons[name] for group, names in groups.items() for name in names if name in reasons}
    kept = [run for run in runs if not any(run.label in groups[group] for group in empty)]
    if not kept:
        raise NotPairedError(f"{task}: no row has a score: {next(iter(empty.values()))}")
    return kept, empty


def against_controls(measured: Measured, recipe: LeaderboardRecipe) -> list[str]:
    """Return how distilled models differ from their controls: the same training on the text alone."""
    told = []
    for name, control in recipe.builds.controls.items():
        if name not in measured.scores or control not in measured.scores:
            continue
        first, second = measured.scores[control], measured.scores[name]
        line = compare(control, first, second, recipe.resamples or RESAMPLES)
        change = report.with_interval(line.difference, line.low, line.high)
        column = f"{measured.task} {measured.metric}"
        told.append(
            f"{column}: {name} against its control, {control}: {change}, p {report.probability(line.p)} "
            "(paired by document, not corrected)"
        )
    return told


def _groups(recipe: LeaderboardRecipe, task: str | None = None) -> dict[str, list[str]]:
    """Return the rows of every line of the table, or of one task's: several where a row is repeated over seeds."""
    groups: dict[str, list[str]] = {}
    for row in recipe.rows:
        if task is None or row.has(task):
            groups.setdefault(row.group, []).append(row.name)
    return groups


def _costs(cell: Cell, with_models: bool) -> dict[str, float | None]:
    count = max(1, cell.documents)
    cost, facts = cell.cost, cell.facts
    costs = {SECONDS: cost.seconds / count, FUSING: cost.fusing / count or None, TOKENS: cost.tokens / count}
    if with_models and facts:
        costs[PARAMETERS] = facts["parameters"] / 1e6
        costs[SPEED] = cost.tokens / facts["models"] / cost.seconds if cost.seconds else None
        costs[TRAINED] = facts["training_tokens"] / 1e3
    return costs


def listing(plan: Plan) -> str:
    """Return the rows and what is to do, for a look before a long run."""
    lines = [["row", *(task.name for task in plan.tasks), "fingerprint"]]
    for row in plan.recipe.rows:
        states = []
        for task in plan.tasks:
            key = (row.name, task.name)
            state = "n/a" if key in plan.meaningless else "finished" if key in plan.finished else "to do"
            states.append(state if row.has(task.name) else "-")
        lines.append([row.name, *states, row.config.fingerprint()[:12]])
    told = [f"{len(plan.missing)} cells to do, {len(plan.finished)} finished", *plan.recipe.notes]
    builds = plan.recipe.builds
    to_do = {row for row, _ in plan.missing}
    wanted = builds.needed(name for row in plan.recipe.rows for name in row.members if row.name in to_do)
    if absent := [name for name in wanted if not builds.folder(name, plan.built).is_dir()]:
        told.insert(1, f"to build in {plan.built}: {', '.join(absent)}")
    reasons = dict.fromkeys(f"n/a: {reason}" for reason in plan.meaningless.values())
    return "\n".join([aligned(lines), "", *told, *reasons])


def summary(table: Table) -> list[list[str]]:
    """Return one line per row of the recipe, one column per task and metric, as text."""
    columns = report.columns(table.rows)
    by_cell = {(line.system, name): line for name, lines in columns.items() for line in lines}
    text = [["system", *columns]]
    for name in _groups(table.recipe):
        line = [name]
        for column in columns:
            if (name, column) in by_cell:
                row = by_cell[name, column]
                interval = "" if row.low is None or row.high is None else f" [{row.low:.3f}, {row.high:.3f}]"
                line.append(f"{row.score:.3f}{interval}{_MARKS[row.verdict(table.recipe.alpha)]}")
            elif (name, column) in table.meaningless:
                line.append(f"n/a ({table.tags[table.meaningless[name, column]]})")
            else:  # no column of this row's
                line.append("-")
        text.append(line)
    return text


def remarks(table: Table) -> list[str]:
    """Return the notes: why some cells are empty, what the table does not show."""
    told = [f"n/a ({tag}): {reason}" if tag.isdigit() else reason for reason, tag in table.tags.items()]
    reading = [*READING, *(READING_BUILDS if table.recipe.builds.recipes else ())]
    if table.recipe.power is not None:
        reading.append(READING_POWER.format(power=table.recipe.power, alpha=table.recipe.alpha))
    if table.recipe.expected:
        reading.append(READING_PUBLISHED)
        for one in table.recipe.expected:
            reading.append(f"{one.table}: read in {one.read_in}" + (f". {one.note}" if one.note else ""))
    return [*told, *reading, *table.notes]


def conclusion(table: Table) -> str:
    """Return in a sentence which ensembles are better than their best member."""
    alpha = table.recipe.alpha
    members = {row.name for row in table.recipe.alone}
    compared = [
        row for row in table.rows
        if row.comparison and row.system not in members and row.comparison.reference in members
    ]  # fmt: skip
    better = [row for row in compared if row.verdict(alpha) == "better"]
    what = "ensembles and built models" if table.recipe.builds.recipes else "ensembles"
    told = f"Of {len(compared)} comparisons of {what} with the best single member, {len(better)} are significantly"
    columns = [f"on {name}: {'; '.join(row.system for row in rows)}" for name, rows in report.columns(better).items()]
    listed = ", " + ", and ".join(columns) if better else ""
    worse = sum(row.verdict(alpha) == "worse" for row in compared)
    return f"{told} better{listed}. {worse} are significantly worse."


def to_dict(table: Table) -> dict[str, Any]:
    """Return the leaderboard as plain data."""
    data = report.to_dict(table.rows, table.recipe.alpha, table.notes)
    empty = [{"system": s, "column": c, "reason": r} for (s, c), r in table.meaningless.items()]
    return {"title": table.recipe.title, "provenance": dict(table.provenance), **data, "not_applicable": empty}


def rendered(table: Table, fmt: str) -> str:
    """Return the leaderboard as ``text``, ``md``, ``json`` or ``html``."""
    alpha = table.recipe.alpha
    told = [_KEY.format(alpha=alpha), conclusion(table)]
    if fmt == "json":
        return json_text(to_dict(table))
    if fmt == "html":
        link = partial(_link, table)
        where_from = table.provenance
        return html(table.rows, alpha, remarks(table), table.recipe.title, where_from, summary(table), told, link)
    if fmt == "md":
        title, lines = literal(table.recipe.title), "\n".join(map(literal, told))
        parts = [f"### {title}", markdown_table(summary(table)), lines]
        facts = markdown_table([["where from", ""], *([name, text] for name, text in table.provenance.items())], 2)
        return "\n\n".join([*parts, report.markdown(table.rows, alpha, remarks(table)), facts])
    parts = [printable(table.recipe.title), aligned(summary(table)), "\n".join(told)]
    return "\n\n".join([*parts, report.plain(table.rows, alpha, remarks(table))])


def check_markers(path: Path) -> str:
    """Return the text of a Markdown file; raises ConfigError where it lacks the markers."""
    try:
        text = read_text(path)
    except StorageError as error:
        raise ConfigError(f"--into {path}: {error}") from error
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ConfigError(f"--into {path}: the table goes between {BEGIN} and {END}, once each, in an existing file")
    return text


def write_into(path: Path, table: str) -> None:
    """Replace what lies between the markers of a Markdown file."""
    text = check_markers(path)
    head, tail = text.split(BEGIN)[0], text.split(END)[1]
    inserted = f"{BEGIN}\n\n{table}\n\n{END}"
    write_text(path, head + (inserted.replace("\n", "\r\n") if "\r\n" in text else inserted) + tail)
