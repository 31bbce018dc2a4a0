"""A learning curve: methods trained on few cells of each type, over the folds of a study."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from jobs.reports.artifacts import log_study, write_study
from jobs.reports.figures import curve_figure
from jobs.reports.page import Report
from jobs.studies.baseline_folds import run_baselines
from jobs.studies.baselines import baseline_title
from jobs.studies.results import FoldResult, results_of
from jobs.studies.scores import scores
from jobs.studies.study import Study
from jobs.studies.trials import run_trials
from screformer.config import ExperimentConfig
from screformer.metrics import OURS

_SCORES = ("macro_f1_true", "macro_f1", "accuracy")


def curve_settings(config: ExperimentConfig) -> list[dict[str, Any]]:
    """The settings of each of our trainings on a fold; none where no curve is wanted.

    For each number of cells, with the start model if there is one, and without.
    """
    start = {"crossval.start": config.crossval.start}
    scratch = {"crossval.start": "", "crossval.pretrain": "none"}
    kinds = [start, scratch] if config.crossval.start else [start]
    return [
        {**kind, "crossval.cells_per_type": [size], "labels.min_cells": 1}
        for size in config.crossval.cells_per_type
        for kind in kinds
    ]


def run_curve(study: Study, baselines: Sequence[str], notes: Sequence[str]) -> dict[str, Any]:
    """Train our model and the baselines on few cells of each type, and report their scores.

    All methods get the same training cells in a fold, and no validation cells, and are tested on all cells of
    the fold. Our model may also answer with types of its start model, which are then errors.

    Args:
        study: The running study.
        baselines: Names of the baselines.
        notes: Caveats for the reader.

    Returns:
        `run_id`, `run_dir`, `report` (its path) and `curve`: one row per method and number of cells, with the
        mean over folds of each score.
    """
    from ray import tune

    assert study.run is not None
    run_trials(study, {"settings": tune.grid_search(curve_settings(study.config))})
    rows = []
    for settings in curve_settings(study.config):
        start, size = settings["crossval.start"], settings["crossval.cells_per_type"][0]
        without = ", without pre-training" if study.config.crossval.start else ""
        name = f"{OURS}, from {start}" if start else f"{OURS}{without}"
        rows.append(_row(study, name, size, results_of(study.trial_folder(settings), len(study.folds))))
    for size in study.config.crossval.cells_per_type:
        few = {"crossval.cells_per_type": [size], "labels.min_cells": 1}
        small = dataclasses.replace(study, config=study.config.merge(few))
        run_baselines(small, baselines)
        for name in baselines:
            results = results_of(small.baseline_folder(name), len(study.folds))
            rows.append(_row(study, baseline_title(name), size, results))
    table = pd.DataFrame(rows)
    _report(study, table, notes)
    print(_wide(table, "macro_f1_true").to_string(float_format="{:.3f}".format), flush=True)
    metrics = {
        f"curve/{row['method']}/{row['cells per type']}/macro_f1_true": row["macro_f1_true"] for row in rows
    }
    study.run.log_metrics({_plain(name): value for name, value in metrics.items()}, step=0)
    return {
        "run_id": study.run.run_id,
        "run_dir": str(study.run_dir),
        "report": str(study.run_dir / "report.html"),
        "curve": rows,
    }


def _row(study: Study, method: str, size: int, results: Sequence[FoldResult]) -> dict[str, Any]:
    found = [scores(result, study) for result in results]
    values = {name: [fold[name] for fold in found] for name in _SCORES}
    sd = float(np.std(values["macro_f1_true"], ddof=1)) if len(found) > 1 else None
    means = {name: float(np.mean(value)) for name, value in values.items()}
    return {"method": method, "cells per type": size, "folds": len(found), **means, "sd": sd}


def _wide(table: pd.DataFrame, score: str) -> pd.DataFrame:
    return table.pivot(index="method", columns="cells per type", values=score).loc[table["method"].unique()]


def _report(study: Study, table: pd.DataFrame, notes: Sequence[str]) -> None:
    types = len(set(study.labels_n[study.labels_n >= 0].tolist()))
    report = Report(
        "Learning curve",
        f"{len(study.folds)} folds by {study.folds.group_by}; {len(study.labels_n):,} cells, {types} types",
    )
    for note in notes:
        report.warning(note)
    report.section("Scores")
    for score, title, text in (
        ("macro_f1_true", "Macro-F1 of true types", "Mean over folds."),
        ("macro_f1", "Macro-F1", "As above, but each type that is predicted counts, present or not."),
        ("accuracy", "Accuracy", "Mean over folds."),
    ):
        report.table(title, _wide(table, score).reset_index(), text)
    report.figure(
        "",
        curve_figure(table, "cells per type", "macro_f1_true", "sd"),
        "Macro-F1 of true types against the training cells of each type; bars are standard deviations over"
        " folds. A type with fewer cells in a fold's training donors has all of them.",
        "Macro-F1 of each method by number of training cells.",
    )
    whole = {"curve": table.to_dict("records"), "notes": list(notes), "config": study.config.to_dict()}
    write_study(report, whole, study.run_dir)
    assert study.run is not None
    log_study(study.run, study.run_dir)


def _plain(name: str) -> str:
    """A name that MLflow accepts."""
    return "".join(letter if letter.isalnum() or letter in "_-. /" else "_" for letter in name)
