"""The file labelled at the end, and how well its own labels agree with the predictions.

Axes: n cells.
"""

from __future__ import annotations

from pathlib import Path

import anndata
import numpy as np
import tiledbsoma

from data_ingest.atlas import MEASUREMENT, X_LAYER, open_atlas
from data_ingest.h5ad import H5adFile
from data_ingest.ingest_files import check_file
from data_ingest.ingest_labels import label, read_labels
from data_ingest.ingest_options import IngestOptions
from data_ingest.measured import measured_genes
from data_ingest.ontology import UNKNOWN, MajorTypes
from jobs.training.cells import TrainingCells

_MOST_CELLS = 5_000


def write_test_cells(cells: TrainingCells, path: Path) -> None:
    """Write test cells as an .h5ad file of raw counts, as a lab would have it.

    Takes the dataset with the most test cells, evenly subsampled if there are many, and the genes it
    measured.
    """
    datasets_n = cells.query.obs["dataset_id"].astype(str).to_numpy()[cells.parts["test"]]
    names, sizes = np.unique(datasets_n, return_counts=True)
    chosen = names[sizes.argmax()]
    positions = cells.parts["test"][datasets_n == chosen]
    positions = positions[:: -(-len(positions) // _MOST_CELLS)]
    atlas = cells.query.atlas
    wanted = tiledbsoma.AxisQuery(coords=(cells.query.obs_joinids[positions],))
    with open_atlas(atlas) as experiment, experiment.axis_query(MEASUREMENT, obs_query=wanted) as query:
        found: anndata.AnnData = query.to_anndata(X_LAYER)
    found = found[:, measured_genes(atlas, [chosen], found.var["soma_joinid"].to_numpy())[0]].copy()
    # tiledbsoma takes obs_id as the index
    found.obs_names = found.obs["dataset_id"].astype(str) + ":" + found.obs_names.astype(str)
    found.var_names = found.var["feature_id"].astype(str)
    found.write_h5ad(path, compression="gzip")


def agreement_text(source: Path, annotated: Path, labels: Path | None) -> str:
    """The share of a file's own labels (read as by ingest) that predictions match; empty without labels."""
    try:
        file = check_file(str(source), options=IngestOptions(duplicate_genes="sum"), symbols=None)
    except ValueError:
        return ""  # ingest would refuse the file, so it has no labels to compare with
    labelled = label(file, read_labels(labels) if labels else {}, MajorTypes())
    own_n = labelled.obs["cell_type_major"].astype(str).to_numpy()
    with H5adFile.open(annotated) as copy:
        predicted_n = copy.obs["predicted_labels"].astype(str).to_numpy()
    known_n = own_n != UNKNOWN
    if not known_n.any():
        return ""
    share = float((predicted_n == own_n)[known_n].mean())
    return f"; {share:.1%} of {int(known_n.sum()):,} agree with the file's own labels"
