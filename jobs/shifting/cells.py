"""The cells to compare with a model's training cells, from an atlas query or a file.

Axes: n cells, g genes of the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from data_ingest.cells import H5adCells
from data_ingest.h5ad import H5adFile
from data_ingest.query_labels import MAJOR, labels_of
from screformer.cells import CellSource
from screformer.config import ExperimentConfig
from screformer.counts import CellCounts
from screformer.predictor import Predictions, Predictor

MOST_CELLS = 5_000
"""Most cells compared, drawn at random."""
LEAST_OVERLAP = 0.0
"""Cells with few of the model's genes are compared too, and this is reported."""
DONOR = "donor_id"


@dataclass(frozen=True, eq=False, kw_only=True)
class ComparedCells:
    """Cells of a query or file, with a model's predictions for some of them."""

    name: str
    """Their source."""
    num_cells: int
    measured_g: np.ndarray
    """Whether each gene of the model was measured in any of them, bool (g,)."""
    counts: CellCounts
    """Counts of n cells, drawn at random."""
    predictions: Predictions
    """Predictions for the same cells."""
    labels_n: np.ndarray
    """Known label of each, object; "" if unknown."""
    donors_n: np.ndarray
    """Donor of each, object; one name for all cells if unknown."""


def compared_file(
    predictor: Predictor,
    path: Path,
    *,
    layer: str | None = None,
    raw: bool = False,
    label_column: str | None = None,
) -> ComparedCells:
    """Cells of an .h5ad file.

    Args:
        predictor: The model.
        path: The file.
        layer: Layer of the counts, instead of X.
        raw: Whether the counts are in `raw.X` instead of X.
        label_column: obs column of known labels. None uses the model's own column, or major types from
            `cell_type_ontology_term_id`, if the file has them.

    Raises:
        ValueError: The file cannot be read, or lacks the column or all of the model's genes.
    """
    cells = H5adCells.open(predictor, path, min_gene_overlap=LEAST_OVERLAP, layer=layer, raw=raw)
    with H5adFile.open(path, layer=layer, raw=raw) as file:
        obs = file.obs
    if label_column and label_column not in obs:
        raise ValueError(
            f"--label-column {label_column}: obs of {path} has no such column; it has"
            f" {', '.join(map(str, obs.columns)) or 'none'}"
        )
    column = label_column or predictor.label_column
    labels = np.full(len(obs), "", dtype=object)
    if column in obs or (column == MAJOR and "cell_type_ontology_term_id" in obs):
        found = pd.Series(labels_of(obs.reset_index(drop=True), column)[0])
        labels = found.astype(object).where(found.notna(), "").to_numpy(dtype=object)
    donors = obs[DONOR].astype(str).to_numpy(dtype=object) if DONOR in obs else np.full(len(obs), "one")
    return _compared(path.name, predictor, cells, cells.match.measured_g, labels, donors)


def compared_query(predictor: Predictor, settings: ExperimentConfig) -> ComparedCells:
    """Cells of a saved query, or of an atlas and a filter.

    Args:
        predictor: The model.
        settings: `atlas` and `query` select the cells.

    Raises:
        ValueError: As `data_ingest.query.find_cells`, or none of the model's genes.
    """
    # Files need neither TileDB-SOMA nor its dependencies.
    from data_ingest.atlas import open_atlas
    from data_ingest.atlas_cells import AtlasCells
    from data_ingest.query import find_cells, resolve_query

    atlas, query, expected_hash = resolve_query(settings)
    with open_atlas(atlas) as experiment:
        names = experiment.obs.schema.names
    known = predictor.label_column if predictor.label_column in (MAJOR, *names) else "cell_type"
    result = find_cells(atlas, query, known, expected_hash=expected_hash)
    cells = AtlasCells.open(predictor, result, min_gene_overlap=LEAST_OVERLAP)
    measured_g = np.asarray(cells.all_panels.measured_pg.any(axis=0))
    name = f"{atlas.uri} ({query.obs_filter or 'all cells'})"
    labels = cells.labels(np.arange(cells.num_cells))
    donors = result.obs[DONOR].astype(str).to_numpy(dtype=object)
    return _compared(name, predictor, cells, measured_g, labels, donors)


def _compared(
    name: str,
    predictor: Predictor,
    source: CellSource,
    measured_g: np.ndarray,
    labels: np.ndarray,
    donors: np.ndarray,
) -> ComparedCells:
    rng = np.random.default_rng(0)
    chosen = np.arange(source.num_cells)
    if source.num_cells > MOST_CELLS:
        chosen = np.sort(rng.choice(source.num_cells, MOST_CELLS, replace=False))
    size = source.cells_per_read
    read = [source.read(chosen[start : start + size]) for start in range(0, len(chosen), size)]
    counts = CellCounts.joined(read, source.panels(chosen))
    return ComparedCells(
        name=name,
        num_cells=source.num_cells,
        measured_g=measured_g,
        predictions=predictor.predict(counts),
        counts=counts,
        labels_n=labels[chosen],
        donors_n=donors[chosen],
    )
