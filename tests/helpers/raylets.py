"""A Ray cluster of several raylets on this machine, whose nodes and processes can be killed, and a training
on it."""

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from mlflow import MlflowClient

from cluster.connect import environment
from helpers import processes
from helpers.local_ray import WATCHERS
from helpers.processes import REPO_ROOT, kill_tree, start_python

SETTINGS = [
    "model.attention=full",  # LSH would turn differences of rounding into other hashes
    "train.max_steps=100000",
    "train.lr=1e-4",
    "train.eval_every_steps=20",
    "train.log_every_steps=20",
    "stream.cells_per_task=128",
    "cluster.cpus_per_worker=2",
]


class Raylets:
    """A head node, which runs the driver, and any number of other nodes."""

    def __init__(self, cluster: Any) -> None:
        self._cluster = cluster
        self.address: str = cluster.address

    def add(self, num_cpus: int) -> Any:
        """Start a node."""
        return self._cluster.add_node(num_cpus=num_cpus)

    def lose(self, *nodes: Any) -> None:
        """Kill nodes with all their processes, as when their machines are gone."""
        for node in nodes:
            raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
            children = raylet.children(recursive=True)
            self._cluster.remove_node(node, allow_graceful=False)
            for process in children:
                with suppress(psutil.NoSuchProcess):
                    process.kill()

    def processes(self, title: str) -> list[psutil.Process]:
        """Running actors or tasks, such as `RayTrainWorker` or `Read`, sorted by process id."""
        found = []
        for node in self._cluster.list_all_nodes():
            raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
            for process in raylet.children():
                with suppress(psutil.NoSuchProcess, IndexError):
                    if process.cmdline()[0].startswith(f"ray::{title}"):
                        found.append(process)
        return sorted(found, key=lambda process: process.pid)


@contextmanager
def raylets(num_cpus: int, **variables: str) -> Iterator[Raylets]:
    """A cluster of a head node, without a dashboard; more environment variables for its processes."""
    from ray.cluster_utils import Cluster

    with environment({"PYTHONPATH": str(REPO_ROOT), **WATCHERS, **variables}):
        cluster = Cluster(
            initialize_head=True, head_node_args={"num_cpus": num_cpus, "include_dashboard": False}
        )
        try:
            yield Raylets(cluster)
        finally:
            cluster.shutdown()


class Job:
    """A fine-tuning that can be given again, with its own tracking store."""

    def __init__(self, cluster: Raylets, atlas: str, folder: Path, *words: str) -> None:
        self.run_dir, self._folder = folder / "run", folder
        self._address, self._tracking = cluster.address, f"sqlite:///{folder / 'mlflow.db'}"
        self._words = ["--config", str(REPO_ROOT / "jobs" / "recipes" / "smoke.yaml"), *SETTINGS, *words]
        self._words += [
            f"atlas.uri={atlas}",
            f"tracking.uri={self._tracking}",
            "--run-dir",
            str(self.run_dir),
        ]

    def start(self) -> subprocess.Popen[str]:
        return start_python(
            "-m",
            "jobs.finetune",
            *self._words,
            cwd=self._folder,
            env=processes.environment(RAY_ADDRESS=self._address),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def losses(self) -> dict[int, float]:
        """Loss on the validation cells at each step; it depends on all cells trained on before."""
        run_id = json.loads((self.run_dir / "run.json").read_text())["run"]["run_id"]
        history = MlflowClient(self._tracking).get_metric_history(run_id, "val/loss")
        return {point.step: point.value for point in sorted(history, key=lambda point: point.timestamp)}


def end(job: subprocess.Popen[str]) -> None:
    """Kill a training that still runs."""
    if job.poll() is None:
        kill_tree(job)
