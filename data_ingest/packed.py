"""Raw counts in narrow types: the rows that read tasks send to training, and the rows of a shard cache.

About 3 bytes per count instead of 8: the index of the gene takes 2 bytes, the count 1. Nothing is lost:
counts that do not fit are stored separately.

Axes: n cells, z their stored counts, g genes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from scipy.sparse import csr_array

_LARGEST = 255
"""Largest count in one byte. A 0 means that the count is in `rare_r`; zeros themselves are not stored."""


@dataclass(frozen=True, eq=False)
class PackedCells:
    """Raw counts of n cells."""

    total_n: np.ndarray
    """Library size, float32 (n,)."""
    offsets_n: np.ndarray
    """Where the counts of each cell start, int64 (n + 1,); the first is 0."""
    genes_z: np.ndarray
    """Gene index of each count, increasing within a cell; uint16, or int32 for more genes."""
    counts_z: np.ndarray
    """The counts, uint8; 0 for those in `rare_r`."""
    rare_offsets_n: np.ndarray
    """Where the rare counts of each cell start, int64 (n + 1,); the first is 0."""
    rare_r: np.ndarray
    """Counts that are not whole numbers up to 255, float32, in the order of `counts_z`."""

    @classmethod
    def of(cls, counts_ng: csr_array, total_n: np.ndarray) -> PackedCells:
        """Pack counts; columns must increase within each row."""
        narrow_z = _narrow(counts_ng.data)
        rare = np.flatnonzero(narrow_z == 0)
        offsets_n = counts_ng.indptr.astype(np.int64)
        genes_z = counts_ng.indices.astype(_gene_type(counts_ng.shape[1]))
        rare_r = counts_ng.data[rare].astype(np.float32, copy=False)
        return cls(total_n, offsets_n, genes_z, narrow_z, np.searchsorted(rare, offsets_n), rare_r)

    @classmethod
    def joined(cls, parts: Sequence[PackedCells]) -> PackedCells:
        """The cells of several parts over the same genes, in order; at least one part."""
        if len(parts) == 1:
            return parts[0]
        return cls(
            np.concatenate([part.total_n for part in parts]),
            _joined_offsets([part.offsets_n for part in parts]),
            np.concatenate([part.genes_z for part in parts]),
            np.concatenate([part.counts_z for part in parts]),
            _joined_offsets([part.rare_offsets_n for part in parts]),
            np.concatenate([part.rare_r for part in parts]),
        )

    def __len__(self) -> int:
        return len(self.total_n)

    def take(self, rows: np.ndarray) -> PackedCells:
        """Some cells, in the given order; -1 is a cell without counts."""
        offsets_n, (genes_z, counts_z) = _gather(rows, self.offsets_n, (self.genes_z, self.counts_z))
        rare_offsets_n, (rare_r,) = _gather(rows, self.rare_offsets_n, (self.rare_r,))
        total_n = np.append(self.total_n, np.float32(0))[rows]
        return PackedCells(total_n, offsets_n, genes_z, counts_z, rare_offsets_n, rare_r)

    def over(self, index_g: np.ndarray, num_genes: int) -> PackedCells:
        """The same cells over other genes; counts of genes that are not among them are left out.

        Args:
            index_g: New index of each gene, -1 for none.
            num_genes: Number of the new genes.
        """
        kind = _gene_type(num_genes + 1)
        nowhere = kind.type(num_genes)
        gene_z = np.where(index_g < 0, nowhere, index_g).astype(kind).take(self.genes_z)
        kept = np.flatnonzero(gene_z != nowhere)
        offsets_n, counts_z, rare_r = self.offsets_n, self.counts_z, self.rare_r
        if len(kept) < len(gene_z):
            offsets_n = np.searchsorted(kept, offsets_n)
            rare_r = rare_r[gene_z[np.flatnonzero(counts_z == 0)] != nowhere]
            gene_z, counts_z = gene_z.take(kept), counts_z.take(kept)
        rare_offsets_n = np.searchsorted(np.flatnonzero(counts_z == 0), offsets_n)
        gene_z = gene_z.astype(_gene_type(num_genes), copy=False)
        found = PackedCells(self.total_n, offsets_n, gene_z, counts_z, rare_offsets_n, rare_r)
        if (np.diff(index_g[index_g >= 0]) > 0).all():
            return found
        return PackedCells.of(in_gene_order(found.counts_ng(num_genes)), self.total_n)

    def values_z(self) -> np.ndarray:
        """The counts, float32."""
        values_z = self.counts_z.astype(np.float32)
        if len(self.rare_r):
            values_z[np.flatnonzero(self.counts_z == 0)] = self.rare_r
        return values_z

    def counts_ng(self, num_genes: int) -> csr_array:
        """The counts as a matrix, float32."""
        # scipy would widen the gene indices if the offsets were wider.
        kind = np.int32 if len(self.genes_z) < 1 << 31 else np.int64
        parts = (self.values_z(), self.genes_z.astype(kind), self.offsets_n.astype(kind))
        return csr_array(parts, shape=(len(self), num_genes))

    def columns(self, first: int, last: int) -> list[pa.Array]:
        """Columns `total`, `genes`, `counts` and `rare` of the rows in a range, in Arrow's types."""
        inner, rare = self.offsets_n[first : last + 1], self.rare_offsets_n[first : last + 1]
        return [
            pa.array(self.total_n[first:last]),
            *(_lists(inner, values) for values in (self.genes_z, self.counts_z)),
            _lists(rare, self.rare_r),
        ]

    @classmethod
    def from_table(cls, table: pa.Table | pa.RecordBatch) -> PackedCells:
        """The cells of a table with the columns `fields`."""
        total, genes, counts, rare = (_whole(table[name]) for name in ("total", "genes", "counts", "rare"))
        offsets_n, rare_offsets_n = genes.offsets.to_numpy(), rare.offsets.to_numpy()
        return cls(
            total.to_numpy(),
            offsets_n - offsets_n[0],
            genes.flatten().to_numpy(),
            counts.flatten().to_numpy(),
            rare_offsets_n - rare_offsets_n[0],
            rare.flatten().to_numpy(),
        )


