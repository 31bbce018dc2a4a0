"""Cells and small .h5ad files with known counts, and the complete contents of an atlas for comparisons."""

from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
from scipy import sparse

from screformer.bundled import DEFAULT, bundled_model
from screformer.predictor import Predictor

MARKERS = {
    "B cell": ("MS4A1", "CD79A", "CD79B", "HLA-DRA", "CD74"),
    "T cell": ("CD3D", "CD3E", "IL7R", "LTB", "IL32"),
    "natural killer cell": ("GNLY", "NKG7", "GZMB", "PRF1", "FGFBP2"),
    "monocyte": ("LYZ", "S100A8", "S100A9", "CST3", "FCN1"),
}
"""Marker genes that the bundled model must know."""


def ensembl(numbers: range) -> list[str]:
    return [f"ENSG{number:011d}" for number in numbers]


def cells(
    n: int = 60,
    genes: range = range(100, 130),
    *,
    dataset: str = "blood_one",
    seed: int = 0,
    first: int = 0,
    terms: bool = True,
) -> anndata.AnnData:
    """Cells with Poisson counts, named `cell_k` for k from `first`; counts do not depend on other cells."""
    cell_counts = [
        np.random.default_rng([seed, cell]).poisson(0.6, genes.stop)[genes.start :]
        for cell in range(first, first + n)
    ]
    counts = sparse.csr_matrix(np.array(cell_counts, np.float32).reshape(n, len(genes)))
    kinds = np.arange(n) % 3
    obs = pd.DataFrame(
        {
            "dataset": dataset,
            "donor_id": np.where(np.arange(n) % 2, "donor_a", "donor_b"),
            "cell_type": np.array(["T", "B", "weird"])[kinds],
            "tissue": "blood",
            "assay": "10x 3' v3",
        },
        index=[f"cell_{k}" for k in range(first, first + n)],
    )
    if terms:
        obs["cell_type_ontology_term_id"] = np.array(["CL:0000895", "CL:0000236", "unknown"])[kinds]
    var = pd.DataFrame(
        {"feature_id": ensembl(genes), "gene_symbol": [f"GENE{k}" for k in genes]},
        index=[f"GENE{k}" for k in genes],
    )
    return anndata.AnnData(counts, obs=obs, var=var)


def write(path: Path, sample: anndata.AnnData, **options: Any) -> Path:
    sample.write_h5ad(path, **options)
    return path


def atlas_content(uri: str, tiledb_config: dict[str, str] | None = None) -> dict[str, pd.DataFrame]:
    """Every table and matrix of an atlas, with rows in joinid order. Leaves out the build date, which may
    change at midnight between two calls."""
    import tiledbsoma as soma

    from data_ingest import schema

    context = schema.soma_context(tiledb_config)
    content = {}
    for place in (schema.OBS, schema.VAR, schema.DATASETS, schema.SUMMARY):
        with soma.DataFrame.open(f"{uri}/{place}", context=context) as table:
            content[place] = (
                table.read().concat().to_pandas().sort_values("soma_joinid").reset_index(drop=True)
            )
    built = content[schema.SUMMARY]["label"] == "census_build_date"
    assert content[schema.SUMMARY].loc[built, "value"].str.fullmatch(r"\d{4}-\d\d-\d\d").all()
    content[schema.SUMMARY].loc[built, "value"] = ""
    for place in (schema.X, schema.PRESENCE):
        with soma.SparseNDArray.open(f"{uri}/{place}", context=context) as array:
            table = array.read().tables().concat().to_pandas()
            content[place] = table.sort_values(["soma_dim_0", "soma_dim_1"]).reset_index(drop=True)
    return content


def differences(a: dict[str, pd.DataFrame], b: dict[str, pd.DataFrame]) -> list[str]:
    """Names of tables and matrices that differ."""
    return [place for place in a if not a[place].equals(b[place])]


def marked_cells() -> anndata.AnnData:
    """Cells with a typical blood profile, 15 counts of each marker of one type and none of other markers."""
    vocabulary = Predictor.load(bundled_model(DEFAULT), device="cpu").vocabulary
    assert vocabulary.reference_g is not None
    markers = sorted({name for names in MARKERS.values() for name in names})
    names = vocabulary.readable_names.astype(str)
    base = np.rint(vocabulary.reference_g * 2000)
    base[np.isin(names, markers)] = 0
    counts = np.stack([base + 15 * np.isin(names, own) for own in MARKERS.values()])
    return anndata.AnnData(
        counts.astype(np.float32),
        obs=pd.DataFrame(index=list(MARKERS)),
        var=pd.DataFrame(index=list(vocabulary.feature_ids)),
    )
