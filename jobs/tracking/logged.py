"""Read logged runs and their artifacts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from jobs.tracking.client import (
    existing_store,
    metric_points,
    mlflow_client,
    mlflow_package,
    scratch_folder,
)
from jobs.tracking.models import MODEL_FOLDER
from screformer.config import TrackingConfig


@dataclass(frozen=True, kw_only=True)
class LoggedRun:
    """A run, as read from its store."""

    run_id: str
    name: str
    status: str
    """FINISHED, FAILED, KILLED or RUNNING."""
    started_ms: int
    ended_ms: int | None
    tags: Mapping[str, str]
    metrics: Mapping[str, float]
    """Last value of each metric."""
    artifacts: tuple[str, ...]
    """Paths of all files except the model's."""
    store: str

    def history(self, key: str) -> list[tuple[int, float]]:
        """(step, value) points of a metric, sorted by step."""
        return metric_points(self.store, self.run_id, key)

    def file(self, path: str) -> Path:
        """Local path of an artifact; a downloaded copy is deleted when this process ends."""
        return Path(mlflow_client(self.store).download_artifacts(self.run_id, path, scratch_folder()))


def logged_run(run_id: str, tracking: TrackingConfig) -> LoggedRun:
    """Read a run.

    Args:
        run_id: MLflow's identifier, or `runs:/ID`.
        tracking: Where runs are kept.

    Raises:
        ValueError: The run does not exist.
        ConnectionError: The tracking server does not answer.
    """
    store, run_id = existing_store(tracking), run_id.removeprefix("runs:/")
    client = mlflow_client(store)
    try:
        run = client.get_run(run_id)
    except mlflow_package().exceptions.MlflowException as error:
        raise ValueError(f"run {run_id!r} is not in {store}: {error.message}") from error
    files, folders = [], [""]
    while folders:
        for entry in client.list_artifacts(run_id, folders.pop() or None):
            if not entry.is_dir:
                files.append(entry.path)
            elif entry.path != MODEL_FOLDER:
                folders.append(entry.path)
    return LoggedRun(
        run_id=run_id,
        name=run.info.run_name,
        status=run.info.status,
        started_ms=run.info.start_time,
        ended_ms=run.info.end_time,
        tags=dict(run.data.tags),
        metrics=dict(run.data.metrics),
        artifacts=tuple(sorted(files)),
        store=store,
    )


def run_file(run_id: str, name: str, tracking: TrackingConfig) -> Path:
    """Fetch an artifact of a run; a downloaded copy is deleted when this process ends.

    Raises:
        ValueError: The run or artifact does not exist.
        ConnectionError: The tracking server does not answer.
    """
    store = existing_store(tracking)
    try:
        return Path(mlflow_client(store).download_artifacts(run_id, name, scratch_folder()))
    except (mlflow_package().exceptions.MlflowException, OSError) as error:
        raise ValueError(f"run {run_id!r} in {store} has no artifact {name}: {error}") from error
