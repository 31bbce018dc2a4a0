"""Convert inputs of other formats to .h5ad: 10x Cell Ranger, AnnData in Zarr, loom, and files behind a URL.

Counts are converted in blocks of cells, so memory does not grow with their number; only Matrix Market files
are read whole.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import anndata
import h5py
import numpy as np
import pandas as pd
from anndata.io import read_elem, sparse_dataset, write_elem
from scipy import sparse

from data_ingest.foreign_files import ZARR_FILES, h5ad_name, url_of

logger = logging.getLogger(__name__)

_VALUES_PER_BLOCK = 1 << 24
_MATRICES = ("matrix.mtx.gz", "matrix.mtx")
_TENX, _LOOM, _MTX, _ZARR = "a 10x .h5 file", "a .loom file", "a 10x matrix folder", "a Zarr store"


@contextmanager
def as_h5ad(sources: Sequence[str | Path]) -> Iterator[list[Path]]:
    """Give every input as a local .h5ad file.

    A local .h5ad file is given unchanged. Everything else is downloaded or converted into a temporary folder
    (`TMPDIR`; on a cluster, one that all nodes share), which is deleted afterwards.

    Args:
        sources: Local files or folders, or URLs of files: .h5ad, 10x Cell Ranger .h5, a folder with 10x's
            matrix.mtx, .zarr, .loom.

    Raises:
        ValueError: An input cannot be downloaded or converted.
    """
    with tempfile.TemporaryDirectory(prefix="screformer-") as scratch:
        yield [_as_h5ad(source, Path(scratch) / str(number)) for number, source in enumerate(sources)]


def _as_h5ad(source: str | Path, scratch: Path) -> Path:
    url = url_of(source)
    path = _downloaded(url, scratch / "download") if url else Path(source)
    kind = _kind(path)
    if kind is None:
        return path  # .h5ad, or nothing that can be converted, which the reader of .h5ad files explains
    logger.info("%s: converting %s", source, kind)
    target = scratch / h5ad_name(path.name)
    target.parent.mkdir(exist_ok=True)
    try:
        _CONVERT[kind](path, target)
    except (OSError, KeyError, ValueError, TypeError) as e:
        raise ValueError(f"{source} cannot be read as {kind} ({e}); write it as .h5ad with anndata") from e
    return target


def _kind(path: Path) -> str | None:
    """The format of a local input; None if it needs no conversion or is unknown."""
    if path.is_dir():
        names = {entry.name for entry in path.iterdir()}
        return _ZARR if names & ZARR_FILES else _MTX if names & set(_MATRICES) else None
    try:
        with h5py.File(path, "r") as file:
            if "matrix" in file and "row_attrs" in file:
                return _LOOM
            return _TENX if _tenx_group(file) is not None else None
    except OSError:
        return None


def _downloaded(url: str, folder: Path) -> Path:
    import fsspec

    folder.mkdir(parents=True)
    target = folder / Path(urlsplit(url).path).name
    try:
        filesystem, place = fsspec.url_to_fs(url)
        logger.info("%s: downloading", url)
        filesystem.get(place, str(target), recursive=target.suffix == ".zarr")
    except ImportError as e:
        raise ValueError(f"{url}: {e}; download the file and give its path") from e
    except Exception as e:  # noqa: BLE001 - each protocol has errors of its own
        raise ValueError(
            f"{url} cannot be downloaded ({type(e).__name__}: {e}); check the address and your credentials,"
            " or download the file and give its path"
        ) from e
    return target


def _convert_10x(path: Path, target: Path) -> None:
    """Cell Ranger's .h5, version 3 (`matrix`) or 2 (a group per genome)."""
    with h5py.File(path, "r") as file:
        group = _tenx_group(file)
        assert group is not None
        features = group["features"] if "features" in group else group
        var = pd.DataFrame(
            {"gene_ids": _texts(features["id" if "id" in features else "genes"])},
            index=_texts(features["name" if "name" in features else "gene_names"]),
        )
        for name in ("feature_type", "genome"):
            if name in features:
                var[{"feature_type": "feature_types"}.get(name, name)] = _texts(features[name])
        obs = pd.DataFrame(index=_texts(group["barcodes"]))
        # Genes by cells, compressed by cell: the rows of our matrix.
        _write(target, obs, var, _csr_blocks(group, len(var)))


def _tenx_group(file: h5py.File) -> h5py.Group | None:
    for group in file.values():
        if isinstance(group, h5py.Group) and {"barcodes", "indptr", "indices", "data"} <= group.keys():
            return group
    return None


def _csr_blocks(group: h5py.Group, num_genes: int) -> Iterator[sparse.csr_matrix]:
    indptr = group["indptr"][:]
    for start, stop in _ranges(np.diff(indptr)):
        first, last = indptr[start], indptr[stop]
        parts = (group["data"][first:last], group["indices"][first:last], indptr[start : stop + 1] - first)
        yield sparse.csr_matrix(parts, shape=(stop - start, num_genes))


