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
from typing import Any

import numpy as np
import pandas as pd

from data_ingest import schema
from data_ingest.file_genes import Duplicates, find_file_genes
from data_ingest.h5ad import H5adFile
from data_ingest.ontology import UNKNOWN, Outcome, is_cell_term

_SOURCES: dict[str, tuple[str, ...]] = {"dataset_id": ("dataset_id", "dataset")}
"""Where a column of the atlas comes from when it is not of the same name."""


DERIVED = ("obs_id", "cell_type_major", "cell_type_major_ontology_term_id", "raw_sum", "nnz")


_NO_VALUE = ("", "nan", "NaN", "None", "none", "NA", "<NA>")


@dataclass(frozen=True, kw_only=True)
class IngestOptions:
    """How files are read and joined."""

    obs_map: Mapping[str, str] = field(default_factory=dict)
    """Atlas column to the file's obs column, such as `donor_id: patient`."""
    constants: Mapping[str, str] = field(default_factory=dict)
    """Atlas column to the value for files that lack it, such as `tissue_general: blood`."""
    layer: str | None = None
    """Layer that holds the counts; X by default."""
    use_raw: bool = False
    """Take counts from raw.X."""
    feature_id_column: str | None = None
    """var column of Ensembl gene ids; found by its usual names by default."""
    symbol_table: Path | None = None
    """Tab-separated table (symbol, feature_id) for genes without an Ensembl id."""
    duplicate_genes: Duplicates = "error"
    """What to do with several genes of one id in a file: refuse, `sum` their counts, or `drop` them."""
    labels: Path | None = None
    """Tab-separated table (dataset, cell_type, cl_id) for labels without a Cell Ontology term; wins over the
    file's own terms."""
    major_types: Path | None = None
    """Tab-separated table (name, cl_id, also, before) that replaces the default major types."""
    tiledb_config: Mapping[str, str] = field(default_factory=dict)
    """Passed to TileDB as it is."""
    dry_run: bool = False
    """Check and plan, write nothing."""
    cells_per_chunk: int = 4096
    """Cells read together; bounds each task's memory."""
    values_per_fragment: int = 1 << 24
    """Most stored counts written by one task, into one fragment of X (at least one cell); 20 bytes of memory
    each."""

    def __post_init__(self) -> None:
        for option, mapping in (("--obs-map", self.obs_map), ("--set", self.constants)):
            for name in mapping:
                if name in DERIVED or name not in schema.OBS_COLUMNS:
                    allowed = ", ".join(column for column in schema.OBS_COLUMNS if column not in DERIVED)
                    raise ValueError(
                        f"{option} {name}={mapping[name]}: {name!r} is not a column that can be given; choose"
                        f" from {allowed}"
                    )
        both = sorted(set(self.obs_map) & set(self.constants))
        if both:
            raise ValueError(f"{both[0]!r} is in --obs-map and in --set; a column has one source")


@dataclass(frozen=True, kw_only=True)
class CheckedFile:
    """One checked file: everything but its counts."""

    path: str
    sha256: str
    stamp: tuple[int, int]
    """Size and time of change, to notice a change while it is ingested."""
    n_cells: int
    feature_ids_g: np.ndarray
    names_g: np.ndarray
    lengths_g: np.ndarray
    gene_source: str
    num_repeated: int
    obs: pd.DataFrame
    """The atlas's columns, without those that come from the counts; major types once `label` has added
    them."""
    unmapped: Mapping[Outcome, Counter[str]] = field(default_factory=dict)
    """Why labels have no major type -> label -> cells."""


def distinct_paths(files: Sequence[str | Path]) -> list[str]:
    """Absolute paths of the files; refuses none at all and repeated ones."""
    if not files:
        raise ValueError("no files were given; name at least one .h5ad")
    paths = [os.path.abspath(path) for path in files]
    repeated = [
        path for path, count in Counter(os.path.realpath(path) for path in paths).items() if count > 1
    ]
    if repeated:
        raise ValueError(f"{repeated[0]} is given twice; name each file once")
    return paths


