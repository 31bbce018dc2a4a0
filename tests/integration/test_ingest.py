"""Ingest real .h5ad files into real atlases; read them with TileDB-SOMA and the public Census client."""

import json
import os
import shutil
from pathlib import Path

import anndata
import cellxgene_census
import numpy as np
import pandas as pd
import pytest
import tiledbsoma
from scipy import sparse

from data_ingest import schema
from data_ingest.ingest import ingest
from data_ingest.ingest_options import IngestOptions
from helpers.cells import atlas_content, cells, differences, ensembl, write
from helpers.servers import S3
from jobs.ingest import main


def counts_frame(sample: anndata.AnnData) -> pd.DataFrame:
    dense = sample.X.toarray() if sparse.issparse(sample.X) else sample.X
    return pd.DataFrame(dense, index=list(sample.obs_names), columns=list(sample.var["feature_id"]))


def from_census(uri: str, **filters) -> anndata.AnnData:
    with cellxgene_census.open_soma(uri=uri) as census:
        return cellxgene_census.get_anndata(census, "Homo sapiens", **filters)


def test_census_client_reads_what_was_ingested(tmp_path: Path) -> None:
    blood, brain = cells(), cells(40, range(110, 150), dataset="brain", first=1000)
    files = [write(tmp_path / "blood.h5ad", blood), write(tmp_path / "brain.h5ad", brain)]
    uri = str(tmp_path / "atlas")
    ingest(files[:1], uri, IngestOptions(constants={"tissue_general": "blood"}))
    ingest(files[1:], uri, IngestOptions(constants={"tissue_general": "brain", "sex": "female"}))

    found = from_census(uri, obs_value_filter="tissue_general == 'blood' and is_primary_data == True")
    expected = counts_frame(blood)
    got = counts_frame(found)
    assert list(got.index) == list(expected.index)
    assert np.array_equal(got[expected.columns], expected)
    assert not got.drop(columns=expected.columns).to_numpy().any()
    assert list(found.obs["raw_sum"]) == list(expected.sum(axis=1))
    assert list(found.obs["nnz"]) == list((expected > 0).sum(axis=1))
    assert set(found.obs["sex"]) == set(found.obs["disease"]) == {"unknown"}
    assert set(from_census(uri, obs_value_filter="dataset_id == 'brain'").obs["sex"]) == {"female"}

    content = atlas_content(uri)
    var = content[schema.VAR].set_index("feature_id")
    assert sorted(var.index) == ensembl(range(100, 150))
    assert var["feature_name"]["ENSG00000000149"] == "GENE149"
    assert var["n_measured_obs"]["ENSG00000000105"] == 60 and var["n_measured_obs"]["ENSG00000000115"] == 100
    assert (
        var["nnz"]["ENSG00000000115"]
        == (expected > 0)["ENSG00000000115"].sum() + (counts_frame(brain) > 0)["ENSG00000000115"].sum()
    )
    with cellxgene_census.open_soma(uri=uri) as census:
        presence = cellxgene_census.get_presence_matrix(census, "Homo sapiens").toarray()
        datasets = census["census_info"]["datasets"].read().concat().to_pandas()
        summary = census["census_info"]["summary"].read().concat().to_pandas().set_index("label")["value"]
    assert list(datasets["dataset_id"]) == ["blood_one", "brain"] and list(
        datasets["dataset_total_cell_count"]
    ) == [60, 40]
    assert presence.sum(axis=1).tolist() == [30, 40]
    assert summary["total_cell_count"] == "100"


def test_x_is_laid_out_for_runs_of_cells(tmp_path: Path) -> None:
    uri = str(tmp_path / "atlas")
    ingest([write(tmp_path / "a.h5ad", cells())], uri)
    with tiledbsoma.SparseNDArray.open(f"{uri}/{schema.X}") as x:
        options = x.schema_config_options()
        dims = json.loads(options.dims)
    assert (dims["soma_dim_0"]["tile"], dims["soma_dim_1"]["tile"]) == ("64", "131072")
    assert (options.capacity, options.allows_duplicates) == (65_536, False)


