"""Test scores of the model, a logistic regression and the most frequent type on the same cells."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import torch

from jobs.reports.results import SCORES
from jobs.studies.baseline_cells import BaselineCells, baseline_parts
from jobs.studies.baselines import run_baseline
from jobs.training.cells import TrainingCells
from screformer.metrics import OURS, LabelCounts


@dataclass(frozen=True, kw_only=True)
class LogisticRegression:
    """A logistic regression and its scores on the held-out cells."""

    c: float
    """Inverse regularisation, chosen by macro-F1 on the validation cells."""
    test: LabelCounts


def logistic_regression(cells: TrainingCells) -> LogisticRegression:
    """Fit the baseline `logistic_l2` on the cells and genes used for the model. Ray must be running."""
    parts, _ = baseline_parts(cells)
    k = len(cells.labels["names"])
    found = BaselineCells(
        train=parts["train"],
        val=parts["val"],
        test=parts["test"].cells,
        num_classes=k,
        genes=cells.genes.feature_ids,
    )
    answer, _ = run_baseline("logistic_l2", found, cells.config.train.seed)
    counts = LabelCounts(k)
    counts.add(torch.from_numpy(parts["test"].labels_n), torch.from_numpy(answer.predicted_n))
    return LogisticRegression(c=answer.chosen["C"], test=counts)


def score_table(
    cells: TrainingCells, metrics: dict[str, float], baseline: LogisticRegression
) -> pd.DataFrame:
    """A row for each of the three, ours first, with columns `model` and the names of `SCORES`."""
    majority = LabelCounts(len(cells.labels["names"]))
    truth = torch.from_numpy(cells.codes_n[cells.parts["test"]])
    majority.add(truth, torch.full_like(truth, int(cells.class_counts_k.argmax())))
    rows = [{"model": OURS} | {score: metrics[f"test/{score}"] for score in SCORES}]
    for name, counts in (("logistic regression", baseline.test), ("most frequent type", majority)):
        rows.append({"model": name} | {score: getattr(counts, score) for score in SCORES})
    return pd.DataFrame(rows)


def score_text(scores: pd.DataFrame, cells: TrainingCells) -> str:
    """The table as text."""
    lines = [
        "",
        f"{len(cells.parts['test']):,} cells of held-out donors ({', '.join(cells.groups('test'))})",
        f"{'':<22}accuracy  macro-F1",
        *(f"{row.model:<22}{row.accuracy:8.3f}{row.macro_f1:10.3f}" for row in scores.itertuples()),
    ]
    return "\n".join(lines)
