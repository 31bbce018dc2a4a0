from pathlib import Path

import anndata
import numpy as np
import pytest

from data_ingest.simulate import DATASETS, HELD_OUT, simulate_h5ads
from data_ingest.simulated_types import CELL_TYPES, MARKERS


def test_equal_seeds_give_equal_cells_and_different_seeds_different_ones(tmp_path: Path) -> None:
    first, again, other = (
        anndata.read_h5ad(simulate_h5ads(tmp_path / name, num_cells=240, seed=seed)[0])
        for name, seed in [("a", 3), ("b", 3), ("c", 4)]
    )
    assert (first.X != again.X).nnz == 0 and first.obs.equals(again.obs) and first.var.equals(again.var)
    assert first.shape != other.shape or (first.X != other.X).nnz > 0


def test_files_are_raw_counts_with_real_ids(sim_h5ads: list[Path]) -> None:
    gene_sets, cells, donors = [], [], []
    for path, dataset in zip(sim_h5ads, DATASETS, strict=True):
        adata = anndata.read_h5ad(path)
        assert (
            adata.X.dtype == np.float32
            and adata.X.data.min() >= 1
            and np.array_equal(adata.X.data, np.round(adata.X.data))
        )
        assert (
            adata.var["feature_id"].is_unique and adata.var["feature_id"].str.fullmatch(r"ENSG\d{11}").all()
        )
        assert adata.obs["donor_id"].nunique() == dataset.donors
        assert set(adata.obs["cell_type_ontology_term_id"]) <= {
            cell_type.cl_id for cell_type in CELL_TYPES.values()
        }
        gene_sets.append(set(adata.var["feature_id"]))
        cells += list(adata.obs_names)
        donors += list(adata.obs["donor_id"].unique())
    assert len(set(cells)) == len(cells) == 900
    assert len(set(donors)) == len(donors)
    assert len(set(map(frozenset, gene_sets))) == 3 and len(set.intersection(*gene_sets)) > 500


def test_markers_mark_their_types(sim_h5ads: list[Path]) -> None:
    adata = anndata.read_h5ad(sim_h5ads[0])
    for name in ("B", "CD14 monocyte", "NK"):
        is_type = (adata.obs["cell_type"] == CELL_TYPES[name].name).to_numpy()
        columns = adata.var["feature_id"].isin(list(MARKERS[name].values())).to_numpy()
        marker_counts_n = np.asarray(adata.X[:, columns].sum(axis=1)).ravel()
        assert marker_counts_n[is_type].mean() > 4 * marker_counts_n[~is_type].mean()


def test_held_out_data_set_has_the_same_profiles_but_other_donors(
    tmp_path: Path, sim_h5ads: list[Path]
) -> None:
    (path,) = simulate_h5ads(tmp_path, num_cells=100, seed=0, datasets=(HELD_OUT,))
    held_out, train = anndata.read_h5ad(path), anndata.read_h5ad(sim_h5ads[0])
    assert not set(held_out.obs["donor_id"]) & set(train.obs["donor_id"])
    assert len(set(held_out.var_names) & set(train.var_names)) > 1000


def test_marker_ids_agree_with_the_gene_map(real_data: Path) -> None:
    import pandas as pd

    table = pd.read_csv(real_data / "gene_map_human.tsv.gz", sep="\t", dtype=str)
    known = set(zip(table["symbol"], table["ensembl_id"], strict=True))
    assert {pair for program in MARKERS.values() for pair in program.items()} <= known


def test_cell_types_agree_with_the_cell_ontology() -> None:
    from cellxgene_ontology_guide.ontology_parser import OntologyParser

    parser = OntologyParser()
    assert {cell_type.cl_id: parser.get_term_label(cell_type.cl_id) for cell_type in CELL_TYPES.values()} == {
        cell_type.cl_id: cell_type.name for cell_type in CELL_TYPES.values()
    }


def test_too_few_cells() -> None:
    with pytest.raises(ValueError, match="num_cells=100 must be at least 20 for each of 12 donors; try 240"):
        simulate_h5ads("unused", num_cells=100)
