"""Plan an ingest: which cells are new, their sums, the joined genes, the parts that tasks write.

Axes: `n` cells, `g` genes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import tiledbsoma as soma
from scipy import sparse

from data_ingest import schema
from data_ingest.h5ad import H5adFile, check_counts
from data_ingest.ingest_files import CheckedFile, IngestOptions, file_sha256, ids_of
from data_ingest.ingest_journal import Journal, close_ingest, obs_ids, read_journal
from data_ingest.tasks import map_tasks

_PARTS_AT_LEAST = 8


FEWEST_VALUES = 1 << 21


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Sums over the counts of a range of cells, genes joined."""

    raw_sum_n: np.ndarray
    nnz_n: np.ndarray
    cells_g: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Part:
    """Cells that one task writes."""

    file: int
    rows: np.ndarray
    first_joinid: int


@dataclass(frozen=True, kw_only=True)
class Base:
    """The atlas before this ingest."""

    exists: bool
    journal: Journal = Journal()
    var: pd.DataFrame
    datasets: pd.DataFrame
    n_cells: int = 0


def refuse_unrelated_genes(files: Sequence[CheckedFile], base: Base) -> None:
    """Refuse a file that shares no gene with the atlas or with the other files."""
    known = set(base.var["feature_id"]) or set(files[0].feature_ids_g)
    for file in files:
        if known.isdisjoint(file.feature_ids_g[file.feature_ids_g != ""]):
            there = "the atlas" if len(base.var) else files[0].path
            raise ValueError(
                f"{file.path}: none of its {int((file.feature_ids_g != '').sum())} genes is among the"
                f" {len(known)} of {there}; "
                "check the gene ids (--feature-id-column), or make an atlas of its own"
            )
        known.update(file.feature_ids_g)


def read_base(uri: str, context: soma.SOMATileDBContext, options: IngestOptions) -> Base:
    """What the atlas holds before this ingest."""
    empty = Base(
        exists=False,
        var=pd.DataFrame(columns=["soma_joinid", *schema.VAR_COLUMNS]),
        datasets=pd.DataFrame(columns=["soma_joinid", *schema.DATASET_COLUMNS]),
    )
    if not schema.find_atlas(uri, context):
        return empty
    journal = read_journal(uri, context)
    if journal.writing and obs_ids(uri, context, f"soma_joinid >= {journal.first_joinid}", ()).num_rows:
        # Killed after its cells became visible: only bookkeeping is left of it.
        if not options.dry_run:
            close_ingest(uri, context, journal)
        journal = dataclasses.replace(journal, writing=False)
    # What an unfinished ingest has written since it began is not part of the atlas.
    at = {"tiledb_timestamp": journal.timestamp_ms} if journal.writing else {}
    with soma.DataFrame.open(f"{uri}/{schema.VAR}", context=context, **at) as table:
        var = table.read().concat().to_pandas()
    with soma.DataFrame.open(f"{uri}/{schema.DATASETS}", context=context, **at) as table:
        datasets = table.read().concat().to_pandas()
    with soma.DataFrame.open(f"{uri}/{schema.OBS}", context=context) as table:
        n_cells = table.count
    return Base(exists=True, journal=journal, var=var, datasets=datasets, n_cells=n_cells)


def new_rows_of(
    uri: str, context: soma.SOMATileDBContext, files: Sequence[CheckedFile], base: Base
) -> list[np.ndarray]:
    """Rows of each file that the atlas does not have."""
    known = set(base.datasets["dataset_id"])
    rows = []
    for file in files:
        is_new = np.ones(file.n_cells, bool)
        for dataset in known.intersection(file.obs["dataset_id"].cat.categories):
            there = obs_ids(uri, context, f"dataset_id == {_quoted(dataset)}", ("obs_id",))[
                "obs_id"
            ].to_pylist()
            is_new &= ~(
                (file.obs["dataset_id"] == dataset).to_numpy() & file.obs["obs_id"].isin(there).to_numpy()
            )
        rows.append(np.flatnonzero(is_new))
    return rows


def _quoted(value: str) -> str:
    return f'"{value}"' if "'" in value else f"'{value}'"


def count_values(
    files: Sequence[CheckedFile], new_rows: Sequence[np.ndarray], options: IngestOptions
) -> list[Counts]:
    """Check every count of the files that have new cells, and sum up."""
    step = 4 * options.cells_per_chunk
    calls = [
        (index, file.path, _local_targets(file), start, min(start + step, file.n_cells))
        for index, (file, rows) in enumerate(zip(files, new_rows, strict=True))
        if len(rows)
        for start in range(0, file.n_cells, step)
    ]
    results = map_tasks(
        partial(_count_cells, options=options), [call[1:] for call in calls], "checking counts"
    )
    counts = []
    for index, file in enumerate(files):
        mine = [result for call, result in zip(calls, results, strict=True) if call[0] == index]
        counts.append(
            Counts(
                raw_sum_n=np.concatenate([part.raw_sum_n for part in mine]) if mine else np.empty(0),
                nnz_n=np.concatenate([part.nnz_n for part in mine]) if mine else np.empty(0, np.int64),
                cells_g=sum((part.cells_g for part in mine), np.zeros(len(ids_of(file)), np.int64)),
            )
        )
    return counts


