"""Launch a training with Ray Train: on workers, or in this process."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train.torch
from ray.train.torch import TorchConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from jobs.training.run_folder import attempts
from jobs.training.task import TrainingTask
from jobs.training.worker import train_loop_per_worker
from screformer.config import ExperimentConfig


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


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a training leaves."""

    model_dir: Path
    """The best model, on this machine."""
    metrics: dict[str, float]
    """`best_val/...` and `test/...` of that model."""
    account: dict[str, float]
    """`best_step`, `cells_per_s` (median) and `peak_memory_gb` (largest)."""


def train(task: TrainingTask, folder: str, *, in_process: bool = False) -> Trained:
    """Train with Ray Train.

    Args:
        task: What to train.
        folder: Path or URI where attempts and their checkpoints are kept, and the model, if it is a path.
        in_process: Train in this process, the only rank, and keep no checkpoints. It starts in milliseconds,
            so it is for trainings shorter than the start of workers. The configuration has one worker.

    Raises:
        ray.train.TrainingFailedError: A worker failed more often than `cluster.max_failures`.
        KeyboardInterrupt: Ctrl-C was pressed.
    """
    model_dir = Path(tempfile.mkdtemp(prefix="screformer-model-") if "://" in folder else folder) / "model"
    if in_process:
        # Not a TorchTrainer: in local mode that ends the process group, which DeepSpeed holds on to.
        local = DataParallelTrainer(
            train_loop_per_worker,
            train_loop_config={"task": task, "model_dir": str(model_dir)},
            scaling_config=ray.train.ScalingConfig(num_workers=0),
        )
        result = local.fit()
    else:
        result = _on_workers(task, folder)
        with result.checkpoint.as_directory() as kept:
            shutil.copytree(Path(kept) / "model", model_dir, dirs_exist_ok=True)
    metrics = {name: value for name, value in (result.metrics or {}).items() if isinstance(value, float)}
    return Trained(model_dir=model_dir, metrics=metrics, account=result.return_value or {})


def _on_workers(task: TrainingTask, folder: str) -> ray.train.Result:
    # How often Ray Train looks at its workers (2 s by default): each checkpoint, and the end, wait for the
    # next look.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    cluster = task.config.cluster
    resources = {"CPU": cluster.cpus_per_worker} | ({"GPU": 1} if cluster.use_gpu else {})
    trainer = _Trainer(
        train_loop_per_worker,
        train_loop_config={"task": task, "model_dir": ""},
        scaling_config=ray.train.ScalingConfig(
            num_workers=cluster.num_workers, use_gpu=cluster.use_gpu, resources_per_worker=resources
        ),
        torch_config=TorchConfig(backend="nccl" if cluster.use_gpu else "gloo"),
        run_config=ray.train.RunConfig(
            # A name of its own for each attempt: which checkpoint to resume from is ours to say, by the
            # manifest that is written last.
            name=f"attempt-{len(attempts(folder)):03d}",
            storage_path=folder,
            failure_config=ray.train.FailureConfig(max_failures=cluster.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
        ),
    )
    try:
        return trainer.fit()
    except SystemExit as stop:
        # What Ray Train does on Ctrl-C, once its workers have ended.
        raise KeyboardInterrupt from stop


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
