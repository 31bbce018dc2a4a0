"""Write a large synthetic atlas directly, for benchmarks of the stream."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import ray
import tiledbsoma

from data_ingest.schema import OBS_COLUMNS, VAR_COLUMNS, create_atlas, soma_context

NUM_TYPES, NUM_DATASETS, DONORS_PER_DATASET = 12, 8, 4


_CELLS_PER_WRITE = 8192


def write_synthetic_atlas(
    uri: str, *, num_cells: int, num_genes: int = 20_000, genes_per_cell: int = 1_000, seed: int = 0
) -> None:
    """Write an atlas with cells sorted by data set, donor and cell type, like public atlases.

    Ray must be running.

    Args:
        uri: A local path that does not exist.
        num_cells: Rows of X.
        num_genes: Columns of X.
        genes_per_cell: Mean number of detected genes.
        seed: Random seed of the counts.
    """
    context = soma_context()
    create_atlas(uri, context)
    codes = np.sort(
        np.random.default_rng([seed, 0]).integers(0, NUM_DATASETS * DONORS_PER_DATASET * NUM_TYPES, num_cells)
    )
    with tiledbsoma.open(f"{uri}/census_data/homo_sapiens", "w", context=context) as experiment:
        experiment.obs.change_domain(((0, num_cells - 1),))
        experiment.ms["RNA"].var.change_domain(((0, num_genes - 1),))
        experiment.ms["RNA"].X["raw"].resize((num_cells, num_genes))
    tasks = [
        _write_x.remote(uri, first, codes[first : first + _CELLS_PER_WRITE], num_genes, genes_per_cell, seed)
        for first in range(0, num_cells, _CELLS_PER_WRITE)
    ]
    sums, nnz = (np.concatenate(parts) for parts in zip(*ray.get(tasks), strict=True))
    donors = codes // NUM_TYPES
    types = codes % NUM_TYPES
    obs = {name: np.full(num_cells, "unknown") for name in OBS_COLUMNS}
    obs |= {
        "obs_id": np.char.mod("cell%d", np.arange(num_cells)),
        "dataset_id": np.char.mod("dataset%d", donors // DONORS_PER_DATASET),
        "donor_id": np.char.mod("donor%d", donors),
        "cell_type": np.char.mod("type %d", types),
        "cell_type_major": np.char.mod("type %d", types),
        "tissue_general": np.where(donors % 2 == 0, "blood", "lung"),
        "is_primary_data": np.ones(num_cells, bool),
        "raw_sum": sums,
        "nnz": nnz,
    }
    var = {
        "feature_id": np.char.mod("ENSG%011d", np.arange(num_genes)),
        "feature_name": np.char.mod("GENE%d", np.arange(num_genes)),
        "feature_length": np.full(num_genes, 1000),
        "nnz": np.zeros(num_genes),
        "n_measured_obs": np.full(num_genes, num_cells),
    }
    with tiledbsoma.open(f"{uri}/census_data/homo_sapiens", "w", context=context) as experiment:
        for table, columns, types_of in (
            (experiment.obs, obs, OBS_COLUMNS),
            (experiment.ms["RNA"].var, var, VAR_COLUMNS),
        ):
            arrays = {name: pa.array(columns[name].tolist(), type=kind) for name, kind in types_of.items()}
            table.write(
                pa.table({"soma_joinid": pa.array(np.arange(len(next(iter(columns.values()))))), **arrays})
            )


@ray.remote
def _write_x(
    uri: str, first: int, codes: np.ndarray, num_genes: int, genes_per_cell: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Write some rows of X; returns the total counts and number of detected genes of each row."""
    rng = np.random.default_rng([seed, 1, first])
    popularity = 1 / np.arange(20, num_genes + 20)
    sums, nnz = np.zeros(len(codes)), np.zeros(len(codes), np.int64)
    with tiledbsoma.open(f"{uri}/census_data/homo_sapiens/ms/RNA/X/raw", "w", context=soma_context()) as x:
        for start in range(0, len(codes), 2048):
            part = codes[start : start + 2048]
            chance = np.stack(
                [
                    np.random.default_rng([seed, 2, kind]).permutation(popularity) + popularity
                    for kind in range(NUM_TYPES)
                ]
            )
            chance = np.minimum(chance * genes_per_cell / chance.sum(1, keepdims=True) * 1.3, 0.95).astype(
                np.float32
            )
            rows, genes = np.nonzero(
                rng.random((len(part), num_genes), dtype=np.float32) < chance[part % NUM_TYPES]
            )
            counts = rng.geometric(0.6, len(rows)).astype(np.float32)
            x.write(pa.table({"soma_dim_0": rows + first + start, "soma_dim_1": genes, "soma_data": counts}))
            sums[start : start + len(part)] = np.bincount(rows, weights=counts, minlength=len(part))
            nnz[start : start + len(part)] = np.bincount(rows, minlength=len(part))
    return sums, nnz
