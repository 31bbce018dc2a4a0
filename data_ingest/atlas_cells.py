"""Cells of an atlas query, to label or explain.

Axes: n cells.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_ingest.atlas import MEASUREMENT, located, open_atlas, pinned
from data_ingest.datasource import read_cells
from data_ingest.query import QueryResult, find_cells
from data_ingest.query_labels import MAJOR
from screformer.cells import CELLS_PER_READ
from screformer.config import AtlasConfig, QueryConfig
from screformer.counts import CellCounts, Panels
from screformer.predictor import Predictor


@dataclass(frozen=True, eq=False)
class AtlasCells:
    """Cells of an atlas query."""

    atlas: AtlasConfig
    joinids: np.ndarray
    known: Sequence[str]
    gene_of_var: np.ndarray
    all_panels: Panels
    query_hash: str

    @classmethod
    def open(cls, predictor: Predictor, result: QueryResult, *, min_gene_overlap: float) -> AtlasCells:
        """Match the model's genes to the atlas.

        Raises:
            ValueError: Too few genes match.
        """
        with open_atlas(result.atlas) as experiment:
            var = experiment.ms[MEASUREMENT].var.read(column_names=["soma_joinid", "feature_id"]).concat()
        ids = var["feature_id"].to_pylist()
        match = predictor.genes.match(ids, [""] * len(ids))
        match.require(min_gene_overlap, source=f"atlas {result.atlas.uri}")
        joinids = var["soma_joinid"].to_numpy()
        gene_of_var = np.full(int(joinids.max(initial=-1)) + 1, -1, dtype=np.int32)
        gene_of_var[joinids] = match.vocabulary_index
        labels = (
            result.obs["label"].astype(object).where(result.obs["label"].notna(), "").astype(str).tolist()
        )
        panels = result.panels(gene_of_var, len(predictor.vocabulary))
        return cls(result.atlas, result.obs_joinids, labels, gene_of_var, panels, result.hash)

    @property
    def num_cells(self) -> int:
        """As `CellSource.num_cells`."""
        return len(self.joinids)

    @property
    def cells_per_read(self) -> int:
        """As `CellSource.cells_per_read`."""
        return CELLS_PER_READ

    def names(self, positions: np.ndarray) -> np.ndarray:
        """As `CellSource.names`: the joinids."""
        return self.joinids[positions].astype(str).astype(object)

    def labels(self, positions: np.ndarray) -> np.ndarray:
        """As `CellSource.labels`."""
        return np.array(self.known, dtype=object)[positions]

    def read(self, positions: np.ndarray) -> CellCounts:
        """As `CellSource.read`."""
        return read_cells(self.atlas, self.joinids[positions], self.gene_of_var, self.panels(positions))

    def panels(self, positions: np.ndarray) -> Panels:
        """As `CellSource.panels`: the genes measured in the cell's dataset."""
        return self.all_panels.take(positions)

    def identity(self) -> dict[str, str]:
        """As `CellSource.identity`."""
        return {
            "atlas": self.atlas.uri,
            "timestamp_ms": str(self.atlas.timestamp_ms),
            "query_hash": self.query_hash,
        }


def query_cells(
    predictor: Predictor,
    atlas: AtlasConfig,
    obs_filter: str,
    *,
    min_gene_overlap: float,
    resumed: Path | None = None,
) -> AtlasCells:
    """Cells of an atlas that match a filter.

    Args:
        predictor: The model.
        atlas: The atlas and its TileDB settings.
        obs_filter: SOMA value filter on obs.
        min_gene_overlap: As in `GeneMatch.require`.
        resumed: JSON file with the `source` (`CellSource.identity`) of an earlier run. If it exists and
            names the same atlas, the same version is used; otherwise the newest.

    Raises:
        ValueError: The atlas does not exist, the filter is invalid, no cell matches, or too few genes match.
    """
    atlas = located(atlas)
    if resumed is not None and resumed.exists():
        source = json.loads(resumed.read_text()).get("source", {})
        if source.get("atlas") == atlas.uri:
            atlas = dataclasses.replace(atlas, timestamp_ms=int(source["timestamp_ms"]))
    atlas = pinned(atlas)
    with open_atlas(atlas) as experiment:
        has_labels = predictor.label_column == MAJOR or predictor.label_column in experiment.obs.schema.names
    result = find_cells(
        atlas, QueryConfig(obs_filter=obs_filter), predictor.label_column if has_labels else "cell_type"
    )
    return AtlasCells.open(predictor, result, min_gene_overlap=min_gene_overlap)
