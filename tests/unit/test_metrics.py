import numpy as np
import pytest
import torch
from sklearn import metrics as reference

from screformer.metrics import LabelCounts

SCORES = ("accuracy", "macro_f1", "weighted_f1", "balanced_accuracy")


def _counts(labels: np.ndarray, predictions: np.ndarray, num_classes: int) -> LabelCounts:
    counts = LabelCounts(num_classes)
    counts.add(torch.from_numpy(labels), torch.from_numpy(predictions))
    return counts


def _reference(labels: np.ndarray, predictions: np.ndarray) -> dict[str, float]:
    return {
        "accuracy": reference.accuracy_score(labels, predictions),
        "macro_f1": reference.f1_score(labels, predictions, average="macro"),
        "weighted_f1": reference.f1_score(labels, predictions, average="weighted"),
        "balanced_accuracy": reference.balanced_accuracy_score(labels, predictions),
    }


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_scores_are_those_of_sklearn() -> None:
    rng = np.random.default_rng(0)
    labels, predictions = (
        rng.integers(0, 7, 60),
        rng.integers(1, 9, 60),
    )  # some classes only true, some only predicted, one (9) neither
    counts = _counts(labels, predictions, 10)
    for name, value in _reference(labels, predictions).items():
        assert getattr(counts, name) == pytest.approx(value), name
    kept = np.arange(10)
    precision, recall, f1, support = reference.precision_recall_fscore_support(
        labels, predictions, labels=kept, zero_division=0
    )
    for found, expected in (
        (counts.precision_k, precision),
        (counts.recall_k, recall),
        (counts.f1_k, f1),
        (counts.support_k, support),
    ):
        np.testing.assert_allclose(found, expected)
    np.testing.assert_array_equal(
        counts.confusion_kk, reference.confusion_matrix(labels, predictions, labels=kept)
    )


def test_parts_add_up_to_the_whole() -> None:
    rng = np.random.default_rng(0)
    labels, predictions = rng.integers(0, 4, 50), rng.integers(0, 4, 50)
    whole, left, right = (
        _counts(labels, predictions, 4),
        _counts(labels[:13], predictions[:13], 4),
        _counts(labels[13:], predictions[13:], 4),
    )
    left.add_loss(3.0, 13)
    right.add_loss(7.0, 37)
    left.merge(right)
    np.testing.assert_array_equal(left.confusion_kk, whole.confusion_kk)
    assert left.loss == pytest.approx(10.0 / 50)


def test_unlabelled_cells_do_not_count() -> None:
    counts = _counts(np.array([-1, 0, 1, -1]), np.array([0, 0, 0, 1]), 2)
    assert counts.num_cells == 2
    assert counts.accuracy == 0.5


def test_nothing_counted_gives_zero_and_not_nan() -> None:
    counts = LabelCounts(3)
    assert counts.loss == 0
    assert [getattr(counts, name) for name in SCORES] == [0, 0, 0, 0]


def test_metric_names() -> None:
    assert set(LabelCounts(2).scores("val")) == {"val/loss", *(f"val/{name}" for name in SCORES)}
    assert set(LabelCounts(0).scores("val")) == {"val/loss"}
    rows = _counts(np.array([0, 1, 1]), np.array([0, 1, 0]), 2).table(["B cell", "T cell"])
    assert rows[1] == {
        "label": "T cell",
        "precision": 1.0,
        "recall": 0.5,
        "f1": pytest.approx(2 / 3),
        "cells": 2,
    }