@dataclass(frozen=True, eq=False)
class CachedRows:
    """Where the cells and genes of a stream are in a shard cache."""

    rows: np.ndarray
    """Shape (n,), int64, increasing: row of each cell of the plan."""
    index_g: np.ndarray | None
    """int32: vocabulary index of each gene of the cache, -1 for none; None if the genes are the same."""


def fields(num_genes: int) -> list[pa.Field]:
    """Arrow fields of `PackedCells.columns`."""
    return [
        pa.field("total", pa.float32()),
        pa.field("genes", pa.large_list(pa.from_numpy_dtype(_gene_type(num_genes)))),
        pa.field("counts", pa.large_list(pa.uint8())),
        pa.field("rare", pa.large_list(pa.float32())),
    ]


def in_gene_order(matrix: csr_array) -> csr_array:
    """The matrix with increasing columns in each row.

    Raises:
        ValueError: A row has a column twice.
    """
    falls = matrix.indices[1:] <= matrix.indices[:-1]
    borders = matrix.indptr[1:-1]
    falls[borders[(borders > 0) & (borders < len(matrix.indices))] - 1] = False
    if not falls.any():
        return matrix
    rows = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
    order = np.lexsort((matrix.indices, rows))
    indices = matrix.indices[order]
    if ((indices[1:] == indices[:-1]) & (rows[1:] == rows[:-1])).any():
        raise ValueError("a cell has a gene twice")
    return csr_array((matrix.data[order], indices, matrix.indptr), shape=matrix.shape)


def _narrow(values: np.ndarray) -> np.ndarray:
    """The values as uint8, with 0 for those that are not whole numbers from 1 to 255."""
    inside = (values >= 0) & (values <= _LARGEST)
    narrow = np.where(inside, values, 0).astype(np.uint8)
    narrow[narrow != values] = 0
    return narrow


def _gene_type(num_genes: int) -> np.dtype:
    return np.dtype(np.uint16 if num_genes <= 1 << 16 else np.int32)


def _joined_offsets(parts: Sequence[np.ndarray]) -> np.ndarray:
    lengths = np.concatenate([np.diff(part) for part in parts])
    return np.concatenate([[0], np.cumsum(lengths)])


def _gather(
    rows: np.ndarray, offsets: np.ndarray, arrays: Sequence[np.ndarray]
) -> tuple[np.ndarray, list[np.ndarray]]:
    """New offsets and the values of some rows; row -1 is empty."""
    lengths = np.append(np.diff(offsets), 0)[rows]
    starts = offsets[rows]
    new_offsets = np.concatenate([[0], np.cumsum(lengths)])
    if not new_offsets[-1]:
        return new_offsets, [values[:0] for values in arrays]
    # Copying whole rows, one slice each, is twice as fast as gathering their values with numpy or Arrow's
    # `take`.
    slices = [slice(*ends) for ends in zip(starts.tolist(), (starts + lengths).tolist(), strict=True)]
    return new_offsets, [np.concatenate([values[each] for each in slices]) for values in arrays]


def _lists(offsets: np.ndarray, values: np.ndarray) -> pa.Array:
    inside = values[offsets[0] : offsets[-1]]
    return pa.LargeListArray.from_arrays(pa.array(offsets - offsets[0]), inside)


def _whole(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
