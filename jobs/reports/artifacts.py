"""The artifacts that jobs leave in a run for reports: their names, writers and readers.

Each table that a report shows is an artifact, so anyone with the run can make its report again.

Axes: k labels.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import yaml

from jobs.reports.figures import confusion_figure, learning_figure, reliability_figure
from jobs.tracking.runs import CONFIG, IDENTITY
from screformer.files import csv_text, read_csv

if TYPE_CHECKING:
    from jobs.reports.page import Report
    from jobs.tracking.logged import LoggedRun
    from jobs.tracking.runs import TrackedRun

ANNOTATED = "annotated"
"""Folder with tables of labelled files; a report shows them unchanged."""

_CONFUSION, _PER_CLASS, _TEST_CELLS, _BASELINES = (
    "confusion.csv",
    "per_class.csv",
    "test/cells.parquet",
    "test/baselines.csv",
)
_RELIABILITY = "calibration/reliability.csv"
_BEFORE_AFTER = "move/before_after.csv"
_EXPLANATIONS = "explanations"
EXPLAINED = "summary.json"
"""The last file written into a folder of explanations."""
_STUDY_PAGE, _STUDY_NUMBERS = "report.html", "report.json"


def log_confusion(run: TrackedRun, counts_kk: np.ndarray, names: Sequence[str], part: str) -> None:
    """Log the confusion matrix of a part (`val`, `test`): the counts as CSV, and a figure.

    Args:
        run: The run.
        counts_kk: Cells by true (row) and predicted (column) label, shape (k, k).
        names: The k labels.
        part: Which cells.
    """
    table = pd.DataFrame(counts_kk, columns=list(names))
    table.insert(0, "true_label", list(names))
    run.log_table(table, f"{part}/{_CONFUSION}")
    run.log_figure(lambda: confusion_figure(np.asarray(counts_kk), names), f"{part}/confusion.png")


def read_confusion(run: LoggedRun, part: str = "test") -> tuple[np.ndarray, list[str]] | None:
    """Counts (k, k) and names (k,) of a confusion matrix; None if the run has none."""
    table = _read(run, f"{part}/{_CONFUSION}")
    if table is None:
        return None
    return table.drop(columns="true_label").to_numpy(), table["true_label"].astype(str).tolist()


def log_per_class(run: TrackedRun, rows: Sequence[Mapping[str, Any]], part: str) -> None:
    """Log the scores of each label, rows as `LabelCounts.table` gives them."""
    run.log_table(pd.DataFrame(rows), f"{part}/{_PER_CLASS}")


def read_per_class(run: LoggedRun, part: str = "test") -> pd.DataFrame | None:
    """Scores of each label; None if the run has none."""
    return _read(run, f"{part}/{_PER_CLASS}")


def log_reliability(run: TrackedRun, table: pd.DataFrame) -> None:
    """Log confidence against accuracy, as a table and a figure.

    Args:
        run: The run.
        table: Rows of `screformer.calibration.reliability`, with `part` (validation, test) and `calibration`
            (before, after).
    """
    run.log_table(table, _RELIABILITY)
    run.log_figure(lambda: reliability_figure(table), "calibration/reliability.png")


def read_reliability(run: LoggedRun) -> pd.DataFrame | None:
    """The table passed to `log_reliability`; None if the run has none."""
    return _read(run, _RELIABILITY)


def log_test_cells(run: TrackedRun, cells: pd.DataFrame) -> None:
    """Log test cells with their predictions.

    Args:
        run: The run.
        cells: `joinid`, `dataset_id`, `donor_id`, `label`, `prediction`, `confidence`, `said` (the answer,
            which may be `unknown` or a broader term) and `embedding` of each.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder, _, name = _TEST_CELLS.rpartition("/")
        path = Path(scratch) / name
        cells.to_parquet(path, index=False)
        run.log_file(path, folder=folder)


def read_test_cells(run: LoggedRun) -> pd.DataFrame | None:
    """The table passed to `log_test_cells`; None if the run has none."""
    return _read(run, _TEST_CELLS)


def log_baselines(run: TrackedRun, scores: pd.DataFrame) -> None:
    """Log scores of other methods on the test cells: `model`, and a column per score."""
    run.log_table(scores, _BASELINES)


