"""Explain why an input is not a readable .h5ad file and how to convert it."""

from __future__ import annotations

import re
from pathlib import Path

import h5py

_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+(?=[^/])")
_FILTER = re.compile(r"filter|plugin", re.IGNORECASE)
ZARR_FILES = {".zgroup", ".zattrs", "zarr.json", ".zmetadata"}
"""Files by which a folder is recognised as a Zarr store."""


def url_of(path: str | Path) -> str:
    """The URL that was given as a path; "" if it is none. A `Path` has lost one slash of it."""
    address = _ADDRESS.match(str(path))
    return f"{address[1]}://{str(path)[address.end() :]}" if address and not Path(path).exists() else ""


def h5ad_name(name: str) -> str:
    """The name of a file or folder after its conversion to .h5ad."""
    return re.sub(r"(\.(h5ad|h5|zarr|loom))?$", ".h5ad", name, count=1)


def require_path(path: Path) -> None:
    """Reject anything that is not a local file.

    Raises:
        ValueError: The path is a URL or a folder, or does not exist.
    """
    if url := url_of(path):
        raise ValueError(f"{url} is a URL; download the file and give its path")
    if path.is_dir():
        raise ValueError(f"{path} is a folder{_folder(path)}")
    if not path.exists():
        raise ValueError(f"{path} does not exist; check the path (on a cluster, every node must see it)")


def unreadable(path: Path, error: OSError) -> str:
    """Why a file cannot be opened as HDF5, and what to do."""
    if isinstance(error, PermissionError) or error.errno == 13:
        return f"{path} is not readable by this user; change its permissions (chmod u+r)"
    if "lock file" in str(error) or error.errno == 11:  # not the `sblock` of a truncated file
        return (
            f"{path} is locked: another program has it open for writing; close that program, or copy the"
            " file. On a file system without locks, set HDF5_USE_FILE_LOCKING=FALSE"
        )
    if "truncated" in str(error):
        return f"{path} is truncated: writing or copying it was interrupted; download or write it again"
    with open(path, "rb") as stream:
        head = stream.read(512)
    if not head:
        return f"{path} is empty; download or write it again"
    if head.startswith(b"\x89HDF"):
        return f"{path} is a damaged HDF5 file ({error}); download or write it again"
    if head.startswith((b"\x1f\x8b", b"PK\x03\x04", b"BZh", b"\xfd7zXZ")):
        return f"{path} is a compressed file, not HDF5; decompress it first (convert an R .rds file in R)"
    if b"\0" not in head:
        return f"{path} is text, not HDF5; read it with anndata.io.read_csv or pandas, then use write_h5ad"
    return f"{path} is not a readable HDF5 file ({error}); check that it is a complete .h5ad file"


def other_hdf5(path: Path, handle: h5py.File) -> str:
    """What kind of HDF5 file this is if not AnnData, and how to convert it; "" for AnnData."""
    kind = str(handle.attrs.get("encoding-type", ""))
    if kind == "MuData" or "mod" in handle:
        names = ", ".join(sorted(handle["mod"])) if "mod" in handle else "?"
        return (
            f"{path} is a MuData file with modalities {names}; write the RNA modality as .h5ad:"
            f" mudata.read({str(path)!r})['rna'].write_h5ad(...)"
        )
    if "matrix" in handle and "row_attrs" in handle:
        return (
            f"{path} is a .loom file; write it as .h5ad: anndata.io.read_loom({str(path)!r}).write_h5ad(...)"
        )
    if "matrix" in handle:
        return (
            f"{path} is a 10x Cell Ranger matrix; write it as .h5ad:"
            f" scanpy.read_10x_h5({str(path)!r}).write_h5ad(...)"
        )
    if "assays" in handle:
        return (
            f"{path} is a Seurat file; write it as .h5ad in R:"
            f" SeuratDisk::Convert({str(path)!r}, dest = 'h5ad')"
        )
    missing = [part for part in ("obs", "var") if part not in handle]
    if missing:
        return (
            f"{path} is HDF5 but not AnnData: it has no {' and no '.join(missing)}; write it with"
            f" anndata.write_h5ad"
        )
    return ""


def unreadable_part(path: Path, part: str, error: Exception) -> str:
    """Why a part of an .h5ad file cannot be read, and what to do."""
    if _FILTER.search(str(error)):
        return (
            f"{path}: {part} uses a compression filter that is not installed here ({error}); where"
            " hdf5plugin is installed, write the file again with compression='gzip'"
        )
    if isinstance(error, OSError):
        return f"{path}: {part} cannot be read ({error}); the file is damaged, download or write it again"
    return f"{path}: {part} cannot be read ({error}); write the file again with a current anndata"


def _folder(path: Path) -> str:
    names = {entry.name for entry in path.iterdir()}
    if names & ZARR_FILES:
        return f" with a Zarr store; write it as .h5ad: anndata.read_zarr({str(path)!r}).write_h5ad(...)"
    if names & {"matrix.mtx", "matrix.mtx.gz"}:
        return (
            " with a 10x Cell Ranger matrix; write it as .h5ad:"
            f" scanpy.read_10x_mtx({str(path)!r}).write_h5ad(...)"
        )
    files = sorted(name for name in names if name.endswith(".h5ad"))
    return f"; give the .h5ad files in it ({', '.join(files[:5]) or 'there are none'})"
