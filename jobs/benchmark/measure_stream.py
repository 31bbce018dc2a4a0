"""Time our stream, from the atlas or a shard cache into the training loop, and other readers of the cells.

The others are a plain SOMA scan, our read tasks without Ray, and tiledbsoma-ml. All read the same cells of
the same atlas in one run, in alternating rounds; medians are compared. The cache is written first, into a
temporary folder.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial

import numpy as np
import pyarrow as pa
import tiledbsoma
from tqdm import tqdm

from cluster.connect import connect
from cluster.quiet import quiet_data
from data_ingest.atlas import MEASUREMENT, X_LAYER, counts_per_cell, open_atlas, pinned
from data_ingest.datasource import CellArrays, CellDatasource, Reader
from data_ingest.epoch_plan import EpochPlan
from data_ingest.query import QueryResult, find_cells
from data_ingest.shard_cache import ShardCache
from data_ingest.shard_write import write_cache
from data_ingest.simulate_atlas import write_synthetic_atlas
from data_ingest.stream import CellStream
from screformer.config import AtlasConfig, QueryConfig, StreamConfig, TokensConfig

PEER_CHUNK, PEER_IO_BATCH, PEER_BATCHES = 64, 65_536, (64, 1_024, 16_384)


_ENTROPY_BATCH = 64


def measure(args: argparse.Namespace) -> dict[str, object]:
    """Time the readers, print a table, and return the numbers; `args` are those of the command.

    Raises:
        ValueError: An atlas or a filter that cannot be read.
    """
    cores = len(os.sched_getaffinity(0))
    with ExitStack() as stack:
        connect()
        quiet_data()
        atlas = args.settings.atlas
        if not atlas.uri:
            print(f"writing an atlas of {args.cells:,} cells x {args.genes:,} genes", file=sys.stderr)
            atlas = AtlasConfig(uri=f"{stack.enter_context(tempfile.TemporaryDirectory())}/atlas")
            write_synthetic_atlas(atlas.uri, num_cells=args.cells, num_genes=args.genes)
        query = find_cells(pinned(atlas), QueryConfig(obs_filter=args.settings.query.obs_filter))
        # A process per core without Ray; spawned, since TileDB does not survive a fork.
        pool = stack.enter_context(ProcessPoolExecutor(cores, multiprocessing.get_context("spawn")))
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        start = time.perf_counter()
        cache = write_cache(query, f"{folder}/cache", seed=args.seed)
        print(f"shard cache: {len(query.obs_joinids) / (time.perf_counter() - start):,.0f} cells/s written")
        return _measure(query, cache, pool, cores, args)


def _measure(
    query: QueryResult, cache: ShardCache, pool: Executor, cores: int, arguments: argparse.Namespace
) -> dict[str, object]:
    codes = query.obs["label"].cat.codes.to_numpy()
    num_cells = len(query.obs_joinids)
    stream, cached = (
        CellStream(
            query.atlas,
            query.obs_joinids,
            codes,
            query.vocabulary(),
            TokensConfig(max_genes=arguments.max_genes),
            StreamConfig(),
            global_batch_size=arguments.batch,
            seed=arguments.seed,
            cache=each,
        )
        for each in (None, cache)
    )
    contestants: dict[str, Callable[[int], int]] = {"raw SOMA scan": lambda number: _scan(query, cores)}
    for who, each in (("our", stream), ("cache:", cached)):
        contestants |= {
            f"{who} read tasks, called directly": partial(_read_directly, each, pool=pool, processes=cores),
            f"{who} read tasks, through Ray": partial(_through_ray, each),
            f"{who} stream, tokens in the loop": partial(_in_loop, each, arguments.batch),
        }
    versions = {name: importlib.metadata.version(name) for name in ("ray", "tiledbsoma", "pyarrow", "numpy")}
    entropy = {
        "ours": _entropy(_labels_in_order(stream)),
        "cache": _entropy(_labels_in_order(cached)),
        "random": _entropy(np.random.default_rng(arguments.seed).permutation(codes)),
    }
    peers: list[str] = []
    try:
        versions["tiledbsoma-ml"] = importlib.metadata.version("tiledbsoma-ml")
    except importlib.metadata.PackageNotFoundError:
        print(
            "tiledbsoma-ml is not installed (pip install screformer[baselines]), so it is not compared",
            file=sys.stderr,
        )
    else:
        peers = [f"tiledbsoma-ml, batch {size:,}" for size in PEER_BATCHES]
        for name, size in zip(peers, PEER_BATCHES, strict=True):
            contestants[name] = lambda number, size=size: sum(
                len(joinids) for joinids in _peer(query, size, cores, arguments.seed)
            )  # type: ignore[misc]
        joinids = np.concatenate(list(_peer(query, PEER_IO_BATCH, cores, arguments.seed)))
        entropy["tiledbsoma-ml"] = _entropy(codes[np.searchsorted(query.obs_joinids, joinids)])
    next(iter(_blocks(stream, 0)))  # start Ray's worker processes before timing
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in tqdm(range(arguments.rounds), desc="rounds", disable=None):
        for name, run in contestants.items():
            if name in peers and number and min(peers, key=lambda peer: seconds[peer][0]) != name:
                continue  # only the peer's best batch size runs again
            start = time.perf_counter()
            seen = run(number)
            seconds[name].append(time.perf_counter() - start)
            assert num_cells <= seen < num_cells + arguments.batch, (
                f"{name} returned {seen} of {num_cells} cells"
            )
    rates = {name: num_cells / statistics.median(times) for name, times in seconds.items()}
    for name, rate in rates.items():
        spread = ", ".join(f"{num_cells / time_s:,.0f}" for time_s in seconds[name])
        print(f"{name:<34} {rate:>9,.0f} cells/s  {rate / cores:>9,.0f} per core   rounds: {spread}")
    for name, bits in entropy.items():
        print(
            f"label entropy in batches of {_ENTROPY_BATCH}, {name:<14} {bits:.4f} bits"
            f" ({bits / entropy['random']:.2%} of random)"
        )
    ours, direct = rates["our stream, tokens in the loop"], rates["our read tasks, called directly"]
    result: dict[str, object] = {
        "benchmark": "stream",
        "cells": num_cells,
        "genes": len(query.var_joinids),
        "values_per_cell": round(counts_per_cell(query.atlas), 1),
        "cores": cores,
        "rounds": arguments.rounds,
        "versions": versions,
        "cells_per_s": {name: round(rate) for name, rate in rates.items()},
        "entropy_bits": {name: round(bits, 4) for name, bits in entropy.items()},
        "entropy_over_random": round(entropy["ours"] / entropy["random"], 4),
        "ray_overhead": round(direct / rates["our read tasks, through Ray"] - 1, 3),
        "stream_overhead": round(direct / ours - 1, 3),
    }
    if peers:
        best = max(rates[name] for name in peers)
        result["over_tiledbsoma_ml"] = round(ours / best, 2)
        result["cache_over_tiledbsoma_ml"] = round(rates["cache: stream, tokens in the loop"] / best, 2)
    print(
        f"load average {os.getloadavg()[0]:.1f} on {cores} cores; "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
    )
    return result


def _scan(query: QueryResult, threads: int) -> int:
    with open_atlas(query.atlas, threads=threads) as experiment:
        x = experiment.ms[MEASUREMENT].X[X_LAYER]
        for table in x.read((pa.array(query.obs_joinids),)).tables():
            table["soma_data"].nbytes  # noqa: B018 - fills the buffers
    return len(query.obs_joinids)


def _through_ray(stream: CellStream, epoch: int) -> int:
    return sum(block.num_rows for block in _blocks(stream, epoch))


def _in_loop(stream: CellStream, size: int, epoch: int) -> int:
    batches = stream.batches(epoch, rank=0, world_size=1, micro_batch_size=size)
    return sum(len(batch["joinids"]) for batch in batches)


def _blocks(stream: CellStream, epoch: int) -> Iterable[pa.Table]:
    """The blocks returned by Ray's read tasks, unchanged."""
    dataset = stream.dataset(epoch, rank=0, world_size=1)
    return dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1)


