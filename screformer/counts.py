"""Raw counts of cells: the type, the check and the normalisation used everywhere.

Axes: n cells, v columns of an input, g genes of the vocabulary, p gene panels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse

COUNTS_PER_CELL = 10_000.0
"""Expression values are log1p of counts per this many counts."""

LEAST_COUNTS, GENES_PER_COUNT = 100, 20
"""A cell is uninformative if it has fewer than 100 counts in total and fewer than one per twenty measured
genes. In the data sets of docs/results.md this affects at most 1 % of the cells, although some data sets
measured only 100 genes."""

_LARGEST_EXACT = 1 << 24
"""Largest count allowed: float32 is exact up to here. Counts are float32, as in Census."""


@dataclass(frozen=True, eq=False)
class Panels:
    """Which of the vocabulary's genes were measured in each cell.

    A gene outside a cell's panel is unknown, not zero.
    """

    measured_pg: np.ndarray
    """Genes of each panel, bool (p, g)."""
    panels_n: np.ndarray
    """Panel of each cell, int64 (n,)."""

    @classmethod
    def one(cls, measured_g: np.ndarray, num_cells: int) -> Panels:
        """Panels of cells that all share one panel."""
        return cls(np.asarray(measured_g, dtype=bool)[None], np.zeros(num_cells, dtype=np.int64))

    def take(self, cells: np.ndarray) -> Panels:
        """The panels of some cells, without unused panels."""
        used, panels_n = np.unique(self.panels_n[cells], return_inverse=True)
        return Panels(self.measured_pg[used], panels_n.astype(np.int64))


@dataclass(frozen=True, eq=False)
class CellCounts:
    """Raw counts of n cells over the model's genes, with library sizes and panels."""

    counts_ng: sparse.csr_array
    """Raw counts, float32. Columns increase within each row, and zeros are not stored."""
    total_n: np.ndarray
    """Library size: total counts of each cell over all measured genes, float32 (n,)."""
    panels: Panels
    """Which genes were measured in each cell."""

    @classmethod
    def of(
        cls, counts_ng: Any, *, total_n: np.ndarray | None = None, panels: Panels | None = None
    ) -> CellCounts:
        """Convert any matrix of counts.

        Args:
            counts_ng: Raw counts, (n, g), dense or sparse.
            total_n: Library sizes; None to sum the given counts.
            panels: None if every gene was measured in every cell.
        """
        matrix = sparse.csr_array(counts_ng, dtype=np.float32, copy=True)
        matrix.sum_duplicates()
        matrix.eliminate_zeros()
        if total_n is None:
            total_n = matrix.sum(axis=1, dtype=np.float64)
        if panels is None:
            panels = Panels.one(np.ones(matrix.shape[1]), matrix.shape[0])
        return cls(matrix, np.asarray(total_n, dtype=np.float32), panels)

    @classmethod
    def joined(cls, parts: Sequence[CellCounts], panels: Panels) -> CellCounts:
        """The cells of several parts, in order.

        Args:
            parts: Counts over the same genes; may be empty.
            panels: Panels of all cells.
        """
        empty = sparse.csr_array((0, panels.measured_pg.shape[1]), dtype=np.float32)
        rows, totals = [part.counts_ng for part in parts], [part.total_n for part in parts]
        counts_ng = sparse.csr_array(sparse.vstack(rows or [empty], format="csr"))
        return cls(counts_ng, np.concatenate(totals or [np.zeros(0, np.float32)]), panels)

    def __len__(self) -> int:
        return len(self.total_n)

    @property
    def lengths_n(self) -> np.ndarray:
        """Number of detected genes of each cell, int (n,)."""
        return np.diff(self.counts_ng.indptr)

    @property
    def informative_n(self) -> np.ndarray:
        """Which cells have enough counts to be labelled, bool (n,).

        Empty droplets do not: they contain a little of everything. A cell needs one count per twenty measured
        genes, up to 100 in total.
        """
        measured_n = self.panels.measured_pg.sum(axis=1)[self.panels.panels_n]
        least_n = np.clip(measured_n / GENES_PER_COUNT, 1, LEAST_COUNTS)
        return (self.total_n >= least_n) & (self.lengths_n > 0)

    def take(self, cells: np.ndarray) -> CellCounts:
        """The counts of some cells, in the given order."""
        return CellCounts(self.counts_ng[cells], self.total_n[cells], self.panels.take(cells))

    def per_10k(self, reference_g: np.ndarray | None = None) -> np.ndarray:
        """Counts per 10,000 of each stored count, float32 (z,).

        Args:
            reference_g: A typical profile, (g,). Values are then per 10,000 counts over the whole profile,
                estimated from the share of the profile that the cell's panel covers. So a cell's values do
                not depend on which other genes were measured. None: per 10,000 counts of the library size.
        """
        if reference_g is None:
            total_n, share_n = self.total_n, np.ones(len(self))
        else:
            total_n = self.counts_ng @ (reference_g > 0).astype(np.float64)
            share_n = (self.panels.measured_pg @ reference_g.astype(np.float64))[self.panels.panels_n]
        scale_n = np.divide(
            COUNTS_PER_CELL * share_n, total_n, out=np.zeros(len(self)), where=total_n > 0
        ).astype(np.float32)
        return self.counts_ng.data * np.repeat(scale_n, self.lengths_n)

    def normalised(self, reference_g: np.ndarray | None = None) -> sparse.csr_array:
        """Expression values: log1p of counts `per_10k`, float32 (n, g)."""
        values = (np.log1p(self.per_10k(reference_g)), self.counts_ng.indices, self.counts_ng.indptr)
        return sparse.csr_array(values, shape=self.counts_ng.shape)


