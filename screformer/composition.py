"""Estimate which cell types a query contains from the label probabilities of its cells.

Axes: n cells, k classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

LEAST_CELLS = 0.5
"""Labels with fewer cells than this, as estimated by `composition`, are absent: the estimate rounds to
zero."""
_EM_STEPS = 300


def composition(probabilities_nk: np.ndarray, prior_k: Sequence[float] | np.ndarray) -> np.ndarray:
    """Estimate how many cells of each label a query contains.

    A cell's probabilities assume the label shares of the training data. Expectation-maximisation replaces
    them with the query's own shares: the shares that equal the mean of the probabilities they lead to.

    Args:
        probabilities_nk: Calibrated probabilities of the query's cells.
        prior_k: Shares in training; a label whose share is 0 stays at 0.

    Returns:
        Expected number of cells of each label, float64 (k,).

    Source: Saerens et al., Adjusting the outputs of a classifier to new a priori probabilities, Neural
    Computation 2002.
    """
    probabilities, prior = probabilities_nk.astype(np.float64), np.asarray(prior_k, np.float64)
    relative_nk = np.divide(probabilities, prior, out=np.zeros_like(probabilities), where=prior > 0)
    share = prior / prior.sum()
    for _ in range(_EM_STEPS):
        joint_nk = relative_nk * share
        share = (joint_nk / np.maximum(joint_nk.sum(axis=1, keepdims=True), 1e-300)).mean(axis=0)
    return share * len(probabilities)


def present_labels(probabilities_nk: np.ndarray, prior_k: Sequence[float] | np.ndarray) -> np.ndarray:
    """The best label of each cell among those estimated to be present in the query, int64 (n,).

    An absent type can still be the best label of a few odd cells, which would make it appear in a summary.
    Arguments are as for `composition`.
    """
    if not len(probabilities_nk):
        return np.zeros(0, np.int64)
    present = composition(probabilities_nk, prior_k) >= LEAST_CELLS
    return np.where(present | ~present.any(), probabilities_nk, -1.0).argmax(axis=1)
