"""Every baseline on a few hundred made-up cells that are easy to tell apart."""

import numpy as np
import pytest
from scipy import sparse

from jobs.studies.baseline_cells import BaselineCells, Part
from jobs.studies.baselines import BASELINES, check_names, run_baseline

K, GENES = 4, 80


def make_part(num_cells, seed, classes=(0, 1, 2)):
    """Cells of some classes, each with ten genes of its own; class 3 never occurs."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(classes, num_cells)
    rate = np.full((K, GENES), 0.5)
    for code in range(K):
        rate[code, code * 10 : code * 10 + 10] = 4
    counts = rng.poisson(rate[labels])
    values = np.log1p(counts * (1e4 / counts.sum(1, keepdims=True))).astype(np.float32)
    return Part(x_ng=sparse.csr_matrix(values), labels_n=labels.astype(np.int64))


@pytest.fixture(scope="module")
def cells():
    test = make_part(80, 3)
    genes = tuple(f"ENSG{index:011d}" for index in range(GENES))
    found = BaselineCells(
        train=make_part(240, 1), val=make_part(60, 2), test_x_ng=test.x_ng, num_classes=K, genes=genes
    )
    return found, test.labels_n


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "scbert" else name for name in BASELINES]
)
def test_baseline(name, cells):
    for module in BASELINES[name].needs:
        pytest.importorskip(module)
    found, truth = cells
    answer, cost = run_baseline(name, found, seed=0)
    accuracy = (answer.predicted_n == truth).mean()
    assert accuracy > 0.9 if name != "majority" else accuracy < 0.6
    assert (answer.predicted_n < 3).all(), "a class without training cells is never said"
    if answer.probabilities_nk is not None:
        assert answer.probabilities_nk.shape == (80, K) and (answer.probabilities_nk[:, 3] == 0).all()
        np.testing.assert_allclose(answer.probabilities_nk.sum(1), 1, atol=1e-4)
    assert cost.seconds > 0 and cost.peak_memory_gb > 0 and answer.parameters > 0
    if name in ("pca_knn", "mlp", "gradient_boosting"):
        again, _ = run_baseline(name, found, seed=0)
        np.testing.assert_array_equal(again.predicted_n, answer.predicted_n)


def test_settings_are_chosen_on_the_validation_cells_alone(cells):
    """With validation labels shuffled another setting may win, but what is learned from the training cells
    stays."""
    found, truth = cells
    empty = Part(x_ng=found.val.x_ng[:0], labels_n=found.val.labels_n[:0])
    without = BaselineCells(
        train=found.train, val=empty, test_x_ng=found.test_x_ng, num_classes=K, genes=found.genes
    )
    assert without.chooser is without.train and found.chooser is found.val
    assert run_baseline("logistic_l2", found, 0)[0].chosen["C"] in (0.01, 0.1, 1.0, 10.0)


def test_names():
    assert (
        check_names(["all"]) == list(BASELINES)
        and check_names(["mlp", "majority", "mlp"]) == ["mlp", "majority"]
        and check_names([]) == []
    )
    with pytest.raises(ValueError, match="crossval.baselines has no 'svm'; there is all, majority"):
        check_names(["svm"])