def raw_counts(
    counts_nv: Any,
    *,
    source: str,
    place: Callable[[int, int], str] | None = None,
    elsewhere: str = "",
) -> sparse.csr_matrix:
    """Check that values are raw counts, and return them as float32.

    Args:
        counts_nv: Counts of any dtype, (n, v), dense or sparse.
        source: Their origin, for the message.
        place: Names the cell and gene of a row and column, if they have names.
        elsewhere: Another place to look for counts, for example `--layer counts`.

    Raises:
        ValueError: A value is missing, infinite, negative, fractional or above 2^24. The message names the
            first one, its cell and gene, and what to do.
    """
    matrix = as_csr(counts_nv, source=source)
    values = matrix.data
    if len(values) and not _are_counts(values):
        position, what, remedy = _first_bad(values)
        row = int(np.searchsorted(matrix.indptr, position, side="right")) - 1
        column = int(matrix.indices[position])
        where = place(row, column) if place else f"row {row}, column {column}"
        places = (
            f"; if the counts are elsewhere, try {elsewhere}"
            if elsewhere
            else "; pass raw counts (often in a layer named `counts`, or in `raw`)"
        )
        raise ValueError(f"{source} has {values[position]:g} at {where}: it {what}; {remedy}{places}")
    counts = matrix.astype(np.float32, copy=False)
    return counts if counts.has_sorted_indices else counts.sorted_indices()


def as_csr(counts_nv: Any, *, source: str) -> sparse.csr_matrix:
    """Convert any matrix of numbers to csr, with a dtype whose sums do not overflow.

    Raises:
        ValueError: A value is not a number.
    """
    if hasattr(counts_nv, "compute"):  # a dask array
        counts_nv = counts_nv.compute()
    if not sparse.issparse(counts_nv):
        counts_nv = np.asarray(counts_nv)
    return sparse.csr_matrix(counts_nv.astype(sum_dtype(counts_nv.dtype, source=source), copy=False))


def sum_dtype(dtype: np.dtype, *, source: str) -> np.dtype:
    """The dtype in which to read values of a stored dtype, because sums of narrow integers would overflow.

    Raises:
        ValueError: Values of this dtype cannot be counts.
    """
    if dtype.kind not in "iuf":
        what = "which only shows whether a gene was detected" if dtype.kind == "b" else "not numbers"
        raise ValueError(
            f"{source}: values are of type {dtype}, {what}; pass raw counts, and keep cell names in the index"
        )
    if dtype.kind == "f":
        return np.dtype(np.float32 if dtype.itemsize <= 4 else np.float64)
    return np.dtype(np.int64)


def _are_counts(values: np.ndarray) -> bool:
    if not (values.min() >= 0 and values.max() <= _LARGEST_EXACT):  # also false if one is missing
        return False
    return values.dtype.kind != "f" or bool((values == np.rint(values)).all())


def _first_bad(values: np.ndarray) -> tuple[int, str, str]:
    """Position of the first value that is not a raw count, the problem, and the remedy."""
    with np.errstate(invalid="ignore"):
        kinds = (
            (~np.isfinite(values), "is missing or infinite", "use 0 for genes that were not detected"),
            (values < 0, "is negative", "raw counts are needed, not scaled or centred values"),
            (
                values != np.rint(values),
                "is not a whole number",
                "raw counts are needed, not normalised or log-transformed values",
            ),
            (
                values > _LARGEST_EXACT,
                "is larger than 2^24, which float32 cannot represent exactly",
                "check that these are counts",
            ),
        )
    bad, what, remedy = next(kind for kind in kinds if kind[0].any())
    return int(bad.argmax()), what, remedy
