"""Simulate single-cell data sets as .h5ad files: real genes and cell types, invented cells.

Each cell type expresses its canonical marker genes (with their Ensembl ids) on top of a background shared by
all types. Counts are negative binomial around a profile that includes effects of the donor, the data set
(protocol, genes measured, depth) and ambient RNA. The data are for trying out the whole pipeline and for
tests; a model trained on them says nothing about real cells.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import scipy.sparse

from data_ingest.simulated_types import CELL_TYPES, MARKERS

# Axes: n cells, g genes, k cell types.

_BLOOD = {
    "CD4 T": 0.28,
    "CD8 T": 0.15,
    "NK": 0.12,
    "B": 0.12,
    "plasma": 0.03,
    "CD14 monocyte": 0.15,
    "CD16 monocyte": 0.05,
    "conventional DC": 0.04,
    "plasmacytoid DC": 0.02,
    "platelet": 0.04,
}
_LUNG = {
    "CD4 T": 0.11,
    "CD8 T": 0.11,
    "NK": 0.08,
    "B": 0.07,
    "plasma": 0.04,
    "CD14 monocyte": 0.13,
    "conventional DC": 0.05,
    "endothelial": 0.14,
    "fibroblast": 0.11,
    "epithelial": 0.16,
}


@dataclass(frozen=True, kw_only=True)
class SimulatedDataset:
    """Properties of one data set."""

    name: str
    """`dataset_id`, file name, and prefix of its donor ids."""
    share: float
    """Share of the requested cells, relative to the other data sets."""
    donors: int
    depth: float
    """Median counts per cell."""
    measured: float
    """Share of the genes in its panel or annotation; other genes are missing from the file, not zero."""
    tissue: str
    tissue_general: str
    assay: str
    composition: Mapping[str, float]
    """Cell types and their mean shares; donors vary around them."""


DATASETS = (
    SimulatedDataset(
        name="sim_blood",
        share=1.0,
        donors=4,
        depth=1000,
        measured=1.0,
        tissue="blood",
        tissue_general="blood",
        assay="10x 3' v3",
        composition=_BLOOD,
    ),
    SimulatedDataset(
        name="sim_blood_panel",
        share=0.8,
        donors=4,
        depth=600,
        measured=0.65,
        tissue="blood",
        tissue_general="blood",
        assay="10x 3' v2",
        composition=_BLOOD,
    ),
    SimulatedDataset(
        name="sim_lung",
        share=1.0,
        donors=4,
        depth=800,
        measured=0.85,
        tissue="lung parenchyma",
        tissue_general="lung",
        assay="10x 5' v1",
        composition=_LUNG,
    ),
)
"""The data sets to train and test on."""

HELD_OUT = SimulatedDataset(
    name="sim_new_blood",
    share=1.0,
    donors=2,
    depth=700,
    measured=0.8,
    tissue="blood",
    tissue_general="blood",
    assay="10x 5' v2",
    composition=_BLOOD,
)
"""A data set to annotate, with a protocol and donors not in `DATASETS`."""

_AMBIENT = 0.08  # mean share of a cell's counts that is ambient RNA
_MARKER_ON = 2.0  # mean log expression of a marker above the background
_MARKER_OFF = 3.3  # log fold change of a marker between the types that express it and the others
_BURST = 2.0  # negative-binomial size: small is noisy


def simulate_h5ads(
    directory: str | Path,
    *,
    num_cells: int = 2400,
    seed: int = 0,
    datasets: Sequence[SimulatedDataset] = DATASETS,
) -> list[Path]:
    """Write one .h5ad per data set, with raw counts (csr, float32), Ensembl ids and CELLxGENE's obs columns.

    Args:
        directory: Created if missing; existing files are replaced.
        num_cells: Total number of cells, divided among data sets by `share`.
        seed: Determines everything. Expression profiles depend only on the seed, so a call with the same seed
            and other data sets (such as `HELD_OUT`) simulates other cells from the same population.
        datasets: The data sets to write.

    Returns:
        Paths `directory/NAME.h5ad`, in the order of `datasets`.

    Raises:
        ValueError: Fewer than 20 cells per donor, so types would be missing.
    """
    num_donors = sum(dataset.donors for dataset in datasets)
    if num_cells < 20 * num_donors:
        raise ValueError(
            f"num_cells={num_cells} must be at least 20 for each of {num_donors} donors; try"
            f" {20 * num_donors}"
        )
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    ends = np.cumsum([dataset.share for dataset in datasets])
    sizes = np.diff((ends / ends[-1] * num_cells).round().astype(int), prepend=0)
    paths = []
    for dataset, size in zip(datasets, sizes, strict=True):
        path = directory / f"{dataset.name}.h5ad"
        _simulate(dataset, int(size), seed).write_h5ad(path, compression="gzip")
        paths.append(path)
    return paths


@functools.cache
def _genes() -> pd.DataFrame:
    """All genes, sorted by Ensembl id: columns `feature_id`, `feature_name`."""
    text = resources.files("data_ingest").joinpath("simulated_genes.tsv").read_text()
    background = dict(line.split("\t") for line in text.splitlines())
    markers = {gene_id: symbol for program in MARKERS.values() for symbol, gene_id in program.items()}
    genes = sorted((background | markers).items())
    return pd.DataFrame(genes, columns=["feature_id", "feature_name"])


@functools.lru_cache(maxsize=4)
def _log_profiles(seed: int) -> np.ndarray:
    """Log expression of each cell type without donor and data set effects, shape (k, g)."""
    rng = np.random.default_rng([seed, 0])
    feature_ids = _genes()["feature_id"].tolist()
    index_of = {gene_id: index for index, gene_id in enumerate(feature_ids)}
    base_g = rng.normal(0.0, 1.3, len(feature_ids))
    profiles_kg = np.empty((len(CELL_TYPES), len(feature_ids)))
    level = {
        gene_id: rng.normal(_MARKER_ON, 0.6) for program in MARKERS.values() for gene_id in program.values()
    }
    for profile_g, cell_type in zip(profiles_kg, CELL_TYPES.values(), strict=True):
        profile_g[:] = base_g + rng.normal(0.0, 0.5, len(feature_ids)) * (rng.random(len(feature_ids)) < 0.05)
        for gene_id, on in level.items():
            profile_g[index_of[gene_id]] = on - _MARKER_OFF
        for program in cell_type.programs:
            for gene_id in MARKERS[program].values():
                profile_g[index_of[gene_id]] = level[gene_id]
    return profiles_kg


def _simulate(dataset: SimulatedDataset, num_cells: int, seed: int) -> anndata.AnnData:
    rng = np.random.default_rng([seed, zlib.crc32(dataset.name.encode())])
    genes, profiles_kg = _genes(), _log_profiles(seed)
    names, num_genes = list(CELL_TYPES), len(genes)

    is_marker = genes["feature_id"].isin(
        [gene_id for program in MARKERS.values() for gene_id in program.values()]
    )
    # Panels are designed to include markers, so few are missing.
    measured = rng.random(num_genes) < np.where(is_marker, 1 - (1 - dataset.measured) / 4, dataset.measured)
    protocol_g = rng.normal(0.0, 0.35, num_genes)

    types, donors, donor_shift = [], [], np.empty((dataset.donors, num_genes))
    shares = np.array([dataset.composition.get(name, 0.0) for name in names])
    donor_sizes = np.diff(np.linspace(0, num_cells, dataset.donors + 1).round().astype(int))
    for donor, size in enumerate(donor_sizes):
        present = shares > 0
        varied = np.zeros(len(names))
        varied[present] = rng.dirichlet(shares[present] / shares.sum() * 80)
        types.append(rng.choice(len(names), size=size, p=varied))
        donors.append(np.full(size, donor))
        donor_shift[donor] = rng.normal(0.0, 0.25, num_genes)
    type_n, donor_n = np.concatenate(types), np.concatenate(donors)

    profile_ng = np.exp(profiles_kg[type_n] + donor_shift[donor_n] + protocol_g) * measured
    profile_ng /= profile_ng.sum(axis=1, keepdims=True)
    ambient_n = rng.beta(2, 2 / _AMBIENT - 2, num_cells)[:, None]
    profile_ng = (1 - ambient_n) * profile_ng + ambient_n * profile_ng.mean(axis=0)
    depth_n = dataset.depth * np.exp(rng.normal(0.0, 0.35, num_cells))
    counts_ng = rng.poisson(rng.gamma(_BURST, profile_ng * depth_n[:, None] / _BURST))[:, measured]

    donor_ids = [f"{dataset.name}_donor{donor + 1}" for donor in donor_n]
    sex_of = rng.choice(["female", "male"], dataset.donors)
    obs = pd.DataFrame(
        {
            "cell_type": [CELL_TYPES[names[index]].name for index in type_n],
            "cell_type_ontology_term_id": [CELL_TYPES[names[index]].cl_id for index in type_n],
            "dataset_id": dataset.name,
            "donor_id": donor_ids,
            "tissue": dataset.tissue,
            "tissue_general": dataset.tissue_general,
            "assay": dataset.assay,
            "disease": "normal",
            "sex": sex_of[donor_n],
            "is_primary_data": True,
        },
        index=pd.Index([f"{dataset.name}-{cell:05d}" for cell in range(num_cells)], name="cell"),
    )
    var = genes[measured].set_index("feature_name")[["feature_id"]]
    adata = anndata.AnnData(scipy.sparse.csr_matrix(counts_ng.astype(np.float32)), obs=obs, var=var)
    adata.uns["source"] = f"simulated by screformer, data set {dataset.name}, seed {seed}"
    return adata