def check_file(path: str, *, options: IngestOptions, symbols: dict[str, str] | None) -> CheckedFile:
    """Read everything of a file but its counts, and check it."""
    with H5adFile.open(path, layer=options.layer, raw=options.use_raw) as file:
        genes = find_file_genes(
            file,
            feature_id_column=options.feature_id_column,
            symbols=symbols,
            duplicates=options.duplicate_genes,
        )
        obs = _standard_obs(file, options)
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
        )


def _standard_obs(file: H5adFile, options: IngestOptions) -> pd.DataFrame:
    """The file's obs in the atlas's columns, as far as the file alone can say."""
    obs, n = file.obs, file.n_cells
    columns: dict[str, Any] = {"obs_id": obs.index.to_numpy(dtype=object)}
    for name in schema.OBS_COLUMNS:
        if name in DERIVED:
            continue
        source = options.obs_map.get(name) or next(
            (column for column in _SOURCES.get(name, (name,)) if column in obs.columns), None
        )
        if source is not None and source not in obs.columns:
            has = ", ".join(map(str, obs.columns)) or "none"
            raise ValueError(
                f"{file.path}: obs has no column {source!r} (--obs-map {name}={source}); it has: {has}"
            )
        if name == "is_primary_data":
            columns[name] = _primary(file, source, options.constants.get(name))
        elif source is not None:
            text = obs[source].astype(object).where(obs[source].notna(), UNKNOWN).map(str)
            columns[name] = pd.Categorical(text.where(~text.isin(_NO_VALUE), UNKNOWN))
        else:
            default = options.constants.get(name, Path(file.path).stem if name == "dataset_id" else UNKNOWN)
            columns[name] = pd.Categorical.from_codes(np.zeros(n, np.int8), [default])
    table = pd.DataFrame(columns, index=pd.RangeIndex(n))
    twice = table.duplicated(["dataset_id", "obs_id"], keep=False).to_numpy()
    if twice.any():
        first = int(np.flatnonzero(twice)[0])
        cell = table["obs_id"].iloc[first]
        other = int(np.flatnonzero(table["obs_id"].to_numpy() == cell)[1])
        raise ValueError(
            f"{file.path}: cell {cell!r} stands twice in obs (rows {first} and {other}), {twice.sum()} such"
            f" cells; "
            "cells are known by their names: make them unique (adata.obs_names_make_unique())"
        )
    for term in table["cell_type_ontology_term_id"].cat.categories:
        if term != UNKNOWN and not is_cell_term(term):
            source = options.obs_map.get("cell_type_ontology_term_id", "cell_type_ontology_term_id")
            row = int(np.flatnonzero(table["cell_type_ontology_term_id"] == term)[0])
            raise ValueError(
                f"{file.path}: obs column {source!r} holds {term!r} (cell {table['obs_id'].iloc[row]!r}),"
                f" which is not a term of the Cell "
                "Ontology such as CL:0000084; correct it or write 'unknown'"
            )
    return table


def _primary(file: H5adFile, source: str | None, constant: str | None) -> np.ndarray:
    """`is_primary_data`: the file's own column, else the constant.

    Else true save for cells that `duplicate_of` calls copies.
    """
    words = {"true": True, "1": True, "false": False, "0": False}
    if source is None and constant is not None:
        if constant.lower() not in words:
            raise ValueError(f"--set is_primary_data={constant}: it must be true or false")
        return np.full(file.n_cells, words[constant.lower()])
    if source is not None:
        text = file.obs[source].astype(str).str.lower()
        wrong = text[~text.isin(list(words))]
        if len(wrong):
            raise ValueError(
                f"{file.path}: obs column {source!r} (is_primary_data) holds"
                f" {file.obs[source].loc[wrong.index[0]]!r} "
                f"at cell {wrong.index[0]!r}; it must be true or false"
            )
        return text.map(words).to_numpy(bool)
    if "duplicate_of" in file.obs.columns:
        copies = file.obs["duplicate_of"]
        return (copies.isna() | copies.astype(str).isin(_NO_VALUE)).to_numpy()
    return np.ones(file.n_cells, bool)


def refuse_shared_cells(files: Sequence[CheckedFile]) -> None:
    """Refuse a cell of one dataset that is in two files."""
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
    """The distinct joined ids of a file, sorted."""
    return np.unique(file.feature_ids_g[file.feature_ids_g != ""].astype(str))


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
