"""Final steps of every training: calibrate, score, log and save the model."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from jobs.reports.artifacts import log_confusion, log_per_class, log_reliability
from jobs.training.task import TrainingTask
from screformer.calibration import Calibration
from screformer.calibration_fit import fit_calibration
from screformer.checkpoint import save_model
from screformer.metrics import CellOutputs, expected_calibration_error, reliability
from screformer.progress import Outcome


def finish(task: TrainingTask, outcome: Outcome, folder: Path) -> dict[str, float]:
    """Calibrate, score and save the model of a finished training; called only by rank 0.

    Args:
        task: The training.
        outcome: The result of `fit`.
        folder: Path of the model directory to write.

    Returns:
        `best_val/...` and `test/...`: scores of the best weights and of their calibration.
    """
    scores = outcome.scores()
    calibration = None
    if outcome.val_outputs is not None and len(outcome.val_outputs):
        calibration = fit_calibration(
            outcome.val_outputs, task.lineage, varied=outcome.varied_outputs, prior_k=task.prior_k
        )
        found = calibration_scores(calibration, outcome.val_outputs, outcome.test_outputs)
        task.run.log_metrics(found, step=task.config.train.max_steps)
        scores |= found
        log_reliability(task.run, _reliability(calibration, outcome.val_outputs, outcome.test_outputs))
    if task.task == "finetune":
        names = task.labels["names"]
        for part, counts in (("val", outcome.val), ("test", outcome.test)):
            if counts is not None:
                log_confusion(task.run, counts.confusion_kk, names, part)
                log_per_class(task.run, counts.table(names), part)
    meta = {**task.meta, "best_step": outcome.progress.best_step, "metrics": scores}
    save_model(folder, outcome.weights, task.config, task.vocabulary, task.labels, meta, calibration)
    return scores


def calibration_scores(
    calibration: Calibration, val: CellOutputs, test: CellOutputs | None
) -> dict[str, float]:
    """Calibration metrics.

    `PART/ece_uncalibrated`, `PART/ece` and `PART/unknown_share` (known types flagged unknown), for `best_val`
    and `test`.
    """
    scores: dict[str, float] = {}
    for part, outputs in (("best_val", val), ("test", test)):
        if outputs is None or not len(outputs):
            continue
        scores_n = calibration.unknown_scores(outputs.logits_nk, outputs.detected_n)
        unknown = scores_n > calibration.unknown_threshold
        scores |= {
            f"{part}/ece_uncalibrated": expected_calibration_error(
                Calibration().probabilities(outputs.logits_nk), outputs.labels_n
            ),
            f"{part}/ece": expected_calibration_error(
                calibration.probabilities(outputs.logits_nk, outputs.detected_n), outputs.labels_n
            ),
            f"{part}/unknown_share": float(unknown.mean()),
        }
    return scores


def _reliability(calibration: Calibration, val: CellOutputs, test: CellOutputs | None) -> pd.DataFrame:
    """Confidence versus accuracy of validation and test cells, before and after calibration."""
    tables = []
    for part, outputs in (("validation", val), ("test", test)):
        for state, used in (("before", Calibration()), ("after", calibration)):
            if outputs is not None and len(outputs):
                probabilities_nk = used.probabilities(outputs.logits_nk, outputs.detected_n)
                rows = pd.DataFrame(reliability(probabilities_nk, outputs.labels_n))
                tables.append(rows.assign(part=part, calibration=state))
    return pd.concat(tables, ignore_index=True)
