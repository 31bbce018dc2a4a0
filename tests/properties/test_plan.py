"""Guarantees of the epoch plan, for any sizes: each cell exactly once, equal steps, resumable on any number
of ranks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_ingest.epoch_plan import EpochPlan

WORLD_SIZES = (1, 2, 3, 4, 6, 12)


@st.composite
def plans(draw, shuffle=None):
    lanes = draw(st.sampled_from([12, 24, 60]))
    return EpochPlan(
        num_cells=draw(st.one_of(st.integers(0, 30), st.integers(0, 3000))),
        seed=draw(st.integers(0, 2**32)),
        epoch=draw(st.integers(0, 50)),
        run_length=draw(st.integers(1, 100)),
        cells_per_task=draw(st.integers(lanes, 8 * lanes + 7)),
        global_batch_size=lanes,
        shuffle=draw(st.booleans()) if shuffle is None else shuffle,
    )


def rank_rows(plan, rank, world_size, start_step=0):
    """The cells that a rank reads, as (steps, lanes of the rank)."""
    units = list(plan.units(rank, world_size, start_step))
    lanes = plan.global_batch_size // world_size
    return np.concatenate([plan.unit_cells(unit) for unit in units] or [np.zeros(0, np.int64)]).reshape(
        -1, lanes
    )


def epoch_rows(plan):
    return np.array([plan.cells(step) for step in range(plan.num_steps)], np.int64).reshape(
        plan.num_steps, plan.global_batch_size
    )


@settings(max_examples=150, deadline=None)
@given(plans())
def test_each_cell_comes_exactly_once_and_only_the_last_batch_is_padded(plan):
    rows = epoch_rows(plan)
    assert sorted(rows[rows >= 0]) == list(range(plan.num_cells))
    assert (rows[:-1] >= 0).all()
    assert (
        (rows < 0).sum() == plan.num_steps * plan.global_batch_size - plan.num_cells < plan.global_batch_size
    )


@settings(max_examples=100, deadline=None)
@given(plans(), st.sampled_from(WORLD_SIZES))
def test_ranks_divide_the_global_batches_into_equal_steps(plan, world_size):
    parts = [rank_rows(plan, rank, world_size) for rank in range(world_size)]
    assert {len(part) for part in parts} == {plan.num_steps}
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), epoch_rows(plan))


@settings(max_examples=100, deadline=None)
@given(plans(), st.sampled_from(WORLD_SIZES), st.sampled_from(WORLD_SIZES), st.floats(0, 1))
def test_a_resumed_epoch_has_exactly_the_remaining_cells_on_any_world_size(plan, before, after, share):
    stop = int(share * plan.num_steps)
    taken = [rank_rows(plan, rank, before)[:stop] for rank in range(before)]
    left = [rank_rows(plan, rank, after, start_step=stop) for rank in range(after)]
    rows = np.concatenate([np.concatenate(taken, axis=1), np.concatenate(left, axis=1)])
    np.testing.assert_array_equal(rows, epoch_rows(plan))


@settings(max_examples=50, deadline=None)
@given(plans(shuffle=True))
def test_order_is_fixed_by_seed_and_epoch(plan):
    same = EpochPlan(**{name: getattr(plan, name) for name in plan.__dataclass_fields__})
    np.testing.assert_array_equal(epoch_rows(plan), epoch_rows(same))


@pytest.mark.parametrize("change", [{"epoch": 1}, {"seed": 1}])
def test_epochs_and_seeds_differ(change):
    sizes = {"num_cells": 5000, "run_length": 16, "cells_per_task": 1024, "global_batch_size": 32}
    first, other = (
        EpochPlan(seed=0, epoch=0, **sizes),
        EpochPlan(**({"seed": 0, "epoch": 0} | change), **sizes),
    )
    a, b = epoch_rows(first), epoch_rows(other)
    assert (a == b).mean() < 0.01
    # Nor are they the same batches in another order: two batches of different epochs share few cells.
    overlap = [len(np.intersect1d(row, b[np.flatnonzero((b == row[0]).any(axis=1))[0]])) for row in a[:-1]]
    assert np.mean(overlap) < 3


def test_unshuffled_plan_reads_in_order():
    plan = EpochPlan(
        num_cells=100, seed=0, epoch=0, run_length=8, cells_per_task=40, global_batch_size=8, shuffle=False
    )
    np.testing.assert_array_equal(plan.task_cells(0), np.arange(40).reshape(8, 5).T)


def test_many_ranks_merge_tasks_to_avoid_tiny_reads():
    plan = EpochPlan(
        num_cells=400_000, seed=0, epoch=0, run_length=64, cells_per_task=16_384, global_batch_size=64
    )
    sizes = [len(plan.unit_cells(unit)) for unit in plan.units(3, 16)]
    assert min(sizes[1:-1]) >= 16_384 / 2 and max(sizes) <= 16_384
    assert len(plan.unit_cells(next(plan.units(0, 1)))) == 16_384


def test_a_task_smaller_than_a_global_batch_is_rejected():
    with pytest.raises(
        ValueError, match=r"stream.cells_per_task=32 must be at least train.global_batch_size=64"
    ):
        EpochPlan(num_cells=1, seed=0, epoch=0, run_length=8, cells_per_task=32, global_batch_size=64)


def test_a_world_size_that_does_not_divide_the_batch_is_refused():
    plan = EpochPlan(num_cells=100, seed=0, epoch=0, run_length=8, cells_per_task=64, global_batch_size=64)
    with pytest.raises(ValueError, match=r"global_batch_size=64 is not a multiple of .* \(1 x 3 = 3\)"):
        next(plan.units(0, 3))


def entropy_bits(codes_nb):
    """Mean Shannon entropy of the codes within each batch."""
    total = 0.0
    for row in codes_nb:
        share = np.unique(row, return_counts=True)[1] / len(row)
        total -= (share * np.log2(share)).sum()
    return total / len(codes_nb)


@pytest.mark.parametrize("batch", [16, 64, 256, 1024])
@pytest.mark.parametrize("run_length", [64, 16])
def test_batches_of_label_sorted_cells_are_as_mixed_as_random_ones(batch, run_length):
    """With 130,000 cells sorted by 14 labels of uneven size, and the default task size, batches have at least
    99 % of the entropy of a random order."""
    rng = np.random.default_rng(0)
    labels = np.sort(rng.choice(14, 130_003, p=rng.dirichlet(np.full(14, 3.0))))
    plan = EpochPlan(
        num_cells=len(labels),
        seed=0,
        epoch=3,
        run_length=run_length,
        cells_per_task=16_384,
        global_batch_size=batch,
    )
    ours = np.concatenate([plan.task_cells(task) for task in range(plan.num_tasks)])[:-1]
    random = rng.permutation(len(labels))[: ours.size].reshape(ours.shape)
    assert entropy_bits(labels[ours]) >= 0.99 * entropy_bits(labels[random])


def test_neighbouring_batches_are_mixed_too():
    """Label shares of 1,024 consecutive cells (64 steps of batch size 16) are as even as those of random
    cells, within 2 %."""
    labels = np.sort(np.random.default_rng(0).choice(14, 130_003))
    plan = EpochPlan(
        num_cells=len(labels), seed=0, epoch=0, run_length=64, cells_per_task=16_384, global_batch_size=16
    )
    order = np.concatenate([plan.task_cells(task).ravel() for task in range(plan.num_tasks - 1)])
    windows = labels[order[: len(order) // 1024 * 1024]].reshape(-1, 1024)
    random = np.random.default_rng(1).permutation(labels)[: windows.size].reshape(windows.shape)
    assert entropy_bits(windows) >= 0.98 * entropy_bits(random)
