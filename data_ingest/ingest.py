"""Turn .h5ad files into an atlas, or append them to one: checked first, written in parallel, safe to kill.

Every file is checked before anything is written. Then X is written by parallel tasks, each a contiguous range of new joinids, and at
the end one write of obs makes the new cells visible: that write is the commit. A journal in the atlas's metadata says what was going
on, so that the same command, run again after a kill, goes on where it stopped, and another command takes the unfinished one back first.
Axes: `n` cells, `g` genes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import tiledbsoma as soma
from scipy import sparse
from tqdm import tqdm

from data_ingest import schema
from data_ingest.h5ad import Duplicates, H5adError, H5adFile, check_counts, read_symbol_table, read_table
from data_ingest.ontology import UNKNOWN, MajorTypes, Outcome, is_cell_term

logger = logging.getLogger(__name__)

_JOURNAL = "screformer_ingest"
_JOURNAL_PARTS = "screformer_ingest_parts"
_JOURNAL_EVERY_S = 2.0
"""How much finished work a kill may cost."""
_PROGRESS_EVERY_S = 10.0
_PARTS_AT_LEAST = 8
_FEWEST_VALUES = 1 << 21
_MOST_FRAGMENTS = 8
"""Small fragments that are left unmerged."""
_SOURCES: dict[str, tuple[str, ...]] = {"dataset_id": ("dataset_id", "dataset")}
"""Where a column of the atlas comes from when it is not of the same name."""
_DERIVED = ("obs_id", "cell_type_major", "cell_type_major_ontology_term_id", "raw_sum", "nnz")
_NO_VALUE = ("", "nan", "NaN", "None", "none", "NA", "<NA>")


class IngestError(ValueError):
    """An ingest that cannot be done as asked; nothing was written. The message names what, where and the remedy."""


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
    """Tab-separated table (dataset, cell_type, cl_id) for labels without a Cell Ontology term; wins over the file's own terms."""
    major_types: Path | None = None
    """Tab-separated table (name, cl_id, also, before) that replaces the default major types."""
    tiledb_config: Mapping[str, str] = field(default_factory=dict)
    """Passed to TileDB as it is."""
    dry_run: bool = False
    """Check and plan, write nothing."""
    cells_per_chunk: int = 4096
    """Cells read together; bounds each task's memory."""
    values_per_fragment: int = 1 << 24
    """Most stored counts written by one task, into one fragment of X (at least one cell); 20 bytes of memory each."""

    def __post_init__(self) -> None:
        for option, mapping in (("--obs-map", self.obs_map), ("--set", self.constants)):
            for name in mapping:
                if name in _DERIVED or name not in schema.OBS_COLUMNS:
                    allowed = ", ".join(column for column in schema.OBS_COLUMNS if column not in _DERIVED)
                    raise IngestError(f"{option} {name}={mapping[name]}: {name!r} is not a column that can be given; choose from {allowed}")
        both = sorted(set(self.obs_map) & set(self.constants))
        if both:
            raise IngestError(f"{both[0]!r} is in --obs-map and in --set; a column has one source")


@dataclass(frozen=True, kw_only=True)
class FileReport:
    """What one file gave."""

    path: str
    dataset_ids: tuple[str, ...]
    cells: int
    """Cells in the file."""
    new_cells: int
    """Cells that the atlas did not have."""
    genes: int
    genes_joined: int
    genes_repeated: int
    """Genes that share their id with another gene of the file."""
    gene_source: str
    major_types: dict[str, int]
    """Cells per major type, `unknown` included."""
    unmapped: dict[str, dict[str, int]]
    """Why labels have no major type: `missing` (no term), `none` (broader than every major type), `ambiguous` -> label -> cells."""

    def lines(self) -> list[str]:
        """The report in words."""
        known = f", {self.cells - self.new_cells} of them already in the atlas" if self.new_cells < self.cells else ""
        repeated = f", {self.genes_repeated} of them share an id" if self.genes_repeated else ""
        text = [
            f"{self.path}: {self.cells} cells{known} (dataset {', '.join(self.dataset_ids)})",
            f"  genes: {self.genes_joined} of {self.genes} joined by {self.gene_source}{repeated}; "
            f"{self.genes - self.genes_joined} not joined",
            "  major types: " + ", ".join(f"{name} {count}" for name, count in sorted(self.major_types.items(), key=lambda item: -item[1])),
        ]
        reasons = {"missing": "no Cell Ontology term", "none": "a term broader than every major type", "ambiguous": "several major types"}
        for outcome, labels in self.unmapped.items():
            shown = ", ".join(f"{label} ({count})" for label, count in list(labels.items())[:8]) + (", ..." if len(labels) > 8 else "")
            text.append(f"  {sum(labels.values())} cells stay unknown, {reasons[outcome]}: {shown}")
        return text


@dataclass(frozen=True, kw_only=True)
class IngestReport:
    """What an ingest did."""

    atlas_uri: str
    files: tuple[FileReport, ...]
    cells_added: int
    cells_total: int
    genes_added: int
    genes_total: int
    resumed: bool
    """An unfinished ingest of the same files was completed."""
    took_back: bool
    """An unfinished ingest of other files was taken back first."""
    dry_run: bool
    seconds: float


