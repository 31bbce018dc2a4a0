import numpy as np
import pytest

from data_ingest.split import few_of_each, split_cells
from screformer.config import SplitConfig


def make_cells(num_donors=12, num_labels=5, seed=0):
    rng = np.random.default_rng(seed)
    donors = np.repeat([f"donor{i}" for i in range(num_donors)], rng.integers(50, 200, num_donors))
    return donors, rng.choice(num_labels, len(donors), p=rng.dirichlet(np.full(num_labels, 5.0)))


def check_parts(split, num_cells):
    np.testing.assert_array_equal(
        np.sort(np.concatenate([split["train"], split["val"], split["test"]])), np.arange(num_cells)
    )
    assert all(part.dtype == np.int64 and (np.diff(part) > 0).all() for part in split.values())


def test_groups_stay_whole_and_labels_are_distributed():
    donors, labels = make_cells()
    split = split_cells(donors, labels, SplitConfig(test_fraction=0.25, val_fraction=0.15), seed=0)
    check_parts(split, len(donors))
    of_part = {name: set(donors[part]) for name, part in split.items()}
    assert (
        not of_part["train"] & of_part["test"]
        and not of_part["train"] & of_part["val"]
        and not of_part["val"] & of_part["test"]
    )
    assert split.notes == ()
    assert len(split["test"]) / len(donors) == pytest.approx(0.25, abs=0.03)
    assert len(split["val"]) / (len(donors) - len(split["test"])) == pytest.approx(0.15, abs=0.05)
    for part in split.values():
        share = np.bincount(labels[part], minlength=5) / len(part)
        assert np.abs(share - np.bincount(labels) / len(labels)).max() < 0.06


def test_seed_fixes_the_split():
    donors, labels = make_cells()
    splits = [split_cells(donors, labels, SplitConfig(), seed=seed) for seed in (0, 0, 1, 2, 3)]
    assert all((splits[0][name] == splits[1][name]).all() for name in splits[0])
    assert len({tuple(split["test"]) for split in splits}) > 1


def test_named_groups_are_held_out():
    donors, labels = make_cells()
    split = split_cells(donors, labels, SplitConfig(test_groups=("donor3", "donor7")), seed=0)
    check_parts(split, len(donors))
    assert set(donors[split["test"]]) == {"donor3", "donor7"}


def test_unknown_group_is_named_with_the_existing_ones():
    donors, labels = make_cells(num_donors=3)
    with pytest.raises(
        ValueError,
        match=r"split.test_groups: no cell has donor_id 'donr1'; choose from donor0, donor1, donor2",
    ):
        split_cells(donors, labels, SplitConfig(test_groups=("donr1",)), seed=0)


def test_holding_everything_out_is_rejected():
    donors, labels = make_cells(num_donors=2)
    with pytest.raises(ValueError, match="holds out every donor_id .*leave some for training"):
        split_cells(donors, labels, SplitConfig(test_groups=("donor0", "donor1")), seed=0)


def test_one_group_cannot_be_tested_on_others():
    labels = np.zeros(50, int)
    with pytest.raises(ValueError, match=r"has only one group, 'only'.*split.test_fraction=0"):
        split_cells(["only"] * 50, labels, SplitConfig(), seed=0)


def test_too_few_groups_validate_on_random_cells_with_a_note(caplog):
    donors = np.repeat(["a", "b"], [300, 300])
    labels = np.tile([0, 0, 1], 200)
    split = split_cells(donors, labels, SplitConfig(test_groups=("b",), val_fraction=0.1), seed=0)
    check_parts(split, 600)
    assert len(split["val"]) == 30 and (labels[split["val"]] == 1).sum() == 10
    assert set(donors[split["val"]]) == {"a"}
    assert "random cells of the training groups because there is only one training group" in split.notes[0]
    assert split.notes[0] in caplog.text


def test_validation_never_removes_a_label_from_training():
    donors = np.repeat(["a", "b", "c", "d"], 100)
    labels = np.repeat([0, 1, 2, 3], 100)  # each label in one donor only
    split = split_cells(donors, labels, SplitConfig(test_fraction=0, val_fraction=0.25), seed=0)
    check_parts(split, 400)
    assert set(labels[split["train"]]) == {0, 1, 2, 3}
    assert "remove a label" in split.notes[0]


def test_a_rare_label_keeps_a_cell_to_train_on():
    labels = np.array([0] * 99 + [1])
    split = split_cells(["a"] * 100, labels, SplitConfig(test_fraction=0, val_fraction=0.9), seed=0)
    assert 99 in split["train"]


def test_nothing_held_out():
    donors, labels = make_cells()
    split = split_cells(donors, labels, SplitConfig(test_fraction=0, val_fraction=0), seed=0)
    assert len(split["train"]) == len(donors) and not len(split["val"]) and not len(split["test"])


def test_cells_without_a_label_are_split_like_others():
    donors, labels = make_cells()
    labels[::7] = -1
    check_parts(split_cells(donors, labels, SplitConfig(), seed=0), len(donors))


def test_few_cells_of_each_label_are_among_more():
    labels = np.array([0] * 50 + [1] * 30 + [2] * 3 + [-1] * 20)
    cells = np.arange(0, len(labels), 2)
    one, five, all_of_them = (few_of_each(cells, labels, most, seed=3) for most in (1, 5, 100))
    assert np.bincount(labels[one]).tolist() == [1, 1, 1] and np.bincount(labels[five]).tolist() == [5, 5, 2]
    assert set(one) < set(five) < set(all_of_them) == set(cells[labels[cells] >= 0])
    assert set(few_of_each(cells, labels, 5, seed=4)) != set(five)
