"""How well two samples of cells can be separated by their embeddings.

Axes: n cells, d model width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_FOLDS = 5
LEAST_CELLS = 30
"""Samples with fewer cells are not compared."""


@dataclass(frozen=True, eq=False, kw_only=True)
class CellSample:
    """Embeddings of some cells, with their labels and donors."""

    embedding_nd: np.ndarray
    labels_n: np.ndarray
    """True or predicted label of each cell, int64."""
    donors_n: np.ndarray
    """Code of each cell's donor, int64."""

    def __len__(self) -> int:
        return len(self.labels_n)

    def take(self, cells: np.ndarray) -> CellSample:
        """A subset of the cells."""
        return CellSample(
            embedding_nd=self.embedding_nd[cells],
            labels_n=self.labels_n[cells],
            donors_n=self.donors_n[cells],
        )


def two_sample_auroc(ours: CellSample, theirs: CellSample) -> float | None:
    """How well a classifier separates two samples on held-out donors.

    A logistic regression on standardised embeddings, cross-validated in folds of whole donors; for a sample
    with one donor, in folds of its cells. The cells of `ours` are weighted so that labels are as frequent as
    in `theirs`: a different composition alone does not separate the samples.

    Args:
        ours: Cells of the training, for example.
        theirs: Cells to compare with them.

    Returns:
        Area under the ROC curve: 0.5 for samples that are alike, 1 for samples that never overlap. None for
        too few cells or without common labels.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.preprocessing import StandardScaler

    weight_n = np.concatenate([_matched_weights(ours, theirs), np.full(len(theirs), 1.0)])
    if min(len(ours), len(theirs)) < LEAST_CELLS or weight_n[: len(ours)].sum() == 0:
        return None
    weight_n[: len(ours)] *= len(theirs) / weight_n[: len(ours)].sum()
    x_nd = np.concatenate([ours.embedding_nd, theirs.embedding_nd]).astype(np.float64)
    is_theirs_n = np.arange(len(x_nd)) >= len(ours)
    folds_n = np.concatenate([_folds(ours.donors_n), _folds(theirs.donors_n)])
    areas = []
    for fold in np.unique(folds_n):
        test, fit = folds_n == fold, (folds_n != fold) & (weight_n > 0)
        test &= weight_n > 0
        if any(len(np.unique(is_theirs_n[part])) < 2 for part in (test, fit)):
            continue
        scaler = StandardScaler().fit(x_nd[fit])
        classifier = LogisticRegression(C=0.1, max_iter=300)
        classifier.fit(scaler.transform(x_nd[fit]), is_theirs_n[fit], weight_n[fit])
        score_n = classifier.decision_function(scaler.transform(x_nd[test]))
        areas.append(roc_auc_score(is_theirs_n[test], score_n, sample_weight=weight_n[test]))
    return float(np.mean(areas)) if areas else None


def usual_auroc(training: CellSample, parts_n: np.ndarray) -> float | None:
    """Mean `two_sample_auroc` of each part of the training cells (for example a data set) against the rest.

    Args:
        training: The cells.
        parts_n: Code of the part of each cell.

    Returns:
        None if no part is large enough.
    """
    found = []
    for part in np.unique(parts_n):
        inside = parts_n == part
        area = two_sample_auroc(training.take(~inside), training.take(inside))
        if area is not None:
            found.append(area)
    return float(np.mean(found)) if found else None


def _matched_weights(ours: CellSample, theirs: CellSample) -> np.ndarray:
    """Weights of our cells that give our labels the frequencies of theirs."""
    most = int(max(ours.labels_n.max(initial=0), theirs.labels_n.max(initial=0))) + 1
    ours_k, theirs_k = (np.bincount(sample.labels_n, minlength=most) for sample in (ours, theirs))
    ratio_k = np.divide(theirs_k, ours_k, out=np.zeros(most), where=ours_k > 0)
    return ratio_k[ours.labels_n]


def _folds(donors_n: np.ndarray) -> np.ndarray:
    """Fold of each cell: donors stay whole, or cells are assigned at random if there is one donor."""
    from sklearn.model_selection import GroupKFold

    num_donors = len(np.unique(donors_n))
    if num_donors == 1:
        return np.random.default_rng(0).permutation(np.arange(len(donors_n)) % _FOLDS)
    fold_n = np.zeros(len(donors_n), np.int64)
    parts = GroupKFold(min(_FOLDS, num_donors)).split(donors_n, groups=donors_n)
    for fold, (_, inside) in enumerate(parts):
        fold_n[inside] = fold
    return fold_n