def _convert_loom(path: Path, target: Path) -> None:
    """Loom: a dense matrix of genes by cells, with attributes of both."""
    with h5py.File(path, "r") as file:
        matrix, genes, cells = file["matrix"], file["row_attrs"], file["col_attrs"]
        var = _attributes(genes, ("Gene", "gene", "var_names", "Accession"), matrix.shape[0], "gene")
        obs = _attributes(cells, ("CellID", "obs_names", "cell_id"), matrix.shape[1], "cell")
        ranges = _ranges(np.full(matrix.shape[1], matrix.shape[0]))
        _write(target, obs, var, (sparse.csr_matrix(matrix[:, start:stop].T) for start, stop in ranges))


def _attributes(group: h5py.Group, index: Sequence[str], length: int, what: str) -> pd.DataFrame:
    columns = {
        name: _texts(values) if values.dtype.kind in "OS" else values[:]
        for name, values in group.items()
        if values.shape == (length,)
    }
    name = next((name for name in index if name in columns), None)
    names = columns.pop(name) if name else [f"{what}{number}" for number in range(length)]
    return pd.DataFrame(columns, index=pd.Index(names, dtype=object))


def _convert_mtx(path: Path, target: Path) -> None:
    """Cell Ranger's folder: matrix.mtx, barcodes.tsv, and features.tsv or genes.tsv, gzipped or not."""
    from scipy.io import mmread

    matrix = next(path / name for name in _MATRICES if (path / name).exists())
    features = _table(path, ("features.tsv", "genes.tsv"))
    names = dict(zip(range(3), ("gene_ids", "name", "feature_types"), strict=True))
    var = features.iloc[:, :3].rename(columns=names)
    var = var.set_index("name" if "name" in var else "gene_ids", drop="name" in var).rename_axis(None)
    obs = _table(path, ("barcodes.tsv",)).iloc[:, :1].set_index(0).rename_axis(None)
    counts = sparse.csr_matrix(mmread(matrix).T)
    if counts.shape != (len(obs), len(var)):
        raise ValueError(
            f"{matrix.name} has {counts.shape[0]} cells and {counts.shape[1]} genes, but the tables have"
            f" {len(obs)} and {len(var)} rows"
        )
    _write(target, obs, var, [counts])


def _table(folder: Path, names: Sequence[str]) -> pd.DataFrame:
    paths = [folder / (name + ending) for name in names for ending in (".gz", "")]
    found = next((path for path in paths if path.exists()), None)
    if found is None:
        raise ValueError(f"it has no {' or '.join(names)}")
    return pd.read_csv(found, sep="\t", header=None, dtype=str)


def _convert_zarr(path: Path, target: Path) -> None:
    """AnnData's Zarr store: X, layers and raw in blocks of cells, everything else at once."""
    import zarr

    store: Any = zarr.open_group(path, mode="r")
    with h5py.File(target, "w") as file:
        file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        for name in store:
            if name == "X":
                _copy_matrix(store[name], file, name)
            elif name == "layers":
                write_elem(file, name, {})
                for layer in store[name]:
                    _copy_matrix(store[name][layer], file, f"{name}/{layer}")
            elif name == "raw":
                if "raw/X" in store:  # else AnnData wrote that there is none
                    group = file.create_group(name)
                    group.attrs.update({"encoding-type": "raw", "encoding-version": "0.1.0"})
                    _copy_matrix(store["raw/X"], file, "raw/X")
                    write_elem(group, "var", read_elem(store["raw/var"]))
            else:
                write_elem(file, name, read_elem(store[name]))


def _copy_matrix(matrix: Any, file: h5py.File, name: str) -> None:
    if hasattr(matrix, "shape"):  # dense
        copy = file.create_dataset(name, matrix.shape, dtype=matrix.dtype, chunks=True)
        copy.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
        for start, stop in _ranges(np.full(*matrix.shape)):
            copy[start:stop] = matrix[start:stop]
        return
    stored = sparse_dataset(matrix)
    if stored.format == "csr":
        ranges = _ranges(np.diff(matrix["indptr"][:]))
        _append(file, name, (stored[start:stop] for start, stop in ranges), stored.shape[1])
    else:
        write_elem(file, name, read_elem(matrix))


def _write(target: Path, obs: pd.DataFrame, var: pd.DataFrame, blocks: Iterable[sparse.csr_matrix]) -> None:
    anndata.AnnData(obs=obs, var=var).write_h5ad(target)
    with h5py.File(target, "r+") as file:
        _append(file, "X", blocks, len(var))


def _append(file: h5py.File, name: str, blocks: Iterable[sparse.csr_matrix], num_genes: int) -> None:
    stored = None
    for block in blocks:
        if stored is None:
            write_elem(file, name, block)
            stored = sparse_dataset(file[name])
        else:
            stored.append(block)
    if stored is None:
        write_elem(file, name, sparse.csr_matrix((0, num_genes), dtype=np.float32))


def _ranges(lengths_n: np.ndarray) -> Iterator[tuple[int, int]]:
    """Consecutive ranges of cells with a limited number of values."""
    ends = np.cumsum(lengths_n)
    start = 0
    while start < len(ends):
        before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + _VALUES_PER_BLOCK, side="right")))
        yield start, stop
        start = stop


def _texts(values: h5py.Dataset) -> list[str]:
    return [text.decode() if isinstance(text, bytes) else str(text) for text in values[:]]


_CONVERT = {_TENX: _convert_10x, _LOOM: _convert_loom, _MTX: _convert_mtx, _ZARR: _convert_zarr}
