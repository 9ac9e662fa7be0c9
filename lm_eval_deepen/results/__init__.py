"""Result folders of the harness, read and paired document by document: files alone, of any model type."""

from lm_eval_deepen.results.aggregation import Scores, mean_scores, scores_of
from lm_eval_deepen.results.files import Run, TaskRun, find_runs
from lm_eval_deepen.results.rows import Comparison, Measured, ScoreRow, corrected, rows_of
from lm_eval_deepen.results.samples import Key, Sample, Samples, common_keys, read_samples, samples_of

__all__ = [
    "Comparison",
    "Key",
    "Measured",
    "ScoreRow",
    "Run",
    "Sample",
    "Samples",
    "Scores",
    "TaskRun",
    "common_keys",
    "corrected",
    "find_runs",
    "mean_scores",
    "read_samples",
    "rows_of",
    "samples_of",
    "scores_of",
]
