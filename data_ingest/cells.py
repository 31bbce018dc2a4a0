"""Cells of an .h5ad file, to label or explain. Registered models contain a copy of this module.

Axes: n cells.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from data_ingest.h5ad import H5adFile
from screformer.cells import CELLS_PER_READ
from screformer.counts import CellCounts, Panels
from screformer.genes import GeneMatch
from screformer.predictor import Predictor

_CELLS_PER_BLOCK = 2048
"""Number of cells whose counts over all of the file's genes are in memory at a time."""


@dataclass(frozen=True, eq=False)
class H5adCells:
    """Cells of an .h5ad file."""

    path: Path
    layer: str | None
    raw: bool
    match: GeneMatch
    num_cells: int
    label_column: str
    column_major: bool
    """Whether each read scans the whole matrix, so few large reads are better."""

    @classmethod
    def open(
        cls,
        predictor: Predictor,
        path: Path,
        *,
        min_gene_overlap: float,
        layer: str | None = None,
        raw: bool = False,
        label_column: str = "",
    ) -> H5adCells:
        """Match the model's genes to a file.

        Args:
            predictor: The model.
            path: The file.
            min_gene_overlap: As in `GeneMatch.require`.
            layer: Layer with the counts, instead of X.
            raw: Read counts from `raw.X` instead of X.
            label_column: obs column of known labels; used if the file has it.

        Raises:
            ValueError: The file is unreadable, or too few genes match.
        """
        with H5adFile.open(path, layer=layer, raw=raw) as file:
            match = predictor.genes.match_var(file.var)
            match.require(min_gene_overlap, source=f"{path} ({file.source})")
            column = label_column if label_column in file.obs else ""
            return cls(path.resolve(), layer, raw, match, file.n_cells, column, file.format == "csc")

    @property
    def cells_per_read(self) -> int:
        """As `CellSource.cells_per_read`."""
        return (4 if self.column_major else 1) * CELLS_PER_READ

    def names(self, positions: np.ndarray) -> np.ndarray:
        """As `CellSource.names`."""
        return self._obs.index.astype(str).to_numpy(dtype=object)[positions]

    def labels(self, positions: np.ndarray) -> np.ndarray:
        """As `CellSource.labels`."""
        if not self.label_column:
            return np.full(len(positions), "", dtype=object)
        return (
            self._obs[self.label_column]
            .astype(object)
            .fillna("")
            .astype(str)
            .to_numpy(dtype=object)[positions]
        )

    def read(self, positions: np.ndarray) -> CellCounts:
        """As `CellSource.read`.

        Raises:
            ValueError: Values are not raw counts.
        """
        parts = []
        with H5adFile.open(self.path, layer=self.layer, raw=self.raw) as file:
            size = self.cells_per_read if self.column_major else _CELLS_PER_BLOCK
            for first in np.unique(positions // size) * size:
                inside = positions[(positions >= first) & (positions < first + size)]
                start, stop = int(inside[0]), int(inside[-1]) + 1
                for _, counts in file.chunks(size, start=start, stop=stop):
                    parts.append(self.match.select(counts[inside - start]))
        return CellCounts.joined(parts, self.panels(positions))

    def panels(self, positions: np.ndarray) -> Panels:
        """As `CellSource.panels`: the genes in the file."""
        return Panels.one(self.match.measured_g, len(positions))

    def identity(self) -> dict[str, str]:
        """As `CellSource.identity`."""
        stat = self.path.stat()
        return {
            "h5ad": str(self.path),
            "bytes": str(stat.st_size),
            "changed": str(stat.st_mtime_ns),
            "counts": self.layer or str(self.raw),
        }

    @cached_property
    def _obs(self) -> pd.DataFrame:
        with H5adFile.open(self.path, layer=self.layer, raw=self.raw) as file:
            return file.obs

    def __getstate__(self) -> dict[str, object]:
        """Leave out obs; each process reads it if needed."""
        return {name: value for name, value in self.__dict__.items() if name != "_obs"}
