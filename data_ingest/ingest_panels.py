"""Record which genes the new cells of an ingest measured, as rows of the presence matrix.

The row of a dataset lists the genes of its first file. A later file of the same dataset with different genes
gets its own row, a panel, so genes missing from it are unknown for its cells, not zero. The atlas's metadata
list the cells of each panel (`data_ingest.measured.PANELS`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from data_ingest import schema
from data_ingest.ingest_base import Base
from data_ingest.ingest_counts import NewCells
from data_ingest.ingest_files import ids_of
from data_ingest.ingest_journal import Target
from data_ingest.measured import Panel


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Datasets after the ingest, and additions to the presence matrix."""

    datasets: pd.DataFrame
    """The table of datasets; known ones keep their joinids."""
    rows: dict[int, np.ndarray]
    """New rows of the presence matrix: row -> var joinids."""
    panels: tuple[Panel, ...]
    """Panels of files whose genes differ from their dataset's; positions count from the first new cell."""
    num_rows: int
    """Number of rows of the presence matrix."""

    def entries(self) -> pa.Table:
        """The new rows as entries of a SOMA array."""
        rows = np.concatenate([np.full(len(columns), row, np.int64) for row, columns in self.rows.items()])
        columns = np.concatenate(list(self.rows.values()))
        ones = np.ones(len(rows), np.uint8)
        return pa.table({"soma_dim_0": rows, "soma_dim_1": columns, "soma_data": ones})


def measured_by(
    target: Target, files: Sequence[NewCells], base: Base, var: pd.DataFrame, at_ms: int | None
) -> Measured:
    """Plan datasets and panels for the new cells.

    Args:
        target: The atlas.
        files: The new cells, in joinid order.
        base: The atlas before the ingest.
        var: The var table after the ingest.
        at_ms: Timestamp of the version that `base` describes; None is now.
    """

    @lru_cache
    def in_atlas(row: int) -> np.ndarray:
        with target.matrix(schema.PRESENCE, timestamp_ms=at_ms) as matrix:
            return np.sort(matrix.read(([row],)).tables().concat()["soma_dim_1"].to_numpy())

    position = pd.Series(var["soma_joinid"].to_numpy(np.int64), index=var["feature_id"])
    datasets = {str(row["dataset_id"]): row for row in base.datasets.to_dict("records")}
    panel_rows = [panel.row for panel in base.panels]
    num_rows = 1 + max([*(row["soma_joinid"] for row in datasets.values()), *panel_rows], default=-1)
    added: dict[int, np.ndarray] = {}
    panels = []
    first = 0
    for cells in (cells for cells in files if len(cells.rows)):
        columns = np.sort(position[ids_of(cells.file)].to_numpy())

        def has_genes(row: int, columns: np.ndarray = columns) -> bool:
            return np.array_equal(added[row] if row in added else in_atlas(row), columns)

        alike = True
        sizes = cells.file.obs["dataset_id"].iloc[cells.rows].value_counts()
        for dataset, size in sizes[sizes > 0].items():
            if dataset not in datasets:
                datasets[str(dataset)] = {
                    "soma_joinid": num_rows,
                    "dataset_id": dataset,
                    "dataset_title": dataset,
                    "dataset_h5ad_path": Path(cells.file.path).name,
                    "dataset_total_cell_count": 0,
                }
                added[num_rows] = columns
                num_rows += 1
            alike &= has_genes(int(datasets[str(dataset)]["soma_joinid"]))
            datasets[str(dataset)]["dataset_total_cell_count"] += int(size)
        if not alike:
            row = next((row for row in panel_rows if has_genes(row)), num_rows)
            if row == num_rows:
                added[row] = columns
                panel_rows.append(row)
                num_rows += 1
            panels.append(Panel(first, first + len(cells.rows), row))
        first += len(cells.rows)
    table = pd.DataFrame(list(datasets.values()), columns=["soma_joinid", *schema.DATASET_COLUMNS])
    return Measured(datasets=table, rows=added, panels=tuple(panels), num_rows=num_rows)
