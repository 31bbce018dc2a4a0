"""Launch a training with Ray Train, on workers or in this process."""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.train.torch
from ray.train.torch import TorchConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from jobs.training.elastic import START_TIMEOUT_S, FittingWorkers, places, reserved_cpus
from jobs.training.failures import GiveUp, explained
from jobs.training.run_folder import attempts, keep_model, model_folder, write_json
from jobs.training.stopping import save_flag, stop_on_signals
from jobs.training.task import TrainingTask
from jobs.training.worker import Account, train_loop_per_worker
from screformer.config import ExperimentConfig
from screformer.not_finite import NonFiniteError

NON_FINITE = "non_finite.json"


def check_layout(config: ExperimentConfig, nodes: Sequence[dict[str, Any]], *, resumes: bool = False) -> None:
    """Reject a layout that can never fit the cluster; Ray would wait forever.

    Args:
        config: The run's settings.
        nodes: Result of `ray.nodes()`.
        resumes: The run has begun, so it may go on with fewer workers.

    Raises:
        ValueError: Too few CPUs or GPUs; the message shows the calculation.
    """
    cluster = config.cluster
    setting, workers = "num_workers", cluster.num_workers
    if resumes:
        setting, workers = "min_workers", min(config.worker_counts())
    resources = [node["Resources"] for node in nodes if node["Alive"]]
    cpus, gpus = (sum(float(node.get(kind, 0)) for node in resources) for kind in ("CPU", "GPU"))
    needed = workers * cluster.cpus_per_worker + (0 if resumes else cluster.cpus_per_read_task)
    if needed > cpus:
        reading = "" if resumes else f" + one read task of cpus_per_read_task={cluster.cpus_per_read_task:g}"
        raise ValueError(
            f"cluster.{setting}={workers} x cpus_per_worker={cluster.cpus_per_worker:g}{reading}"
            f" = {needed:g} CPUs, but Ray has {cpus:g} on {len(resources)} node(s);"
            " lower one of these settings or add nodes"
        )
    if cluster.use_gpu and workers > gpus:
        raise ValueError(
            f"cluster.{setting}={workers} needs one GPU each, but Ray has {gpus:g}; lower it,"
            f" or set cluster.use_gpu=false"
        )
    fitting = places(resources, cluster.cpus_per_worker, use_gpu=cluster.use_gpu)
    if fitting < workers:
        raise ValueError(
            f"with cluster.cpus_per_worker={cluster.cpus_per_worker:g}, only {fitting} workers fit on the"
            f" nodes ({', '.join(format(float(node.get('CPU', 0)), 'g') for node in resources)} CPUs), not"
            f" {workers}; lower cluster.{setting}"
        )


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Result of a training."""

    model_dir: Path
    """Local directory of the best model; its meta data include its scores."""
    account: Account
    """How the training ended, with its speed and memory."""


def train(task: TrainingTask, folder: str, *, in_process: bool = False, elastic: bool = False) -> Trained:
    """Train with Ray Train.

    Args:
        task: The training.
        folder: Path or URI for attempts and their checkpoints and, if a path, for the model.
        elastic: Go on with fewer workers, down to `cluster.min_workers`, while nodes are missing.
        in_process: Train in this process as the only rank, without checkpoints. This starts in milliseconds,
            so it suits trainings that are shorter than the start of workers. The configuration must have one
            worker.

    Raises:
        RuntimeError: Workers failed more often than `cluster.max_failures`, or could not be started within
            `cluster.wait_for_nodes_minutes`.
        StorageError: The folder cannot be written.
        NonFiniteError: The loss or a weight became NaN or infinite; `non_finite.json` in the folder lists
            the cells of that step.
        KeyboardInterrupt: SIGTERM or SIGINT arrived; the exception's note names the saved checkpoint.
    """
    if in_process:
        model_dir = model_folder(folder)
        # Not a TorchTrainer: in local mode it destroys the process group, which DeepSpeed still uses.
        local = DataParallelTrainer(
            partial(train_loop_per_worker, task=task, folder=folder, model_dir=str(model_dir), flag=""),
            scaling_config=ray.train.ScalingConfig(num_workers=0),
        )
        account = Account(**local.fit().return_value)
    else:
        flag = f"stop-{uuid.uuid4().hex}"
        with stop_on_signals(flag):
            result = _on_workers(task, folder, flag, elastic=elastic)
        account = Account(**(result.return_value or {}))
    if account.not_finite:
        joinids = list(account.joinids)
        write_json(folder, NON_FINITE, {"message": account.not_finite, "joinids": joinids})
        resume = "" if in_process else f", and resume with --resume {folder} train.lr=..."
        raise NonFiniteError(
            f"{account.not_finite}{resume}; {folder}/{NON_FINITE} lists the step's cells", joinids
        )
    if account.stopped_after is not None:
        stop = KeyboardInterrupt()
        stop.add_note(f"saved a checkpoint at step {account.stopped_after}")
        raise stop
    if not in_process:
        model_dir = keep_model(result.checkpoint, folder)
    return Trained(model_dir=model_dir, account=account)


def _on_workers(task: TrainingTask, folder: str, flag: str, *, elastic: bool) -> ray.train.Result:
    # How often Ray Train polls its workers (default 2 s). Each checkpoint, and the end of training, waits for
    # the next poll.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(START_TIMEOUT_S))
    cluster = task.config.cluster
    resources = {"CPU": reserved_cpus(cluster.cpus_per_worker)} | ({"GPU": 1} if cluster.use_gpu else {})
    # By default, Ray would give BLAS one thread per whole reserved CPU.
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, int(cluster.cpus_per_worker))))
    scaling = ray.train.ScalingConfig(
        num_workers=cluster.num_workers, use_gpu=cluster.use_gpu, resources_per_worker=resources
    )
    trainer = _Trainer(
        # Without `train_loop_config`: the controller would unpickle it and import all our code.
        partial(train_loop_per_worker, task=task, folder=folder, model_dir="", flag=flag),
        scaling_config=scaling,
        torch_config=TorchConfig(backend="nccl" if cluster.use_gpu else "gloo"),
        run_config=ray.train.RunConfig(
            # A separate name per attempt: we choose the checkpoint to resume from ourselves, by the manifest
            # that is written last.
            name=f"attempt-{len(attempts(folder)):03d}",
            storage_path=folder,
            failure_config=ray.train.FailureConfig(max_failures=cluster.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            callbacks=[GiveUp()],
            worker_runtime_env={"env_vars": {"OMP_NUM_THREADS": threads}},
        ),
    )
    trainer.scaling_policy = FittingWorkers(
        scaling,
        sizes=task.config.worker_counts() if elastic else [cluster.num_workers],
        cpus_per_worker=cluster.cpus_per_worker,
        save_flag=save_flag(flag),
        patience_s=60 * cluster.wait_for_nodes_minutes,
    )
    try:
        return trainer.fit()
    except (ray.train.TrainingFailedError, ray.exceptions.RayError) as error:
        raise explained(error, task.config, folder) from error


class _Trainer(ray.train.torch.TorchTrainer):
    """TorchTrainer with our scaling policy, and without features that have no public switch."""

    scaling_policy: FittingWorkers

    def _initialize_and_run_controller(self, **arguments: Any) -> ray.train.Result:
        """Start the controller with our policy."""
        return super()._initialize_and_run_controller(**arguments | {"scaling_policy": self.scaling_policy})

    def _create_default_callbacks(self) -> list[Any]:
        """Remove two of Ray Train's actors.

        One splits Ray Train datasets, which we do not use. The other watches for a dead controller and needs
        the dashboard; it is removed if there is none. A Ray without a dashboard ends with this process, so
        there is nothing to clean up. The watcher would warn every second, or fail if another Ray runs on the
        machine.
        """
        unused = {"DatasetsCallback"}
        if not ray._private.worker.get_dashboard_url():
            unused.add("PlacementGroupCleanerCallback")
        callbacks = super()._create_default_callbacks()
        return [callback for callback in callbacks if type(callback).__name__ not in unused]

    def _register_sigint_handler(self, controller: Any) -> None:
        """Do nothing: Ray's handler would end the run without a checkpoint."""