@dataclass(frozen=True, kw_only=True)
class _File:
    """One checked file: everything but its counts."""

    path: str
    sha256: str
    stamp: tuple[int, int]
    n_cells: int
    feature_ids_g: np.ndarray
    names_g: np.ndarray
    lengths_g: np.ndarray
    gene_source: str
    num_repeated: int
    obs: pd.DataFrame


@dataclass(frozen=True, kw_only=True)
class _Counts:
    """Sums over the counts of a range of cells, genes joined."""

    raw_sum_n: np.ndarray
    nnz_n: np.ndarray
    cells_g: np.ndarray


@dataclass(frozen=True, kw_only=True)
class _Part:
    """Cells that one task writes."""

    file: int
    rows: np.ndarray
    first_joinid: int


@dataclass(frozen=True, kw_only=True)
class _Journal:
    """What is, or was last, going on in an atlas."""

    digest: str = ""
    writing: bool = False
    timestamp_ms: int = 0
    first_joinid: int = 0
    end_joinid: int = 0
    num_fragments: int = 0
    """Fragments of X since they were last merged."""
    num_commits: int = 0
    """Ingests since the fragments of obs and var were last merged."""


@dataclass(frozen=True, kw_only=True)
class _Base:
    """The atlas before this ingest."""

    exists: bool
    journal: _Journal = _Journal()
    var: pd.DataFrame
    datasets: pd.DataFrame
    n_cells: int = 0


def ingest(files: Sequence[str | Path], atlas_uri: str, options: IngestOptions | None = None) -> IngestReport:
    """Check the files, and write their cells into an atlas.

    Work goes to Ray tasks when this process is connected to Ray, else it runs here. Cells are known by (dataset_id, obs_id): those that
    the atlas already has are left as they are, so that running twice adds nothing. One ingest at a time per atlas.

    Args:
        files: .h5ad files, visible to every node.
        atlas_uri: A path or `s3://...`; made if there is none.
        options: How files are read and joined.

    Raises:
        IngestError: A file, a table, an option or the atlas is not usable; nothing was written.
    """
    options = options or IngestOptions()
    started = time.monotonic()
    context = schema.soma_context(options.tiledb_config, threads=os.cpu_count() or 1)
    uri = atlas_uri.rstrip("/") if schema.is_remote(atlas_uri) else os.path.abspath(atlas_uri.removeprefix("file://"))
    paths = _distinct_paths(files)
    try:
        labels = _read_labels(options.labels) if options.labels else {}
        majors = MajorTypes.from_table(options.major_types) if options.major_types else MajorTypes()
        symbols = read_symbol_table(options.symbol_table) if options.symbol_table else None
        base = _read_base(uri, context, options)
        checked = _map(partial(_check_file, options=options, symbols=symbols), [(path,) for path in paths], "checking files")
        _refuse_shared_cells(checked)
        _refuse_unrelated_genes(checked, base)
        reasons = [_label(file, labels, majors) for file in checked]
        new_rows = _new_rows(uri, context, checked, base)
        counts = _count(checked, new_rows, options)
    except H5adError as e:
        raise IngestError(str(e)) from e
    n_new = sum(len(rows) for rows in new_rows)
    reports = [_report(*item) for item in zip(checked, new_rows, reasons, strict=True)]

    journal = base.journal
    digest = _digest(checked, new_rows, labels, options, base)
    resumes = journal.writing and journal.digest == digest
    took_back = journal.writing and not resumes
    var = _joined_var(checked, new_rows, base, counts)
    result = partial(
        IngestReport,
        atlas_uri=atlas_uri,
        files=tuple(reports),
        cells_added=n_new,
        cells_total=base.n_cells + n_new,
        genes_added=len(var) - len(base.var),
        genes_total=len(var),
        resumed=resumes,
        took_back=took_back,
        dry_run=options.dry_run,
    )
    if options.dry_run:
        return result(seconds=time.monotonic() - started)

    if not base.exists:
        schema.create_atlas(uri, context)
    if took_back:
        _take_back(uri, context, journal)
    if n_new:
        first = journal.first_joinid if resumes else journal.end_joinid
        parts = list(_parts(new_rows, counts, first, options))
        if not resumes:
            n_datasets = len(set(base.datasets["dataset_id"]).union(*(file.obs["dataset_id"] for file in checked)))
            _grow(uri, context, n_cells=first + n_new, n_genes=len(var), n_datasets=n_datasets)
            journal = _Journal(
                digest=digest,
                writing=True,
                timestamp_ms=_now_ms(),
                first_joinid=first,
                end_joinid=first + n_new,
                num_fragments=journal.num_fragments + len(parts),
                num_commits=journal.num_commits + 1,
            )
            _write_journal(uri, context, journal, [])
        _write_x(uri, context, checked, parts, var, options, journal)
        _commit(uri, context, checked, new_rows, counts, var, base, journal)
    _tidy(uri, context)
    return result(seconds=time.monotonic() - started)


