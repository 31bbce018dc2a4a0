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
    values[np.arange(80), labels] += 2
    weights, bias = logistic_start(sparse.csr_array(values.astype(np.float32)), labels + 1, num_labels + 2)
    assert (weights.dtype, weights.shape, bias.shape) == (np.float32, (12, num_labels + 2), (num_labels + 2,))
    scaled = normalize(values) * LINEAR_SCALE
    logits = scaled @ weights + bias
    found = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    fitted = LogisticRegression(C=INVERSE_PENALTY, class_weight="balanced", max_iter=100).fit(scaled, labels)
    np.testing.assert_allclose(found[:, 1:-1], fitted.predict_proba(scaled), atol=0.01)
    assert found[:, [0, -1]].max() < 0.01  # classes that no cell of the sample has
