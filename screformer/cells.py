"""Sources of cells to label or explain: the interface, and the source for an AnnData in memory.

The sources for files and atlases are in `data_ingest.cells` and `data_ingest.atlas_cells`.

Axes: n cells.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from screformer.counts import CellCounts, Panels
from screformer.genes import GeneMatch
from screformer.predictor import Predictions, Predictor

CELLS_PER_READ = 4_096


class CellSource(Protocol):
    """Cells that can be read by position. Small and picklable: the reading process opens the data."""

    @property
    def num_cells(self) -> int:
        """Number of cells."""

    def names(self, positions: np.ndarray) -> np.ndarray:
        """Name of each cell, object (n,)."""

    def labels(self, positions: np.ndarray) -> np.ndarray:
        """Known label of each cell, object (n,), "" if unknown."""

    def read(self, positions: np.ndarray) -> CellCounts:
        """Raw counts over the model's genes of cells at increasing positions."""

    def panels(self, positions: np.ndarray) -> Panels:
        """Which of the model's genes were measured in each cell."""

    def identity(self) -> dict[str, str]:
        """Plain values that identify the cells and change if the cells change."""

    @property
    def cells_per_read(self) -> int:
        """Recommended number of cells per read."""


@dataclass(frozen=True, eq=False, kw_only=True)
class AnnDataCells:
    """Cells of an AnnData in memory, or backed by a file."""

    adata: Any
    counts: Any
    """The count matrix: X, a layer or raw.X."""
    gene_names: Any
    match: GeneMatch
    source: str
    """Name used in messages."""

    @classmethod
    def open(
        cls,
        predictor: Predictor,
        adata: Any,
        *,
        min_gene_overlap: float,
        layer: str = "",
        raw: bool = False,
        source: str = "adata",
    ) -> AnnDataCells:
        """Match the model's genes to an AnnData.

        Args:
            predictor: The model.
            adata: The cells.
            min_gene_overlap: As in `GeneMatch.require`.
            layer: Layer with the counts, instead of X.
            raw: Read counts from `raw.X` instead of X.
            source: Name used in messages.

        Raises:
            ValueError: The layer, raw or X does not exist, or too few genes match.
        """
        layers = ", ".join(adata.layers) or "none"
        if layer and layer not in adata.layers:
            raise ValueError(f"{source} has no layer {layer!r}; it has {layers}")
        if raw and adata.raw is None:
            raise ValueError(f"{source} has no raw; use raw=False to read X")
        owner = adata.raw if raw else adata
        counts = adata.layers[layer] if layer else owner.X
        if counts is None:
            raise ValueError(f"{source} has no X; choose the layer with raw counts (it has {layers})")
        match = predictor.genes.match_var(owner.var)
        match.require(min_gene_overlap, source=source)
        return cls(adata=adata, counts=counts, gene_names=owner.var_names, match=match, source=source)

    @property
    def num_cells(self) -> int:
        """As `CellSource.num_cells`."""
        return int(self.adata.n_obs)

    @property
    def cells_per_read(self) -> int:
        """As `CellSource.cells_per_read`."""
        return CELLS_PER_READ

    def names(self, positions: np.ndarray) -> np.ndarray:
        """As `CellSource.names`."""
        return self.adata.obs_names.astype(str).to_numpy(dtype=object)[positions]

    def labels(self, positions: np.ndarray) -> np.ndarray:
        """As `CellSource.labels`: none are known."""
        return np.full(len(positions), "", dtype=object)

    def read(self, positions: np.ndarray) -> CellCounts:
        """As `CellSource.read`.

        Raises:
            ValueError: The values are not raw counts.
        """
        rows = slice(int(positions[0]), int(positions[-1]) + 1) if len(positions) else slice(0, 0)
        block = self.counts[rows] if rows.stop - rows.start == len(positions) else self.counts[positions]
        places = [
            f"layer={name!r}" for name in self.adata.layers if self.adata.layers[name] is not self.counts
        ]

        def place(row: int, column: int) -> str:
            return f"cell {self.adata.obs_names[positions[row]]!r}, gene {self.gene_names[column]!r}"

        return self.match.select(block, source=self.source, place=place, elsewhere=" or ".join(places))

    def panels(self, positions: np.ndarray) -> Panels:
        """As `CellSource.panels`: the genes in the AnnData."""
        return Panels.one(self.match.measured_g, len(positions))

    def identity(self) -> dict[str, str]:
        """As `CellSource.identity`: empty, because nothing is saved for it."""
        return {}


def predictions(predictor: Predictor, source: CellSource) -> Iterator[Predictions]:
    """Label all cells of a source, a few thousand at a time; yields at least one part, possibly empty."""
    for start in range(0, max(source.num_cells, 1), source.cells_per_read):
        stop = min(start + source.cells_per_read, source.num_cells)
        yield predictor.predict(source.read(np.arange(start, stop)))
