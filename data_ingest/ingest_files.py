"""Read and check the .h5ad files of an ingest: cells, genes, labels.

Axes: `n` cells, `g` genes.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from data_ingest.file_genes import find_file_genes
from data_ingest.foreign_files import url_of
from data_ingest.h5ad import H5adFile
from data_ingest.ingest_obs import standard_obs
from data_ingest.ingest_options import IngestOptions
from data_ingest.ontology import Outcome


@dataclass(frozen=True, kw_only=True)
class CheckedFile:
    """A checked file: everything but its counts."""

    path: str
    sha256: str
    stamp: tuple[int, int]
    """Size and modification time, to detect changes during the ingest."""
    n_cells: int
    feature_ids_g: np.ndarray
    names_g: np.ndarray
    lengths_g: np.ndarray
    gene_source: str
    num_repeated: int
    obs: pd.DataFrame
    """The atlas's columns except those derived from the counts; major types are added by `label`."""
    unmapped: Mapping[Outcome, Counter[str]] = field(default_factory=dict)
    """Reason why labels have no major type -> label -> number of cells."""
    notes: tuple[str, ...] = ()
    """Remarks on the file for the user."""


def distinct_paths(files: Sequence[str | Path]) -> list[str]:
    """Absolute paths or URLs of the files; rejects an empty list and duplicates."""
    if not files:
        raise ValueError("no files were given; pass at least one .h5ad")
    paths = [url_of(path) or os.path.abspath(path) for path in files]
    repeated = [
        path for path, count in Counter(os.path.realpath(path) for path in paths).items() if count > 1
    ]
    if repeated:
        raise ValueError(f"{repeated[0]} is given twice; list each file once")
    return paths


def check_file(path: str, *, options: IngestOptions, symbols: dict[str, str] | None) -> CheckedFile:
    """Read and check everything in a file but its counts."""
    with H5adFile.open(path, layer=options.layer, raw=options.use_raw) as file:
        genes = find_file_genes(
            file,
            feature_id_column=options.feature_id_column,
            symbols=symbols,
            duplicates=options.duplicate_genes,
        )
        obs, notes = standard_obs(file, options)
        lengths = (
            pd.to_numeric(file.var["feature_length"], errors="coerce").fillna(0)
            if "feature_length" in file.var
            else None
        )
        stat = os.stat(path)
        return CheckedFile(
            path=path,
            sha256=file_sha256(path),
            stamp=(stat.st_size, stat.st_mtime_ns),
            n_cells=file.n_cells,
            feature_ids_g=genes.feature_ids,
            names_g=genes.names,
            lengths_g=np.zeros(file.n_genes, np.int64) if lengths is None else lengths.to_numpy(np.int64),
            gene_source=genes.source,
            num_repeated=genes.num_repeated,
            obs=obs,
            notes=tuple(notes),
        )


def refuse_shared_cells(files: Sequence[CheckedFile]) -> None:
    """Reject a cell of one dataset that is in two files."""
    owner: dict[str, list[CheckedFile]] = {}
    for file in files:
        for dataset in file.obs["dataset_id"].cat.categories:
            owner.setdefault(dataset, []).append(file)
    for dataset, sharing in owner.items():
        seen: dict[str, str] = {}
        for file in sharing if len(sharing) > 1 else ():
            for cell in file.obs.loc[file.obs["dataset_id"] == dataset, "obs_id"]:
                if cell in seen:
                    raise ValueError(
                        f"cell {cell!r} of dataset {dataset!r} is in {seen[cell]} and in {file.path}; leave"
                        f" one file out, "
                        "or give each its own dataset (--obs-map dataset_id=COLUMN)"
                    )
                seen[cell] = file.path


def ids_of(file: CheckedFile) -> np.ndarray:
    """The distinct gene ids of a file, sorted."""
    return np.unique(file.feature_ids_g[file.feature_ids_g != ""].astype(str))


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
