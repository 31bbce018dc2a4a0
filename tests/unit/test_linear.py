"""The logistic regression that the linear part of the network starts from."""

import numpy as np
import pytest
from scipy import sparse
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import normalize

from screformer.linear import INVERSE_PENALTY, logistic_start
from screformer.model import LINEAR_SCALE


@pytest.mark.parametrize("num_labels", [2, 4])
def test_gives_the_probabilities_of_scikit_learn_whatever_classes_are_missing(num_labels: int) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(num_labels, size=80)
    values = rng.gamma(1.0, size=(80, 12)) * (rng.random((80, 12)) < 0.5)
    values[np.arange(80), labels] += 0.7
    class_weights = np.array([0, *range(1, num_labels + 1), 0], dtype=np.float32)
    weights, bias = logistic_start(sparse.csr_array(values.astype(np.float32)), labels + 1, class_weights)
    assert (weights.dtype, weights.shape, bias.shape) == (np.float32, (12, num_labels + 2), (num_labels + 2,))
    scaled = normalize(values.astype(np.float32)) * LINEAR_SCALE
    logits = scaled @ weights + bias
    found = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    fitted = LogisticRegression(C=INVERSE_PENALTY, max_iter=1000).fit(scaled, labels, sample_weight=labels + 1)
    np.testing.assert_allclose(found[:, 1:-1], fitted.predict_proba(scaled), atol=0.03)
    assert found[:, [0, -1]].max() < 0.01  # classes that no cell of the sample has
