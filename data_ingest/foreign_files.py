"""Say what an input is that is no readable .h5ad file, and what makes one of it."""

from __future__ import annotations

import re
from pathlib import Path

import h5py

_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+(?=[^/])")
_FILTER = re.compile(r"filter|plugin", re.IGNORECASE)


def require_path(path: Path) -> None:
    """Refuse what is no file on this machine.

    Raises:
        ValueError: An address, a folder, or nothing; says which, and what helps.
    """
    address = _ADDRESS.match(str(path))
    if address and not path.exists():
        place = f"{address[1]}://{str(path)[address.end() :]}"
        raise ValueError(f"{place} is an address; fetch the file to this machine and give its path")
    if path.is_dir():
        raise ValueError(f"{path} is a folder{_folder(path)}")
    if not path.exists():
        raise ValueError(f"{path} does not exist; check the path (on a cluster, every node must see it)")


def unreadable(path: Path, error: OSError) -> str:
    """Why a file cannot be opened as HDF5, and what helps."""
    if isinstance(error, PermissionError) or error.errno == 13:
        return f"{path} may not be read by this user; change its permissions (chmod u+r)"
    if "lock file" in str(error) or error.errno == 11:  # not the `sblock` of a truncated file
        return (
            f"{path} is locked: another program has it open for writing; close it there, or copy the file."
            " On a file system without locks, set HDF5_USE_FILE_LOCKING=FALSE"
        )
    if "truncated" in str(error):
        return f"{path} is truncated: it was cut off while it was written or copied; fetch it again"
    with open(path, "rb") as stream:
        head = stream.read(512)
    if not head:
        return f"{path} is empty; fetch it again"
    if head.startswith(b"\x89HDF"):
        return f"{path} is a damaged HDF5 file ({error}); fetch it again"
    if head.startswith((b"\x1f\x8b", b"PK\x03\x04", b"BZh", b"\xfd7zXZ")):
        return f"{path} is a compressed file, not HDF5; unpack it first (an R .rds is to be converted in R)"
    if b"\0" not in head:
        return f"{path} is text, not HDF5; read it with anndata.io.read_csv or pandas, and write_h5ad it"
    return f"{path} is not a readable HDF5 file ({error}); check that it is an .h5ad file, or fetch it again"


def other_hdf5(path: Path, handle: h5py.File) -> str:
    """What an HDF5 file is that is not AnnData, and how it becomes .h5ad; "" for AnnData."""
    kind = str(handle.attrs.get("encoding-type", ""))
    if kind == "MuData" or "mod" in handle:
        names = ", ".join(sorted(handle["mod"])) if "mod" in handle else "?"
        return (
            f"{path} is MuData with the modalities {names}; write that of the genes as .h5ad:"
            f" mudata.read({str(path)!r})['rna'].write_h5ad(...)"
        )
    if "matrix" in handle and "row_attrs" in handle:
        return (
            f"{path} is a .loom file; write it as .h5ad: anndata.io.read_loom({str(path)!r}).write_h5ad(...)"
        )
    if "matrix" in handle:
        return (
            f"{path} is a matrix of 10x Cell Ranger; write it as .h5ad:"
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
    """Why a part of an .h5ad file cannot be read, and what helps."""
    if _FILTER.search(str(error)):
        return (
            f"{path}: {part} is compressed in a way that this HDF5 lacks ({error}); where hdf5plugin is"
            " installed, write the file again with compression='gzip'"
        )
    if isinstance(error, OSError):
        return f"{path}: {part} cannot be read ({error}); the file is damaged, fetch it again"
    return f"{path}: {part} cannot be read ({error}); write the file again with a current anndata"


def _folder(path: Path) -> str:
    names = {entry.name for entry in path.iterdir()}
    if names & {".zgroup", ".zattrs", "zarr.json", ".zmetadata"}:
        return (
            f" that holds a Zarr store; write it as .h5ad: anndata.read_zarr({str(path)!r}).write_h5ad(...)"
        )
    if names & {"matrix.mtx", "matrix.mtx.gz"}:
        return (
            " of 10x Cell Ranger's matrix; write it as .h5ad:"
            f" scanpy.read_10x_mtx({str(path)!r}).write_h5ad(...)"
        )
    files = sorted(name for name in names if name.endswith(".h5ad"))
    return f"; name the .h5ad files in it ({', '.join(files[:5]) or 'there are none'})"
