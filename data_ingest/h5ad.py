"""Read .h5ad files in chunks of cells and check their counts.

A matrix is never loaded whole: blocks of rows are read from HDF5, whether it is CSR, CSC or dense.

Axes: `n` cells, `g` genes.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np
import pandas as pd
from anndata.io import read_elem
from scipy import sparse

from data_ingest.foreign_files import other_hdf5, require_path, unreadable, unreadable_part
from screformer.counts import raw_counts, sum_dtype

_ELEMENTS_PER_READ = 1 << 24
"""Maximum number of values in memory while converting a dense or CSC matrix to CSR: 64 MiB of float32."""


class H5adFile:
    """An open .h5ad file and its matrix of counts.

    A context manager. Not picklable; open it in the process that reads it.
    """

    def __init__(self, path: Path, handle: h5py.File, source: str) -> None:
        self.path = path
        self.source = source
        self._handle = handle
        self._matrix = handle[source]
        self.format, shape = _matrix_format(path, source, self._matrix)
        self.n_cells, self.n_genes = shape
        self._axis_obs, self._axis_var = "obs", "raw/var" if source == "raw/X" else "var"
        self._obs: pd.DataFrame | None = None
        self._var: pd.DataFrame | None = None
        self._indptr: np.ndarray | None = None

    @classmethod
    def open(cls, path: str | Path, *, layer: str | None = None, raw: bool = False) -> H5adFile:
        """Open a file and find its counts.

        Args:
            path: The .h5ad file.
            layer: Layer with the counts, instead of X.
            raw: Read counts from `raw.X` instead of X.

        Raises:
            ValueError: The file is missing, truncated, not HDF5, not AnnData, empty, or has no such layer or
                raw.
        """
        path = Path(path)
        if layer and raw:
            raise ValueError(f"layer={layer!r} and raw=True select two matrices; choose one")
        require_path(path)
        try:
            handle = h5py.File(path, "r")
        except OSError as e:
            raise ValueError(unreadable(path, e)) from e
        try:
            source = cls._find_counts(path, handle, layer, raw)
            opened = cls(path, handle, source)
            for axis, number in (("cells", opened.n_cells), ("genes", opened.n_genes)):
                if number == 0:
                    raise ValueError(
                        f"{path}: {source} has 0 {axis}, so there is nothing to read; leave the file out"
                    )
            return opened
        except BaseException:
            handle.close()
            raise

    @staticmethod
    def _find_counts(path: Path, handle: h5py.File, layer: str | None, raw: bool) -> str:
        other = other_hdf5(path, handle)
        if other:
            raise ValueError(other)
        layers = sorted(handle["layers"]) if "layers" in handle else []
        x, raw_x = ("yes" if name in handle else "no" for name in ("X", "raw"))
        has = f"it has X: {x}, raw: {raw_x}, layers: {', '.join(layers) or 'none'}"
        if layer:
            if layer not in layers:
                raise ValueError(f"{path} has no layer {layer!r}; {has}")
            return f"layers/{layer}"
        if raw:
            if "raw" not in handle or "X" not in handle["raw"]:
                raise ValueError(f"{path} has no raw.X; {has}")
            return "raw/X"
        if "X" not in handle:
            raise ValueError(f"{path} has no X; {has}; select the counts with --layer or --use raw")
        return "X"

    def __enter__(self) -> H5adFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handle.close()

    def close(self) -> None:
        """Close the file."""
        self._handle.close()

    def alternatives(self) -> str:
        """Options that select other matrices of counts, for error messages."""
        layers = [
            f"--layer {name}" for name in (sorted(self._handle["layers"]) if "layers" in self._handle else [])
        ]
        places = layers + (["--use raw"] if "raw" in self._handle and "X" in self._handle["raw"] else [])
        places = [
            place
            for place in places
            if place not in (f"--layer {self.source.removeprefix('layers/')}", f"--use {self.source[:3]}")
        ]
        return " or ".join(places)

    @property
    def obs(self) -> pd.DataFrame:
        """The table of cells, n rows, indexed by cell name."""
        if self._obs is None:
            self._obs = self._table("obs", self.n_cells)
        return self._obs

    @property
    def var(self) -> pd.DataFrame:
        """The table of genes of the selected matrix, g rows, indexed by gene name."""
        if self._var is None:
            self._var = self._table(self._axis_var, self.n_genes)
        return self._var

    def uns(self, name: str) -> Any:
        """An entry of `uns`; None if it is missing or unreadable."""
        try:
            return read_elem(self._handle["uns"][name])
        except (OSError, KeyError, ValueError, TypeError):
            return None

    def _table(self, key: str, length: int) -> pd.DataFrame:
        try:
            table = read_elem(self._handle[key])
        except (OSError, KeyError, ValueError, TypeError) as e:
            raise ValueError(unreadable_part(self.path, key, e)) from e
        if not isinstance(table, pd.DataFrame):
            raise ValueError(f"{self.path}: {key} is not a table; write the file with anndata.write_h5ad")
        if len(table) != length:
            raise ValueError(
                f"{self.path}: {key} has {len(table)} rows but {self.source} has {length}; the file is"
                f" damaged; write it again"
            )
        table.index = table.index.map(str)
        return table

    def chunks(
        self, cells_per_chunk: int = 4096, *, start: int = 0, stop: int | None = None
    ) -> Iterator[tuple[int, sparse.csr_matrix]]:
        """Read the counts, a block of cells at a time.

        Args:
            cells_per_chunk: Maximum number of cells per block.
            start: First cell.
            stop: One past the last cell; defaults to all.

        Yields:
            (index of the block's first cell, counts as csr float32 of shape (cells, n_genes) with sorted
            columns).

        Raises:
            ValueError: The matrix is damaged, or a value is not a raw count.
        """
        stop = self.n_cells if stop is None else stop
        read = {"csr": self._rows_of_csr, "csc": self._rows_of_csc, "dense": self._rows_of_dense}[self.format]
        for first in range(start, stop, cells_per_chunk):
            last = min(first + cells_per_chunk, stop)
            try:
                block = read(first, last)
            except OSError as e:
                part = f"{self.source}, cells {first} to {last},"
                raise ValueError(unreadable_part(self.path, part, e)) from e
            yield (
                first,
                raw_counts(
                    block,
                    source=f"{self.path}: {self.source}",
                    place=partial(self._place, first),
                    elsewhere=self.alternatives(),
                ),
            )

    def _place(self, first: int, row: int, column: int) -> str:
        return f"cell {self.obs.index[first + row]!r}, gene {self.var.index[column]!r}"

    def _pointers(self) -> np.ndarray:
        if self._indptr is None:
            indptr = np.asarray(self._matrix["indptr"][:], dtype=np.int64)
            major = self.n_cells if self.format == "csr" else self.n_genes
            stored = len(self._matrix["data"])
            if (
                len(indptr) != major + 1
                or indptr[0] != 0
                or indptr[-1] != stored
                or (np.diff(indptr) < 0).any()
                or len(self._matrix["indices"]) != stored
            ):
                raise ValueError(
                    f"{self.path}: {self.source} is damaged: indptr does not match its {stored} values;"
                    f" write the file again"
                )
            self._indptr = indptr
        return self._indptr

    def _checked_indices(self, low: int, high: int, bound: int) -> np.ndarray:
        indices = self._matrix["indices"][low:high]
        if len(indices) and (indices.min() < 0 or indices.max() >= bound):
            raise ValueError(
                f"{self.path}: {self.source} is damaged: an index is outside 0 to {bound - 1}; write the"
                f" file again"
            )
        return indices

    def _rows_of_csr(self, first: int, last: int) -> sparse.csr_matrix:
        pointers = self._pointers()[first : last + 1]
        low, high = int(pointers[0]), int(pointers[-1])
        indices = self._checked_indices(low, high, self.n_genes).astype(np.int32, copy=False)
        return sparse.csr_matrix(
            (self._values(self._matrix["data"][low:high]), indices, pointers - low),
            shape=(last - first, self.n_genes),
            copy=False,
        )

    def _rows_of_csc(self, first: int, last: int) -> sparse.csr_matrix:
        # One pass over the whole matrix per block keeps memory bounded; a transposed copy would not.
        pointers = self._pointers()
        rows, columns, values = [], [], []
        for low in range(0, int(pointers[-1]), _ELEMENTS_PER_READ):
            high = min(low + _ELEMENTS_PER_READ, int(pointers[-1]))
            row = self._checked_indices(low, high, self.n_cells)
            kept = np.flatnonzero((row >= first) & (row < last))
            rows.append(row[kept] - first)
            columns.append((np.searchsorted(pointers, kept + low, side="right") - 1).astype(np.int32))
            values.append(self._values(self._matrix["data"][low:high][kept]))
        if not values:
            return sparse.csr_matrix((last - first, self.n_genes), dtype=np.float32)
        places = (np.concatenate(rows), np.concatenate(columns))
        return sparse.coo_matrix((np.concatenate(values), places), shape=(last - first, self.n_genes)).tocsr()

    def _rows_of_dense(self, first: int, last: int) -> sparse.csr_matrix:
        step = max(1, _ELEMENTS_PER_READ // self.n_genes)
        blocks = [
            sparse.csr_matrix(self._values(self._matrix[low : min(low + step, last)]))
            for low in range(first, last, step)
        ]
        return sparse.vstack(blocks, format="csr") if len(blocks) > 1 else blocks[0]

    def _values(self, values: np.ndarray) -> np.ndarray:
        return values.astype(sum_dtype(values.dtype, source=f"{self.path}: {self.source}"), copy=False)


def _matrix_format(path: Path, source: str, matrix: Any) -> tuple[str, tuple[int, int]]:
    if isinstance(matrix, h5py.Dataset):
        if matrix.ndim != 2:
            raise ValueError(
                f"{path}: {source} has {matrix.ndim} dimensions, not 2; write the file with"
                f" anndata.write_h5ad"
            )
        sum_dtype(matrix.dtype, source=f"{path}: {source}")
        return "dense", (int(matrix.shape[0]), int(matrix.shape[1]))
    # Files written before anndata 0.7 use the h5sparse names.
    kind = str(matrix.attrs.get("encoding-type", matrix.attrs.get("h5sparse_format", "?"))).removesuffix(
        "_matrix"
    )
    if kind not in ("csr", "csc") or not {"data", "indices", "indptr"} <= set(matrix):
        raise ValueError(
            f"{path}: {source} is stored as {kind!r}; it must be a dense, csr or csc matrix: write the file"
            f" with anndata.write_h5ad"
        )
    shape = matrix.attrs.get("shape", matrix.attrs.get("h5sparse_shape"))
    sum_dtype(matrix["data"].dtype, source=f"{path}: {source}")
    return kind, (int(shape[0]), int(shape[1]))
