"""Bad input is rejected before anything is written; the message gives the problem, the place and the
remedy."""

import pickle
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import tiledbsoma
from scipy import sparse

from data_ingest.ingest import ingest
from data_ingest.ingest_options import IngestOptions
from helpers.cells import cells, write
from jobs.ingest import main

Made = tuple[list[Path], dict]


def one(tmp: Path, sample=None, **options) -> Made:
    return [write(tmp / "in.h5ad", cells() if sample is None else sample)], options


def negative(tmp: Path) -> Made:
    sample = cells()
    sample.X[5, 10] = -2
    return one(tmp, sample)


def log_normalised(tmp: Path) -> Made:
    sample = cells()
    sample.layers["counts"] = sample.X.copy()
    sample.raw = sample.copy()
    sample.X = sparse.csr_matrix(np.log1p(sample.X.toarray() * 3.3))
    return one(tmp, sample)


def normalised_layer(tmp: Path) -> Made:
    sample = cells()
    sample.layers["scaled"] = sample.X * 0.3
    return one(tmp, sample, layer="scaled")


def normalised_raw(tmp: Path) -> Made:
    sample = cells()
    other = sample.copy()
    other.X = other.X * 0.3
    sample.raw = other
    return one(tmp, sample, use_raw=True)


def var_change(change: Callable, **options) -> Callable[[Path], Made]:
    def make(tmp: Path) -> Made:
        sample = cells()
        change(sample)
        return one(tmp, sample, **options)

    return make


def truncated(tmp: Path) -> Made:
    path = write(tmp / "in.h5ad", cells(400))
    path.write_bytes(path.read_bytes()[:-2000])
    return [path], {}


def edited(edit: Callable[[h5py.File], None]) -> Callable[[Path], Made]:
    def make(tmp: Path) -> Made:
        files, options = one(tmp)
        with h5py.File(files[0], "r+") as file:
            edit(file)
        return files, options

    return make


def delete(*names: str) -> Callable[[h5py.File], None]:
    def edit(file: h5py.File) -> None:
        for name in names:
            del file[name]

    return edit


def wild_index(file: h5py.File) -> None:
    file["X/indices"][3] = 999


def broken_pointers(file: h5py.File) -> None:
    file["X/indptr"][-1] = 3


def strange_matrix(file: h5py.File) -> None:
    file["X"].attrs["encoding-type"] = "ell_matrix"


def text_counts(file: h5py.File) -> None:
    del file["X"]
    file.create_dataset("X", data=np.full((60, 30), b"many"))


def short_obs(file: h5py.File) -> None:
    other = file["obs/_index"][:50]
    for name in list(file["obs"]):
        del file["obs"][name]
    file["obs"].attrs["column-order"] = []
    index = file["obs"].create_dataset("_index", data=other)
    index.attrs.update({"encoding-type": "string-array", "encoding-version": "0.2.0"})


def duplicate_cells(sample) -> None:
    sample.obs_names = ["cell_7" if k == 9 else name for k, name in enumerate(sample.obs_names)]


def set_ids(values: dict[int, str]) -> Callable:
    def change(sample) -> None:
        for k, value in values.items():
            sample.var.iloc[k, 0] = value

    return change


def no_ids(sample) -> None:
    sample.var = sample.var[[]]


def foreign_term(sample) -> None:
    sample.obs["cell_type_ontology_term_id"] = ["T-ish" if k == 4 else "unknown" for k in range(sample.n_obs)]


def odd_primary(sample) -> None:
    sample.obs["is_primary_data"] = ["maybe" if k == 4 else "True" for k in range(sample.n_obs)]


def table(text: str, option: str) -> Callable[[Path], Made]:
    def make(tmp: Path) -> Made:
        (tmp / "table.tsv").write_text(text)
        return one(tmp, **{option: tmp / "table.tsv"})

    return make


def two_files(second) -> Callable[[Path], Made]:
    return lambda tmp: ([write(tmp / "in.h5ad", cells()), write(tmp / "other.h5ad", second)], {})


