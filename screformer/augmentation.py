"""Augment training cells by lower sequencing depth and smaller gene panels.

A pure function of seed, epoch and cell, independent of the number of ranks, the batch and resuming.

Axes: n cells, g genes of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse

from screformer.counts import CellCounts, Panels

LEAST_DEPTH = 0.25
"""Minimum share of counts that a thinned cell keeps."""
LEAST_GENES = 0.15
"""Minimum share of measured input genes that a cell with a random panel keeps."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Augmentation:
    """Changes training cells before they become tokens. Picklable."""

    thinned_share: float
    """Share of cells whose counts are thinned binomially."""
    panel_share: float
    """Share of cells from which some genes are removed; these are then unknown, not zero."""
    genes: np.ndarray
    """Vocabulary indices of the genes that can be removed, increasing."""
    seed: int

    def __call__(self, cells: CellCounts, joinids_n: np.ndarray, epoch: int) -> CellCounts:
        """The augmented cells in one epoch.

        Args:
            cells: Raw counts.
            joinids_n: Ids of the cells; negative ones (padding) are left unchanged.
            epoch: Number of the epoch; every cell occurs once per epoch.
        """
        counts_ng = cells.counts_ng.copy()
        total_n = cells.total_n.copy()
        measured_ng = cells.panels.measured_pg[cells.panels.panels_n]
        for row in np.flatnonzero(joinids_n >= 0):
            rng = np.random.default_rng([self.seed, epoch, int(joinids_n[row])])
            stored = slice(counts_ng.indptr[row], counts_ng.indptr[row + 1])
            thins, loses = rng.random(2) < (self.thinned_share, self.panel_share)
            if thins:
                depth = rng.uniform(LEAST_DEPTH, 1)
                counts_ng.data[stored] = rng.binomial(counts_ng.data[stored].astype(np.int64), depth)
                total_n[row] *= depth
            if loses:
                lost = self.genes[rng.random(len(self.genes)) >= rng.uniform(LEAST_GENES, 1)]
                measured_ng[row, lost] = False
                counts_ng.data[stored] *= measured_ng[row, counts_ng.indices[stored]]
        counts_ng.eliminate_zeros()
        return CellCounts(
            sparse.csr_array(counts_ng), total_n, Panels(measured_ng, np.arange(len(cells), dtype=np.int64))
        )
