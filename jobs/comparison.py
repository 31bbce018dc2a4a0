"""What a study found, from the files of its folds: scores, differences with their intervals, pictures, and a report of them.

Axes: n cells, k classes.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from scipy import stats

from data_ingest.ontology import is_at_or_below
from jobs.figures import reliability_figure
from jobs.report import Report
from jobs.study import OURS, FoldResult, Study, baseline_title
from jobs.tracking import confusion_figure
from screformer.calibration import expected_calibration_error, present_labels, reliability
from screformer.metrics import LabelCounts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METRICS = {
    "macro_f1": "macro-F1",
    "accuracy": "accuracy",
    "weighted_f1": "weighted F1",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1_present": "macro-F1, absent types dropped",
    "macro_f1_known": "macro-F1 of known types",
    "ontology_f1": "ontology-aware macro-F1",
    "ece": "calibration error",
}
"""Scores by name, with how they are called."""
COMPARED = ("macro_f1", "macro_f1_present", "accuracy", "balanced_accuracy")
"""Scores whose differences the report shows; `report.json` has all."""
CONFIDENCE = 0.95


def counts(result: FoldResult, num_classes: int) -> LabelCounts:
    """Confusion of a fold's test cells."""
    found = LabelCounts(num_classes)
    found.add(torch.from_numpy(result.labels_n), torch.from_numpy(result.predicted_n))
    return found


def scores(result: FoldResult, study: Study) -> dict[str, float]:
    """Scores of one fold.

    Cells of a type that the fold's training cells lack count as errors, except in `macro_f1_known`, which leaves them out. In
    `ontology_f1` a prediction below the true term counts as right, as in scTab: the true label is only the more general one. In
    `macro_f1_present` labels are dropped that the test cells as a whole do not hold (`screformer.calibration.present_labels`); their own
    labels are not asked for that.
    """
    k = len(study.label_names)
    whole, known, lenient = counts(result, k), LabelCounts(k), LabelCounts(k)
    is_known_n = np.isin(result.labels_n, result.known)
    known.add(torch.from_numpy(result.labels_n[is_known_n]), torch.from_numpy(result.predicted_n[is_known_n]))
    accepted_kk = _accepted(study.label_cl_ids)
    taken_n = np.where(accepted_kk[result.labels_n, result.predicted_n], result.labels_n, result.predicted_n)
    lenient.add(torch.from_numpy(result.labels_n), torch.from_numpy(taken_n))
    found = {name: float(getattr(whole, name)) for name in ("macro_f1", "accuracy", "weighted_f1", "balanced_accuracy")}
    found |= {"macro_f1_known": known.macro_f1, "ontology_f1": lenient.macro_f1}
    if result.probabilities_nk is not None:
        found["ece"] = expected_calibration_error(result.probabilities_nk, result.labels_n)
        present = dataclasses.replace(result, predicted_n=present_labels(result.probabilities_nk, result.account["prior"]))
        found["macro_f1_present"] = float(counts(present, k).macro_f1)
    return found


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and its 95 % interval by Student's t; the interval is infinite for a single value."""
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return mean, -np.inf, np.inf
    half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, count - 1) * np.std(values, ddof=1) / np.sqrt(count))
    return mean, mean - half, mean + half


def summary(methods: Mapping[str, Sequence[FoldResult]], study: Study, reference: str) -> dict[str, Any]:
    """Scores of all methods over the folds that they finished, and the differences `reference` - method on common folds."""
    by_fold = {name: {result.fold: scores(result, study) for result in results} for name, results in methods.items()}
    tree: dict[str, Any] = {}
    for name, results in methods.items():
        entry: dict[str, Any] = {"title": baseline_title(name), "folds": [result.fold for result in results], "metrics": {}}
        for metric in METRICS:
            values = [scored[metric] for scored in by_fold[name].values() if metric in scored]
            if not values:
                continue
            sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
            entry["metrics"][metric] = {"mean": float(np.mean(values)), "sd": sd, "values": values}
            common = [fold for fold in by_fold[name] if metric in by_fold.get(reference, {}).get(fold, {})]
            if name != reference and common:
                mean, low, high = mean_interval([by_fold[reference][fold][metric] - by_fold[name][fold][metric] for fold in common])
                entry["metrics"][metric]["difference"] = {"mean": mean, "low": low, "high": high, "folds": len(common)}
        for cost in ("seconds", "cpu_seconds", "cells_per_s", "peak_memory_gb", "parameters"):
            values = [result.account[cost] for result in results if result.account.get(cost) is not None]
            if values:
                entry[cost] = float(np.median(values))
        entry["chosen"] = [result.account.get("chosen", {}) for result in results]
        tree[name] = entry
    return tree