def _read_directly(stream: CellStream, epoch: int, pool: Executor, processes: int) -> int:
    plan = stream.plan(epoch)
    num_units = len(list(plan.units(0, 1)))
    parts = [range(first, num_units, processes) for first in range(processes)]
    arrays = stream.arrays
    return sum(
        pool.map(_run_read_tasks, *zip(*((stream.reader, arrays, plan, part) for part in parts), strict=True))
    )


def _run_read_tasks(read: Reader, arrays: CellArrays, plan: EpochPlan, numbers: Iterable[int]) -> int:
    num_genes = arrays.panels.measured_pg.shape[1]
    source = CellDatasource(read, arrays, plan, num_genes=num_genes, rank=0, world_size=1)
    tasks = source.get_read_tasks(1)
    return sum(table.num_rows for number in numbers for table in tasks[number]())


def _peer(query: QueryResult, batch_size: int, threads: int, seed: int) -> Iterator[np.ndarray]:
    """Joinids of tiledbsoma-ml's batches, read as its documentation advises.

    Sparse X, eager fetching, TileDB's own buffer size.
    """
    from tiledbsoma_ml import ExperimentDataset

    with open_atlas(query.atlas, threads=threads, buffer_bytes=2**30) as experiment:
        obs_query = tiledbsoma.AxisQuery(coords=(pa.array(query.obs_joinids),))
        with experiment.axis_query(MEASUREMENT, obs_query=obs_query) as axis_query:
            dataset = ExperimentDataset(
                axis_query,
                layer_name=X_LAYER,
                obs_column_names=["soma_joinid"],
                batch_size=batch_size,
                io_batch_size=PEER_IO_BATCH,
                shuffle_chunk_size=PEER_CHUNK,
                seed=seed,
                return_sparse_X=True,
            )
            for _, obs in dataset:
                yield obs["soma_joinid"].to_numpy()


def _labels_in_order(stream: CellStream) -> np.ndarray:
    plan = stream.plan(0)
    order = np.concatenate([plan.task_cells(task).ravel() for task in range(plan.num_tasks)])
    return stream.arrays.labels[order[order >= 0]]


def _entropy(codes_in_order: np.ndarray) -> float:
    """Mean Shannon entropy, in bits, of the labels in consecutive batches."""
    batches = codes_in_order[: len(codes_in_order) // _ENTROPY_BATCH * _ENTROPY_BATCH].reshape(
        -1, _ENTROPY_BATCH
    )
    if not len(batches):
        return float("nan")
    share_bk = np.stack([(batches == code).mean(axis=1) for code in np.unique(codes_in_order)], axis=1)
    return float(-(share_bk * np.log2(np.where(share_bk > 0, share_bk, 1))).sum(axis=1).mean())
