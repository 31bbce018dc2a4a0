"""Folds: no group is on both sides, and every cell is tested once."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_ingest.folds import FILE, load_folds
from data_ingest.make_folds import make_folds


@st.composite
def cells(draw):
    """Cells of donors from a few data sets, with some labels, in random order."""
    num_donors, num_labels = draw(st.integers(2, 14)), draw(st.integers(1, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    sizes = rng.integers(1, draw(st.sampled_from([5, 60])), num_donors)
    donor_n = rng.permutation(np.repeat(np.arange(num_donors), sizes))
    label_n = rng.integers(-1, num_labels, len(donor_n))
    dataset_of_donor = rng.integers(0, draw(st.integers(1, 4)), num_donors)
    return (
        np.char.add("donor", donor_n.astype(str)),
        np.char.add("set", dataset_of_donor[donor_n].astype(str)),
        label_n,
    )


@given(cells(), st.integers(2, 6), st.integers(0, 3), st.sampled_from(["donor_id", "dataset_id", "none"]))
@settings(max_examples=40, deadline=None)
def test_every_cell_is_tested_once_and_no_group_is_on_two_sides(found, num_folds, seed, group_by):
    donors, datasets, labels = found
    try:
        folds = make_folds(group_by, donors, datasets, labels, num_folds, seed)
    except ValueError as error:
        assert "at least 2" in str(error) or "lower it" in str(error)
        return
    groups = {"donor_id": donors, "dataset_id": datasets, "none": np.arange(len(labels))}[group_by]
    tested = []
    for fold in range(len(folds)):
        split = folds.parts(fold, donors, labels, 0.1)
        tested.append(split["test"])
        assert len(split["test"])
        np.testing.assert_array_equal(np.sort(np.concatenate(list(split.values()))), np.arange(len(labels)))
        assert not set(groups[split["test"]]) & set(groups[np.concatenate([split["train"], split["val"]])])
        if not split.notes and group_by != "none":
            assert not set(donors[split["val"]]) & set(donors[split["train"]])
    np.testing.assert_array_equal(np.sort(np.concatenate(tested)), np.arange(len(labels)))
    again = make_folds(group_by, donors, datasets, labels, num_folds, seed)
    np.testing.assert_array_equal(again.fold_n, folds.fold_n)
    for fold in range(len(folds)):
        for part, positions in folds.parts(fold, donors, labels, 0.1).items():
            np.testing.assert_array_equal(positions, again.parts(fold, donors, labels, 0.1)[part])


@given(cells(), st.integers(2, 5), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_labels_are_distributed_within_the_stated_bounds(found, num_folds, seed):
    donors, datasets, labels = found
    if len(labels) >= num_folds:
        folds = make_folds("none", donors, datasets, labels, num_folds, seed)
        for label in np.unique(labels):
            assert np.ptp(np.bincount(folds.fold_n[labels == label], minlength=num_folds)) <= 1
    folds = make_folds("donor_id", donors, datasets, labels, num_folds, seed)
    sizes = np.bincount(folds.fold_n, minlength=len(folds))
    assert np.ptp(sizes) <= np.unique(donors, return_counts=True)[1].max()
    assert any("not crossval.num_folds" in note for note in folds.notes) == (
        len(np.unique(donors)) < num_folds
    )


def test_equal_donors_give_even_labels():
    """Twenty donors with four label distributions: every fold gets about its share of each label."""
    rng = np.random.default_rng(0)
    lean = np.array([rng.dirichlet(np.where(np.arange(4) == donor % 4, 8.0, 1.0)) for donor in range(20)])
    donor_n = np.repeat(np.arange(20), 100)
    label_n = np.concatenate([rng.choice(4, 100, p=share) for share in lean])
    folds = make_folds("donor_id", donor_n.astype(str), np.full(2000, "set"), label_n, 5, 0)
    share_fk = np.stack(
        [np.bincount(label_n[folds.fold_n == fold], minlength=4) for fold in range(5)]
    ) / np.bincount(label_n)
    assert np.abs(share_fk - 0.2).max() < 0.08
    random = np.stack(
        [np.bincount(label_n[(donor_n // 4) == fold], minlength=4) for fold in range(5)]
    ) / np.bincount(label_n)
    assert share_fk.std() < random.std()


def test_caveats_are_reported():
    donors = np.repeat(["a", "b", "c"], 20)
    labels = np.concatenate([np.arange(20) % 2, np.arange(20) % 2, np.full(20, 2)])
    folds = make_folds("donor_id", donors, np.where(donors == "a", "x", "y"), labels, 5, 0)
    assert any("only 3 donors, so 3 folds" in note for note in folds.notes)
    assert any("only one label (c)" in note for note in folds.notes)
    assert folds.labels_of_one_fold(labels) == {2: folds.names[folds.fold_n[-1]]}
    shared = make_folds("dataset_id", donors, np.tile(["x", "y"], 30), labels, 5, 0)
    assert shared.names == ("x", "y") and any(
        "donor a is in dataset_id x, y" in note for note in shared.notes
    )
    assert any("optimistic" in note for note in make_folds("none", donors, donors, labels, 5, 0).notes)
    with pytest.raises(ValueError, match="group_by=study needs at least 2 values, the query has 1"):
        make_folds("study", donors, np.full(60, "x"), labels, 5, 0)
    with pytest.raises(ValueError, match="needs at least 2 donors, the query has 1"):
        make_folds("donor_id", np.full(60, "a"), donors, labels, 5, 0)


def test_saved_folds_are_found_again_by_joinid():
    donors = np.repeat(["a", "b", "c", "d"], 10)
    labels, joinids = np.arange(40) % 3, np.arange(40) * 7 + 3
    folds = make_folds("donor_id", donors, donors, labels, 2, 1)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / FILE
        folds.save(path, joinids)
        order = np.random.default_rng(0).permutation(40)[:25]
        again = load_folds(path, joinids[order])
        np.testing.assert_array_equal(again.fold_n, folds.fold_n[order])
        assert (again.group_by, again.names, again.seed, again.notes) == (
            folds.group_by,
            folds.names,
            folds.seed,
            folds.notes,
        )
        with pytest.raises(ValueError, match=r"lack 1 of the query's 2 cells \(for example joinid 4\)"):
            load_folds(path, np.array([3, 4]))
        (Path(scratch) / "other.parquet").write_bytes(b"nothing")
        with pytest.raises(ValueError, match="cannot be read"):
            load_folds(Path(scratch) / "other.parquet", joinids)