def fold_scores(study: Study, results: Sequence[FoldResult]) -> dict[str, Any]:
    """What a model carries of the cross-validation of its settings: which folds, and each metric's value in each of them."""
    scored = [scores(result, study) for result in results]
    return {
        "run_id": study.run.run_id if study.run else None,
        "kind": study.folds.kind,
        "hash": study.folds.hash(study.query.obs_joinids),
        "names": list(study.folds.names),
        "metrics": {metric: [fold[metric] for fold in scored] for metric in METRICS if all(metric in fold for fold in scored)},
    }


def difference_text(difference: Mapping[str, float] | None) -> str:
    """A difference with its interval, such as `+0.012 [-0.004, +0.028]`."""
    if difference is None:
        return ""
    if not np.isfinite(difference["low"]):
        return f"{difference['mean']:+.3f} (one fold)"
    return f"{difference['mean']:+.3f} [{difference['low']:+.3f}, {difference['high']:+.3f}]"


def spread_text(entry: Mapping[str, Any] | None) -> str:
    """A mean with its standard deviation over folds, such as `0.861 +- 0.020`."""
    if entry is None:
        return ""
    return f"{entry['mean']:.3f}" + (f" ± {entry['sd']:.3f}" if entry["sd"] is not None else "")


def verdict(tree: Mapping[str, Any]) -> str:
    """In a few sentences, how ours does against the best baseline in macro-F1, and with absent types dropped on both sides."""
    said = [_verdict(tree, metric) for metric in ("macro_f1", "macro_f1_present")]
    return "\n\n".join(dict.fromkeys(said))


def _verdict(tree: Mapping[str, Any], metric: str) -> str:
    others = {name: entry for name, entry in tree.items() if name != OURS and "difference" in entry["metrics"].get(metric, {})}
    if not others:
        return "There is no baseline to compare with."
    best = max(others, key=lambda name: others[name]["metrics"][metric]["mean"])
    difference, title = others[best]["metrics"][metric]["difference"], others[best]["title"]
    ours, theirs = tree[OURS]["metrics"][metric]["mean"], others[best]["metrics"][metric]["mean"]
    said = f"{OURS} has {METRICS[metric]} {ours:.3f}; the best baseline, {title}, has {theirs:.3f}."
    said += f" The paired difference is {difference_text(difference)}: "
    if difference["low"] > 0:
        return said + f"{OURS} is better."
    if difference["high"] < 0:
        return said + f"**{OURS} is worse than {title}.**"
    return said + "the folds do not tell them apart" + (", and **the mean is below the baseline's**." if difference["mean"] < 0 else ".")


