"""Inputs of other formats give the same counts, genes and cells as .h5ad."""

import gzip
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from scipy.io import mmwrite

from data_ingest import formats
from data_ingest.foreign_files import h5ad_name
from data_ingest.formats import as_h5ad
from data_ingest.h5ad import H5adFile
from helpers.cells import cells


@pytest.fixture
def adata() -> anndata.AnnData:
    found = cells()
    found.var["gene_ids"] = [f"ENSG{number:011d}" for number in range(found.n_vars)]
    return found


def tenx(adata: anndata.AnnData, path: Path, *, old: bool = False) -> None:
    counts = sparse.csr_matrix(adata.X)
    with h5py.File(path, "w") as file:
        group = file.create_group("GRCh38" if old else "matrix")
        for name in ("data", "indices", "indptr"):
            group[name] = getattr(counts, name).astype(np.int32)
        group["barcodes"] = np.array(adata.obs_names, dtype="S")
        genes = group if old else group.create_group("features")
        genes["genes" if old else "id"] = np.array(adata.var["gene_ids"], dtype="S")
        genes["gene_names" if old else "name"] = np.array(adata.var_names, dtype="S")
        if not old:
            genes["feature_type"] = np.array(["Gene Expression"] * adata.n_vars, dtype="S")


def loom(adata: anndata.AnnData, path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["matrix"] = sparse.csr_matrix(adata.X).toarray().T
        file["row_attrs/Gene"] = np.array(adata.var_names, dtype="S")
        file["row_attrs/Accession"] = np.array(adata.var["gene_ids"], dtype="S")
        file["col_attrs/CellID"] = np.array(adata.obs_names, dtype="S")


def mtx(adata: anndata.AnnData, path: Path) -> None:
    path.mkdir()
    with gzip.open(path / "matrix.mtx.gz", "wb") as file:
        mmwrite(file, sparse.csr_matrix(adata.X).T.astype(int))
    features = pd.DataFrame({"id": adata.var["gene_ids"], "name": adata.var_names, "type": "Gene Expression"})
    features.to_csv(path / "features.tsv.gz", sep="\t", header=False, index=False)
    pd.Series(adata.obs_names).to_csv(path / "barcodes.tsv.gz", sep="\t", header=False, index=False)


def zarr(adata: anndata.AnnData, path: Path) -> None:
    adata.layers["counts"] = sparse.csr_matrix(adata.X).toarray()
    adata.raw = adata
    adata.write_zarr(path)


@pytest.mark.filterwarnings("ignore:.*zarr v2:UserWarning")
@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.h5", tenx),
        ("old.h5", partial(tenx, old=True)),
        ("a.loom", loom),
        ("filtered.v1", mtx),
        ("a.zarr", zarr),
        ("plain.zarr", lambda adata, path: adata.write_zarr(path)),
    ],
)
def test_each_format_has_the_cells_of_an_h5ad_file(
    adata: anndata.AnnData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    write: Callable[[anndata.AnnData, Path], None],
) -> None:
    write(adata, tmp_path / name)
    monkeypatch.setattr(formats, "_VALUES_PER_BLOCK", 100)  # several blocks
    with as_h5ad([tmp_path / name]) as (path,):
        assert path.name == h5ad_name(name)
        with H5adFile.open(path) as file:
            assert list(file.obs.index) == list(adata.obs_names)
            assert list(file.var.index) == list(adata.var_names)
            ids = "Accession" if name.endswith("loom") else "gene_ids"
            assert list(file.var[ids]) == list(adata.var["gene_ids"])
            counts = sparse.vstack([block for _, block in file.chunks(7)])
            assert (counts != sparse.csr_matrix(adata.X)).nnz == 0
        whole = anndata.read_h5ad(path)
        if name == "a.zarr":
            pd.testing.assert_frame_equal(whole.obs, adata.obs)
            assert np.array_equal(whole.layers["counts"], adata.layers["counts"])
            assert (whole.raw.X != sparse.csr_matrix(adata.X)).nnz == 0
    assert not path.exists()


def test_an_h5ad_file_is_read_where_it_is(adata: anndata.AnnData, tmp_path: Path) -> None:
    adata.write_h5ad(tmp_path / "a.h5ad")
    with as_h5ad([tmp_path / "a.h5ad"]) as paths:
        assert paths == [tmp_path / "a.h5ad"]


def test_tables_that_do_not_fit_are_refused(adata: anndata.AnnData, tmp_path: Path) -> None:
    mtx(adata, tmp_path / "filtered")
    (tmp_path / "filtered/barcodes.tsv.gz").write_bytes(gzip.compress(b"one\n"))
    with pytest.raises(ValueError, match=r"matrix.mtx.gz has \d+ cells .* but the tables have 1 and"):
        with as_h5ad([tmp_path / "filtered"]):
            pass
    (tmp_path / "filtered/barcodes.tsv.gz").unlink()
    with pytest.raises(ValueError, match="filtered cannot be read as a 10x matrix folder .*no barcodes.tsv"):
        with as_h5ad([tmp_path / "filtered"]):
            pass


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    handler.log_message = lambda *words: None  # type: ignore[attr-defined]
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_url_is_downloaded(adata: anndata.AnnData, tmp_path: Path, web: str) -> None:
    tenx(adata, tmp_path / "a.h5")
    with as_h5ad([Path(f"{web}/a.h5")]) as (path,), H5adFile.open(path) as file:
        assert file.n_cells == adata.n_obs
    with pytest.raises(ValueError, match=r"http://127.0.0.1:\d+/none.h5 cannot be downloaded"):
        with as_h5ad([f"{web}/none.h5"]):
            pass