def _count_cells(
    path: str, targets_g: np.ndarray, start: int, stop: int, *, options: IngestOptions
) -> Counts:
    width = int(targets_g.max()) + 1
    sums, numbers, cells_g = [], [], np.zeros(width, np.int64)
    with H5adFile.open(path, layer=options.layer, raw=options.use_raw) as file:
        for first, block in file.chunks(options.cells_per_chunk, start=start, stop=stop):
            check_counts(block, file=file, start=first)
            joined = join_genes(block, targets_g, width)
            sums.append(np.asarray(joined.sum(axis=1, dtype=np.float64)).ravel())
            numbers.append(np.diff(joined.indptr).astype(np.int64))
            cells_g += np.bincount(joined.indices, minlength=width)
    return Counts(raw_sum_n=np.concatenate(sums), nnz_n=np.concatenate(numbers), cells_g=cells_g)


def _local_targets(file: CheckedFile) -> np.ndarray:
    return gene_targets(
        file, dict(zip(ids_of(file), range(file.n_cells + len(file.feature_ids_g)), strict=False))
    )


def gene_targets(file: CheckedFile, column_of: Mapping[str, int]) -> np.ndarray:
    """Where each gene of the file goes, -1 where it was not joined, int32, shape (g,)."""
    return np.array([column_of.get(feature_id, -1) for feature_id in file.feature_ids_g], dtype=np.int32)


def join_genes(block: sparse.csr_matrix, targets_g: np.ndarray, width: int) -> sparse.csr_matrix:
    """Move columns to their targets; add up those that meet, drop zeros and what has no target.

    Columns come out sorted.
    """
    columns = targets_g[block.indices]
    kept = (columns >= 0) & (block.data != 0)
    if kept.all():
        joined = sparse.csr_matrix((block.data, columns, block.indptr), shape=(block.shape[0], width))
    else:
        before = np.concatenate([[0], np.cumsum(kept)])
        joined = sparse.csr_matrix(
            (block.data[kept], columns[kept], before[block.indptr]), shape=(block.shape[0], width)
        )
    joined.sum_duplicates()
    return joined


def joined_var(
    files: Sequence[CheckedFile], new_rows: Sequence[np.ndarray], base: Base, counts: Sequence[Counts]
) -> pd.DataFrame:
    """The var table with the new files' genes.

    Known genes keep their joinids, new ones follow, sorted by id.
    """
    known = dict(zip(base.var["feature_id"], base.var["soma_joinid"], strict=True))
    used = [file for file, rows in zip(files, new_rows, strict=True) if len(rows)]
    added = sorted({str(feature_id) for file in used for feature_id in ids_of(file)} - set(known))
    details: dict[str, tuple[str, int]] = {}
    for file in used:
        for feature_id, name, length in zip(file.feature_ids_g, file.names_g, file.lengths_g, strict=True):
            details.setdefault(feature_id, (str(name), int(length)))
    fresh = pd.DataFrame(
        {
            "soma_joinid": np.arange(len(known), len(known) + len(added), dtype=np.int64),
            "feature_id": added,
            "feature_name": [details[feature_id][0] for feature_id in added],
            "feature_length": np.array([details[feature_id][1] for feature_id in added], dtype=np.int64),
            "nnz": 0,
            "n_measured_obs": 0,
        }
    )
    var = pd.concat([base.var, fresh], ignore_index=True) if len(base.var) else fresh
    position = pd.Series(np.arange(len(var)), index=var["feature_id"])
    nnz, measured = (
        var["nnz"].to_numpy(np.int64, copy=True),
        var["n_measured_obs"].to_numpy(np.int64, copy=True),
    )
    for file, rows, count in zip(files, new_rows, counts, strict=True):
        if len(rows):
            where = position[ids_of(file)].to_numpy()
            nnz[where] += count.cells_g
            measured[where] += len(rows)
    return var.assign(nnz=nnz, n_measured_obs=measured)


def parts_of(
    new_rows: Sequence[np.ndarray], counts: Sequence[Counts], first_joinid: int, options: IngestOptions
) -> Iterable[Part]:
    """Cut the new cells into one task each.

    Few and large, for each leaves a fragment, but enough of them to work in parallel.
    """
    total = sum(int(count.nnz_n[rows].sum()) for rows, count in zip(new_rows, counts, strict=True))
    most = min(options.values_per_fragment, max(total // _PARTS_AT_LEAST, FEWEST_VALUES))
    for index, (rows, count) in enumerate(zip(new_rows, counts, strict=True)):
        group = (np.cumsum(count.nnz_n[rows]) - 1) // most
        for part in np.split(rows, np.flatnonzero(np.diff(group)) + 1) if len(rows) else ():
            yield Part(file=index, rows=part, first_joinid=first_joinid)
            first_joinid += len(part)


def ingest_digest(
    files: Sequence[CheckedFile],
    new_rows: Sequence[np.ndarray],
    labels: Mapping[tuple[str, str], str],
    options: IngestOptions,
    base: Base,
) -> str:
    """What decides the outcome: equal digests write equal atlases."""
    tables = [file_sha256(path) if path else "" for path in (options.symbol_table, options.major_types)]
    settings = {
        k: v
        for k, v in dataclasses.asdict(options).items()
        if k not in ("tiledb_config", "dry_run", "labels", "symbol_table", "major_types")
    }
    content = {
        "files": [
            (Path(file.path).name, file.sha256, len(rows)) for file, rows in zip(files, new_rows, strict=True)
        ],
        "labels": sorted((*key, value) for key, value in labels.items()),
        "tables": tables,
        "settings": settings,
        "base": (base.n_cells, len(base.var)),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
