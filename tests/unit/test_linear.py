"""The logistic regression that initialises the network's linear part."""

import numpy as np
import pytest
from scipy import sparse
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import normalize

from screformer.counts import Panels
from screformer.layers import LINEAR_SCALE
from screformer.start import INVERSE_PENALTY, logistic_start


@pytest.mark.parametrize("num_labels", [2, 4])
def test_gives_the_probabilities_of_scikit_learn_whatever_classes_are_missing(num_labels: int) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(num_labels, size=80)
    values = rng.gamma(1.0, size=(80, 12)) * (rng.random((80, 12)) < 0.5)
    values[np.arange(80), labels] += 0.7
    class_weights = np.array([0, *range(1, num_labels + 1), 0], dtype=np.float32)
    every = Panels.one(np.ones(12), 80)
    weights, bias, center = logistic_start(
        sparse.csr_array(values.astype(np.float32)), labels + 1, class_weights, every
    )
    assert (weights.dtype, weights.shape, bias.shape) == (np.float32, (12, num_labels + 2), (num_labels + 2,))
    scaled = normalize(values.astype(np.float32)) * LINEAR_SCALE
    np.testing.assert_allclose(center, scaled.mean(axis=0), rtol=1e-5)
    logits = (scaled - center) @ weights + bias
    found = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    fitted = LogisticRegression(C=INVERSE_PENALTY, max_iter=1000).fit(
        scaled, labels, sample_weight=labels + 1
    )
    np.testing.assert_allclose(found[:, 1:-1], fitted.predict_proba(scaled), atol=0.03)
    assert found[:, [0, -1]].max() < 0.01  # classes that no cell of the sample has


def test_an_unmeasured_gene_has_no_influence() -> None:
    """Two data sets, one without the marker of label 1: its cells must not affect the marker's weight, and
    the absence must not affect their labels."""
    rng = np.random.default_rng(1)
    labels, panel = rng.integers(2, size=400), rng.integers(2, size=400)
    values = rng.gamma(2.0, size=(400, 80))
    values[:, 0] *= 4 * labels  # the marker
    values[:, 1] += 0.5 * labels  # a weak hint, measured everywhere
    measured = np.ones((2, 80), dtype=bool)
    measured[1, 0] = False
    values[panel == 1, 0] = 0
    ones = np.ones(2, dtype=np.float32)
    weights, bias, center = logistic_start(
        sparse.csr_array(values.astype(np.float32)), labels, ones, Panels(measured, panel)
    )
    scaled = normalize(values.astype(np.float32)) * LINEAR_SCALE
    assert center[0] == pytest.approx(scaled[panel == 0, 0].mean(), rel=1e-5)
    logits = (scaled - measured[panel] * center) @ weights + bias
    said = logits.argmax(axis=1)
    assert 0.35 < said[panel == 1].mean() < 0.65, "cells without a measured marker have both labels"
    as_zero = ((scaled - center) @ weights + bias).argmax(axis=1)
    assert as_zero[panel == 1].mean() < 0.1, "as zero, the marker counts against label 1 in all of them"
    assert (said == labels)[panel == 0].mean() > 0.9
