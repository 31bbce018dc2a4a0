"""The table and report of an ablation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from jobs.reports.figures import differences_figure
from jobs.reports.page import Report
from jobs.studies.exactness import exact_lines
from jobs.studies.scores import difference_text, spread_text
from jobs.studies.study import Study
from jobs.studies.variants import REFERENCE


def conclusions(rows: Sequence[dict[str, Any]]) -> list[str]:
    """One line per variant: whether the reference's choice helps, harms, or makes no difference."""
    lines = []
    for row in rows[1:]:
        difference = row["difference"]
        if difference is None:
            lines.append(
                f"{row['variant']}: {spread_text(row)} on separate folds; the reference has"
                f" {spread_text(rows[0])}; not paired."
            )
        elif row["identical"]:
            lines.append(f"{row['variant']}: exactly the same predictions as the reference.")
        elif difference["low"] > 0:
            lines.append(
                f"{row['variant']}: better than the reference ({difference_text(difference)}): **the"
                f" reference's choice hurts.**"
            )
        elif difference["high"] < 0:
            lines.append(
                f"{row['variant']}: worse than the reference ({difference_text(difference)}): the reference's"
                f" choice helps."
            )
        else:
            lines.append(
                f"{row['variant']}: no clear difference from the reference ({difference_text(difference)}):"
                f" no evidence that the reference's choice helps."
            )
    return lines


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
    folds = study.folds
    report = Report(
        "Ablation", f"{len(folds)} folds ({folds.kind}), {num_seeds} seeds, {len(study.labels_n):,} cells"
    )
    report.text("\n".join(f"- {line}" for line in [*conclusions(rows), *exact_lines(exact)]))
    for note in study.notes():
        report.warning(note)
    caption = (
        "macro-F1: mean and standard deviation over folds. Minus reference: mean difference over the same"
        " folds (averaged over seeds), with a 95 % interval by Student's t; below zero, the reference is"
        " better. Variants with different cells, labels or folds have none. Seconds are of training only;"
        " memory is that of the whole process."
    )
    report.table("Variants", _table(rows), caption)
    drawn = {
        row["variant"]: (row["difference"]["mean"], row["difference"]["low"], row["difference"]["high"])
        for row in rows
        if row["difference"] is not None
    }
    report.figure(
        "",
        differences_figure(drawn),
        "Differences from the reference with 95 % intervals.",
        "Macro-F1 of each variant minus the reference.",
    )
    return report
