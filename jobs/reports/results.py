"""The report's first section: scores on the test cells, next to the baselines'."""

from __future__ import annotations

import numpy as np
import pandas as pd

from jobs.reports.artifacts import (
    read_baselines,
    read_before_and_after,
    read_confusion,
    read_per_class,
    read_test_cells,
)
from jobs.reports.figures import confusion_figure
from jobs.reports.page import Report
from jobs.reports.provenance import listed
from jobs.tracking.logged import LoggedRun
from screformer.metrics import OURS

SCORES = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro-F1",
    "weighted_f1": "weighted F1",
}
"""Name of the metric, and its title in reports."""

_MOST_ROWS = 40
"""Of donors or datasets."""


def add_results(report: Report, run: LoggedRun) -> None:
    """Add the section, if the run was tested."""
    per_class, confusion, baselines = read_per_class(run), read_confusion(run), read_baselines(run)
    if f"test/{next(iter(SCORES))}" not in run.metrics and per_class is None:
        return
    report.section("Results")
    rows = [{"model": OURS} | {name: run.metrics.get(f"test/{key}") for key, name in SCORES.items()}]
    if baselines is not None:
        rows += [
            {"model": row["model"]} | {name: row.get(key) for key, name in SCORES.items()}
            for _, row in baselines.iterrows()
        ]
        best = baselines.loc[baselines["macro_f1"].idxmax()]
        difference = run.metrics["test/macro_f1"] - best["macro_f1"]
        verdict = "above" if difference > 0 else "below" if difference < 0 else "the same as"
        report.text(
            f"Macro-F1 is **{abs(difference):.3f} {verdict}** the best baseline on the same cells"
            f" ({best['model']}, {best['macro_f1']:.3f}). One split says little about small differences;"
            f" use cross-validation."
        )
    caption = "Macro-F1 weights all types equally, even rare ones; accuracy weights all cells equally."
    moved = read_before_and_after(run)
    if moved is not None:
        report.table(
            "Before and after",
            moved.fillna({"type": "all"}).replace({"type": {"": "all"}}),
            "The start model and the trained one on the same test cells of donors (or other groups) that"
            " neither was trained on: of the new query, and of the query that the start model was trained on."
            " Accuracy is of best labels.",
        )
    report.table("Test scores", pd.DataFrame(rows).dropna(axis="columns", how="all"), caption)
    if per_class is not None:
        per_class = per_class.rename(columns={"label": "type", "f1": "F1"}).sort_values(
            "cells", ascending=False
        )
        weak = per_class[(per_class["cells"] > 0) & (per_class["F1"] < 0.5)]["type"].tolist()
        if weak:
            report.warning(f"F1 below 0.5: {listed(weak)}.")
        caption = "Test cells of each true type; a type without test cells has no recall."
        report.table("Each type", per_class, caption)
    cells = read_test_cells(run)
    if cells is not None:
        for column, noun in (("donor_id", "donor"), ("dataset_id", "dataset")):
            _add_groups(report, cells, column, noun)
    if confusion is not None:
        counts_kk, names = confusion
        report.figure(
            "Confusion matrix",
            confusion_figure(counts_kk, names),
            "Rows are true types (with numbers of cells), columns predictions. Each field has the share of"
            " the row and the number of cells.",
            _confusion_alt(counts_kk, names),
        )


def _add_groups(report: Report, cells: pd.DataFrame, column: str, noun: str) -> None:
    """Scores of each donor's or dataset's test cells, worst first; skipped if there is only one."""
    rows = []
    for name, own in cells.groupby(cells[column].astype(str), sort=True):
        wrong = own[own["label"] != own["prediction"]]
        mistakes = (wrong["label"].astype(str) + " as " + wrong["prediction"].astype(str)).value_counts()
        recalls = (own["label"] == own["prediction"]).groupby(own["label"]).mean()
        rows.append(
            {
                noun: name,
                "cells": len(own),
                "types": len(recalls),
                "accuracy": 1 - len(wrong) / len(own),
                "balanced accuracy": recalls.mean(),
                "unsure": (own["said"] != own["prediction"]).mean(),
                "most frequent mistake": f"{mistakes.index[0]} ({mistakes.iloc[0]})" if len(wrong) else "",
            }
        )
    if len(rows) < 2:
        return
    table = pd.DataFrame(rows).sort_values("accuracy", kind="stable")
    note = (
        f"For the {len(cells):,} test cells with saved predictions. Unsure is the share labelled unknown or"
        f" with a broader term."
    )
    if len(table) > _MOST_ROWS:
        note += f" The {_MOST_ROWS} worst of {len(table):,}."
    report.table(f"Each {noun}", table.head(_MOST_ROWS), note)


def _confusion_alt(counts_kk: np.ndarray, names: list[str]) -> str:
    wrong_kk = counts_kk * (1 - np.eye(len(counts_kk), dtype=counts_kk.dtype))
    pairs = [
        np.unravel_index(flat, wrong_kk.shape) for flat in np.argsort(-wrong_kk, axis=None, kind="stable")[:3]
    ]
    said = "; ".join(
        f"{names[row]} labelled {names[column]} {wrong_kk[row, column]} times"
        for row, column in pairs
        if wrong_kk[row, column]
    )
    right = f"{np.trace(counts_kk):,} of {counts_kk.sum():,} cells are correct"
    return f"Confusion matrix of {len(names)} types; {right}. {said or 'No mistakes'}."
