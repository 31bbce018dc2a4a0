"""Where the linear part of the network starts: a logistic regression on a sample of training cells.

Axes: n cells, g genes of the vocabulary, k classes.
"""

from __future__ import annotations

import warnings

import numpy as np
from scipy import sparse
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import normalize

from screformer.model import LINEAR_SCALE

INVERSE_PENALTY = 1.0
"""scikit-learn's C. Chosen on validation cells of real blood data, where 0.01 to 1 differ little (docs/experiments.md)."""
_MAX_ITERATIONS = 100
_NEVER = -8.0
"""Bias of a class that the sample does not hold."""


def logistic_start(values_ng: sparse.csr_array, labels_n: np.ndarray, class_weights_k: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fit what `ScReformer.set_linear_start` takes.

    Args:
        values_ng: Expression values as the tokenizer makes them.
        labels_n: Class of each cell, int64 in [0, k); at least two classes.
        class_weights_k: Weight of a cell of each class in the loss, (k,).

    Returns:
        Weights float32 (g, k) and bias float32 (k,) of the L2-penalised regression.
    """
    scaled = sparse.csr_matrix(normalize(sparse.csr_matrix(values_ng)) * LINEAR_SCALE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a start need not be converged
        fitted = LogisticRegression(C=INVERSE_PENALTY, max_iter=_MAX_ITERATIONS)
        fitted.fit(scaled, labels_n, sample_weight=class_weights_k[labels_n])
    coefficients, intercept = fitted.coef_, fitted.intercept_
    if len(fitted.classes_) == 2:  # scikit-learn then keeps the second class's only
        coefficients, intercept = np.concatenate([-coefficients, coefficients]) / 2, np.concatenate([-intercept, intercept]) / 2
    num_classes = len(class_weights_k)
    weights_gk, bias_k = np.zeros((scaled.shape[1], num_classes), np.float32), np.full(num_classes, _NEVER, np.float32)
    weights_gk[:, fitted.classes_], bias_k[fitted.classes_] = coefficients.T, intercept
    return weights_gk, bias_k