def write_crossval_report(
    study: Study, methods: Mapping[str, Sequence[FoldResult]], trials: Sequence[Mapping[str, Any]], notes: Sequence[str]
) -> dict[str, Any]:
    """Write `report.md`, `report.html` and `report.json` into the study's folder.

    Args:
        study: The study.
        methods: Finished folds by method, ours first.
        trials: Of a search: settings, folds and mean of each configuration; ours is the best of them.
        notes: What the reader must know.

    Returns:
        What `report.json` holds.
    """
    tree = summary(methods, study, OURS)
    names, k = study.label_names, len(study.label_names)
    folds = study.folds
    kinds = {"donor": "whole donors are held out", "dataset": "whole data sets are held out", "random": "random cells are held out"}
    report = Report("Cross-validation", f"{len(folds)} folds, {kinds[folds.kind]}; {len(study.labels_n):,} cells, {k} labels")
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
    report.table("Mean and standard deviation over folds", pd.DataFrame(rows), "Scores of the test cells, which nothing was chosen on.")
    rows = []
    for name, entry in tree.items():
        if name != OURS:
            differences = {metric: scored.get("difference") for metric, scored in entry["metrics"].items() if metric in COMPARED}
            rows.append({"method": entry["title"]} | {METRICS[metric]: difference_text(found) for metric, found in differences.items()})
    if rows:
        report.table(
            f"{OURS} minus baseline",
            pd.DataFrame(rows),
            "Mean of the differences over the same folds, with its 95 % interval by Student's t. Above zero, ours is better. Few folds and"
            " training cells that they share make such intervals rough.",
        )
    report.figure("", _scores_figure(tree), "Macro-F1 of each fold (dots) and its mean (bar).", "Macro-F1 of each method over the folds.")
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
                "Rows are true types and sum to 1; test cells of all folds.",
                f"Confusion matrix of {OURS}.",
            )
            if all(result.probabilities_nk is not None for result in results) and results:
                report.figure(
                    "Reliability",
                    reliability_figure(_reliability_table(results)),
                    "Share of right predictions against their probability; on the diagonal they agree.",
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
                    "chosen on validation cells": "; ".join(dict.fromkeys(_plain(chosen) for chosen in entry["chosen"] if chosen)),
                }
                for entry in tree.values()
            ]
        ),
        "Memory is that of the whole process. Cells/s of baselines divides the training cells by all of the method's time.",
    )
    if len(trials) > 1:
        report.section("Search")
        report.table(
            "Configurations",
            pd.DataFrame(trials),
            "Mean macro-F1 of the finished folds. The best one with all folds is ours above, and flattered by the choice.",
        )
    report.section("Folds")
    report.table("Cells", _folds_table(study), "Validation cells choose the step and the baselines' settings.")
    whole = {
        "split": folds.kind,
        "labels": list(names),
        "notes": list(notes),
        "methods": tree,
        "trials": [dict(trial) for trial in trials],
        "config": study.config.to_dict(),
    }
    write_report(report, study.run_dir, whole)
    return whole


def write_report(report: Report, folder: Path, tree: Mapping[str, Any]) -> None:
    """Write a report in its three forms: `report.md`, `report.html`, `report.json`."""
    report.write_markdown(folder / "report.md")
    report.write_html(folder / "report.html")
    (folder / "report.json").write_text(json.dumps(_finite(tree), indent=2) + "\n")


def _accepted(cl_ids: Sequence[str]) -> np.ndarray:
    """Whether a prediction (column) is right for a true label (row): the same, or a term below it; bool (k, k)."""
    accepted_kk = np.eye(len(cl_ids), dtype=bool)
    for row, general in enumerate(cl_ids):
        for column, special in enumerate(cl_ids):
            accepted_kk[row, column] |= bool(general and special) and is_at_or_below(special, general)
    return accepted_kk


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


def _scores_figure(tree: Mapping[str, Any]) -> Figure:
    from matplotlib.figure import Figure

    entries = [entry for entry in tree.values() if "macro_f1" in entry["metrics"]]
    figure = Figure(figsize=(7, 1 + 0.4 * len(entries)), layout="constrained")
    axes = figure.add_subplot()
    for row, entry in enumerate(reversed(entries)):
        scored = entry["metrics"]["macro_f1"]
        axes.barh(row, scored["mean"], color="#4878a8" if entry["title"] == OURS else "#b8c4d0")
        axes.scatter(scored["values"], [row] * len(scored["values"]), color="black", s=12, zorder=3)
    axes.set_yticks(range(len(entries)), [entry["title"] for entry in reversed(entries)])
    axes.set_xlim(0, 1)
    axes.set_xlabel("macro-F1")
    axes.grid(axis="x", alpha=0.3)
    return figure


def _reliability_table(results: Sequence[FoldResult]) -> pd.DataFrame:
    probabilities = np.concatenate([result.probabilities_nk for result in results if result.probabilities_nk is not None])
    rows = reliability(probabilities, np.concatenate([result.labels_n for result in results]))
    return pd.DataFrame(rows).assign(part="test", calibration="after")


def _plain(chosen: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in chosen.items())


def _finite(tree: Any) -> Any:
    """With None for what JSON has no number for."""
    if isinstance(tree, Mapping):
        return {str(name): _finite(value) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_finite(value) for value in tree]
    return None if isinstance(tree, float) and not np.isfinite(tree) else tree
