"""Write an ingest into the atlas: journal, counts, commit, undo, consolidation.

Axes: `n` cells, `g` genes.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import tiledbsoma as soma

from data_ingest import schema
from data_ingest.h5ad import H5adFile
from data_ingest.ingest_files import CheckedFile, IngestOptions, ids_of
from data_ingest.ingest_journal import (
    Journal,
    close_ingest,
    finished_parts,
    read_journal,
    write_journal,
    write_table,
)
from data_ingest.ingest_plan import FEWEST_VALUES, Base, Counts, Part, gene_targets, join_genes
from data_ingest.tasks import map_tasks

logger = logging.getLogger(__name__)

_JOURNAL_EVERY_S = 2.0
"""How much finished work a kill may cost."""


_MOST_FRAGMENTS = 8
"""Small fragments that are left unmerged."""


def grow(uri: str, context: soma.SOMATileDBContext, *, n_cells: int, n_genes: int, n_datasets: int) -> None:
    """Make room. Room alone changes nothing that a query sees."""
    for place, rows in (
        (schema.OBS, n_cells),
        (schema.VAR, n_genes),
        (schema.DATASETS, n_datasets),
        (schema.SUMMARY, 16),
    ):
        with soma.DataFrame.open(f"{uri}/{place}", "w", context=context) as table:
            if table.domain[0][1] + 1 < rows:
                table.tiledbsoma_resize_soma_joinid_shape(rows)
    for place, shape in ((schema.X, (n_cells, n_genes)), (schema.PRESENCE, (n_datasets, n_genes))):
        with soma.SparseNDArray.open(f"{uri}/{place}", "w", context=context) as array:
            array.resize([max(old, new) for old, new in zip(array.shape, shape, strict=True)])


def write_x(
    uri: str,
    context: soma.SOMATileDBContext,
    files: Sequence[CheckedFile],
    parts: Sequence[Part],
    var: pd.DataFrame,
    options: IngestOptions,
    journal: Journal,
) -> None:
    """Write the counts of all parts that are not written yet."""
    column_of = dict(zip(var["feature_id"], var["soma_joinid"], strict=True))
    targets = {index: gene_targets(files[index], column_of) for index in {part.file for part in parts}}
    finished = set(finished_parts(uri, context))
    left = [index for index in range(len(parts)) if index not in finished]
    saved = time.monotonic()

    def note(done: int) -> None:
        nonlocal saved
        finished.add(left[done])
        if time.monotonic() - saved > _JOURNAL_EVERY_S:
            write_journal(uri, context, journal, finished)
            saved = time.monotonic()

    write = partial(
        _write_part, uri=uri, timestamp_ms=journal.timestamp_ms, n_genes=len(var), options=options
    )
    calls = [
        (
            files[parts[i].file].path,
            files[parts[i].file].stamp,
            targets[parts[i].file],
            parts[i].rows,
            parts[i].first_joinid,
        )
        for i in left
    ]
    map_tasks(write, calls, "writing counts", note=note)
    write_journal(uri, context, journal, finished)


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
        raise ValueError(
            f"{path} changed while it was ingested; run the same command again once nobody writes to it"
        )
    tables = []
    with H5adFile.open(path, layer=options.layer, raw=options.use_raw) as file:
        for first, block in file.chunks(options.cells_per_chunk, start=int(rows[0]), stop=int(rows[-1]) + 1):
            wanted = (
                rows[np.searchsorted(rows, first) : np.searchsorted(rows, first + block.shape[0])] - first
            )
            joined = join_genes(block if len(wanted) == block.shape[0] else block[wanted], targets_g, n_genes)
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
    with soma.SparseNDArray.open(
        f"{uri}/{schema.X}", "w", context=context, tiledb_timestamp=timestamp_ms
    ) as array:
        # The rows come in the array's own order, which saves TileDB a sort: 2.5 times as fast.
        array.write(pa.concat_tables(tables), platform_config={"tiledb": {"write": {"sort_coords": False}}})


def commit(
    uri: str,
    context: soma.SOMATileDBContext,
    files: Sequence[CheckedFile],
    new_rows: Sequence[np.ndarray],
    counts: Sequence[Counts],
    var: pd.DataFrame,
    base: Base,
    journal: Journal,
) -> None:
    """Write genes, datasets and presence, then obs, which makes the new cells visible."""
    if read_journal(uri, context).digest != journal.digest:
        raise ValueError(f"{uri}: another ingest began meanwhile; run one at a time, then this command again")
    sizes = Counter(
        dict(
            zip(base.datasets["dataset_id"], map(int, base.datasets["dataset_total_cell_count"]), strict=True)
        )
    )
    titles = {
        row.dataset_id: (row.dataset_title, row.dataset_h5ad_path) for row in base.datasets.itertuples()
    }
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
                columns = position[ids_of(file)].to_numpy()
                present.append(
                    (np.full(len(columns), number.setdefault(dataset, len(number)), np.int64), columns)
                )
        arrays: dict[str, Any] = {
            "soma_joinid": np.arange(next_joinid, next_joinid + len(rows), dtype=np.int64)
        }
        for name, kind in schema.OBS_COLUMNS.items():
            arrays[name] = pa.array(
                obs[name].astype(object) if kind == pa.large_string() else obs[name], type=kind
            )
        tables.append(pa.table(arrays))
        next_joinid += len(rows)

    write_table(uri, context, schema.VAR, var, schema.VAR_COLUMNS)
    datasets = pd.DataFrame(
        {
            "soma_joinid": list(number.values()),
            "dataset_id": list(number),
            "dataset_title": [titles[name][0] for name in number],
            "dataset_h5ad_path": [titles[name][1] for name in number],
            "dataset_total_cell_count": [sizes[name] for name in number],
        }
    )
    write_table(uri, context, schema.DATASETS, datasets, schema.DATASET_COLUMNS)
    pairs = pd.DataFrame({i: np.concatenate([pair[i] for pair in present]) for i in (0, 1)}).drop_duplicates()
    with soma.SparseNDArray.open(f"{uri}/{schema.PRESENCE}", "w", context=context) as array:
        array.write(
            pa.table(
                {
                    "soma_dim_0": pairs[0].to_numpy(),
                    "soma_dim_1": pairs[1].to_numpy(),
                    "soma_data": np.ones(len(pairs), np.uint8),
                }
            )
        )
    with soma.DataFrame.open(f"{uri}/{schema.OBS}", "w", context=context) as table:
        # All new cells in one fragment: they become visible together or not at all.
        table.write(pa.concat_tables(tables), platform_config={"tiledb": {"write": {"sort_coords": False}}})
    close_ingest(uri, context, journal)


def take_back(uri: str, context: soma.SOMATileDBContext, journal: Journal) -> None:
    """Remove what an unfinished ingest wrote. Its joinids are not used again."""
    logger.warning("%s holds an unfinished ingest of other files; it is taken back first", uri)
    with soma.SparseNDArray.open(f"{uri}/{schema.X}", "d", context=context) as array:
        array.delete_cells((slice(journal.first_joinid, journal.end_joinid - 1),))
    for place, kind in (
        (schema.VAR, soma.DataFrame),
        (schema.DATASETS, soma.DataFrame),
        (schema.PRESENCE, soma.SparseNDArray),
    ):
        with kind.open(f"{uri}/{place}", context=context, tiledb_timestamp=journal.timestamp_ms) as old:
            content = old.read().concat() if kind is soma.DataFrame else old.read().tables().concat()
        with kind.open(f"{uri}/{place}", "d", context=context) as target:
            target.delete_cells((slice(0, None),))
        # A write of the same millisecond would fall to the deletion.
        time.sleep(0.01)
        with kind.open(f"{uri}/{place}", "w", context=context) as target:
            target.write(content)
    write_journal(uri, context, dataclasses.replace(journal, writing=False), [])


def tidy(uri: str, context: soma.SOMATileDBContext) -> None:
    """Merge what many writes left.

    Commits and footers are merged always. The data of X is not rewritten as long as its fragments are large:
    they do not overlap and are in the array's own order, and reading the merged fragment took 20 % more CPU
    time (TileDB adds a time stamp to each value).
    """
    journal = read_journal(uri, context)
    with soma.DataFrame.open(f"{uri}/{schema.OBS}", context=context) as obs:
        num_values = sum(int(np.sum(batch["nnz"].to_numpy())) for batch in obs.read(column_names=["nnz"]))
    many_x = journal.num_fragments > _MOST_FRAGMENTS and num_values / journal.num_fragments < FEWEST_VALUES
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
            target._handle.consolidate_and_vacuum(
                (["fragments"] if merge else []) + ["fragment_meta", "commits"]
            )
    if many_x or many_tables:
        left_x, left_tables = (
            (1 if many_x else journal.num_fragments),
            (1 if many_tables else journal.num_commits),
        )
        write_journal(
            uri, context, dataclasses.replace(journal, num_fragments=left_x, num_commits=left_tables), []
        )