def test_major_types_come_from_terms_and_from_the_table(tmp_path: Path) -> None:
    table = tmp_path / "labels.tsv"
    table.write_text(
        "dataset\tcell_type\tn\tcl_id\nblood_one\tweird\t1\tCL:0000738\nblood_one\tB\t1\tCL:0000786\nblood_one\tT\t1\t\n"
    )
    uri = str(tmp_path / "atlas")
    report = ingest([write(tmp_path / "a.h5ad", cells())], uri, IngestOptions(labels=table))
    obs = atlas_content(uri)[schema.OBS]
    majors = obs.groupby("cell_type")[
        ["cell_type_ontology_term_id", "cell_type_major", "cell_type_major_ontology_term_id"]
    ].first()
    assert majors.loc["T"].tolist() == ["CL:0000895", "T cell", "CL:0000084"]
    assert majors.loc["B"].tolist() == ["CL:0000786", "plasma cell", "CL:0000786"]
    assert majors.loc["weird"].tolist() == ["CL:0000738", "unknown", "unknown"]
    assert report.files[0].major_types == {"T cell": 20, "plasma cell": 20, "unknown": 20}
    assert report.files[0].unmapped == {"none": {"weird": 20}}


def test_running_twice_adds_nothing(tmp_path: Path) -> None:
    files = [write(tmp_path / "a.h5ad", cells()), write(tmp_path / "b.h5ad", cells(30, dataset="other"))]
    uri = str(tmp_path / "atlas")
    ingest(files, uri)
    before = atlas_content(uri)
    report = ingest(files[::-1], uri)
    assert (report.cells_added, report.cells_total, report.genes_added) == (0, 90, 0)
    assert not differences(atlas_content(uri), before)


def test_overlapping_file_adds_only_its_new_cells(tmp_path: Path) -> None:
    first, second = cells(60), cells(60, first=40)
    # The overlap is not contiguous: known and new cells are mixed.
    second = second[np.random.default_rng(0).permutation(60)].copy()
    uri = str(tmp_path / "atlas")
    ingest([write(tmp_path / "a.h5ad", first)], uri)
    report = ingest(
        [write(tmp_path / "b.h5ad", second)], uri, IngestOptions(values_per_fragment=200, cells_per_chunk=8)
    )
    assert (report.files[0].cells, report.files[0].new_cells, report.cells_total) == (60, 40, 100)
    assert "60 cells, 20 of them already in the atlas" in report.files[0].lines()[0]
    got = counts_frame(from_census(uri))
    expected = pd.concat(
        [
            counts_frame(first),
            counts_frame(second).loc[[name for name in second.obs_names if name not in first.obs_names]],
        ]
    )
    assert list(got.index) == list(expected.index) and np.array_equal(got[expected.columns], expected)


def test_an_old_version_can_be_read_after_many_appends(tmp_path: Path) -> None:
    uri = str(tmp_path / "atlas")
    ingest([write(tmp_path / "first.h5ad", cells(20))], uri)
    with tiledbsoma.Collection.open(uri) as root:
        pinned = root.context.timestamp_ms or int(root.tiledb_timestamp_ms)
    before = atlas_content(uri)
    for k in range(9):  # one more than stay unmerged
        ingest(
            [write(tmp_path / f"{k}.h5ad", cells(5, range(100 + k, 131 + k), dataset=f"d{k}", first=k))], uri
        )
    fragments = {
        place: len(os.listdir(Path(uri) / place / "__fragments"))
        for place in (schema.X, schema.OBS, schema.VAR)
    }
    assert max(fragments.values()) <= 3, f"left unmerged: {fragments}"
    assert len(atlas_content(uri)[schema.OBS]) == 20 + 9 * 5
    with tiledbsoma.Experiment.open(f"{uri}/{schema.EXPERIMENT}", tiledb_timestamp=pinned) as experiment:
        obs = experiment.obs.read().concat().to_pandas()
        var = experiment.ms["RNA"].var.read().concat().to_pandas()
        x = experiment.ms["RNA"].X["raw"].read().tables().concat().to_pandas()
    assert obs.equals(before[schema.OBS]) and var.equals(before[schema.VAR])
    assert x.sort_values(["soma_dim_0", "soma_dim_1"]).reset_index(drop=True).equals(before[schema.X])


