"""Write the cells of a query as a shard cache (`shard_cache`), in one pass of Ray Data."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from pyarrow.fs import LocalFileSystem
from tqdm import tqdm

from data_ingest.claims import only_writer
from data_ingest.datasource import AtlasReader, CellArrays, gene_of_var
from data_ingest.epoch_plan import EpochPlan
from data_ingest.packed import fields
from data_ingest.query import QueryResult
from data_ingest.shard_cache import (
    FORMAT,
    MANIFEST,
    ORDER,
    ShardCache,
    checksum,
    files_of,
    identity_of,
    read_manifest,
    shard_name,
)
from screformer.config import AtlasConfig, StreamConfig
from screformer.counts import Panels
from screformer.files import write_whole
from screformer.settings import plain
from screformer.storage import absolute, writing

ROWS_PER_SHARD, ROWS_PER_BLOCK = 16384, 256
"""About 55 MB per file and 1 MB per read, with 1,100 detected genes per cell."""


def write_cache(
    query: QueryResult,
    place: str,
    *,
    seed: int,
    run_length: int = StreamConfig().run_length,
    rows_per_shard: int = ROWS_PER_SHARD,
    rows_per_block: int = ROWS_PER_BLOCK,
) -> ShardCache:
    """Write the cells of a query, in one pass of Ray Data. Ray must be running.

    A complete cache of the same cells is left unchanged. An unfinished one is written again.

    Args:
        query: The cells and genes.
        place: A path that all nodes see, or a URI.
        seed: Random seed of the order.
        run_length: Number of neighbouring cells of the atlas that are read together.
        rows_per_shard: Cells per file, which are shuffled together.
        rows_per_block: Cells per record batch, which are read together.

    Raises:
        ValueError: The place has a cache of other cells, another process writes to it, or counts differ from
            those that were ingested.
        StorageError: The place cannot be written.
    """
    assert rows_per_shard % rows_per_block == 0
    place = absolute(place)
    files, path = files_of(place)
    with (
        only_writer(files, f"{path}/writing", f"--out {place}"),
        writing(place, "run the same command again"),
    ):
        if read_manifest(place) is not None:
            found = ShardCache.open(place)
            found.require(query)
            return found
        plan = EpochPlan(
            num_cells=len(query.obs_joinids),
            seed=seed,
            epoch=0,
            run_length=run_length,
            cells_per_task=rows_per_shard,
            global_batch_size=1,
        )
        written = _write_shards(query, place, plan, rows_per_block)
        order = np.concatenate([plan.task_cells(shard).ravel() for shard in range(plan.num_tasks)])
        table = pa.table({"joinid": query.obs_joinids[order]})
        written[ORDER] = _write(place, ORDER, [table.to_batches()[0]], table.schema, [{}])
        manifest = {
            "format": FORMAT,
            **identity_of(query),
            "atlas": plain(query.atlas),
            "seed": seed,
            "num_cells": plan.num_cells,
            "rows_per_shard": rows_per_shard,
            "rows_per_block": rows_per_block,
            "files": dict(sorted(written.items())),
        }
        _write_manifest(place, json.dumps(manifest).encode())
    return ShardCache.open(place)


def _write_shards(
    query: QueryResult, place: str, plan: EpochPlan, rows_per_block: int
) -> dict[str, dict[str, Any]]:
    vocabulary, num_cells = query.vocabulary(), plan.num_cells
    arrays = CellArrays(
        query.obs_joinids,
        np.zeros(0, np.int64),
        gene_of_var(query.atlas, vocabulary),
        Panels.one(np.ones(len(vocabulary)), num_cells),
        query.raw_sums(np.arange(num_cells)),
    )
    write = partial(_write_shard, query.atlas, ray.put(arrays), plan, place, rows_per_block)
    dataset = ray.data.range(plan.num_tasks, override_num_blocks=plan.num_tasks).map(write)
    rows = tqdm(dataset.iter_rows(), "writing", plan.num_tasks, unit="shard", disable=None)
    return {row.pop("name"): row for row in rows}


def _write_shard(
    atlas: AtlasConfig,
    arrays: ray.ObjectRef,
    plan: EpochPlan,
    place: str,
    rows_per_block: int,
    item: dict[str, int],
) -> dict[str, Any]:
    shared: CellArrays = ray.get(arrays)
    cells = plan.task_cells(item["id"]).ravel()
    in_order = np.sort(cells)
    packed = AtlasReader(atlas)(shared, in_order)[0].take(np.searchsorted(in_order, cells))
    num_genes = shared.panels.measured_pg.shape[1]
    schema = pa.schema([pa.field("joinid", pa.int64()), *fields(num_genes)])
    batches, notes = [], []
    for first in range(0, len(cells), rows_per_block):
        last = min(first + rows_per_block, len(cells))
        joinids = pa.array(shared.joinids[cells[first:last]])
        batch = pa.record_batch([joinids, *packed.columns(first, last)], schema=schema)
        batches.append(batch)
        notes.append({"crc32": str(checksum(batch))})
    name = shard_name(item["id"])
    return {"name": name, **_write(place, name, batches, schema, notes)}


def _write(
    place: str,
    name: str,
    batches: Sequence[pa.RecordBatch],
    schema: pa.Schema,
    notes: Sequence[dict[str, str]],
) -> dict[str, Any]:
    """Write an Arrow file; returns its size and SHA-256."""
    buffer = io.BytesIO()
    with pa.ipc.new_file(buffer, schema) as writer:
        for batch, note in zip(batches, notes, strict=True):
            writer.write_batch(batch, custom_metadata=note)
    content = buffer.getbuffer()
    files, path = files_of(place)
    with files.open_output_stream(f"{path}/{name}") as out:
        out.write(content)
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _write_manifest(place: str, content: bytes) -> None:
    files, path = files_of(place)
    if isinstance(files, LocalFileSystem):
        write_whole(f"{path}/{MANIFEST}", content)
        return
    with files.open_output_stream(f"{path}/{MANIFEST}") as out:  # object stores show only whole objects
        out.write(content)
