"""Ray Data source of cells: reads SOMA or a shard cache, one task per unit of an epoch's plan.

Axes: `n` cells (rows), `z` their stored values. Rows with cell -1 are padding from the plan. Cells without
counts are empty lists.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from functools import lru_cache, partial
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import ray
from ray.data import Datasource
from ray.data.block import BlockMetadata
from ray.data.datasource import ReadTask
from scipy.sparse import csr_array

from data_ingest.atlas import MEASUREMENT, X_LAYER, damaged, open_atlas, reading
from data_ingest.epoch_plan import EpochPlan, ReadUnit
from data_ingest.packed import CachedRows, PackedCells, fields, in_gene_order
from screformer.config import AtlasConfig
from screformer.counts import CellCounts, Panels
from screformer.tokenizer import GeneVocabulary

BLOCK_BYTES = 32 * 2**20
"""Size of a block: small, so several fit in a small object store."""
_ROUNDING = 1e-4
"""Relative difference between two sums of a cell's counts that may be due to rounding. One count is found in
cells with fewer than 10,000."""
_CELLS_PER_READ, _BUFFER_BYTES = 2048, 24 * 2**20
"""Cells per SOMA query, and buffer per column. Larger ones get new pages each time: slower by a third."""


@dataclasses.dataclass(frozen=True, eq=False)
class CellArrays:
    """Data shared by all read tasks.

    Stored once in Ray's object store and mapped into each process without a copy.
    """

    joinids: np.ndarray
    """Shape (n,), int64: joinid of each cell of the plan; increasing if they are read from the atlas."""
    labels: np.ndarray
    """Shape (n,), int64: label code, -1 for none."""
    gene_of_var: np.ndarray
    """int32: vocabulary index of each var joinid, -1 for a gene outside the vocabulary."""
    panels: Panels
    """Which genes were measured in each of the n cells."""
    raw_sums: np.ndarray | None = None
    """Shape (n,), float32: total counts of each cell according to obs; None skips the check."""
    cached: CachedRows | None = None
    """Where the cells are in a shard cache; None if they are read from the atlas."""

    def check_sums(self, cells: np.ndarray, total_n: np.ndarray) -> None:
        """Reject cells whose counts differ from those ingested, for example because a byte of X changed.

        Args:
            cells: Positions of the cells that were read.
            total_n: Total counts of each cell, as read.

        Raises:
            ValueError: A total differs from obs.
        """
        if self.raw_sums is not None:
            expected_n = self.raw_sums[cells]
            wrong = np.flatnonzero(
                ~np.isclose(total_n, expected_n, rtol=_ROUNDING, atol=0) & ~np.isnan(expected_n)
            )
            if len(wrong):
                raise ValueError(
                    f"the counts of cell {self.joinids[cells[wrong[0]]]} of the atlas sum to"
                    f" {total_n[wrong[0]]:g}, but raw_sum in obs is {expected_n[wrong[0]]:g}"
                    f" ({len(wrong)} of {len(cells)} cells read together): X is damaged; find all such"
                    " cells with `jobs.ingest --verify`"
                )


class Reader(Protocol):
    """Reads the counts of cells. Picklable and small, because each read task has one."""

    def __call__(self, arrays: CellArrays, cells: np.ndarray) -> tuple[PackedCells, np.ndarray]:
        """Read the cells at some positions, increasing, over the vocabulary.

        Returns:
            Cells, and the row of each of the given ones among them.

        Raises:
            ValueError: Counts differ from those that were ingested.
        """


@dataclasses.dataclass(frozen=True)
class AtlasReader:
    """Reads cells from SOMA."""

    atlas: AtlasConfig
    threads: int = 1
    """Number of TileDB threads."""

    def __call__(self, arrays: CellArrays, cells: np.ndarray) -> tuple[PackedCells, np.ndarray]:
        """As `Reader`."""
        parts = []
        for first in range(0, max(len(cells), 1), _CELLS_PER_READ):
            part = cells[first : first + _CELLS_PER_READ]
            found = read_checked(self.atlas, arrays, part, threads=self.threads)
            parts.append(PackedCells.of(found.counts_ng, found.total_n))
        return PackedCells.joined(parts), np.arange(len(cells))


class CellDatasource(Datasource):
    """The cells of one rank in one epoch, starting at `start_step`, in the order of the plan."""

    def __init__(
        self,
        read: Reader,
        arrays: ray.ObjectRef | CellArrays,
        plan: EpochPlan,
        *,
        num_genes: int,
        rank: int,
        world_size: int,
        start_step: int = 0,
    ) -> None:
        """Plan the read tasks; nothing is read yet.

        Args:
            read: Reads the counts.
            arrays: The arrays that the plan's indices refer to; a reference if Ray runs the tasks.
            plan: Order of the epoch.
            num_genes: Size of the vocabulary.
            rank: Rank whose lanes to read.
            world_size: Number of ranks, a divisor of the global batch.
            start_step: Number of global batches of the epoch already taken.
        """
        super().__init__()
        self._schema = schema(num_genes)
        self._task = partial(
            _read_unit, read, arrays, dataclasses.replace(plan), self._schema
        )  # a copy, without the plan's cached order
        self.units = list(plan.units(rank, world_size, start_step))
        self._rows = [_num_rows(plan, unit) for unit in self.units]

    def estimate_inmemory_data_size(self) -> int | None:
        """Unknown before reading."""
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """One task per unit, in order.

        Ray calls this several times per execution; the result is always the same.
        """
        tasks = []
        for unit, rows in zip(self.units, self._rows, strict=True):
            metadata = BlockMetadata(num_rows=rows, size_bytes=None, input_files=None, exec_stats=None)
            tasks.append(ReadTask(partial(self._task, unit), metadata, self._schema, per_task_row_limit))
        return tasks


def read_cells(
    atlas: AtlasConfig, joinids: np.ndarray, gene_of_var: np.ndarray, panels: Panels, *, threads: int = 1
) -> CellCounts:
    """Raw counts of the given cells over the vocabulary.

    Args:
        atlas: The pinned atlas. Its handle stays open in this process for the next call.
        joinids: Shape (n,), int64, increasing.
        gene_of_var: Vocabulary index of each var joinid, -1 for none.
        panels: Which genes were measured in these cells.
        threads: Number of TileDB threads.

    Returns:
        Counts; the library size includes genes outside the vocabulary.
    """
    shape = (len(joinids), panels.measured_pg.shape[1])
    total_n = np.zeros(len(joinids), np.float32)
    genes, counts, segment_cells, segment_lengths = [], [], [], []
    for table in _tables(atlas, joinids, threads) if len(joinids) else ():
        rows, columns, values = (table[name].to_numpy() for name in ("soma_dim_0", "soma_dim_1", "soma_data"))
        if not len(rows):
            continue
        # A segment is a run of values of one cell. With rows in order it is the whole cell, unless a table
        # ends inside it.
        starts = np.concatenate([[0], np.flatnonzero(rows[1:] != rows[:-1]) + 1])
        cells = np.searchsorted(joinids, rows[starts])
        np.add.at(total_n, cells, np.add.reduceat(values, starts))
        lengths = np.diff(starts, append=len(rows))
        gene = gene_of_var[columns]
        if gene.min() < 0 or values.min() == 0:
            keep = (gene >= 0) & (values != 0)
            lengths = np.add.reduceat(keep, starts, dtype=np.int64)
            gene, values = gene[keep], values[keep]
        genes.append(gene)
        counts.append(values)
        segment_cells.append(cells)
        segment_lengths.append(lengths)
    if not genes:
        return CellCounts(csr_array(shape, dtype=np.float32), total_n, panels)
    gene_z, count_z = (parts[0] if len(parts) == 1 else np.concatenate(parts) for parts in (genes, counts))
    count_z = count_z.astype(np.float32, copy=False)
    cells_s, lengths_s = np.concatenate(segment_cells), np.concatenate(segment_lengths)
    offsets = np.concatenate(
        [[0], np.cumsum(np.bincount(cells_s, weights=lengths_s, minlength=len(joinids)))]
    ).astype(np.int64)
    if not (cells_s[1:] >= cells_s[:-1]).all():  # TileDB returned the cells in tiles or out of order
        order = np.lexsort((gene_z, np.repeat(cells_s, lengths_s)))
        gene_z, count_z = gene_z[order], count_z[order]
    try:
        counts_ng = in_gene_order(csr_array((count_z, gene_z, offsets), shape=shape))
    except ValueError as error:
        raise damaged(atlas, str(error)) from error
    return CellCounts(counts_ng, total_n, panels)


def _tables(atlas: AtlasConfig, joinids: np.ndarray, threads: int) -> Iterator[pa.Table]:
    x, _ = _open_x(atlas, threads)
    with reading(atlas):
        yield from x.read((pa.array(joinids),)).tables()


def read_checked(
    atlas: AtlasConfig, arrays: CellArrays, cells: np.ndarray, *, threads: int = 1
) -> CellCounts:
    """Raw counts of the cells at some positions, increasing; `ValueError` where a sum differs from obs.

    Ray's tasks call it. It is in this module because that needs no torch, which takes a second to load.
    """
    panels = arrays.panels.take(cells)
    found = read_cells(atlas, arrays.joinids[cells], arrays.gene_of_var, panels, threads=threads)
    arrays.check_sums(cells, found.total_n)
    return found


def schema(num_genes: int) -> pa.Schema:
    """Columns of the blocks: position of the cell in `CellArrays` (-1: padding), then `packed.fields`."""
    return pa.schema([pa.field("cell", pa.int64()), *fields(num_genes)])


def _read_unit(
    read: Reader, arrays: ray.ObjectRef | CellArrays, plan: EpochPlan, columns: pa.Schema, unit: ReadUnit
) -> Iterator[pa.Table]:
    shared: CellArrays = ray.get(arrays) if isinstance(arrays, ray.ObjectRef) else arrays
    cells = plan.unit_cells(unit)
    sorted_cells = np.sort(cells[cells >= 0])
    found, row_n = read(shared, sorted_cells)
    rows = np.append(row_n, -1)[np.where(cells >= 0, np.searchsorted(sorted_cells, cells), -1)]
    ordered = found.take(rows)
    for first, last in _cuts(ordered.offsets_n, ordered.genes_z.itemsize + 1):
        yield pa.table([pa.array(cells[first:last]), *ordered.columns(first, last)], schema=columns)


def _cuts(offsets: np.ndarray, value_bytes: int) -> Iterable[tuple[int, int]]:
    """Ranges of rows whose values fit into a block; a single cell may exceed it."""
    first, rows = 0, len(offsets) - 1
    while first < rows:
        last = int(np.searchsorted(offsets, offsets[first] + BLOCK_BYTES // value_bytes, side="right")) - 1
        last = min(max(last, first + 1), rows, first + BLOCK_BYTES // 64)
        yield first, last
        first = last


def _num_rows(plan: EpochPlan, unit: ReadUnit) -> int:
    first = unit.first_task * plan.steps_per_task + unit.skip_steps
    last = min((unit.first_task + unit.num_tasks) * plan.steps_per_task, plan.num_steps)
    return (last - first) * unit.num_lanes


@lru_cache(maxsize=2)
def _open_x(atlas: AtlasConfig, threads: int) -> tuple[Any, ExitStack]:
    """X of the atlas, kept open until the process ends: opening costs more than a small read."""
    stack = ExitStack()
    experiment = stack.enter_context(open_atlas(atlas, threads=threads, buffer_bytes=_BUFFER_BYTES))
    return experiment.ms[MEASUREMENT].X[X_LAYER], stack


def gene_of_var(atlas: AtlasConfig, vocabulary: GeneVocabulary) -> np.ndarray:
    """Vocabulary index of each var joinid, int32, -1 for a gene outside the vocabulary.

    Raises:
        ValueError: The atlas has none of the vocabulary's genes.
    """
    with open_atlas(atlas) as experiment:
        var = experiment.ms[MEASUREMENT].var.read(column_names=["soma_joinid", "feature_id"]).concat()
    joinids = var["soma_joinid"].to_numpy()
    found = vocabulary.index(var["feature_id"].to_pylist())
    if not (found >= 0).any():
        raise ValueError(
            f"the atlas {atlas.uri} has none of the vocabulary's {len(vocabulary)} genes (for example"
            f" {vocabulary.feature_ids[0]!r};"
            f" the atlas has {', '.join(var['feature_id'][:3].to_pylist())}); genes are matched by feature_id"
        )
    genes = np.full(int(joinids.max(initial=-1)) + 1, -1, np.int32)
    genes[joinids] = found
    return genes