def test_genes_join_by_id_symbol_and_sum(tmp_path: Path) -> None:
    by_id, by_symbol = cells(), cells(20, dataset="symbols", first=500)
    by_symbol.var = by_symbol.var[[]]
    table = tmp_path / "symbols.tsv"
    ids = dict(zip([f"GENE{k}" for k in range(100, 128)], ensembl(range(100, 128)), strict=True)) | {
        "GENE128": "ENSG00000000100"
    }
    table.write_text(
        "symbol\tfeature_id\n" + "".join(f"{symbol}\t{feature}\n" for symbol, feature in ids.items())
    )
    uri = str(tmp_path / "atlas")
    options = IngestOptions(symbol_table=table, duplicate_genes="sum")
    report = ingest([write(tmp_path / "a.h5ad", by_id), write(tmp_path / "b.h5ad", by_symbol)], uri, options)
    assert (report.genes_total, report.files[1].genes_joined, report.files[1].genes_repeated) == (30, 29, 2)
    genes = report.files[1].lines()[1]
    assert "29 of 30 matched by var index and symbol table; 3.1% of the counts" in genes
    assert genes.endswith("2 of them share an id; 1 not matched")
    got = counts_frame(from_census(uri, obs_value_filter="dataset_id == 'symbols'"))
    dense = by_symbol.X.toarray()
    assert np.array_equal(got["ENSG00000000100"], dense[:, 0] + dense[:, 28])
    assert got["ENSG00000000129"].sum() == 0
    assert np.array_equal(got["ENSG00000000101"], dense[:, 1])


def test_columns_are_mapped_filled_and_never_invented(tmp_path: Path) -> None:
    sample = cells()
    sample.obs = sample.obs.drop(columns=["dataset", "tissue"]).rename(columns={"donor_id": "patient"})
    sample.obs["disease"] = [None if k % 2 else "normal" for k in range(60)]
    sample.obs["duplicate_of"] = ["other:cell" if k < 5 else "" for k in range(60)]
    uri = str(tmp_path / "atlas")
    ingest(
        [write(tmp_path / "my_study.h5ad", sample)],
        uri,
        IngestOptions(obs_map={"donor_id": "patient"}, constants={"assay": "ignored"}),
    )
    obs = atlas_content(uri)[schema.OBS]
    assert set(obs["dataset_id"]) == {"my_study"} and set(obs["donor_id"]) == {"donor_a", "donor_b"}
    assert list(obs["disease"][:2]) == ["normal", "unknown"]
    assert set(obs["tissue"]) == set(obs["tissue_general"]) == {"unknown"}
    assert set(obs["assay"]) == {"10x 3' v3"}
    assert list(obs["is_primary_data"]) == [False] * 5 + [True] * 55


@pytest.mark.parametrize("kind", ["csc", "raw"])
def test_ray_tasks_write_the_same_as_this_process(tmp_path: Path, ray_local, kind: str) -> None:
    import ray

    first, second = cells(200, range(100, 140)), cells(100, range(90, 120), dataset="two", seed=2)
    options = IngestOptions(values_per_fragment=700, cells_per_chunk=32, use_raw=kind == "raw")
    for sample in (first, second):
        if kind == "raw":
            sample.raw = sample.copy()
            sample.X = sample.X * 0.1
        else:
            sample.X = sparse.csc_matrix(sample.X)
    files = [write(tmp_path / "a.h5ad", first), write(tmp_path / "b.h5ad", second)]
    assert ray.is_initialized()
    ingest(files, str(tmp_path / "by_ray"), options)
    content = atlas_content(str(tmp_path / "by_ray"))
    x = content[schema.X]
    columns = content[schema.VAR].set_index("feature_id")["soma_joinid"]
    for sample, start in ((first, 0), (second, 200)):
        counts = (sample.raw.to_adata() if kind == "raw" else sample).X
        dense = counts.toarray() if sparse.issparse(counts) else np.asarray(counts)
        row, gene = np.nonzero(dense)
        expected = pd.DataFrame(
            {
                "soma_dim_0": row + start,
                "soma_dim_1": columns[sample.var["feature_id"]].to_numpy()[gene],
                "soma_data": dense[row, gene],
            }
        )
        part = x[(x["soma_dim_0"] >= start) & (x["soma_dim_0"] < start + sample.n_obs)]
        a, b = (t.sort_values(["soma_dim_0", "soma_dim_1"]).reset_index(drop=True) for t in (part, expected))
        assert np.array_equal(a.to_numpy(), b.to_numpy())


