"""Check and sum the counts of files over the joined genes.

Axes: `n` cells, `g` genes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from scipy import sparse

from data_ingest.h5ad import H5adFile
from data_ingest.ingest_files import CheckedFile, ids_of
from data_ingest.ingest_options import IngestOptions
from data_ingest.tasks import map_tasks


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Sums over the counts of a range of cells."""

    raw_sum_n: np.ndarray
    nnz_n: np.ndarray
    cells_g: np.ndarray
    """Number of cells that express each gene."""

    @classmethod
    def none(cls) -> Counts:
        """For a file whose counts are not needed."""
        return cls(raw_sum_n=np.empty(0), nnz_n=np.empty(0, np.int64), cells_g=np.empty(0, np.int64))


@dataclass(frozen=True, kw_only=True)
class NewCells:
    """The cells of a file that are not in the atlas."""

    file: CheckedFile
    rows: np.ndarray
    """Their rows in the file, increasing; may be empty."""
    counts: Counts
    """Counts of all cells of the file; empty if none is new."""
    num_empty: int
    """Number of cells without counts, which are left out."""


def count_files(files: Sequence[CheckedFile], options: IngestOptions) -> list[Counts]:
    """Check all counts of the files, and sum them over the joined genes."""
    step = 4 * options.cells_per_chunk
    calls, owners = [], []
    for index, file in enumerate(files):
        targets = gene_targets(file, {feature_id: i for i, feature_id in enumerate(ids_of(file))})
        for start in range(0, file.n_cells, step):
            calls.append((file.path, targets, start, min(start + step, file.n_cells)))
            owners.append(index)
    results = map_tasks(partial(_count_cells, options=options), calls, "checking counts")
    by_file: list[list[Counts]] = [[] for _ in files]
    for owner, result in zip(owners, results, strict=True):
        by_file[owner].append(result)
    return [
        Counts(
            raw_sum_n=np.concatenate([part.raw_sum_n for part in parts]),
            nnz_n=np.concatenate([part.nnz_n for part in parts]),
            cells_g=np.sum([part.cells_g for part in parts], axis=0),
        )
        for parts in by_file
    ]


def _count_cells(
    path: str, targets_g: np.ndarray, start: int, stop: int, *, options: IngestOptions
) -> Counts:
    width = int(targets_g.max()) + 1
    sums, numbers, cells_g = [], [], np.zeros(width, np.int64)
    with H5adFile.open(path, layer=options.layer, raw=options.use_raw) as file:
        for _, block in file.chunks(options.cells_per_chunk, start=start, stop=stop):
            joined = join_genes(block, targets_g, width)
            sums.append(np.asarray(joined.sum(axis=1, dtype=np.float64)).ravel())
            numbers.append(np.diff(joined.indptr).astype(np.int64))
            cells_g += np.bincount(joined.indices, minlength=width)
    return Counts(raw_sum_n=np.concatenate(sums), nnz_n=np.concatenate(numbers), cells_g=cells_g)


def gene_targets(file: CheckedFile, column_of: Mapping[str, int]) -> np.ndarray:
    """Column of each gene of the file, -1 for genes without an id, int32, shape (g,)."""
    return np.array([column_of.get(feature_id, -1) for feature_id in file.feature_ids_g], dtype=np.int32)


def join_genes(block: sparse.csr_matrix, targets_g: np.ndarray, width: int) -> sparse.csr_matrix:
    """Move columns to their targets, sorted; sum duplicates, drop zeros and genes without a target."""
    columns = targets_g[block.indices]
    kept = (columns >= 0) & (block.data != 0)
    if kept.all():
        joined = sparse.csr_matrix((block.data, columns, block.indptr), shape=(block.shape[0], width))
    else:
        before = np.concatenate([[0], np.cumsum(kept)])
        joined = sparse.csr_matrix(
            (block.data[kept], columns[kept], before[block.indptr]), shape=(block.shape[0], width)
        )
    joined.sum_duplicates()
    return joined