def read_baselines(run: LoggedRun) -> pd.DataFrame | None:
    """The table passed to `log_baselines`; None if the run has none."""
    return _read(run, _BASELINES)


def log_before_and_after(run: TrackedRun, scores: pd.DataFrame) -> None:
    """Log the scores of a model before and after it was trained on another query."""
    run.log_table(scores, _BEFORE_AFTER)


def read_before_and_after(run: LoggedRun) -> pd.DataFrame | None:
    """Read what `log_before_and_after` logged; None if the run has none."""
    return _read(run, _BEFORE_AFTER)


def log_curves(run: TrackedRun) -> None:
    """Log a figure of each metric with more than one step; training and validation share a figure.

    Does nothing while the tracking server is unreachable, since it has the points; `jobs.sync` does it later.
    """
    run.send_kept()  # points that other processes of the run could not send
    try:
        histories = run.histories()
    except ConnectionError:
        return
    groups: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for key, points in histories.items():
        if len(points) > 1:
            groups.setdefault(key.rpartition("/")[2], {})[key] = points
    for name, curves in groups.items():
        path = f"curves/{re.sub(r'[^A-Za-z0-9_.-]', '_', name)}.png"
        run.log_figure(partial(learning_figure, name, curves), path)


def write_explained(folder: Path, table: Literal["classes", "dots", "curves"], rows: pd.DataFrame) -> None:
    """Write a table of explanations into their folder.

    Args:
        folder: The folder.
        table: `classes` (genes and markers of each label), `dots` (expression of the top genes by label) or
            `curves` (probability over the share of genes removed or inserted).
        rows: The table.
    """
    (folder / f"{table}.csv").write_text(csv_text(rows))


def log_explanations(run: TrackedRun, folder: Path) -> None:
    """Log a folder of explanations: tables, values, figures and `summary.json`."""
    for path in sorted(folder.iterdir()):
        run.log_file(path, folder=_EXPLANATIONS)


def read_explanations(run: LoggedRun) -> tuple[dict[str, Any], dict[str, pd.DataFrame]] | None:
    """Summary and tables (by name) of a run's explanations; None if it has none."""
    if f"{_EXPLANATIONS}/{EXPLAINED}" not in run.artifacts:
        return None
    summary = json.loads(run.file(f"{_EXPLANATIONS}/{EXPLAINED}").read_text())
    found = {name: _read(run, f"{_EXPLANATIONS}/{name}.csv") for name in ("classes", "dots", "curves")}
    return summary, {name: table for name, table in found.items() if table is not None}


def write_study(report: Report, numbers: Mapping[str, Any], folder: Path) -> None:
    """Write the report of a study into its folder: a page, and the numbers as JSON."""
    report.write_html(folder / _STUDY_PAGE)
    (folder / _STUDY_NUMBERS).write_text(json.dumps(_finite(numbers), indent=2) + "\n")


def log_study(run: TrackedRun, folder: Path) -> None:
    """Log what `write_study` wrote."""
    for name in (_STUDY_PAGE, _STUDY_NUMBERS):
        run.log_file(folder / name)


def study_page(run: LoggedRun) -> Path | None:
    """The page of a run that is a study (a cross-validation, an ablation); None for other runs."""
    return run.file(_STUDY_PAGE) if _STUDY_NUMBERS in run.artifacts else None


def read_config(run: LoggedRun) -> dict[str, Any]:
    """The run's settings as plain values; empty if it has none."""
    return yaml.safe_load(run.file(CONFIG).read_text()) if CONFIG in run.artifacts else {}


def read_identity(run: LoggedRun) -> dict[str, Any]:
    """The run's data and code version; empty if unknown."""
    return json.loads(run.file(IDENTITY).read_text()) if IDENTITY in run.artifacts else {}


def _read(run: LoggedRun, path: str) -> pd.DataFrame | None:
    if path not in run.artifacts:
        return None
    file = run.file(path)
    return pd.read_parquet(file) if path.endswith(".parquet") else read_csv(file)


def _finite(tree: Any) -> Any:
    """Replace numbers that JSON cannot represent by null."""
    if isinstance(tree, Mapping):
        return {str(name): _finite(value) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree
