"""Raw counts of cells, from any reader to the model: one shape, one check, one normalisation.

Axes: n cells, v columns of an input, g genes of the vocabulary, p gene panels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse

COUNTS_PER_CELL = 10_000.0
"""Expression values are log1p of counts per so many counts."""

LEAST_COUNTS, GENES_PER_COUNT = 100, 20
"""A cell with fewer counts in all than 100, and than one in twenty measured genes, says nothing. Of the data
sets in docs/results.md at most 1 % of the cells are below, though some measure 100 genes only."""

_LARGEST_EXACT = 1 << 24
"""Above it, float32 no longer holds every integer; counts are stored as float32, as in Census."""


@dataclass(frozen=True, eq=False)
class Panels:
    """Which of the vocabulary's genes were measured in which cells.

    A gene outside of a cell's panel is unknown there, not zero.
    """

    measured_pg: np.ndarray
    """Genes of each panel, bool (p, g)."""
    panels_n: np.ndarray
    """Panel of each cell, int64 (n,)."""

    @classmethod
    def one(cls, measured_g: np.ndarray, num_cells: int) -> Panels:
        """Cells that share a panel."""
        return cls(np.asarray(measured_g, dtype=bool)[None], np.zeros(num_cells, dtype=np.int64))

    def take(self, cells: np.ndarray) -> Panels:
        """Those of some cells, without the panels that none of them has."""
        used, panels_n = np.unique(self.panels_n[cells], return_inverse=True)
        return Panels(self.measured_pg[used], panels_n.astype(np.int64))


@dataclass(frozen=True, eq=False)
class CellCounts:
    """Raw counts of n cells over the model's genes, with what is needed to read them."""

    counts_ng: sparse.csr_array
    """Raw counts, float32. Columns increase within each row, and no zero is stored."""
    total_n: np.ndarray
    """Library size: counts of each cell over all genes that were measured, float32 (n,)."""
    panels: Panels
    """Which genes were measured in which cells."""

    @classmethod
    def of(
        cls, counts_ng: Any, *, total_n: np.ndarray | None = None, panels: Panels | None = None
    ) -> CellCounts:
        """Put any matrix of counts into this form.

        Args:
            counts_ng: Raw counts, (n, g), dense or sparse.
            total_n: Library sizes; None sums the given counts.
            panels: None: every gene was measured in every cell.
        """
        matrix = sparse.csr_array(counts_ng, dtype=np.float32, copy=True)
        matrix.sum_duplicates()
        matrix.eliminate_zeros()
        if total_n is None:
            total_n = matrix.sum(axis=1, dtype=np.float64)
        if panels is None:
            panels = Panels.one(np.ones(matrix.shape[1]), matrix.shape[0])
        return cls(matrix, np.asarray(total_n, dtype=np.float32), panels)

    def __len__(self) -> int:
        return len(self.total_n)

    @property
    def lengths_n(self) -> np.ndarray:
        """Detected genes of each cell, int (n,)."""
        return np.diff(self.counts_ng.indptr)

    @property
    def informative_n(self) -> np.ndarray:
        """Which cells hold enough counts to say anything of them, bool (n,).

        Empty droplets do not: they hold a little of everything. A cell needs one count in twenty measured
        genes, and never more than 100 in all.
        """
        measured_n = self.panels.measured_pg.sum(axis=1)[self.panels.panels_n]
        least_n = np.clip(measured_n / GENES_PER_COUNT, 1, LEAST_COUNTS)
        return (self.total_n >= least_n) & (self.lengths_n > 0)

    def take(self, cells: np.ndarray) -> CellCounts:
        """Those of some cells, in the given order."""
        return CellCounts(self.counts_ng[cells], self.total_n[cells], self.panels.take(cells))

    def per_10k(self, reference_g: np.ndarray | None = None) -> np.ndarray:
        """Counts per 10,000 of each stored count, float32 (z,).

        Args:
            reference_g: A usual profile, (g,). With it the 10,000 are what the cell would have over the whole
                profile: the genes of its panel count as their share of it. So a cell has the same values
                whichever genes were measured beside them. None: per 10,000 counts of the library size.
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
    """Refuse anything that is no raw count, and give the rest as float32.

    Args:
        counts_nv: Counts of any dtype, (n, v), dense or sparse.
        source: Where they come from, for the message.
        place: Names the cell and gene of a row and column, where they have names.
        elsewhere: Where counts may be instead, such as `--layer counts`.

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
            f"; the counts may be elsewhere: try {elsewhere}"
            if elsewhere
            else "; give raw counts (often in a layer such as `counts`, or in `raw`)"
        )
        raise ValueError(f"{source} holds {values[position]:g} at {where}: it {what}; {remedy}{places}")
    counts = matrix.astype(np.float32, copy=False)
    return counts if counts.has_sorted_indices else counts.sorted_indices()


def as_csr(counts_nv: Any, *, source: str) -> sparse.csr_matrix:
    """Any matrix of numbers as csr, in a dtype whose sums do not wrap around.

    Raises:
        ValueError: It holds something other than numbers.
    """
    if hasattr(counts_nv, "compute"):  # a dask array
        counts_nv = counts_nv.compute()
    if not sparse.issparse(counts_nv):
        counts_nv = np.asarray(counts_nv)
    return sparse.csr_matrix(counts_nv.astype(sum_dtype(counts_nv.dtype, source=source), copy=False))


def sum_dtype(dtype: np.dtype, *, source: str) -> np.dtype:
    """The dtype in which values of a stored dtype are read: sums of narrow integers would wrap around.

    Raises:
        ValueError: Values of this dtype are no counts.
    """
    if dtype.kind not in "iuf":
        what = "which only says whether a gene was detected" if dtype.kind == "b" else "not numbers"
        raise ValueError(
            f"{source}: values are of type {dtype}, {what}; give raw counts, and keep cell names in the index"
        )
    if dtype.kind == "f":
        return np.dtype(np.float32 if dtype.itemsize <= 4 else np.float64)
    return np.dtype(np.int64)


def _are_counts(values: np.ndarray) -> bool:
    if not (values.min() >= 0 and values.max() <= _LARGEST_EXACT):  # also false where one is missing
        return False
    return values.dtype.kind != "f" or bool((values == np.rint(values)).all())


def _first_bad(values: np.ndarray) -> tuple[int, str, str]:
    """Position of the first value that is no raw count, what is wrong with it, and what helps."""
    with np.errstate(invalid="ignore"):
        kinds = (
            (~np.isfinite(values), "is missing or infinite", "fill genes that were not detected with 0"),
            (values < 0, "is negative", "raw counts are needed, not scaled or centred values"),
            (
                values != np.rint(values),
                "is not a whole number",
                "raw counts are needed, not normalised or log-transformed values",
            ),
            (
                values > _LARGEST_EXACT,
                "is larger than 2^24, which float32 does not hold exactly",
                "check that these are counts",
            ),
        )
    bad, what, remedy = next(kind for kind in kinds if kind[0].any())
    return int(bad.argmax()), what, remedy