def test_dry_run_checks_and_writes_nothing(tmp_path: Path, capsys, ray_local) -> None:
    path = write(tmp_path / "a.h5ad", cells())
    assert (
        main(
            [
                "--h5ad",
                str(path),
                "--atlas",
                str(tmp_path / "atlas"),
                "--set",
                "tissue_general=blood",
                "--dry-run",
            ]
        )
        == 0
    )
    said = capsys.readouterr().out
    assert "would add 60 cells and 30 genes" in said and "nothing was written" in said
    assert not (tmp_path / "atlas").exists()


def test_command_reports_files_genes_and_labels(tmp_path: Path, capsys, ray_local) -> None:
    path = write(tmp_path / "a.h5ad", cells())
    command = [
        "--h5ad",
        str(path),
        "--atlas",
        str(tmp_path / "atlas"),
        "--obs-map",
        "sex=tissue",
        "--set",
        "tissue_general=blood",
    ]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert (
        "60 cells (dataset blood_one)" in said
        and "genes: 30 of 30 matched by var column feature_id; 0 not matched" in said
    )
    assert "20 cells stay unknown, no Cell Ontology term: weird (20)" in said
    assert f"added 60 cells and 30 genes; {tmp_path / 'atlas'} has 60 cells and 30 genes" in said
    assert len(from_census(str(tmp_path / "atlas"), obs_value_filter="sex == 'blood'")) == 60


def test_atlas_on_s3(tmp_path: Path, s3: S3) -> None:
    files = [
        write(tmp_path / "a.h5ad", cells()),
        write(tmp_path / "b.h5ad", cells(20, range(110, 140), dataset="two")),
    ]
    options = IngestOptions(tiledb_config=s3.tiledb_config)
    uri = f"{s3.uri}/ingested/atlas"
    for file in files:
        ingest([file], uri, options)
        ingest([file], str(tmp_path / "local"))
    assert ingest(files, uri, options).cells_added == 0
    assert not differences(atlas_content(uri, s3.tiledb_config), atlas_content(str(tmp_path / "local")))


def test_local_atlas_can_be_moved(tmp_path: Path) -> None:
    ingest([write(tmp_path / "a.h5ad", cells())], str(tmp_path / "here"))
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert len(from_census(str(tmp_path / "there"))) == 60


def test_real_files_are_read_back_unchanged(tmp_path: Path, real_data: Path) -> None:
    files = [real_data / f"{name}.h5ad" for name in ("pbmc3k_10x", "zheng17_facs", "kang18_ctrl_8donors")]
    uri = str(tmp_path / "atlas")
    options = IngestOptions(
        labels=real_data / "label_map.tsv", duplicate_genes="sum", constants={"tissue_general": "blood"}
    )
    report = ingest(files, uri, options)
    assert report.cells_added == 18_773 and all("unknown" not in file.major_types for file in report.files)
    found = from_census(uri, obs_value_filter="tissue_general == 'blood' and is_primary_data == True")
    found.var_names = found.var["feature_id"]
    assert len(found) == 18_773
    for path in files[1:]:
        sample = anndata.read_h5ad(path)
        mine = found[found.obs["dataset_id"] == sample.obs["dataset"].iloc[0], list(sample.var["feature_id"])]
        mine = mine[sample.obs_names]
        assert (mine.X != sample.X).nnz == 0
