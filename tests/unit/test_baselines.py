"""Every baseline, on a few hundred simulated cells that are easy to classify."""

import dataclasses

import numpy as np
import pytest

from jobs.studies.baseline_cells import BaselineCells, Candidate, Cells, Labels, Part, choose
from jobs.studies.baselines import BASELINES, check_names, run_baseline
from screformer.counts import CellCounts

K, GENES = 4, 80


def make_part(num_cells, seed, classes=(0, 1, 2)):
    """Cells of some classes, each with its own ten genes; class 3 never occurs."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(classes, num_cells)
    rate = np.full((K, GENES), 0.5)
    for code in range(K):
        rate[code, code * 10 : code * 10 + 10] = 4
    counts = rng.poisson(rate[labels])
    return Part(
        cells=Cells(CellCounts.of(counts)),
        labels_n=labels.astype(np.int64),
        datasets_n=np.arange(num_cells, dtype=np.int64) % 2,
    )


@pytest.fixture(scope="module")
def cells():
    test = make_part(80, 3)
    genes = tuple(f"ENSG{index:011d}" for index in range(GENES))
    found = BaselineCells(
        train=make_part(240, 1), val=make_part(60, 2), test=test.cells, num_classes=K, genes=genes
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
    assert (answer.predicted_n < 3).all(), "a class without training cells is never predicted"
    if answer.probabilities_nk is not None:
        assert answer.probabilities_nk.shape == (80, K) and (answer.probabilities_nk[:, 3] == 0).all()
        np.testing.assert_allclose(answer.probabilities_nk.sum(1), 1, atol=1e-4)
    assert cost.seconds > 0 and cost.peak_memory_gb > 0 and answer.parameters > 0
    if name in ("pca_knn", "mlp", "gradient_boosting"):
        again, _ = run_baseline(name, found, seed=0)
        np.testing.assert_array_equal(again.predicted_n, answer.predicted_n)


def test_settings_are_chosen_only_on_the_validation_cells(cells):
    found, truth = cells
    shuffled = np.random.default_rng(0).permutation(found.val.labels_n)
    other = dataclasses.replace(found, val=dataclasses.replace(found.val, labels_n=shuffled))
    answer, _ = run_baseline("logistic_l2", other, 0)
    assert (answer.predicted_n == truth).mean() > 0.9, "shuffled validation labels teach nothing"
    empty = make_part(0, 2)
    without = dataclasses.replace(found, val=empty)
    assert without.chooser is without.train and found.chooser is found.val


def test_the_first_best_candidate_labels_the_test_cells_once(cells):
    """Candidates label so many validation cells correctly; with patience, no more are fitted than needed."""
    found, _ = cells
    fitted, labelled = [], []

    def candidates(rights):
        for number, right in enumerate(rights):
            fitted.append(number)

            def label(cells, number=number, right=right):
                if cells is found.test:
                    labelled.append(number)
                    return Labels(np.full(len(cells.counts), number), None)
                return Labels(np.where(np.arange(60) < right, found.val.labels_n, 3), None)

            yield Candidate({"number": number}, label, lambda: 7)

    rights = [10, 40, 40, 20, 50, 0]
    answer = choose(found, candidates(rights))
    assert (answer.chosen, answer.parameters, labelled) == ({"number": 4}, 7, [4]) and len(fitted) == 6
    assert (answer.predicted_n == 4).all() and answer.probabilities_nk is None
    fitted.clear()
    assert choose(found, candidates(rights), patience=2).chosen == {"number": 1}
    assert fitted == [0, 1, 2, 3]


def test_names():
    assert (
        check_names(["all"]) == list(BASELINES)
        and check_names(["mlp", "majority", "mlp"]) == ["mlp", "majority"]
        and check_names([]) == []
    )
    with pytest.raises(ValueError, match="crossval.baselines has no 'svm'; choose from all, majority"):
        check_names(["svm"])
