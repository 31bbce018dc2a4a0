"""The table and report of an ablation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from jobs.reports.page import Report
from jobs.studies.exactness import exact_lines
from jobs.studies.scores import difference_text, spread_text
from jobs.studies.study import Study
from jobs.studies.variants import REFERENCE


def conclusions(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What the table says of each axis, plainly: what helps, what harms, what the folds do not tell."""
    said = []
    for row in rows[1:]:
        difference = row["difference"]
        if difference is None:
            said.append(
                f"{row['variant']}: {spread_text(row)} on folds of its own, the reference has"
                f" {spread_text(rows[0])}; not paired."
            )
        elif row["identical"]:
            said.append(f"{row['variant']}: gives the very same predictions as the reference.")
        elif difference["low"] > 0:
            said.append(
                f"{row['variant']}: better than the reference ({difference_text(difference)}): **what the"
                f" latter does here harms.**"
            )
        elif difference["high"] < 0:
            said.append(
                f"{row['variant']}: the reference is better ({difference_text(difference)}): what it does"
                f" here helps."
            )
        else:
            said.append(
                f"{row['variant']}: not told apart from the reference ({difference_text(difference)}): no"
                f" sign here that it helps."
            )
    return said


def _table(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "axis": row["axis"],
                "variant": row["variant"],
                "macro-F1": spread_text(row),
                "minus reference": ""
                if row["variant"] == REFERENCE
                else difference_text(row["difference"]) or "other folds",
                "s per 1,000 cells": row["seconds_per_1000_cells"],
                "peak GB": row["peak_memory_gb"],
                "parameters": row["parameters"],
            }
            for row in rows
        ]
    )


def text_table(rows: Sequence[dict[str, Any]]) -> str:
    """The table of variants as text."""
    return _table(rows).to_string(index=False, float_format=lambda value: f"{value:.2f}")


def ablation_report(
    study: Study, rows: Sequence[dict[str, Any]], exact: Mapping[str, Any], num_seeds: int
) -> Report:
    """The report of an ablation."""
    from matplotlib.figure import Figure

    folds = study.folds
    report = Report(
        "Ablation", f"{len(folds)} folds ({folds.kind}), {num_seeds} seeds, {len(study.labels_n):,} cells"
    )
    report.text("\n".join(f"- {line}" for line in [*conclusions(rows), *exact_lines(exact)]))
    for note in study.notes():
        report.warning(note)
    caption = (
        "macro-F1: mean and standard deviation over folds. Minus reference: mean of the differences over the"
        " same folds, each the mean over"
        " its seeds, with its 95 % interval by Student's t; below zero, the reference is better. A variant"
        " with other cells, labels or"
        " folds has none. Seconds are those of training; memory is that of the whole process."
    )
    report.table("Variants", _table(rows), caption)
    drawn = [row for row in rows if row["difference"] is not None]
    figure = Figure(figsize=(7.5, 1 + 0.3 * len(drawn)), layout="constrained")
    axes = figure.add_subplot()
    for place, row in enumerate(reversed(drawn)):
        difference = row["difference"]
        finite = np.isfinite(difference["low"]) and row["variant"] != REFERENCE
        error = (
            [[difference["mean"] - difference["low"]], [difference["high"] - difference["mean"]]]
            if finite
            else None
        )
        axes.errorbar(difference["mean"], place, xerr=error, fmt="o", color="#4878a8", capsize=3)
    axes.axvline(0, color="gray", linewidth=1)
    axes.set_yticks(range(len(drawn)), [row["variant"] for row in reversed(drawn)])
    axes.set_xlabel("macro-F1 minus reference")
    axes.grid(axis="x", alpha=0.3)
    report.figure(
        "",
        figure,
        "Differences to the reference with their 95 % intervals.",
        "Macro-F1 of each variant minus the reference.",
    )
    return report