# unit/test_h5ad.py covers values that are not counts, unit/test_foreign_files.py files that are not .h5ad.
BAD: dict[str, tuple[Callable[[Path], Made], str]] = {
    "negative": (
        negative,
        r"in\.h5ad: X has -2 at cell 'cell_5', gene 'GENE110': it is negative.*raw counts",
    ),
    "log-normalised, counts elsewhere": (log_normalised, r"whole number.*try --layer counts or --use raw"),
    "normalised layer": (normalised_layer, r"layers/scaled has 0\.\d+ at cell .*whole number"),
    "normalised raw": (normalised_raw, r"raw/X has 0\.\d+ at cell"),
    "no such layer": (
        lambda tmp: one(tmp, layer="counts"),
        r"no layer 'counts'; it has X: yes, raw: no, layers: none",
    ),
    "no raw": (lambda tmp: one(tmp, use_raw=True), r"has no raw\.X; it has X: yes"),
    "layer and raw": (lambda tmp: one(tmp, use_raw=True, layer="a"), "choose one"),
    "no X": (edited(delete("X")), r"has no X; .*select the counts with --layer or --use raw"),
    "missing file": (lambda tmp: ([tmp / "gone.h5ad"], {}), r"gone\.h5ad does not exist; check the path"),
    "directory": (lambda tmp: ([tmp], {}), "is a folder; give the .h5ad files in it"),
    "no files": (lambda tmp: ([], {}), "no files were given"),
    "same file twice": (lambda tmp: (one(tmp)[0] * 2, {}), r"in\.h5ad is given twice"),
    "truncated": (truncated, r"in\.h5ad is truncated.*download or write it again"),
    "HDF5, not AnnData": (edited(delete("obs", "var")), "HDF5 but not AnnData: it has no obs and no var"),
    "0 cells": (lambda tmp: one(tmp, cells()[:0].copy()), "X has 0 cells, so there is nothing to read"),
    "0 genes": (lambda tmp: one(tmp, cells()[:, :0].copy()), "X has 0 genes"),
    "gene index outside": (edited(wild_index), "X is damaged: an index is outside 0 to 29"),
    "pointers broken": (edited(broken_pointers), "X is damaged: indptr"),
    "unknown storage": (edited(strange_matrix), "stored as 'ell'; it must be a dense, csr or csc matrix"),
    "text for counts": (edited(text_counts), r"X: values are of type \|S4, not numbers"),
    "obs too short": (edited(short_obs), "obs has 50 rows but X has 60"),
    "duplicate cells": (
        var_change(duplicate_cells),
        r"cell 'cell_7' appears twice in obs \(rows 7 and 9\).*obs_names_make_unique",
    ),
    "duplicate genes": (
        var_change(set_ids({1: "ENSG00000000100"})),
        "'GENE100' and 'GENE101' are both ENSG00000000100",
    ),
    "duplicate genes by version": (
        var_change(set_ids({0: "ENSG00000000101.7"})),
        "'GENE100' and 'GENE101' are both ENSG00000000101",
    ),
    "mouse genes": (
        var_change(set_ids({i: f"ENSMUSG{100 + i:011d}" for i in range(30)})),
        r"genes are of another species, ids like ENSMUSG00000000100 \(mouse\)",
    ),
    "no gene ids": (
        var_change(no_ids),
        r"no gene can be matched: var index has no Ensembl gene ids \(its names are 'GENE100', ",
    ),
    "gene column missing": (
        lambda tmp: one(tmp, feature_id_column="ensg"),
        r"var has no column 'ensg' .*it has: feature_id, gene_symbol",
    ),
    "gene column of symbols": (
        lambda tmp: one(tmp, feature_id_column="gene_symbol"),
        "var column gene_symbol has no Ensembl gene ids",
    ),
    "obs column missing": (
        lambda tmp: one(tmp, obs_map={"donor_id": "patient"}),
        r"no column 'patient' \(--obs-map donor_id=patient\); it has",
    ),
    "unknown target": (
        lambda tmp: one(tmp, obs_map={"donor": "donor_id"}),
        "'donor' is not a column you can set; choose from dataset_id",
    ),
    "derived target": (
        lambda tmp: one(tmp, constants={"nnz": "3"}),
        "'nnz' is not a column you can set",
    ),
    "two sources": (
        lambda tmp: one(tmp, constants={"sex": "female"}, obs_map={"sex": "tissue"}),
        "'sex' is in both --obs-map and --set",
    ),
    "foreign cell type term": (
        var_change(foreign_term),
        r"'cell_type_ontology_term_id' has 'T-ish' \(cell 'cell_4'\)",
    ),
    "primary not boolean": (
        var_change(odd_primary),
        r"'is_primary_data' \(is_primary_data\) has 'maybe' at cell 'cell_4'",
    ),
    "primary constant": (
        lambda tmp: one(tmp, constants={"is_primary_data": "perhaps"}),
        "--set is_primary_data=perhaps: it must be true or false",
    ),
    "labels missing": (
        lambda tmp: one(tmp, labels=tmp / "none.tsv"),
        r"none\.tsv \(--labels\) does not exist",
    ),
    "labels without column": (
        table("dataset\tcell_type\n", "labels"),
        r"\(--labels\) has no column 'cl_id'; it has: dataset, cell_type",
    ),
    "labels with a wrong term": (
        table("dataset\tcell_type\tcl_id\nblood_one\tT\tCL:123\n", "labels"),
        r"\(--labels\) line 2: cl_id='CL:123' is not a Cell Ontology term",
    ),
    "labels that disagree": (
        table("dataset\tcell_type\tcl_id\nd\tT\tCL:0000084\nd\tT\tCL:0000236\n", "labels"),
        r"line 3: \(d, T\) has cl_id='CL:0000236' here and 'CL:0000084' above",
    ),
    "symbols without column": (
        table("name\tid\n", "symbol_table"),
        r"\(--symbol-table\) has no column 'symbol'",
    ),
    "symbols without ids": (
        table("symbol\tfeature_id\nA\tB\n", "symbol_table"),
        "has no human Ensembl gene id",
    ),
    "major types wrong": (
        table("name\tcl_id\nmuscle\tCL:1\n", "major_types"),
        "major type 'muscle': 'CL:1' is not a Cell Ontology term",
    ),
    "same cell in two files": (
        two_files(cells(20, first=55)),
        r"cell 'cell_55' of dataset 'blood_one' is in .*in\.h5ad and in .*other\.h5ad",
    ),
    "no gene in common": (
        two_files(cells(20, range(500, 530), dataset="other")),
        r"other\.h5ad: none of its 30 genes is among the 30 of .*in\.h5ad",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_rejected(tmp_path: Path, name: str) -> None:
    make, message = BAD[name]
    atlas = tmp_path / "atlas"
    with pytest.raises(ValueError, match=message) as caught:
        files, options = make(tmp_path)
        ingest(files, str(atlas), IngestOptions(**options))
    assert not atlas.exists(), "nothing may be written"
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def plain_directory(path: Path) -> None:
    path.mkdir()
    (path / "notes.txt").write_text("not an atlas")


def another_soma(path: Path) -> None:
    tiledbsoma.Experiment.create(str(path)).close()


def newer_atlas(path: Path) -> None:
    with tiledbsoma.Collection.create(str(path)) as root:
        root.metadata["screformer_schema"] = "99"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (plain_directory, "is a directory with other contents"),
        (another_soma, "is a SOMAExperiment with a different schema"),
        (newer_atlas, "has schema version 99, this program writes version 1"),
        (lambda path: path.write_text("x"), "is a file; use a directory"),
    ],
)
def test_a_folder_that_is_not_an_atlas_is_rejected(tmp_path: Path, make, message: str) -> None:
    make(tmp_path / "atlas")
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=message):
        ingest([write(tmp_path / "in.h5ad", cells())], str(tmp_path / "atlas"))
    (tmp_path / "in.h5ad").unlink()
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before


def test_the_command_exits_with_status_2_and_the_message(tmp_path: Path, capsys, ray_local) -> None:
    status = main(["--h5ad", str(tmp_path / "gone.h5ad"), "--atlas", str(tmp_path / "atlas")])
    assert status == 2
    assert capsys.readouterr().err.startswith(f"screformer ingest: {tmp_path}/gone.h5ad does not exist")
