"""The order of cells in an epoch, as a pure function of (seed, epoch).

The plan determines the global batch of each cell and the rank that reads it.

Terms: a *run* is `run_length` neighbouring cells; runs are shuffled over the whole query. A *task* is about
`cells_per_task` consecutive cells of that order, shuffled among themselves. A task is cut into
`global_batch_size` *lanes*, and each of its global batches takes the next cell of every lane. Each rank owns
whole lanes. So a rank reads only its own cells, ranks do not wait for each other, and the order does not
depend on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from screformer.config import check_task_size, grad_accum_steps


@dataclass(frozen=True)
class ReadUnit:
    """What one read task reads: some lanes of some tasks, without the first steps of the first task."""

    first_task: int
    num_tasks: int
    skip_steps: int
    first_lane: int
    num_lanes: int


@dataclass(frozen=True, kw_only=True)
class EpochPlan:
    """The order of one epoch's cells, indices 0 to num_cells - 1."""

    num_cells: int
    seed: int
    epoch: int
    run_length: int
    cells_per_task: int
    global_batch_size: int
    shuffle: bool = True
    """If False, runs keep their order and cells their lanes; every cell still occurs exactly once."""

    def __post_init__(self) -> None:
        """Check the sizes.

        Raises:
            ValueError: A task can't hold one global batch.
        """
        assert (
            min(self.num_cells, self.seed, self.epoch) >= 0
            and min(self.run_length, self.global_batch_size) >= 1
        )
        check_task_size(self.cells_per_task, self.global_batch_size)

    @property
    def steps_per_task(self) -> int:
        """Number of global batches per task; the last task may have fewer."""
        return self.cells_per_task // self.global_batch_size

    @property
    def num_steps(self) -> int:
        """Number of global batches in the epoch; the last one may have padding."""
        return -(-self.num_cells // self.global_batch_size)

    @property
    def num_tasks(self) -> int:
        """Number of tasks in the epoch."""
        return -(-self.num_steps // self.steps_per_task)

    @cached_property
    def _run_order(self) -> np.ndarray:
        num_runs = -(-self.num_cells // self.run_length)
        if not self.shuffle:
            return np.arange(num_runs)
        return np.random.default_rng([self.seed, self.epoch]).permutation(num_runs)

    def task_cells(self, task: int) -> np.ndarray:
        """Cells of a task, shape (steps, global_batch_size), int64.

        Row s is its s-th global batch; -1 is padding in the last row.
        """
        size, lanes = self.steps_per_task * self.global_batch_size, self.global_batch_size
        start = task * size
        count = min(size, self.num_cells - start)
        assert count > 0, f"task {task} of {self.num_tasks}"
        bounds = np.arange(lanes + 1) * count // lanes
        lengths = np.diff(bounds)
        steps = int(lengths.max())
        keys = np.tile(np.arange(steps, dtype=np.float64), (lanes, 1))
        if self.shuffle:
            keys = np.random.default_rng([self.seed, self.epoch, task]).random((lanes, steps))
        keys[np.arange(steps) >= lengths[:, None]] = (
            np.inf
        )  # a lane that is one cell short ends one step early
        within = np.argsort(keys, axis=1, kind="stable")
        cells = self._cells_at(start + np.minimum(bounds[:-1, None] + within, count - 1))
        cells[within >= lengths[:, None]] = -1
        return np.ascontiguousarray(cells.T)

    def cells(self, step: int) -> np.ndarray:
        """Cells of global batch `step`, shape (global_batch_size,), int64, -1 for padding."""
        return self.task_cells(step // self.steps_per_task)[step % self.steps_per_task]

    def unit_cells(self, unit: ReadUnit) -> np.ndarray:
        """Cells of a read unit in training order, shape (steps x lanes,), int64, -1 for padding."""
        lanes = slice(unit.first_lane, unit.first_lane + unit.num_lanes)
        parts = [
            self.task_cells(task)[:, lanes]
            for task in range(unit.first_task, unit.first_task + unit.num_tasks)
        ]
        parts[0] = parts[0][unit.skip_steps :]
        return np.concatenate(parts).ravel()

    def units(self, rank: int, world_size: int, start_step: int = 0) -> Iterator[ReadUnit]:
        """Read units of a rank, in order, starting at global batch `start_step`.

        Tasks are merged until a unit has at least half of `cells_per_task` cells; otherwise reads would be
        tiny with many ranks.

        Raises:
            ValueError: The global batch is not a multiple of the world size.
        """
        lanes = grad_accum_steps(self.global_batch_size, 1, world_size)
        assert 0 <= rank < world_size and 0 <= start_step <= self.num_steps
        if start_step == self.num_steps:
            return
        joined = max(1, -(-self.cells_per_task // (2 * lanes * self.steps_per_task)))
        task, skip = divmod(start_step, self.steps_per_task)
        while task < self.num_tasks:
            # The first unit of an epoch is a single task, because training waits for it.
            count = min(joined if task > start_step // self.steps_per_task else 1, self.num_tasks - task)
            yield ReadUnit(task, count, skip, rank * lanes, lanes)
            task, skip = task + count, 0

    def _cells_at(self, positions: np.ndarray) -> np.ndarray:
        """Cell at each position in the shuffled runs; the query's last run may be shorter than the others."""
        short = self.num_cells % self.run_length
        if short:
            missing = self.run_length - short
            end_of_short = (
                int(np.flatnonzero(self._run_order == len(self._run_order) - 1)[0]) * self.run_length + short
            )
            positions = positions + missing * (positions >= end_of_short)
        return self._run_order[positions // self.run_length] * self.run_length + positions % self.run_length


def sampled_cells(labels_n: np.ndarray, most: int, seed: int, *, even_labels: bool) -> np.ndarray:
    """Indices of a random sample of cells, increasing.

    Args:
        labels_n: Label code of each cell.
        most: Maximum number of cells.
        seed: Random seed.
        even_labels: Sample equally many cells of each label, or all of a label that has fewer.
    """
    num_cells = len(labels_n)
    if num_cells <= most:
        return np.arange(num_cells)
    shuffled = np.random.default_rng([seed, 1]).permutation(num_cells)
    if even_labels:
        labels = labels_n[shuffled]
        by_label = np.argsort(labels, kind="stable")
        place_in_label = np.empty(num_cells, np.int64)
        place_in_label[by_label] = np.arange(num_cells) - np.searchsorted(labels[by_label], labels[by_label])
        shuffled = shuffled[np.argsort(place_in_label, kind="stable")]
    return np.sort(shuffled[:most])
