"""Which types the cells of a query hold as a whole, by how likely each label is for each cell.

Axes: n cells, k classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

LEAST_CELLS = 0.5
"""A label of which a query holds fewer cells, by the estimate of `composition`, is absent: the estimate
rounds to none."""
_EM_STEPS = 300


def composition(probabilities_nk: np.ndarray, prior_k: Sequence[float] | np.ndarray) -> np.ndarray:
    """How many cells of each label a query holds, estimated from all of its cells together.

    The probabilities of a cell presume the shares that the labels had in training. Expectation-maximisation
    finds the query's own shares: those which, put in the place of the former, are again the mean over the
    cells.

    Args:
        probabilities_nk: Of the query's cells, calibrated.
        prior_k: Shares in training; a label whose share is 0 stays at 0.

    Returns:
        Expected cells of each label, float64 (k,).

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
    """The best label of each cell among those that the query as a whole holds, int64 (n,).

    Arguments as of `composition`.

    A type that is not there can still be the best label of a few odd cells, each of which stands for a type
    of its own in a summary.
    """
    if not len(probabilities_nk):
        return np.zeros(0, np.int64)
    present = composition(probabilities_nk, prior_k) >= LEAST_CELLS
    return np.where(present | ~present.any(), probabilities_nk, -1.0).argmax(axis=1)
