"""The report of a cross-validation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from jobs.reports.artifacts import log_study, write_study
from jobs.reports.figures import LEAST_CELLS, confusion_figure, reliability_figure, scores_figure
from jobs.reports.page import Report
from jobs.studies.results import FoldResult
from jobs.studies.scores import COMPARED, METRICS, counts, difference_text, spread_text, summary
from jobs.studies.study import Study
from screformer.metrics import OURS, LabelCounts, reliability


def verdict(tree: Mapping[str, Any]) -> str:
    """A few sentences that compare our model with the best baseline in macro-F1.

    Also compares them with absent types dropped.
    """
    text = [_verdict(tree, metric) for metric in ("macro_f1", "macro_f1_present")]
    return "\n\n".join(dict.fromkeys(text))


def _verdict(tree: Mapping[str, Any], metric: str) -> str:
    others = {
        name: entry
        for name, entry in tree.items()
        if name != OURS and "difference" in entry["metrics"].get(metric, {})
    }
    if not others:
        return "No baseline to compare with."
    best = max(others, key=lambda name: others[name]["metrics"][metric]["mean"])
    difference, title = others[best]["metrics"][metric]["difference"], others[best]["title"]
    ours, theirs = tree[OURS]["metrics"][metric]["mean"], others[best]["metrics"][metric]["mean"]
    text = f"{OURS} has {METRICS[metric]} {ours:.3f}; the best baseline, {title}, has {theirs:.3f}."
    text += f" The paired difference is {difference_text(difference)}: "
    if difference["low"] > 0:
        return text + f"{OURS} is better."
    if difference["high"] < 0:
        return text + f"**{OURS} is worse than {title}.**"
    return (
        text
        + "the folds cannot tell them apart"
        + (", and **the mean is below the baseline's**." if difference["mean"] < 0 else ".")
    )


def write_crossval_report(
    study: Study,
    methods: Mapping[str, Sequence[FoldResult]],
    trials: Sequence[Mapping[str, Any]],
    notes: Sequence[str],
) -> dict[str, Any]:
    """Write `report.html` and `report.json` into the study's folder.

    Args:
        study: The study.
        methods: Finished folds by method, our model first.
        trials: In a search: settings, folds and mean of each configuration; the best one is reported as ours.
        notes: Caveats for the reader.

    Returns:
        The contents of `report.json`.
    """
    tree = summary(methods, study, OURS)
    names, k = study.label_names, len(study.label_names)
    folds = study.folds
    kinds = {
        "donor": "whole donors are held out",
        "dataset": "whole data sets are held out",
        "random": "random cells are held out",
    }
    report = Report(
        "Cross-validation",
        f"{len(folds)} folds, {kinds.get(folds.kind, f'each {folds.kind} is held out')};"
        f" {len(study.labels_n):,} cells, {k} labels",
    )
    report.text(verdict(tree) if OURS in tree else "")
    for note in notes:
        report.warning(note)
    report.section("Scores")
    rows = []
    for entry in tree.values():
        metrics = entry["metrics"]
        row = {"method": entry["title"], "folds": len(entry["folds"])}
        row |= {title: spread_text(metrics.get(metric)) for metric, title in METRICS.items()}
        rows.append(row)
    report.table(
        "Mean and standard deviation over folds",
        pd.DataFrame(rows),
        "Scores on the test cells, which were not used to choose anything.",
    )
    rows = []
    for name, entry in tree.items():
        if name != OURS:
            differences = {
                metric: scored.get("difference")
                for metric, scored in entry["metrics"].items()
                if metric in COMPARED
            }
            rows.append(
                {"method": entry["title"]}
                | {METRICS[metric]: difference_text(found) for metric, found in differences.items()}
            )
    if rows:
        report.table(
            f"{OURS} minus baseline",
            pd.DataFrame(rows),
            "Mean difference over the same folds, with a 95 % interval by Student's t. Above zero, our model"
            " is better. These intervals are rough, since folds are few and share training cells.",
        )
    scores = {
        entry["title"]: entry["metrics"]["macro_f1"]["values"]
        for entry in tree.values()
        if "macro_f1" in entry["metrics"]
    }
    report.figure(
        "",
        scores_figure(scores, OURS),
        "Macro-F1 of each fold (dots) and its mean (bar).",
        "Macro-F1 of each method over the folds.",
    )
    report.section("Types")
    report.table(
        "F1 of each type",
        pd.DataFrame(
            [
                {"type": name, "cells": int((study.labels_n == code).sum())}
                | {entry["title"]: _class_f1(methods[method], code, k) for method, entry in tree.items()}
                for code, name in enumerate(names)
            ]
        ),
        "Over the test cells of all folds together.",
    )
    for method, results in methods.items():
        if method == OURS:
            pooled = LabelCounts(k)
            for result in results:
                pooled.merge(counts(result, k))
            report.figure(
                f"Confusion of {OURS}",
                confusion_figure(pooled.confusion_kk, names),
                "Rows are true types. Each cell shows the share of its row and, below, the number of"
                " test cells over all folds.",
                f"Confusion matrix of {OURS}.",
            )
            if all(result.probabilities_nk is not None for result in results) and results:
                report.figure(
                    "Reliability",
                    reliability_figure(_reliability_table(results)),
                    "Share of correct predictions against their probability; on the diagonal they agree."
                    f" Bins of fewer than {LEAST_CELLS} cells are not drawn.",
                    f"Reliability diagram of {OURS}.",
                )
    report.section("Cost")
    report.table(
        "Median over folds",
        pd.DataFrame(
            [
                {
                    "method": entry["title"],
                    "seconds per fold": entry.get("seconds"),
                    "CPU seconds": entry.get("cpu_seconds"),
                    "training cells/s": entry.get("cells_per_s"),
                    "peak memory (GB)": entry.get("peak_memory_gb"),
                    "parameters": entry.get("parameters"),
                    "chosen on validation cells": "; ".join(
                        dict.fromkeys(_plain(chosen) for chosen in entry["chosen"] if chosen)
                    ),
                }
                for entry in tree.values()
            ]
        ),
        "Memory is that of the whole process. A baseline's cells/s is its number of training cells over"
        " its total time.",
    )
    if len(trials) > 1:
        report.section("Search")
        report.table(
            "Configurations",
            pd.DataFrame(trials),
            "Mean macro-F1 of the finished folds. The best one with all folds is ours above; its score is"
            " optimistic because it was chosen here.",
        )
    report.section("Folds")
    report.table(
        "Cells", _folds_table(study), "The step and the baselines' settings are chosen on validation cells."
    )
    whole = {
        "split": folds.kind,
        "labels": list(names),
        "notes": list(notes),
        "methods": tree,
        "trials": [dict(trial) for trial in trials],
        "config": study.config.to_dict(),
    }
    write_study(report, whole, study.run_dir)
    return whole


def _class_f1(results: Sequence[FoldResult], code: int, num_classes: int) -> float:
    pooled = LabelCounts(num_classes)
    for result in results:
        pooled.merge(counts(result, num_classes))
    return float(pooled.f1_k[code])


def _folds_table(study: Study) -> pd.DataFrame:
    rows = []
    for fold, name in enumerate(study.folds.names):
        split = study.split(fold)
        row: dict[str, Any] = {"fold": name, **{part: len(split[part]) for part in ("train", "val", "test")}}
        held = sorted(set(study.donors[split["test"]]))
        row["test donors"] = ", ".join(held[:6]) + (f" and {len(held) - 6} more" if len(held) > 6 else "")
        rows.append(row)
    return pd.DataFrame(rows)


def _reliability_table(results: Sequence[FoldResult]) -> pd.DataFrame:
    probabilities = np.concatenate(
        [result.probabilities_nk for result in results if result.probabilities_nk is not None]
    )
    rows = reliability(probabilities, np.concatenate([result.labels_n for result in results]))
    return pd.DataFrame(rows).assign(part="test", calibration="after")


def _plain(chosen: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in chosen.items())


def log_report(study: Study, methods: Mapping[str, Any]) -> None:
    """Log a study's report and mean scores to the parent run."""
    assert study.run is not None
    log_study(study.run, study.run_dir)
    metrics = {}
    for name, entry in methods.items():
        prefix = "cv" if name == OURS else f"baseline/{name}"
        for metric, scored in entry["metrics"].items():
            metrics[f"{prefix}/{metric}"] = scored["mean"]
            if scored["sd"] is not None:
                metrics[f"{prefix}/{metric}_sd"] = scored["sd"]
    study.run.log_metrics(metrics, step=0)