# ---------------------------------------------------------------------------------------------------------------- checks


def _distinct_paths(files: Sequence[str | Path]) -> list[str]:
    if not files:
        raise IngestError("no files were given; name at least one .h5ad")
    paths = [os.path.abspath(path) for path in files]
    repeated = [path for path, count in Counter(os.path.realpath(path) for path in paths).items() if count > 1]
    if repeated:
        raise IngestError(f"{repeated[0]} is given twice; name each file once")
    return paths


def _check_file(path: str, *, options: IngestOptions, symbols: dict[str, str] | None) -> _File:
    with H5adFile.open(path, layer=options.layer, raw=options.use_raw) as file:
        genes = file.genes(feature_id_column=options.feature_id_column, symbols=symbols, duplicates=options.duplicate_genes)
        obs = _standard_obs(file, options)
        lengths = pd.to_numeric(file.var["feature_length"], errors="coerce").fillna(0) if "feature_length" in file.var else None
        stat = os.stat(path)
        return _File(
            path=path,
            sha256=_sha256(path),
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
        if name in _DERIVED:
            continue
        source = options.obs_map.get(name) or next((column for column in _SOURCES.get(name, (name,)) if column in obs.columns), None)
        if source is not None and source not in obs.columns:
            has = ", ".join(map(str, obs.columns)) or "none"
            raise H5adError(f"{file.path}: obs has no column {source!r} (--obs-map {name}={source}); it has: {has}")
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
        raise H5adError(
            f"{file.path}: cell {cell!r} stands twice in obs (rows {first} and {other}), {twice.sum()} such cells; "
            "cells are known by their names: make them unique (adata.obs_names_make_unique())"
        )
    for term in table["cell_type_ontology_term_id"].cat.categories:
        if term != UNKNOWN and not is_cell_term(term):
            source = options.obs_map.get("cell_type_ontology_term_id", "cell_type_ontology_term_id")
            row = int(np.flatnonzero(table["cell_type_ontology_term_id"] == term)[0])
            raise H5adError(
                f"{file.path}: obs column {source!r} holds {term!r} (cell {table['obs_id'].iloc[row]!r}), which is not a term of the Cell "
                "Ontology such as CL:0000084; correct it or write 'unknown'"
            )
    return table


def _primary(file: H5adFile, source: str | None, constant: str | None) -> np.ndarray:
    """`is_primary_data`: the file's own column, else the constant, else true save for cells that `duplicate_of` calls copies."""
    words = {"true": True, "1": True, "false": False, "0": False}
    if source is None and constant is not None:
        if constant.lower() not in words:
            raise H5adError(f"--set is_primary_data={constant}: it must be true or false")
        return np.full(file.n_cells, words[constant.lower()])
    if source is not None:
        text = file.obs[source].astype(str).str.lower()
        wrong = text[~text.isin(list(words))]
        if len(wrong):
            raise H5adError(
                f"{file.path}: obs column {source!r} (is_primary_data) holds {file.obs[source].loc[wrong.index[0]]!r} "
                f"at cell {wrong.index[0]!r}; it must be true or false"
            )
        return text.map(words).to_numpy(bool)
    if "duplicate_of" in file.obs.columns:
        copies = file.obs["duplicate_of"]
        return (copies.isna() | copies.astype(str).isin(_NO_VALUE)).to_numpy()
    return np.ones(file.n_cells, bool)


def _read_labels(path: Path) -> dict[tuple[str, str], str]:
    table = read_table(path, "--labels", ("dataset", "cell_type", "cl_id"))
    found: dict[tuple[str, str], str] = {}
    for line, (dataset, label, cl_id) in enumerate(zip(table["dataset"], table["cell_type"], table["cl_id"], strict=True), start=2):
        if cl_id and not is_cell_term(cl_id):
            raise H5adError(
                f"{path} (--labels) line {line}: cl_id={cl_id!r} is not a term of the Cell Ontology such as CL:0000084; "
                "leave it empty if none fits"
            )
        if found.setdefault((dataset, label), cl_id) != cl_id:
            raise H5adError(
                f"{path} (--labels) line {line}: ({dataset}, {label}) has cl_id={cl_id!r} here and {found[dataset, label]!r} above; "
                "keep one row"
            )
    return found


def _refuse_shared_cells(files: Sequence[_File]) -> None:
    owner: dict[str, list[_File]] = {}
    for file in files:
        for dataset in file.obs["dataset_id"].cat.categories:
            owner.setdefault(dataset, []).append(file)
    for dataset, sharing in owner.items():
        seen: dict[str, str] = {}
        for file in sharing if len(sharing) > 1 else ():
            for cell in file.obs.loc[file.obs["dataset_id"] == dataset, "obs_id"]:
                if cell in seen:
                    raise IngestError(
                        f"cell {cell!r} of dataset {dataset!r} is in {seen[cell]} and in {file.path}; leave one file out, "
                        "or give each its own dataset (--obs-map dataset_id=COLUMN)"
                    )
                seen[cell] = file.path


def _refuse_unrelated_genes(files: Sequence[_File], base: _Base) -> None:
    known = set(base.var["feature_id"]) or set(files[0].feature_ids_g)
    for file in files:
        if known.isdisjoint(file.feature_ids_g[file.feature_ids_g != ""]):
            there = "the atlas" if len(base.var) else files[0].path
            raise IngestError(
                f"{file.path}: none of its {int((file.feature_ids_g != '').sum())} genes is among the {len(known)} of {there}; "
                "check the gene ids (--feature-id-column), or make an atlas of its own"
            )
        known.update(file.feature_ids_g)


# ------------------------------------------------------------------------------------------------------------------ plan


def _read_base(uri: str, context: soma.SOMATileDBContext, options: IngestOptions) -> _Base:
    empty = _Base(
        exists=False,
        var=pd.DataFrame(columns=["soma_joinid", *schema.VAR_COLUMNS]),
        datasets=pd.DataFrame(columns=["soma_joinid", *schema.DATASET_COLUMNS]),
    )
    if not schema.find_atlas(uri, context):
        return empty
    journal = _read_journal(uri, context)
    if journal.writing and _obs_ids(uri, context, f"soma_joinid >= {journal.first_joinid}", ()).num_rows:
        # Killed after its cells became visible: only bookkeeping is left of it.
        if not options.dry_run:
            _close(uri, context, journal)
        journal = dataclasses.replace(journal, writing=False)
    # What an unfinished ingest has written since it began is not part of the atlas.
    at = {"tiledb_timestamp": journal.timestamp_ms} if journal.writing else {}
    with soma.DataFrame.open(f"{uri}/{schema.VAR}", context=context, **at) as table:
        var = table.read().concat().to_pandas()
    with soma.DataFrame.open(f"{uri}/{schema.DATASETS}", context=context, **at) as table:
        datasets = table.read().concat().to_pandas()
    with soma.DataFrame.open(f"{uri}/{schema.OBS}", context=context) as table:
        n_cells = table.count
    return _Base(exists=True, journal=journal, var=var, datasets=datasets, n_cells=n_cells)


def _obs_ids(uri: str, context: soma.SOMATileDBContext, value_filter: str | None, columns: Sequence[str]) -> pa.Table:
    with soma.DataFrame.open(f"{uri}/{schema.OBS}", context=context) as obs:
        return obs.read(value_filter=value_filter, column_names=["soma_joinid", *columns]).concat()


def _new_rows(uri: str, context: soma.SOMATileDBContext, files: Sequence[_File], base: _Base) -> list[np.ndarray]:
    """Rows of each file that the atlas does not have."""
    known = set(base.datasets["dataset_id"])
    rows = []
    for file in files:
        is_new = np.ones(file.n_cells, bool)
        for dataset in known.intersection(file.obs["dataset_id"].cat.categories):
            there = _obs_ids(uri, context, f"dataset_id == {_quoted(dataset)}", ("obs_id",))["obs_id"].to_pylist()
            is_new &= ~((file.obs["dataset_id"] == dataset).to_numpy() & file.obs["obs_id"].isin(there).to_numpy())
        rows.append(np.flatnonzero(is_new))
    return rows


def _quoted(value: str) -> str:
    return f'"{value}"' if "'" in value else f"'{value}'"


def _label(file: _File, labels: Mapping[tuple[str, str], str], majors: MajorTypes) -> dict[Outcome, Counter[str]]:
    """Fill the file's terms and major types in place; return the labels without a major type, by reason."""
    obs = file.obs
    keys = ["dataset_id", "cell_type", "cell_type_ontology_term_id"]
    codes, triples = pd.MultiIndex.from_frame(obs[keys].astype(object)).factorize()
    terms, names, ids = [], [], []
    unmapped: dict[Outcome, Counter[str]] = {}
    sizes = np.bincount(codes, minlength=len(triples))
    for (dataset, label, own_term), size in zip(triples, sizes, strict=True):
        term = labels.get((dataset, label)) or own_term
        major = majors.roll_up(term)
        terms.append(term)
        names.append(major.name)
        ids.append(major.cl_id)
        if major.outcome != "mapped":
            unmapped.setdefault(major.outcome, Counter())[label] += int(size)
    for column, values in zip(
        ("cell_type_ontology_term_id", "cell_type_major", "cell_type_major_ontology_term_id"), (terms, names, ids), strict=True
    ):
        obs[column] = pd.Categorical(np.array(values, dtype=object)[codes])
    return unmapped


def _count(files: Sequence[_File], new_rows: Sequence[np.ndarray], options: IngestOptions) -> list[_Counts]:
    """Check every count of the files that have new cells, and sum up."""
    step = 4 * options.cells_per_chunk
    calls = [
        (index, file.path, _local_targets(file), start, min(start + step, file.n_cells))
        for index, (file, rows) in enumerate(zip(files, new_rows, strict=True))
        if len(rows)
        for start in range(0, file.n_cells, step)
    ]
    results = _map(partial(_count_cells, options=options), [call[1:] for call in calls], "checking counts")
    counts = []
    for index, file in enumerate(files):
        mine = [result for call, result in zip(calls, results, strict=True) if call[0] == index]
        counts.append(
            _Counts(
                raw_sum_n=np.concatenate([part.raw_sum_n for part in mine]) if mine else np.empty(0),
                nnz_n=np.concatenate([part.nnz_n for part in mine]) if mine else np.empty(0, np.int64),
                cells_g=sum((part.cells_g for part in mine), np.zeros(len(_ids_of(file)), np.int64)),
            )
        )
    return counts


def _count_cells(path: str, targets_g: np.ndarray, start: int, stop: int, *, options: IngestOptions) -> _Counts:
    width = int(targets_g.max()) + 1
    sums, numbers, cells_g = [], [], np.zeros(width, np.int64)
    with H5adFile.open(path, layer=options.layer, raw=options.use_raw) as file:
        for first, block in file.chunks(options.cells_per_chunk, start=start, stop=stop):
            check_counts(block, file=file, start=first)
            joined = _join(block, targets_g, width)
            sums.append(np.asarray(joined.sum(axis=1, dtype=np.float64)).ravel())
            numbers.append(np.diff(joined.indptr).astype(np.int64))
            cells_g += np.bincount(joined.indices, minlength=width)
    return _Counts(raw_sum_n=np.concatenate(sums), nnz_n=np.concatenate(numbers), cells_g=cells_g)


def _ids_of(file: _File) -> np.ndarray:
    """The distinct joined ids of a file, sorted."""
    return np.unique(file.feature_ids_g[file.feature_ids_g != ""].astype(str))


def _local_targets(file: _File) -> np.ndarray:
    return _targets(file, dict(zip(_ids_of(file), range(file.n_cells + len(file.feature_ids_g)), strict=False)))


def _targets(file: _File, column_of: Mapping[str, int]) -> np.ndarray:
    """Where each gene of the file goes, -1 where it was not joined, int32, shape (g,)."""
    return np.array([column_of.get(feature_id, -1) for feature_id in file.feature_ids_g], dtype=np.int32)


def _join(block: sparse.csr_matrix, targets_g: np.ndarray, width: int) -> sparse.csr_matrix:
    """Move columns to their targets; add up those that meet, drop zeros and what has no target. Columns come out sorted."""
    columns = targets_g[block.indices]
    kept = (columns >= 0) & (block.data != 0)
    if kept.all():
        joined = sparse.csr_matrix((block.data, columns, block.indptr), shape=(block.shape[0], width))
    else:
        before = np.concatenate([[0], np.cumsum(kept)])
        joined = sparse.csr_matrix((block.data[kept], columns[kept], before[block.indptr]), shape=(block.shape[0], width))
    joined.sum_duplicates()
    return joined


def _joined_var(files: Sequence[_File], new_rows: Sequence[np.ndarray], base: _Base, counts: Sequence[_Counts]) -> pd.DataFrame:
    """The var table with the new files' genes: known genes keep their joinids, new ones follow, sorted by id."""
    known = dict(zip(base.var["feature_id"], base.var["soma_joinid"], strict=True))
    used = [file for file, rows in zip(files, new_rows, strict=True) if len(rows)]
    added = sorted({str(feature_id) for file in used for feature_id in _ids_of(file)} - set(known))
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
    nnz, measured = var["nnz"].to_numpy(np.int64, copy=True), var["n_measured_obs"].to_numpy(np.int64, copy=True)
    for file, rows, count in zip(files, new_rows, counts, strict=True):
        if len(rows):
            where = position[_ids_of(file)].to_numpy()
            nnz[where] += count.cells_g
            measured[where] += len(rows)
    return var.assign(nnz=nnz, n_measured_obs=measured)


def _parts(new_rows: Sequence[np.ndarray], counts: Sequence[_Counts], first_joinid: int, options: IngestOptions) -> Iterable[_Part]:
    """Cut the new cells into one task each: few and large, for each leaves a fragment, but enough of them to work in parallel."""
    total = sum(int(count.nnz_n[rows].sum()) for rows, count in zip(new_rows, counts, strict=True))
    most = min(options.values_per_fragment, max(total // _PARTS_AT_LEAST, _FEWEST_VALUES))
    for index, (rows, count) in enumerate(zip(new_rows, counts, strict=True)):
        group = (np.cumsum(count.nnz_n[rows]) - 1) // most
        for part in np.split(rows, np.flatnonzero(np.diff(group)) + 1) if len(rows) else ():
            yield _Part(file=index, rows=part, first_joinid=first_joinid)
            first_joinid += len(part)


def _digest(
    files: Sequence[_File], new_rows: Sequence[np.ndarray], labels: Mapping[tuple[str, str], str], options: IngestOptions, base: _Base
) -> str:
    """What decides the outcome: equal digests write equal atlases."""
    tables = [_sha256(path) if path else "" for path in (options.symbol_table, options.major_types)]
    settings = {
        k: v
        for k, v in dataclasses.asdict(options).items()
        if k not in ("tiledb_config", "dry_run", "labels", "symbol_table", "major_types")
    }
    content = {
        "files": [(Path(file.path).name, file.sha256, len(rows)) for file, rows in zip(files, new_rows, strict=True)],
        "labels": sorted((*key, value) for key, value in labels.items()),
        "tables": tables,
        "settings": settings,
        "base": (base.n_cells, len(base.var)),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _report(file: _File, rows: np.ndarray, unmapped: Mapping[Outcome, Counter[str]]) -> FileReport:
    return FileReport(
        path=file.path,
        dataset_ids=tuple(file.obs["dataset_id"].cat.categories),
        cells=file.n_cells,
        new_cells=len(rows),
        genes=len(file.feature_ids_g),
        genes_joined=int((file.feature_ids_g != "").sum()),
        genes_repeated=file.num_repeated,
        gene_source=file.gene_source,
        major_types={str(name): int(count) for name, count in file.obs["cell_type_major"].value_counts().items()},
        unmapped={str(outcome): dict(labels.most_common()) for outcome, labels in unmapped.items()},
    )


# ----------------------------------------------------------------------------------------------------------------- write


def _grow(uri: str, context: soma.SOMATileDBContext, *, n_cells: int, n_genes: int, n_datasets: int) -> None:
    """Make room. Room alone changes nothing that a query sees."""
    for place, rows in ((schema.OBS, n_cells), (schema.VAR, n_genes), (schema.DATASETS, n_datasets), (schema.SUMMARY, 16)):
        with soma.DataFrame.open(f"{uri}/{place}", "w", context=context) as table:
            if table.domain[0][1] + 1 < rows:
                table.tiledbsoma_resize_soma_joinid_shape(rows)
    for place, shape in ((schema.X, (n_cells, n_genes)), (schema.PRESENCE, (n_datasets, n_genes))):
        with soma.SparseNDArray.open(f"{uri}/{place}", "w", context=context) as array:
            array.resize([max(old, new) for old, new in zip(array.shape, shape, strict=True)])


def _write_x(
    uri: str,
    context: soma.SOMATileDBContext,
    files: Sequence[_File],
    parts: Sequence[_Part],
    var: pd.DataFrame,
    options: IngestOptions,
    journal: _Journal,
) -> None:
    column_of = dict(zip(var["feature_id"], var["soma_joinid"], strict=True))
    targets = {index: _targets(files[index], column_of) for index in {part.file for part in parts}}
    finished = set(_finished_parts(uri, context))
    left = [index for index in range(len(parts)) if index not in finished]
    saved = time.monotonic()

    def note(done: int) -> None:
        nonlocal saved
        finished.add(left[done])
        if time.monotonic() - saved > _JOURNAL_EVERY_S:
            _write_journal(uri, context, journal, finished)
            saved = time.monotonic()

    write = partial(_write_part, uri=uri, timestamp_ms=journal.timestamp_ms, n_genes=len(var), options=options)
    calls = [
        (files[parts[i].file].path, files[parts[i].file].stamp, targets[parts[i].file], parts[i].rows, parts[i].first_joinid) for i in left
    ]
    _map(write, calls, "writing counts", note)
    _write_journal(uri, context, journal, finished)


def _write_part(
    path: str,
    stamp: tuple[int, int],
    targets_g: np.ndarray,
    rows: np.ndarray,
    first_joinid: int,
    *,
    uri: str,
    timestamp_ms: int,
    n_genes: int,
    options: IngestOptions,
) -> None:
    """Write the counts of some cells. Doing it again writes the same values to the same places."""
    stat = os.stat(path)
    if (stat.st_size, stat.st_mtime_ns) != stamp:
        raise IngestError(f"{path} changed while it was ingested; run the same command again once nobody writes to it")
    tables = []
    with H5adFile.open(path, layer=options.layer, raw=options.use_raw) as file:
        for first, block in file.chunks(options.cells_per_chunk, start=int(rows[0]), stop=int(rows[-1]) + 1):
            wanted = rows[np.searchsorted(rows, first) : np.searchsorted(rows, first + block.shape[0])] - first
            joined = _join(block if len(wanted) == block.shape[0] else block[wanted], targets_g, n_genes)
            joinids = np.arange(first_joinid, first_joinid + len(wanted), dtype=np.int64)
            first_joinid += len(wanted)
            tables.append(
                pa.table(
                    {
                        "soma_dim_0": np.repeat(joinids, np.diff(joined.indptr)),
                        "soma_dim_1": joined.indices.astype(np.int64),
                        "soma_data": joined.data,
                    }
                )
            )
    context = schema.soma_context(options.tiledb_config)
    with soma.SparseNDArray.open(f"{uri}/{schema.X}", "w", context=context, tiledb_timestamp=timestamp_ms) as array:
        # The rows come in the array's own order, which saves TileDB a sort: 2.5 times as fast.
        array.write(pa.concat_tables(tables), platform_config={"tiledb": {"write": {"sort_coords": False}}})


def _commit(
    uri: str,
    context: soma.SOMATileDBContext,
    files: Sequence[_File],
    new_rows: Sequence[np.ndarray],
    counts: Sequence[_Counts],
    var: pd.DataFrame,
    base: _Base,
    journal: _Journal,
) -> None:
    if _read_journal(uri, context).digest != journal.digest:
        raise IngestError(f"{uri}: another ingest began meanwhile; run one at a time, then this command again")
    sizes = Counter(dict(zip(base.datasets["dataset_id"], map(int, base.datasets["dataset_total_cell_count"]), strict=True)))
    titles = {row.dataset_id: (row.dataset_title, row.dataset_h5ad_path) for row in base.datasets.itertuples()}
    number = dict(zip(base.datasets["dataset_id"], map(int, base.datasets["soma_joinid"]), strict=True))
    position = pd.Series(var["soma_joinid"].to_numpy(), index=var["feature_id"])
    present: list[tuple[np.ndarray, np.ndarray]] = []
    tables, next_joinid = [], journal.first_joinid
    for file, rows, count in zip(files, new_rows, counts, strict=True):
        if not len(rows):
            continue
        obs = file.obs.iloc[rows].assign(raw_sum=count.raw_sum_n[rows], nnz=count.nnz_n[rows])
        for dataset, size in obs["dataset_id"].value_counts().items():
            if size:
                sizes[dataset] += int(size)
                titles.setdefault(dataset, (dataset, Path(file.path).name))
                columns = position[_ids_of(file)].to_numpy()
                present.append((np.full(len(columns), number.setdefault(dataset, len(number)), np.int64), columns))
        arrays: dict[str, Any] = {"soma_joinid": np.arange(next_joinid, next_joinid + len(rows), dtype=np.int64)}
        for name, kind in schema.OBS_COLUMNS.items():
            arrays[name] = pa.array(obs[name].astype(object) if kind == pa.large_string() else obs[name], type=kind)
        tables.append(pa.table(arrays))
        next_joinid += len(rows)

    _write_table(uri, context, schema.VAR, var, schema.VAR_COLUMNS)
    datasets = pd.DataFrame(
        {
            "soma_joinid": list(number.values()),
            "dataset_id": list(number),
            "dataset_title": [titles[name][0] for name in number],
            "dataset_h5ad_path": [titles[name][1] for name in number],
            "dataset_total_cell_count": [sizes[name] for name in number],
        }
    )
    _write_table(uri, context, schema.DATASETS, datasets, schema.DATASET_COLUMNS)
    pairs = pd.DataFrame({i: np.concatenate([pair[i] for pair in present]) for i in (0, 1)}).drop_duplicates()
    with soma.SparseNDArray.open(f"{uri}/{schema.PRESENCE}", "w", context=context) as array:
        array.write(
            pa.table({"soma_dim_0": pairs[0].to_numpy(), "soma_dim_1": pairs[1].to_numpy(), "soma_data": np.ones(len(pairs), np.uint8)})
        )
    with soma.DataFrame.open(f"{uri}/{schema.OBS}", "w", context=context) as table:
        # All new cells in one fragment: they become visible together or not at all.
        table.write(pa.concat_tables(tables), platform_config={"tiledb": {"write": {"sort_coords": False}}})
    _close(uri, context, journal)


def _close(uri: str, context: soma.SOMATileDBContext, journal: _Journal) -> None:
    """What is left once the cells are visible: the summary, and the journal's last word."""
    obs = _obs_ids(uri, context, None, ("donor_id", "is_primary_data"))
    rows = {
        "census_schema_version": "2.1.0",
        "census_build_date": time.strftime("%Y-%m-%d", time.gmtime(journal.timestamp_ms / 1000)),
        "dataset_schema_version": "5.2.0",
        "total_cell_count": str(obs.num_rows),
        "unique_cell_count": str(int(np.count_nonzero(obs["is_primary_data"].to_numpy()))),
        "number_donors_homo_sapiens": str(len(obs["donor_id"].unique())),
    }
    summary = pd.DataFrame({"soma_joinid": range(len(rows)), "label": list(rows), "value": list(rows.values())})
    _write_table(uri, context, schema.SUMMARY, summary, schema.SUMMARY_COLUMNS)
    _write_journal(uri, context, dataclasses.replace(journal, writing=False), [])


def _write_table(uri: str, context: soma.SOMATileDBContext, place: str, table: pd.DataFrame, columns: Mapping[str, pa.DataType]) -> None:
    fields = pa.schema([("soma_joinid", pa.int64()), *columns.items()])
    with soma.DataFrame.open(f"{uri}/{place}", "w", context=context) as target:
        target.write(pa.Table.from_pandas(table[fields.names], schema=fields, preserve_index=False))


def _take_back(uri: str, context: soma.SOMATileDBContext, journal: _Journal) -> None:
    """Remove what an unfinished ingest wrote. Its joinids are not used again."""
    logger.warning("%s holds an unfinished ingest of other files; it is taken back first", uri)
    with soma.SparseNDArray.open(f"{uri}/{schema.X}", "d", context=context) as array:
        array.delete_cells((slice(journal.first_joinid, journal.end_joinid - 1),))
    for place, kind in ((schema.VAR, soma.DataFrame), (schema.DATASETS, soma.DataFrame), (schema.PRESENCE, soma.SparseNDArray)):
        with kind.open(f"{uri}/{place}", context=context, tiledb_timestamp=journal.timestamp_ms) as old:
            content = old.read().concat() if kind is soma.DataFrame else old.read().tables().concat()
        with kind.open(f"{uri}/{place}", "d", context=context) as target:
            target.delete_cells((slice(0, None),))
        # A write of the same millisecond would fall to the deletion.
        time.sleep(0.01)
        with kind.open(f"{uri}/{place}", "w", context=context) as target:
            target.write(content)
    _write_journal(uri, context, dataclasses.replace(journal, writing=False), [])


def _tidy(uri: str, context: soma.SOMATileDBContext) -> None:
    """Merge what many writes left.

    Commits and footers are merged always. The data of X is not rewritten as long as its fragments are large: they do not overlap and are in
    the array's own order, and reading the merged fragment took 20 % more CPU time (TileDB adds a time stamp to each value).
    """
    journal = _read_journal(uri, context)
    with soma.DataFrame.open(f"{uri}/{schema.OBS}", context=context) as obs:
        num_values = sum(int(np.sum(batch["nnz"].to_numpy())) for batch in obs.read(column_names=["nnz"]))
    many_x = journal.num_fragments > _MOST_FRAGMENTS and num_values / journal.num_fragments < _FEWEST_VALUES
    many_tables = journal.num_commits > _MOST_FRAGMENTS
    for place, kind, merge in (
        (schema.X, soma.SparseNDArray, many_x),
        (schema.OBS, soma.DataFrame, many_tables),
        (schema.VAR, soma.DataFrame, many_tables),
        (schema.DATASETS, soma.DataFrame, many_tables),
        (schema.PRESENCE, soma.SparseNDArray, many_tables),
    ):
        with kind.open(f"{uri}/{place}", "w", context=context) as target:
            # tiledbsoma has no public call for this on an array that is already written.
            target._handle.consolidate_and_vacuum((["fragments"] if merge else []) + ["fragment_meta", "commits"])
    if many_x or many_tables:
        left_x, left_tables = (1 if many_x else journal.num_fragments), (1 if many_tables else journal.num_commits)
        _write_journal(uri, context, dataclasses.replace(journal, num_fragments=left_x, num_commits=left_tables), [])


# --------------------------------------------------------------------------------------------------------------- journal


def _read_journal(uri: str, context: soma.SOMATileDBContext) -> _Journal:
    with soma.Collection.open(uri, context=context) as root:
        return _Journal(**json.loads(root.metadata.get(_JOURNAL, "{}")))


def _finished_parts(uri: str, context: soma.SOMATileDBContext) -> list[int]:
    with soma.Collection.open(uri, context=context) as root:
        return list(json.loads(root.metadata.get(_JOURNAL_PARTS, "[]")))


def _write_journal(uri: str, context: soma.SOMATileDBContext, journal: _Journal, finished: Iterable[int]) -> None:
    with soma.Collection.open(uri, "w", context=context) as root:
        root.metadata[_JOURNAL] = json.dumps(dataclasses.asdict(journal))
        root.metadata[_JOURNAL_PARTS] = json.dumps(sorted(finished))


def _now_ms() -> int:
    # Past the millisecond of every earlier write, so that reading the atlas at this time shows those and nothing later.
    time.sleep(0.005)
    return int(time.time() * 1000)


def _sha256(path: str | Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _map(function: Callable[..., Any], calls: Sequence[tuple[Any, ...]], what: str, note: Callable[[int], None] | None = None) -> list[Any]:
    """Call the function with each tuple, in Ray tasks if there is a Ray; results in order, `note(index)` as each is done."""
    import ray

    results: list[Any] = [None] * len(calls)
    num_done, said = 0, time.monotonic()
    logger.info("%s: %d parts", what, len(calls))
    with tqdm(total=len(calls), desc=what, unit="part", disable=None) as bar:

        def done(index: int, result: Any) -> None:
            nonlocal num_done, said
            results[index] = result
            num_done += 1
            bar.update()
            # A log file, as of a submitted job, shows no bar.
            if bar.disable and time.monotonic() - said > _PROGRESS_EVERY_S:
                said = time.monotonic()
                logger.info("%s: %d of %d parts done", what, num_done, len(calls))
            if note:
                note(index)

        if not ray.is_initialized():
            for index, call in enumerate(calls):
                done(index, function(*call))
            return results
        task = ray.remote(num_cpus=1, max_retries=3)(_call)
        shared = ray.put(function)
        limit = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
        waiting = list(range(len(calls)))[::-1]
        running: dict[Any, int] = {}
        while waiting or running:
            while waiting and len(running) < limit:
                index = waiting.pop()
                running[task.remote(shared, *calls[index])] = index
            ready, _ = ray.wait(list(running))
            for reference in ready:
                try:
                    result = ray.get(reference)
                except ray.exceptions.RayTaskError as e:
                    raise e.cause from e
                done(running.pop(reference), result)
    return results


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)
