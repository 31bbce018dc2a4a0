"""Launch a training on a cluster with Ray Train."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import ray
import ray.train.torch

from data_ingest.ontology import lineage
from jobs.tracking.identity import code_identity
from jobs.tracking.runs import TrackedRun
from jobs.training.cells import TrainingCells
from jobs.training.run_folder import attempts
from jobs.training.worker import train_loop_per_worker
from screformer.config import ExperimentConfig, Task


def check_layout(config: ExperimentConfig, nodes: Sequence[dict[str, Any]]) -> None:
    """Refuse what the cluster could never hold: Ray would wait for it for ever.

    Args:
        config: The run's settings.
        nodes: As `ray.nodes()` gives them.

    Raises:
        ValueError: Too few CPUs or GPUs, with the sum.
    """
    cluster = config.cluster
    resources = [node["Resources"] for node in nodes if node["Alive"]]
    cpus, gpus = (sum(float(node.get(kind, 0)) for node in resources) for kind in ("CPU", "GPU"))
    needed = cluster.num_workers * cluster.cpus_per_worker + cluster.cpus_per_read_task
    if needed > cpus:
        raise ValueError(
            f"cluster.num_workers={cluster.num_workers} x cpus_per_worker={cluster.cpus_per_worker:g} + one"
            f" read task of"
            f" cpus_per_read_task={cluster.cpus_per_read_task:g} = {needed:g} CPUs, but Ray has {cpus:g} on"
            f" {len(resources)} node(s);"
            " lower one of them or add nodes"
        )
    if cluster.use_gpu and cluster.num_workers > gpus:
        raise ValueError(
            f"cluster.num_workers={cluster.num_workers} need one GPU each, but Ray has {gpus:g}; lower it, or"
            f" set cluster.use_gpu=false"
        )
    places = sum(
        min(
            int(node.get("CPU", 0) / cluster.cpus_per_worker),
            int(node.get("GPU", 0)) if cluster.use_gpu else sys.maxsize,
        )
        for node in resources
    )
    if places < cluster.num_workers:
        raise ValueError(
            f"cluster.cpus_per_worker={cluster.cpus_per_worker:g} lets only {places} workers fit on the nodes"
            f" ({', '.join(format(float(node.get('CPU', 0)), 'g') for node in resources)} CPUs), not"
            f" {cluster.num_workers}; lower it"
        )


def train_on_cluster(
    config: ExperimentConfig,
    task: Task,
    cells: TrainingCells,
    start_arrays: dict[str, Any],
    run: TrackedRun,
    run_dir: str,
    checkpoint: ray.train.Checkpoint | None,
) -> ray.train.Result:
    """Train with a group of Ray Train workers.

    The result holds the last checkpoint, with the best model in its folder `model`.
    """
    from ray.train.torch import TorchConfig

    # How often Ray Train looks at its workers (2 s by default): each checkpoint, and the end, wait for the
    # next look.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    cluster = config.cluster
    resources = {"CPU": cluster.cpus_per_worker} | ({"GPU": 1} if cluster.use_gpu else {})
    trainer = _Trainer(
        train_loop_per_worker,
        train_loop_config={
            "config": config.to_dict(),
            "task": task,
            "streams": {
                part: cells.stream(part) for part, positions in cells.parts.items() if len(positions)
            },
            "labels": cells.labels,
            "lineage": lineage(cells.labels["cl_ids"]).to_json(),
            "class_counts": cells.class_counts_k.tolist(),
            "start": ray.put(start_arrays),
            "meta": {"task": task, **cells.identity(), "code": code_identity(), "run_id": run.run_id},
            "run": run,
            "resume": checkpoint,
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=cluster.num_workers, use_gpu=cluster.use_gpu, resources_per_worker=resources
        ),
        torch_config=TorchConfig(backend="nccl" if cluster.use_gpu else "gloo"),
        run_config=ray.train.RunConfig(
            # A name of its own for each attempt: which checkpoint to go on from is ours to say, by the
            # manifest that is written last.
            name=f"attempt-{len(attempts(run_dir)):03d}",
            storage_path=run_dir,
            failure_config=ray.train.FailureConfig(max_failures=cluster.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
        ),
    )
    return trainer.fit()


class _Trainer(ray.train.torch.TorchTrainer):
    """Without the watcher that Ray Train starts for a controller that dies: it asks the dashboard.

    A Ray without dashboard is one that ends with this process, so nothing is left to clean up; the watcher
    would warn every second, or fail where another Ray runs on the machine.
    """

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        if ray._private.worker.get_dashboard_url():
            return callbacks
        return [
            callback for callback in callbacks if type(callback).__name__ != "PlacementGroupCleanerCallback"
        ]
