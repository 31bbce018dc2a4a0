"""Find which cells of a file are already in the atlas, by dataset, name and counts.

Axes: `n` cells, `g` genes.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy import sparse

from data_ingest import schema
from data_ingest.h5ad import H5adFile
from data_ingest.ingest_counts import gene_targets, join_genes
from data_ingest.ingest_files import CheckedFile
from data_ingest.ingest_journal import Target, obs_ids
from data_ingest.ingest_options import IngestOptions

_CELLS_COMPARED = 64
_LEAST_AGREEMENT = 0.5
"""Minimum share of equal counts for two cells to be the same; cells of other samples rarely reach 0.3."""


def new_rows(
    target: Target, file: CheckedFile, known_datasets: set[str], var: pd.DataFrame, options: IngestOptions
) -> np.ndarray:
    """Rows of a file that are not in the atlas, increasing.

    Names alone do not distinguish samples, because barcodes repeat and different files can have the same
    name. So if names match, the counts of some cells are compared.

    Raises:
        ValueError: Cells have the same names as cells in the atlas, but different counts.
    """
    is_new_n = np.ones(file.n_cells, bool)
    for dataset in known_datasets.intersection(file.obs["dataset_id"].cat.categories):
        there = obs_ids(target, f"dataset_id == {_quoted(dataset)}", ("obs_id",)).to_pandas()
        joinid_of = pd.Series(there["soma_joinid"].to_numpy(), index=there["obs_id"].to_numpy())
        named_n = (file.obs["dataset_id"] == dataset).to_numpy() & file.obs["obs_id"].isin(
            joinid_of.index
        ).to_numpy()
        rows = np.flatnonzero(named_n)
        if len(rows) and not _same_cells(target, file, rows, joinid_of, var, options):
            raise ValueError(
                f"{file.path}: {len(rows)} of its cells, such as {file.obs['obs_id'].iloc[rows[0]]!r}, have"
                f" the same names as cells of dataset {dataset!r} in the atlas, but different counts: this is"
                " another sample. Give it its own dataset with --set dataset_id=NAME or --obs-map"
                " dataset_id=COLUMN"
            )
        is_new_n &= ~named_n
    return np.flatnonzero(is_new_n)


def _same_cells(
    target: Target,
    file: CheckedFile,
    rows: np.ndarray,
    joinid_of: pd.Series,
    var: pd.DataFrame,
    options: IngestOptions,
) -> bool:
    """Whether cells of a file and of the atlas are the same, judged by the genes that both have."""
    column_of = dict(zip(var["feature_id"], var["soma_joinid"], strict=True))
    rows = rows[rows < rows[0] + options.cells_per_chunk][:_CELLS_COMPARED]
    with H5adFile.open(file.path, layer=options.layer, raw=options.use_raw) as opened:
        _, block = next(opened.chunks(int(rows[-1] - rows[0]) + 1, start=int(rows[0])))
    targets_g = gene_targets(file, column_of)
    ours = join_genes(block[rows - rows[0]], targets_g, len(var))

    joinids = joinid_of[file.obs["obs_id"].iloc[rows].to_numpy()].to_numpy(np.int64)
    order = np.argsort(joinids)
    with target.matrix(schema.X) as matrix:
        found = matrix.read((np.sort(joinids),)).tables().concat()
    cell = order[np.searchsorted(joinids, found["soma_dim_0"].to_numpy(), sorter=order)]
    shape = (len(rows), len(var))
    gene = found["soma_dim_1"].to_numpy()
    theirs = sparse.csr_matrix((found["soma_data"].to_numpy(), (cell, gene)), shape=shape)

    # Genes without counts in any of these atlas cells may not have been measured there.
    common_g = np.zeros(len(var), bool)
    common_g[targets_g[targets_g >= 0]] = True
    common_g &= np.asarray((theirs != 0).sum(axis=0)).ravel() > 0
    ours_ng, theirs_ng = (counts[:, common_g].toarray() for counts in (ours, theirs))
    expressed_n = ((ours_ng != 0) | (theirs_ng != 0)).sum(axis=1)
    equal_n = ((ours_ng == theirs_ng) & (ours_ng != 0)).sum(axis=1)
    agreement_n = np.where(expressed_n > 0, equal_n / np.maximum(expressed_n, 1), 1.0)
    return bool(np.median(agreement_n) >= _LEAST_AGREEMENT)


def _quoted(value: str) -> str:
    return f'"{value}"' if "'" in value else f"'{value}'"
