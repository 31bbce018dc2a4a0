"""Packing counts loses nothing."""

import numpy as np
import pytest
from scipy.sparse import csr_array

from data_ingest.packed import PackedCells, fields, in_gene_order


def some_counts(num_cells=60, num_genes=40, seed=0):
    """Counts of every kind: small, at the limits, large, fractional, and cells without any."""
    rng = np.random.default_rng(seed)
    values = np.array([1, 2, 254, 255, 256, 70_000, 2**24, 0.5, 3.25], np.float32)
    counts = np.where(rng.random((num_cells, num_genes)) < 0.3, rng.choice(values, (num_cells, num_genes)), 0)
    counts[::7] = 0
    return csr_array(counts.astype(np.float32))


def same(one, other):
    return (one.toarray() == other.toarray()).all() and one.dtype == other.dtype == np.float32


@pytest.mark.parametrize("num_genes", [40, 1 << 16, (1 << 16) + 1])
def test_counts_come_back(num_genes):
    counts = some_counts()
    counts = csr_array((counts.data, counts.indices + num_genes - 40, counts.indptr), shape=(60, num_genes))
    packed = PackedCells.of(counts, np.arange(60, dtype=np.float32))
    assert packed.genes_z.itemsize == (2 if num_genes <= 1 << 16 else 4)
    back = packed.counts_ng(num_genes)
    assert (back != counts).nnz == 0 and back.dtype == np.float32 and back.indices.dtype == np.int32
    assert [field.name for field in fields(num_genes)] == ["total", "genes", "counts", "rare"]


def test_rows_in_another_order_and_cells_that_are_missing():
    counts, total = some_counts(), np.arange(60, dtype=np.float32)
    rows = np.array([5, -1, 59, 0, 5, 7, -1])
    taken = PackedCells.of(counts, total).take(rows)
    expected = np.vstack([counts.toarray()[rows], np.zeros((1, 40))])[:-1] * (rows >= 0)[:, None]
    np.testing.assert_array_equal(taken.counts_ng(40).toarray(), expected)
    np.testing.assert_array_equal(taken.total_n, np.where(rows >= 0, rows, 0))
    nothing = PackedCells.of(csr_array((0, 40), dtype=np.float32), np.zeros(0, np.float32))
    assert nothing.take(np.array([-1, -1])).counts_ng(40).shape == (2, 40)


def test_slices_and_joins_are_the_same_cells():
    import pyarrow as pa

    counts, total = some_counts(), np.arange(60, dtype=np.float32)
    packed = PackedCells.of(counts, total)
    schema = pa.schema(fields(40))
    parts = [
        PackedCells.from_table(pa.table(packed.columns(first, last), schema=schema))
        for first, last in ((0, 20), (20, 21), (21, 60))
    ]
    assert same(PackedCells.joined(parts).counts_ng(40), counts)
    table = pa.table(packed.columns(0, 60), schema=schema)
    sliced = PackedCells.from_table(table.slice(13, 9))
    assert same(sliced.counts_ng(40), csr_array(counts[13:22]))
    np.testing.assert_array_equal(sliced.total_n, total[13:22])


def test_other_genes():
    counts = some_counts()
    index = np.full(40, -1, np.int32)
    index[[3, 30, 12, 8]] = [0, 1, 2, 3]  # fewer genes, in another order
    found = PackedCells.of(counts, np.zeros(60, np.float32)).over(index, 5).counts_ng(5)
    np.testing.assert_array_equal(found.toarray()[:, :4], counts.toarray()[:, [3, 30, 12, 8]])
    assert not found.toarray()[:, 4].any()
    np.testing.assert_array_equal(found.indices, in_gene_order(found).indices)
