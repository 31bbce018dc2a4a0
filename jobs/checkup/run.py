"""Check an installation or a cluster: nodes, storage, tracking store, and a short training."""

from __future__ import annotations

import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pyarrow.fs
import ray

from cluster.connect import connect
from data_ingest.ingest import ingest
from data_ingest.ingest_options import IngestOptions
from data_ingest.simulate import simulate_h5ads
from jobs.arguments import recipe_path
from jobs.checkup.nodes import (
    gpu_faults,
    look_at_nodes,
    storage_faults,
    tracking_faults,
    version_faults,
    versions_here,
)
from jobs.tracking.client import answering, mlflow_client, probe, tracking_uri
from jobs.training.run import run_training
from screformer.config import ExperimentConfig
from screformer.storage import absolute, filesystem

EXPERIMENT = "screformer-doctor"


def examine(config: ExperimentConfig, *, train: bool = True) -> list[str]:
    """Run all checks, print a line for each, and remove what they wrote to the storage.

    Args:
        config: `cluster`, `tracking` and `atlas.tiledb_config` describe what is checked.
        train: Also train for some seconds.

    Returns:
        What is wrong, and how to fix it; empty if nothing is.
    """
    place = f"{absolute(config.cluster.storage_path or 'runs')}/doctor-{uuid.uuid4().hex[:8]}"
    found: list[str] = []

    def check(what: str, work: Callable[[], list[str]]) -> bool:
        began = time.monotonic()
        try:
            faults = work()
        except (ValueError, OSError, RuntimeError) as error:
            faults = [str(error)]
        print(f"{'wrong' if faults else 'ok':<5}  {what} ({time.monotonic() - began:.0f} s)", flush=True)
        for fault in faults:
            print(f"       {fault}", flush=True)
        found.extend(faults)
        return not faults

    try:
        # Before Ray starts, since the files are on this node alone.
        stored = check("storage: an atlas of simulated cells", lambda: _write_atlas(place, config))
        check("tracking store", lambda: _tracking(config))
        check("Ray", lambda: _connect(config))
        if ray.is_initialized():
            nodes, faults = look_at_nodes(place, tracking_uri(config.tracking))
            check(f"{len(nodes)} nodes run our code", lambda: faults)
            check("same versions on all nodes", lambda: version_faults(nodes, versions_here()))
            check("GPUs", lambda: gpu_faults(nodes))
            if stored:
                check("storage from all nodes", lambda: storage_faults(nodes, place, _names(place)))
            check("tracking store from all nodes", lambda: tracking_faults(nodes))
            if train and not found:
                check("a short training", lambda: _train(place, config))
    finally:
        _remove(place)
    return found


def _write_atlas(place: str, config: ExperimentConfig) -> list[str]:
    if "://" not in place:
        Path(place).mkdir(parents=True)
    with tempfile.TemporaryDirectory() as scratch:
        files = simulate_h5ads(scratch, num_cells=400, seed=0)
        ingest(
            [str(file) for file in files],
            f"{place}/atlas",
            IngestOptions(tiledb_config=config.atlas.tiledb_config),
        )
    return []


def _tracking(config: ExperimentConfig) -> list[str]:
    uri = tracking_uri(config.tracking)
    probe(uri)
    with answering(uri):
        mlflow_client(uri).search_experiments(max_results=1)
    return []


def _connect(config: ExperimentConfig) -> list[str]:
    cluster = config.cluster
    connect(num_cpus=cluster.num_workers * cluster.cpus_per_worker + cluster.cpus_per_read_task)
    return []


def _train(place: str, config: ExperimentConfig) -> list[str]:
    settings = {
        "atlas.uri": f"{place}/atlas",
        "atlas.tiledb_config": dict(config.atlas.tiledb_config),
        "tracking.uri": config.tracking.uri,
        "tracking.experiment": EXPERIMENT,
        "train.global_batch_size": 8 * config.cluster.num_workers,
        "train.micro_batch_size": 8,
        "stream.cells_per_task": 32 * config.cluster.num_workers,
    }
    settings |= {f"cluster.{name}": value for name, value in config.to_dict()["cluster"].items()}
    smoke = ExperimentConfig.from_file(recipe_path("smoke"))
    run_training(smoke.merge(settings), "pretrain", folder=f"{place}/run")
    return []


def _names(place: str) -> list[str]:
    files, path = filesystem(place)
    return [info.base_name for info in files.get_file_info(pyarrow.fs.FileSelector(path))]


def _remove(place: str) -> None:
    files, path = filesystem(place)
    if files.get_file_info(path).type == pyarrow.fs.FileType.Directory:
        files.delete_dir(path)
