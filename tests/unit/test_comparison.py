import dataclasses

import numpy as np
import pytest
import torch
from scipy import stats

from jobs.studies.layout import count_trials, search_space
from jobs.studies.report import verdict
from jobs.studies.results import FoldResult
from jobs.studies.scores import difference_text, mean_interval, scores, summary
from jobs.studies.study import Study
from screformer.config import ExperimentConfig
from screformer.metrics import OURS, LabelCounts


def make_result(labels, predicted, *, known=(0, 1, 2), probabilities=None):
    labels = np.asarray(labels)
    return FoldResult(
        method=OURS,
        fold=0,
        joinids_n=np.arange(len(labels)),
        labels_n=labels,
        predicted_n=np.asarray(predicted),
        probabilities_nk=probabilities,
        known=list(known),
        account={},
    )


def make_study(cl_ids):
    names = tuple(f"type{code}" for code in range(len(cl_ids)))
    return Study(
        config=ExperimentConfig(),
        query=None,
        folds=None,
        label_names=names,
        label_cl_ids=cl_ids,
        labels_n=np.zeros(0),
        run_dir=None,
        run=None,
    )  # type: ignore[arg-type]


def test_scores_without_terms_and_probabilities():
    rng = np.random.default_rng(0)
    labels, predicted = rng.integers(0, 3, 200), rng.integers(0, 3, 200)
    found = scores(make_result(labels, predicted), make_study(("", "", "")))
    whole = LabelCounts(3)
    whole.add(torch.from_numpy(labels), torch.from_numpy(predicted))
    for name in ("accuracy", "macro_f1", "weighted_f1", "balanced_accuracy"):
        assert found[name] == getattr(whole, name)
    assert found["ontology_f1"] == found["macro_f1"], "without terms both are the same"
    assert "ece" not in found


def test_types_that_could_not_be_learned_count_as_errors_in_all_scores_but_one():
    found = scores(
        make_result([0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 1, 1], known=(0, 1)), make_study(("", "", ""))
    )
    assert found["accuracy"] == pytest.approx(4 / 6) and found["macro_f1"] == pytest.approx(
        (1 + 2 / 3 + 0) / 3
    )
    assert found["macro_f1_known"] == 1
    stray = scores(make_result([0, 0, 1, 1], [0, 0, 1, 2]), make_study(("", "", "")))
    assert stray["macro_f1_true"] == pytest.approx((1 + 2 / 3) / 2) and stray["macro_f1"] < 0.6


def test_a_prediction_below_the_true_term_counts_in_the_ontology_aware_score_and_not_the_other_way():
    # T cell; CD4-positive, alpha-beta T cell; B cell
    study = make_study(("CL:0000084", "CL:0000624", "CL:0000236"))
    more_special = scores(make_result([0, 0, 2, 2], [1, 0, 2, 2]), study)
    assert more_special["ontology_f1"] == 1 > more_special["macro_f1"]
    more_general = scores(make_result([1, 1, 2, 2], [0, 1, 2, 2]), study)
    assert more_general["ontology_f1"] == more_general["macro_f1"] < 1
    assert scores(make_result([0, 0, 2, 2], [2, 0, 2, 2]), study)["ontology_f1"] < 1


def test_the_interval_is_that_of_the_paired_t_test():
    ours, theirs = np.array([0.81, 0.85, 0.79, 0.88, 0.83]), np.array([0.80, 0.82, 0.80, 0.84, 0.81])
    test = stats.ttest_rel(ours, theirs)
    expected = test.confidence_interval(0.95)
    assert mean_interval(ours - theirs) == pytest.approx(
        (np.mean(ours - theirs), expected.low, expected.high)
    )
    assert np.isinf(mean_interval([0.1])[2])
    assert difference_text({"mean": 0.1, "low": -np.inf, "high": np.inf}) == "+0.100 (one fold)"


def test_seeds_of_a_fold_are_one_observation():
    right, half = [0, 0, 1, 1], [0, 1, 1, 0]
    ours = [make_result(right, right), make_result(right, half)]
    ours.append(dataclasses.replace(ours[0], fold=1))
    other = [make_result(right, half), dataclasses.replace(ours[1], fold=1)]
    tree = summary({OURS: ours, "majority": other}, make_study(("", "")), OURS)
    assert tree[OURS]["folds"] == [0, 1]
    assert tree[OURS]["metrics"]["accuracy"]["values"] == [0.75, 1.0]
    difference = tree["majority"]["metrics"]["accuracy"]["difference"]
    assert (difference["mean"], difference["folds"]) == (0.375, 2)


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [(0.01, 0.03, "is better"), (-0.03, -0.01, "is worse than X"), (-0.03, 0.01, "below the")],
)
def test_the_verdict_is_plain(low, high, said):
    mean = (low + high) / 2
    entry = {
        "title": "X",
        "metrics": {"macro_f1": {"mean": 0.8, "difference": {"mean": mean, "low": low, "high": high}}},
    }
    assert said in verdict({OURS: {"title": OURS, "metrics": {"macro_f1": {"mean": 0.8 + mean}}}, "x": entry})


def test_results_come_back_from_their_files(tmp_path):
    probabilities = np.random.default_rng(0).random((5, 3)).astype(np.float32)
    result = make_result([0, 1, 2, 0, 1], [0, 1, 1, 0, 2], probabilities=probabilities)
    assert FoldResult.load(tmp_path, 0) is None
    result.save(tmp_path)
    again = FoldResult.load(tmp_path, 0)
    np.testing.assert_array_equal(again.probabilities_nk, probabilities)
    np.testing.assert_array_equal(again.predicted_n, result.predicted_n)
    assert again.known == [0, 1, 2] and again.method == OURS


def test_search_spaces():
    config = ExperimentConfig().merge(
        {"search.space": {"model.depth": [1, 2], "train.lr": [1e-3, 1e-2, 1e-1]}}
    )
    assert count_trials(config) == 6 and search_space(config)["model.depth"] == {"grid_search": [1, 2]}
    drawn = {
        "search.algorithm": "random",
        "search.num_samples": 4,
        "search.space": {"train.lr": "loguniform(1e-4, 1e-2)", "model.depth": [1, 2]},
    }
    config = ExperimentConfig().merge(drawn)
    assert count_trials(config) == 4
    assert 1e-4 <= search_space(config)["train.lr"].sample() <= 1e-2
    for space, message in (
        ({"train.lr": "uniform(0, 1)"}, "train.lr=0.0 must be positive"),
        ({"train.warmup": [1]}, "unknown setting train.warmup; did you mean train.warmup_steps?"),
        ({"train.lr": "much"}, "search.space.train.lr=much must be a list"),
        ({"crossval.num_folds": [2, 3]}, "changes cells, labels or folds, which all configurations of"),
    ):
        with pytest.raises(ValueError, match=message.replace("(", r"\(")):
            search_space(ExperimentConfig().merge({**drawn, "search.space": space}))
    with pytest.raises(ValueError, match="is a range, which search.algorithm=grid cannot list"):
        search_space(ExperimentConfig().merge({"search.space": {"train.lr": "uniform(0.1, 1)"}}))
