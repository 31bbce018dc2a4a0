"""Errors for unreadable .h5ad files say what the file is and what to do."""

import gzip
import subprocess
from pathlib import Path

import anndata
import h5py
import numpy as np
import pytest

from data_ingest.foreign_files import unreadable_part
from data_ingest.h5ad import H5adFile
from helpers.cells import cells, write
from helpers.processes import start_python


def mudata(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.attrs["encoding-type"] = "MuData"
        for name in ("obs", "var", "mod/rna", "mod/prot"):
            file.create_group(name)


def hdf5(*names: str):
    def make(path: Path) -> None:
        with h5py.File(path, "w") as file:
            for name in names:
                file.create_group(name)

    return make


def zarr(path: Path) -> None:
    path.mkdir()
    (path / "zarr.json").write_text("{}")


def mtx(path: Path) -> None:
    path.mkdir()
    (path / "matrix.mtx.gz").write_bytes(b"")


def folder(path: Path) -> None:
    path.mkdir()
    (path / "a.h5ad").write_bytes(b"")


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("a.h5mu", mudata, r"is a MuData file with modalities prot, rna; .*\['rna'\].write_h5ad"),
        ("a.loom", hdf5("matrix", "row_attrs", "col_attrs"), "is a .loom file; .*read_loom"),
        ("a.h5", hdf5("matrix"), "is a 10x Cell Ranger matrix; .*read_10x_h5"),
        ("a.h5seurat", hdf5("assays"), "is a Seurat file; .*SeuratDisk::Convert"),
        ("a.h5ad", hdf5("obs"), "is HDF5 but not AnnData: it has no var"),
        ("a.zarr", zarr, "is a folder with a Zarr store; .*read_zarr"),
        ("filtered", mtx, "is a folder with a 10x Cell Ranger matrix; .*read_10x_mtx"),
        ("folder", folder, r"is a folder; give the .h5ad files in it \(a.h5ad\)"),
        ("a.csv", lambda path: path.write_text("gene,cell\n"), "is text, not HDF5"),
        ("a.h5ad.gz", lambda path: path.write_bytes(gzip.compress(b"x")), "is a compressed file"),
        ("none.h5ad", lambda path: None, "does not exist; check the path"),
        ("zero.h5ad", lambda path: path.touch(), "is empty; download or write it again"),
    ],
)
def test_other_inputs_are_named(tmp_path: Path, name: str, make, message: str) -> None:
    make(tmp_path / name)
    with pytest.raises(ValueError, match=message):
        H5adFile.open(tmp_path / name)


@pytest.mark.parametrize("address", ["s3://bucket/a.h5ad", "https://host/a.h5ad", "gs://b/c.h5ad"])
def test_a_url_is_shown_as_given(address: str) -> None:
    with pytest.raises(ValueError, match=f"{address} is a URL; download the file"):
        H5adFile.open(Path(address))


def test_a_locked_file_is_not_called_damaged(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5ad", cells())
    code = f"import h5py; file = h5py.File({str(path)!r}, 'r+'); print('open', flush=True); input()"
    with start_python("-c", code, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None and writer.stdout.readline() == "open\n"
        with pytest.raises(
            ValueError, match="is locked: another program has it open for writing; close that program"
        ):
            H5adFile.open(path)
        writer.communicate("\n")
    with H5adFile.open(path) as file:
        assert file.n_cells == 60


def test_a_filter_that_is_missing_is_named(tmp_path: Path) -> None:
    error = OSError("Can't synchronously read data (required filter 'zstd' is not registered)")
    assert "where hdf5plugin is installed, write the file again with compression='gzip'" in unreadable_part(
        tmp_path / "a.h5ad", "X", error
    )


def test_text_that_may_be_missing_is_read(tmp_path: Path) -> None:
    sample = cells()
    expected = sample.obs_names.tolist()
    sample.obs.index = sample.obs.index.astype("string")
    sample.var.index = sample.var.index.astype("string")
    with anndata.settings.override(allow_write_nullable_strings=True):
        path = write(tmp_path / "a.h5ad", sample)
    with H5adFile.open(path) as file:
        assert file.obs.index.tolist() == expected
        assert np.array_equal(next(file.chunks())[1].toarray(), sample.X.toarray())
