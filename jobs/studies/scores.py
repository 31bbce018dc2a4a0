"""Scores of methods over folds, their means and intervals."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy import stats

from data_ingest.ontology import is_at_or_below
from jobs.studies.baselines import baseline_title
from jobs.studies.results import FoldResult
from jobs.studies.study import Study
from screformer.composition import present_labels
from screformer.metrics import LabelCounts, expected_calibration_error

if TYPE_CHECKING:
    pass

METRICS = {
    "macro_f1": "macro-F1",
    "macro_f1_true": "macro-F1 of true types",
    "accuracy": "accuracy",
    "weighted_f1": "weighted F1",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1_present": "macro-F1, absent types dropped",
    "macro_f1_known": "macro-F1 of known types",
    "ontology_f1": "ontology-aware macro-F1",
    "ece": "calibration error",
}
"""Title of each score."""


COMPARED = ("macro_f1", "macro_f1_true", "macro_f1_present", "accuracy", "balanced_accuracy")
"""Scores whose differences the report shows; `report.json` has all."""


CONFIDENCE = 0.95


def counts(result: FoldResult, num_classes: int) -> LabelCounts:
    """Confusion of a fold's test cells."""
    found = LabelCounts(num_classes)
    found.add(torch.from_numpy(result.labels_n), torch.from_numpy(result.predicted_n))
    return found


def scores(result: FoldResult, study: Study) -> dict[str, float]:
    """Scores of one fold.

    `macro_f1` counts every type that is true or predicted, `macro_f1_true` only true ones. Cells of a type
    missing from the fold's training cells count as errors, except in `macro_f1_known`, which leaves them out.
    In `ontology_f1`, a prediction below the true term counts as correct, as in scTab: the true label is just
    more general. `macro_f1_present` drops labels estimated to be absent from the test cells as a whole
    (`screformer.composition.present_labels`); true labels are not used for that.
    """
    k = len(study.label_names)
    whole, known, lenient = counts(result, k), LabelCounts(k), LabelCounts(k)
    is_known_n = np.isin(result.labels_n, result.known)
    known.add(torch.from_numpy(result.labels_n[is_known_n]), torch.from_numpy(result.predicted_n[is_known_n]))
    accepted_kk = _accepted(study.label_cl_ids)
    taken_n = np.where(accepted_kk[result.labels_n, result.predicted_n], result.labels_n, result.predicted_n)
    lenient.add(torch.from_numpy(result.labels_n), torch.from_numpy(taken_n))
    found = {
        name: float(getattr(whole, name))
        for name in ("macro_f1", "macro_f1_true", "accuracy", "weighted_f1", "balanced_accuracy")
    }
    found |= {"macro_f1_known": known.macro_f1, "ontology_f1": lenient.macro_f1}
    if result.probabilities_nk is not None:
        found["ece"] = expected_calibration_error(result.probabilities_nk, result.labels_n)
        present = dataclasses.replace(
            result, predicted_n=present_labels(result.probabilities_nk, result.account["prior"])
        )
        found["macro_f1_present"] = float(counts(present, k).macro_f1)
    return found


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean with a 95 % interval by Student's t; the interval is infinite for a single value."""
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return mean, -np.inf, np.inf
    half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, count - 1) * np.std(values, ddof=1) / np.sqrt(count))
    return mean, mean - half, mean + half


def summary(methods: Mapping[str, Sequence[FoldResult]], study: Study, reference: str) -> dict[str, Any]:
    """Scores of all methods over their finished folds.

    Includes the differences `reference` - method on common folds. Seeds of one fold share its cells, so their
    mean is one observation: intervals are over folds.
    """
    by_fold = {name: _mean_by_fold(results, study) for name, results in methods.items()}
    tree: dict[str, Any] = {}
    for name, results in methods.items():
        entry: dict[str, Any] = {
            "title": baseline_title(name),
            "folds": list(by_fold[name]),
            "metrics": {},
        }
        for metric in METRICS:
            values = [scored[metric] for scored in by_fold[name].values() if metric in scored]
            if not values:
                continue
            sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
            entry["metrics"][metric] = {"mean": float(np.mean(values)), "sd": sd, "values": values}
            common = [fold for fold in by_fold[name] if metric in by_fold.get(reference, {}).get(fold, {})]
            if name != reference and common:
                mean, low, high = mean_interval(
                    [by_fold[reference][fold][metric] - by_fold[name][fold][metric] for fold in common]
                )
                entry["metrics"][metric]["difference"] = {
                    "mean": mean,
                    "low": low,
                    "high": high,
                    "folds": len(common),
                }
        for cost in ("seconds", "cpu_seconds", "cells_per_s", "peak_memory_gb", "parameters"):
            values = [result.account[cost] for result in results if result.account.get(cost) is not None]
            if values:
                entry[cost] = float(np.median(values))
        entry["chosen"] = [result.account.get("chosen", {}) for result in results]
        tree[name] = entry
    return tree


def _mean_by_fold(results: Sequence[FoldResult], study: Study) -> dict[int, dict[str, float]]:
    """Scores of each fold, averaged over its seeds."""
    found: dict[int, list[dict[str, float]]] = {}
    for result in results:
        found.setdefault(result.fold, []).append(scores(result, study))
    return {
        fold: {metric: float(np.mean([one[metric] for one in seeds])) for metric in seeds[0]}
        for fold, seeds in found.items()
    }


def fold_scores(study: Study, results: Sequence[FoldResult]) -> dict[str, Any]:
    """Cross-validation results stored with a model.

    The folds, and each metric's value in each fold.
    """
    scored = [scores(result, study) for result in results]
    return {
        "run_id": study.run.run_id if study.run else None,
        "kind": study.folds.kind,
        "hash": study.folds.hash(study.query.obs_joinids),
        "names": list(study.folds.names),
        "metrics": {
            metric: [fold[metric] for fold in scored]
            for metric in METRICS
            if all(metric in fold for fold in scored)
        },
    }


def difference_text(difference: Mapping[str, float] | None) -> str:
    """A difference with its interval, for example `+0.012 [-0.004, +0.028]`."""
    if difference is None:
        return ""
    if not np.isfinite(difference["low"]):
        return f"{difference['mean']:+.3f} (one fold)"
    return f"{difference['mean']:+.3f} [{difference['low']:+.3f}, {difference['high']:+.3f}]"


def spread_text(entry: Mapping[str, Any] | None) -> str:
    """A mean with its standard deviation over folds, for example `0.861 +- 0.020`."""
    if entry is None:
        return ""
    return f"{entry['mean']:.3f}" + (f" ± {entry['sd']:.3f}" if entry["sd"] is not None else "")


def _accepted(cl_ids: Sequence[str]) -> np.ndarray:
    """Whether a prediction (column) is correct for a true label (row): the same term, or one below it.

    Bool (k, k).
    """
    accepted_kk = np.eye(len(cl_ids), dtype=bool)
    for row, general in enumerate(cl_ids):
        for column, special in enumerate(cl_ids):
            accepted_kk[row, column] |= bool(general and special) and is_at_or_below(special, general)
    return accepted_kk
