"""Predictions for labelled cells and their scores, summed over batches and ranks.

Axes: n cells, k classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from screformer.splitmix import GOLDEN

OURS = "scReformer-BERT"
"""Name of our method in score tables."""
MOST_CELLS = 50_000
"""Maximum number of cells whose outputs are kept for calibration, which fits only a few numbers."""
_BINS = 15


class LabelCounts:
    """Confusion counts and loss sums.

    Sums are added up before dividing, so batches and ranks of any size are weighted correctly.

    Scores follow scikit-learn's defaults: macro and weighted averages cover the classes among the true or
    predicted labels, balanced accuracy those among the true labels; a precision, recall or F1 of 0/0 is 0.
    With no cells, a score is 0.

    Args:
        num_classes: k; 0 to track losses only, as in pre-training.
    """

    def __init__(self, num_classes: int) -> None:
        self.confusion_kk = np.zeros((num_classes, num_classes), dtype=np.int64)
        """Cells by true class (row) and predicted class (column)."""
        self.loss_sum = 0.0
        self.loss_weight = 0.0

    @classmethod
    def of_names(cls, labels_n: np.ndarray, answers_n: np.ndarray) -> LabelCounts:
        """Counts of true and predicted labels given as text, object (n,); the classes are all of both."""
        both = np.concatenate([labels_n, answers_n]).astype(str)
        names, codes = np.unique(both, return_inverse=True)
        counts = cls(len(names))
        counts.add(torch.from_numpy(codes[: len(labels_n)]), torch.from_numpy(codes[len(labels_n) :]))
        return counts

    def add(self, labels_n: torch.Tensor, predictions_n: torch.Tensor) -> None:
        """Count predictions, int (n,) in [0, k); cells with label -1 are ignored."""
        k = len(self.confusion_kk)
        known_n = labels_n >= 0
        pairs = labels_n[known_n].to(torch.int64) * k + predictions_n[known_n].to(torch.int64)
        self.confusion_kk += torch.bincount(pairs, minlength=k * k).reshape(k, k).cpu().numpy()

    def add_loss(self, loss_sum: float, weight: float) -> None:
        """Add a loss summed over elements whose weights add up to `weight`."""
        self.loss_sum += loss_sum
        self.loss_weight += weight

    def merge(self, other: LabelCounts) -> None:
        """Add the counts of other cells."""
        self.confusion_kk += other.confusion_kk
        self.add_loss(other.loss_sum, other.loss_weight)

    def all_reduce(self, device: torch.device) -> None:
        """Sum over all ranks in place; every rank calls it. Does nothing outside torch.distributed."""
        if not torch.distributed.is_initialized():
            return
        confusion_kk = torch.from_numpy(self.confusion_kk).to(device)
        torch.distributed.all_reduce(confusion_kk)
        self.confusion_kk = confusion_kk.cpu().numpy()
        self.loss_sum, self.loss_weight = sum_over_ranks(device, self.loss_sum, self.loss_weight)

    @property
    def num_cells(self) -> int:
        """Number of labelled cells."""
        return int(self.confusion_kk.sum())

    @property
    def loss(self) -> float:
        """Mean loss."""
        return self.loss_sum / self.loss_weight if self.loss_weight else 0.0

    @property
    def accuracy(self) -> float:
        """Share of cells with the correct label."""
        return float(np.trace(self.confusion_kk)) / max(self.num_cells, 1)

    @property
    def support_k(self) -> np.ndarray:
        """True cells of each class, int64 (k,)."""
        return self.confusion_kk.sum(axis=1)

    @property
    def precision_k(self) -> np.ndarray:
        """Share of correct cells among those predicted as each class, float64 (k,)."""
        return _ratio(np.diagonal(self.confusion_kk), self.confusion_kk.sum(axis=0))

    @property
    def recall_k(self) -> np.ndarray:
        """Share of each class's cells that were predicted correctly, float64 (k,)."""
        return _ratio(np.diagonal(self.confusion_kk), self.support_k)

    @property
    def f1_k(self) -> np.ndarray:
        """Harmonic mean of precision and recall, float64 (k,)."""
        return _ratio(2 * np.diagonal(self.confusion_kk), self.support_k + self.confusion_kk.sum(axis=0))

    @property
    def macro_f1(self) -> float:
        """Mean F1 over the classes among true or predicted labels."""
        present_k = self.support_k + self.confusion_kk.sum(axis=0) > 0
        return float(self.f1_k[present_k].mean()) if present_k.any() else 0.0

    @property
    def macro_f1_true(self) -> float:
        """Mean F1 over the classes among true labels."""
        present_k = self.support_k > 0
        return float(self.f1_k[present_k].mean()) if present_k.any() else 0.0

    @property
    def weighted_f1(self) -> float:
        """Mean F1, each class weighted by its number of true cells."""
        return float(self.f1_k @ self.support_k) / max(self.num_cells, 1)

    @property
    def balanced_accuracy(self) -> float:
        """Mean recall over the classes among true labels."""
        present_k = self.support_k > 0
        return float(self.recall_k[present_k].mean()) if present_k.any() else 0.0

    def scores(self, prefix: str) -> dict[str, float]:
        """The scores as metrics, `prefix/loss` first.

        With classes, also `prefix/accuracy`, `/macro_f1`, `/weighted_f1` and `/balanced_accuracy`.
        """
        names = ["loss"]
        if len(self.confusion_kk):
            names += ["accuracy", "macro_f1", "weighted_f1", "balanced_accuracy"]
        return {f"{prefix}/{name}": getattr(self, name) for name in names}

    def table(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """One row per class: label, precision, recall, F1, and number of true cells."""
        columns = (self.precision_k, self.recall_k, self.f1_k, self.support_k)
        return [
            {"label": name, "precision": float(p), "recall": float(r), "f1": float(f), "cells": int(c)}
            for name, p, r, f, c in zip(names, *columns, strict=True)
        ]


def sum_over_ranks(device: torch.device | str, *values: float) -> list[float]:
    """The sum of each value over all ranks, in float64; every rank calls it."""
    sums = torch.tensor(values, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(sums)
    return sums.tolist()


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.zeros(len(below)), where=below > 0)


@dataclass(frozen=True, eq=False, kw_only=True)
class CellOutputs:
    """Logits and true classes of labelled cells."""

    logits_nk: np.ndarray
    """float32."""
    labels_n: np.ndarray
    """True class, int64, in [0, k)."""
    detected_n: np.ndarray
    """Genes that became tokens, int64."""

    def __len__(self) -> int:
        return len(self.labels_n)


class OutputSample:
    """Outputs of a random sample of labelled cells, at most `MOST_CELLS`.

    The choice of cells does not depend on how they are spread over ranks and batches.
    """

    def __init__(self, num_classes: int, most_cells: int = MOST_CELLS) -> None:
        self._most = most_cells
        self._keys = np.zeros(0, dtype=np.uint64)
        self._labels = np.zeros(0, dtype=np.int64)
        self._logits = np.zeros((0, num_classes), dtype=np.float32)
        self._detected = np.zeros(0, dtype=np.int64)

    def add(
        self,
        joinids_n: torch.Tensor,
        labels_n: torch.Tensor,
        logits_nk: torch.Tensor,
        detected_n: torch.Tensor,
    ) -> None:
        """Add a batch; cells with label -1 are ignored."""
        labels = labels_n.cpu().numpy()
        known = labels >= 0
        # Pseudo-random, and unique because joinids are.
        keys = joinids_n.cpu().numpy()[known].astype(np.uint64) * np.uint64(GOLDEN)
        logits, detected = logits_nk.float().cpu().numpy()[known], detected_n.cpu().numpy()[known]
        self._join(keys, labels[known], logits, detected)

    def gather(self) -> CellOutputs:
        """The sample over all ranks, in an order independent of their number; every rank calls it."""
        own = (self._keys, self._labels, self._logits, self._detected)
        parts = [own] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(parts, own)
        whole = OutputSample(self._logits.shape[1], self._most)
        for part in parts:
            whole._join(*part)
        order = np.argsort(whole._keys)
        return CellOutputs(
            logits_nk=whole._logits[order], labels_n=whole._labels[order], detected_n=whole._detected[order]
        )

    def _join(self, keys: np.ndarray, labels: np.ndarray, logits: np.ndarray, detected: np.ndarray) -> None:
        self._keys = np.concatenate([self._keys, keys])
        self._labels = np.concatenate([self._labels, labels])
        self._logits = np.concatenate([self._logits, logits])
        self._detected = np.concatenate([self._detected, detected])
        if len(self._keys) > self._most:
            kept = np.argpartition(self._keys, self._most)[: self._most]
            self._keys, self._labels = self._keys[kept], self._labels[kept]
            self._logits, self._detected = self._logits[kept], self._detected[kept]


def reliability(probabilities_nk: np.ndarray, labels_n: np.ndarray) -> list[dict[str, float]]:
    """Confidence versus accuracy of best labels; see `reliability_rows`."""
    return reliability_rows(probabilities_nk.max(axis=1), probabilities_nk.argmax(axis=1) == labels_n)


def reliability_rows(confidence_n: np.ndarray, right_n: np.ndarray) -> list[dict[str, float]]:
    """Confidence versus accuracy, one row per non-empty bin of equal width.

    Rows have `from`, `to`, `cells`, `confidence` and `accuracy`.

    Args:
        confidence_n: Probability of each cell's best label.
        right_n: Whether that label is correct, bool.
    """
    bins = np.minimum((confidence_n * _BINS).astype(np.int64), _BINS - 1)
    rows = []
    for index in np.unique(bins):
        inside = bins == index
        rows.append(
            {
                "from": index / _BINS,
                "to": (index + 1) / _BINS,
                "cells": int(inside.sum()),
                "confidence": float(confidence_n[inside].mean()),
                "accuracy": float(right_n[inside].mean()),
            }
        )
    return rows


def expected_calibration_error(probabilities_nk: np.ndarray, labels_n: np.ndarray) -> float:
    """Mean gap between confidence and accuracy over 15 bins of equal width, weighted by cells; in [0, 1]."""
    rows = reliability(probabilities_nk, labels_n)
    return float(
        sum(row["cells"] * abs(row["confidence"] - row["accuracy"]) for row in rows)
        / max(sum(row["cells"] for row in rows), 1)
    )
