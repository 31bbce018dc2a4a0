"""Write an ingest into the atlas: journal, counts, commit, rollback, consolidation.

Axes: `n` cells, `g` genes.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from data_ingest import schema
from data_ingest.h5ad import H5adFile
from data_ingest.ingest_counts import NewCells, gene_targets, join_genes
from data_ingest.ingest_journal import (
    Journal,
    Target,
    close_ingest,
    finished_parts,
    now_ms,
    read_journal,
    write_journal,
    write_table,
)
from data_ingest.ingest_options import IngestOptions
from data_ingest.ingest_plan import FEWEST_VALUES, Part, Plan, parts_of
from data_ingest.measured import PANELS, Panel
from data_ingest.tasks import map_tasks

logger = logging.getLogger(__name__)

_JOURNAL_EVERY_S = 2.0
"""Maximum amount of finished work lost in a kill."""


_MOST_FRAGMENTS = 8
"""Maximum number of small fragments left unmerged."""


_IN_ORDER = {"tiledb": {"write": {"sort_coords": False}}}


def write(plan: Plan) -> None:
    """Write a plan into its atlas. The journal records progress, so it can be killed at any time."""
    target, journal = plan.target, plan.base.journal
    if not plan.base.exists:
        schema.create_atlas(target.uri, target.context)
    if plan.rolls_back:
        roll_back(target, journal)
    if plan.num_new_cells:
        parts = list(parts_of(plan, journal.first_joinid if plan.resumes else journal.end_joinid))
        if not plan.resumes:
            journal = _begin(plan, len(parts))
        _write_x(plan, parts, journal)
        _commit(plan, journal)
    tidy(target)


def _begin(plan: Plan, num_parts: int) -> Journal:
    """Enlarge the arrays and open the journal. Neither changes what queries see."""
    before = plan.base.journal
    journal = Journal(
        digest=plan.digest,
        writing=True,
        first_joinid=before.end_joinid,
        end_joinid=before.end_joinid + plan.num_new_cells,
        num_fragments=before.num_fragments + num_parts,
        num_commits=before.num_commits + 1,
    )
    n_cells, n_genes, n_datasets = journal.end_joinid, len(plan.var), plan.measured.num_rows
    for place, rows in (
        (schema.OBS, n_cells),
        (schema.VAR, n_genes),
        (schema.DATASETS, n_datasets),
        (schema.SUMMARY, 16),
    ):
        with plan.target.table(place, "w") as table:
            if table.domain[0][1] + 1 < rows:
                table.tiledbsoma_resize_soma_joinid_shape(rows)
    for place, shape in ((schema.X, (n_cells, n_genes)), (schema.PRESENCE, (n_datasets, n_genes))):
        with plan.target.matrix(place, "w") as array:
            array.resize([max(old, new) for old, new in zip(array.shape, shape, strict=True)])
    journal = dataclasses.replace(journal, timestamp_ms=now_ms())
    write_journal(plan.target, journal)
    return journal


def _write_x(plan: Plan, parts: Sequence[Part], journal: Journal) -> None:
    """Write the counts of all parts not yet written."""
    column_of = dict(zip(plan.var["feature_id"], plan.var["soma_joinid"], strict=True))
    targets = {
        file.path: gene_targets(file, column_of)
        for file in {part.file.path: part.file for part in parts}.values()
    }
    finished = set(finished_parts(plan.target))
    left = [index for index in range(len(parts)) if index not in finished]
    saved = time.monotonic()

    def note(done: int) -> None:
        nonlocal saved
        finished.add(left[done])
        if time.monotonic() - saved > _JOURNAL_EVERY_S:
            write_journal(plan.target, journal, finished)
            saved = time.monotonic()

    task = partial(
        _write_part,
        uri=plan.target.uri,
        timestamp_ms=journal.timestamp_ms,
        n_genes=len(plan.var),
        options=plan.options,
    )
    calls = [
        (part.file.path, part.file.stamp, targets[part.file.path], part.rows, part.first_joinid)
        for part in (parts[index] for index in left)
    ]
    map_tasks(task, calls, "writing counts", note=note)
    write_journal(plan.target, journal, finished)


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
    """Write the counts of some cells. Repeating it writes the same values to the same places."""
    stat = os.stat(path)
    if (stat.st_size, stat.st_mtime_ns) != stamp:
        raise ValueError(
            f"{path} changed during the ingest; run the same command again once nothing writes to it"
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
    target = Target(uri, schema.soma_context(options.tiledb_config))
    with target.matrix(schema.X, "w", timestamp_ms=timestamp_ms) as array:
        # Rows are in the array's order, which saves TileDB a sort and is 2.5 times as fast.
        array.write(pa.concat_tables(tables), platform_config=_IN_ORDER)


def _commit(plan: Plan, journal: Journal) -> None:
    """Write genes, datasets and presence, then obs, which makes the new cells visible."""
    target = plan.target
    if read_journal(target).digest != journal.digest:
        raise ValueError(
            f"{target.uri}: another ingest started in the meantime; wait for it, then run this command again"
        )
    new = [new for new in plan.files if len(new.rows)]
    measured = plan.measured
    write_table(target, schema.VAR, plan.var, schema.VAR_COLUMNS)
    write_table(target, schema.DATASETS, measured.datasets, schema.DATASET_COLUMNS)
    if measured.rows:
        with target.matrix(schema.PRESENCE, "w") as matrix:
            matrix.write(measured.entries())
    if measured.panels:
        start = journal.first_joinid
        panels = [Panel(start + panel.first, start + panel.end, panel.row) for panel in measured.panels]
        with target.root("w") as root:
            root.metadata[PANELS] = json.dumps([*plan.base.panels, *panels])
    with target.table(schema.OBS, "w") as table:
        # All new cells are in one fragment, so they become visible together or not at all.
        table.write(_new_obs(new, journal.first_joinid), platform_config=_IN_ORDER)
    close_ingest(target, journal)


def _new_obs(new: Sequence[NewCells], first_joinid: int) -> pa.Table:
    """The rows of obs for the new cells, in joinid order."""
    tables = []
    for cells in new:
        counts, rows = cells.counts, cells.rows
        obs = cells.file.obs.iloc[rows].assign(raw_sum=counts.raw_sum_n[rows], nnz=counts.nnz_n[rows])
        columns: dict[str, Any] = {
            "soma_joinid": np.arange(first_joinid, first_joinid + len(rows), dtype=np.int64)
        }
        for name, kind in schema.OBS_COLUMNS.items():
            values = obs[name].astype(object) if kind == pa.large_string() else obs[name]
            columns[name] = pa.array(values, type=kind)
        tables.append(pa.table(columns))
        first_joinid += len(rows)
    return pa.concat_tables(tables)


def roll_back(target: Target, journal: Journal) -> None:
    """Remove what an unfinished ingest wrote. Its joinids are not reused."""
    logger.warning("%s has an unfinished ingest of other files; rolling it back first", target.uri)
    with target.matrix(schema.X, "d") as matrix:
        matrix.delete_cells((slice(journal.first_joinid, journal.end_joinid - 1),))
    for place, open_place in (
        (schema.VAR, target.table),
        (schema.DATASETS, target.table),
        (schema.PRESENCE, target.matrix),
    ):
        with open_place(place, timestamp_ms=journal.timestamp_ms) as old:
            content = old.read().tables().concat() if place == schema.PRESENCE else old.read().concat()
        with open_place(place, "d") as array:
            array.delete_cells((slice(0, None),))
        # A write in the same millisecond would be deleted too.
        time.sleep(0.01)
        with open_place(place, "w") as array:
            array.write(content)
    write_journal(target, dataclasses.replace(journal, writing=False))


def tidy(target: Target) -> None:
    """Merge the fragments of many writes.

    Commits and footers are always merged. X is not rewritten while its fragments are large: they do not
    overlap and are in the array's order, and reading the merged fragment took 20 % more CPU time (TileDB adds
    a timestamp to each value).
    """
    journal = read_journal(target)
    with target.table(schema.OBS) as obs:
        num_values = sum(int(np.sum(batch["nnz"].to_numpy())) for batch in obs.read(column_names=["nnz"]))
    many_x = journal.num_fragments > _MOST_FRAGMENTS and num_values / journal.num_fragments < FEWEST_VALUES
    many_tables = journal.num_commits > _MOST_FRAGMENTS
    for place, open_place, merge in (
        (schema.X, target.matrix, many_x),
        (schema.OBS, target.table, many_tables),
        (schema.VAR, target.table, many_tables),
        (schema.DATASETS, target.table, many_tables),
        (schema.PRESENCE, target.matrix, many_tables),
    ):
        with open_place(place, "w") as array:
            # tiledbsoma has no public call for this on an existing array.
            array._handle.consolidate_and_vacuum(
                (["fragments"] if merge else []) + ["fragment_meta", "commits"]
            )
    if many_x or many_tables:
        merged = dataclasses.replace(
            journal,
            num_fragments=1 if many_x else journal.num_fragments,
            num_commits=1 if many_tables else journal.num_commits,
        )
        write_journal(target, merged)
