"""MLflow runs: start one, log to it, read it back.

`TrackedRun` is a plain picklable handle, so that rank 0 of a Ray worker group logs into the run that the
driver started. Nothing here touches MLflow's global state (active run, tracking URI).
"""

from __future__ import annotations

import atexit
import dataclasses
import json
import logging
import os
import platform
import re
import shutil
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import yaml

from jobs.tracking.outbox import Entry, outbox
from screformer.config import ExperimentConfig, TrackingConfig

if TYPE_CHECKING:
    pass
from jobs.reports.figures import confusion_figure, learning_figure
from jobs.tracking.client import (
    PATIENCE_S,
    is_away,
    mlflow_client,
    probe,
    scratch_folder,
    sqlite_path,
    tracking_uri,
)
from jobs.tracking.identity import code_identity
from jobs.tracking.models import MODEL_FOLDER, register_model

logger = logging.getLogger(__name__)


def start_run(config: ExperimentConfig, job: str, *, parent: TrackedRun | None = None) -> TrackedRun:
    """Start the run of a job and log its configuration.

    Args:
        config: The job's settings; `config.tracking` says where runs are kept and what they are called.
        job: Name of the command, such as `finetune`; kept as a tag.
        parent: Run that this one belongs to, such as that of a cross-validation.

    Returns:
        The run, to be used in a `with` statement: an exception marks it FAILED with the error, else it ends
        FINISHED.

    Raises:
        ConnectionError: The tracking server does not answer.
        ValueError: `tracking.uri` names something that MLflow cannot use.
    """
    uri = tracking_uri(config.tracking)
    probe(uri)
    client = mlflow_client(uri)
    experiment = client.get_experiment_by_name(config.tracking.experiment)
    if experiment is None:
        # A server chooses its own artifact store; a SQLite file has none, and MLflow would take the working
        # directory of each process.
        artifacts = sqlite_path(uri).parent / "mlartifacts" if uri.startswith("sqlite:") else None
        experiment_id = client.create_experiment(
            config.tracking.experiment, artifact_location=artifacts.as_uri() if artifacts else None
        )
    else:
        experiment_id = experiment.experiment_id
    tags = {
        "job": job,
        "mlflow.source.name": f"jobs.{job}",
        "mlflow.source.type": "JOB",
        "mlflow.user": os.environ.get("USER", "unknown"),
    }
    if parent is not None:
        tags["mlflow.parentRunId"] = parent.run_id
    info = client.create_run(experiment_id, tags=tags, run_name=config.tracking.run_name or None).info
    run = TrackedRun(tracking_uri=uri, run_id=info.run_id)
    run.log_config(config.to_dict(job))
    logger.info(
        "run %s (%s) in experiment %s of %s", info.run_id, info.run_name, config.tracking.experiment, uri
    )
    return run


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """A run of one job. Picklable; every process that holds it may log."""

    tracking_uri: str
    """Absolute, so that it means the same in every process of this machine; other nodes need a server."""
    run_id: str
    """MLflow's identifier."""

    outbox: str = ""
    """Folder or URI where entries wait while the server is away; empty sends everything at once or raises."""

    def kept_in(self, run_dir: str) -> TrackedRun:
        """The same run, which loses nothing while its server is away.

        What cannot be sent waits in `outbox/` of the run folder.
        """
        if not self.tracking_uri.startswith("http"):
            return self
        folder = run_dir.rstrip("/") if "://" in run_dir else str(Path(run_dir).resolve())
        return dataclasses.replace(self, outbox=f"{folder}/outbox")

    def __enter__(self) -> TrackedRun:
        self._deliver({"kind": "running"})
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end(error=error)

    def end(self, *, error: BaseException | None = None) -> None:
        """Mark the run FINISHED.

        Or FAILED (KILLED when interrupted) with the error as a tag and its traceback as an artifact.
        """
        entry: Entry = {"kind": "end", "status": "FINISHED", "time_ms": int(time.time() * 1000)}
        if error is not None:
            self.set_tags({"error": f"{type(error).__name__}: {error}"})
            self._deliver(
                {"kind": "text", "path": "error.txt", "text": "".join(traceback.format_exception(error))}
            )
            entry["status"] = "KILLED" if isinstance(error, KeyboardInterrupt | SystemExit) else "FAILED"
        self.send_kept()
        self._deliver(entry)
        left = len(outbox(self.outbox).names()) if self.outbox else 0
        if left:
            logger.warning(
                "%d entries of run %s did not reach %s and are kept in %s; when it is back, `%s` sends them",
                left,
                self.run_id,
                self.tracking_uri,
                self.outbox,
                self._sync_command,
            )

    def send_kept(self) -> tuple[int, int]:
        """Send what waits in the outbox; gives how many entries were sent and how many are left."""
        return outbox(self.outbox).flush(self._send) if self.outbox else (0, 0)

    def log_config(self, tree: Mapping[str, Any]) -> None:
        """Log every setting as a parameter (`model.n_hashes`) and the whole as `config.yaml`.

        Which a job can be started from again.

        Args:
            tree: Nested plain values of the settings that the job uses.
        """
        params = {
            f"{section}.{name}": str(value)[:6000]
            for section, fields in tree.items()
            for name, value in fields.items()
        }
        self._deliver({"kind": "params", "params": params})
        self._deliver({"kind": "text", "path": "config.yaml", "text": yaml.safe_dump(tree, sort_keys=False)})

    def log_identity(self, identity: Mapping[str, Any]) -> None:
        """Log what the run read and which code it ran.

        Args:
            identity: Nested plain values, such as `{"atlas": atlas.to_dict(), "query": {"hash": ...,
                "num_cells": ...}}`. They become tags (`atlas.uri`) and, with `code_identity()`, the artifact
                `identity.json`.
        """
        whole = {**identity, "code": code_identity()}
        tags = {name: value for name, value in _flat(whole).items() if not name.startswith("code.packages.")}
        if re.fullmatch(r"[0-9a-f]{40}.*", whole["code"]["git"]):
            tags["mlflow.source.git.commit"] = whole["code"]["git"][:40]
        self.set_tags(tags)
        self._deliver(
            {"kind": "text", "path": "identity.json", "text": json.dumps(whole, indent=2, default=str)}
        )

    def log_metrics(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Log scalars, such as `{"train/loss": 0.3}`, in one request.

        Characters that MLflow refuses become `_`.
        """
        named = {re.sub(r"[^\w\-. :/]", "_", name): float(value) for name, value in metrics.items()}
        self._deliver({"kind": "metrics", "metrics": named, "step": step, "time_ms": int(time.time() * 1000)})

    def log_table(self, table: pd.DataFrame, path: str) -> None:
        """Log a table as CSV under `path`, such as `test/per_class.csv`; the index is left out."""
        self._deliver({"kind": "text", "path": path, "text": table.to_csv(index=False)})

    def log_confusion(self, counts_kk: np.ndarray, names: Sequence[str], *, folder: str) -> None:
        """Log a confusion matrix: a picture with rows normalised to 1, and the counts as CSV.

        Args:
            counts_kk: Cells by true (row) and predicted (column) label, shape (k, k).
            names: The k labels.
            folder: Where it goes, such as `test`.
        """
        table = pd.DataFrame(counts_kk, columns=list(names))
        table.insert(0, "true_label", list(names))
        self.log_table(table, f"{folder}/confusion.csv")
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "confusion.png"
            confusion_figure(np.asarray(counts_kk), names).savefig(path)
            self.log_file(path, folder=folder)

    def history(self, names: Sequence[str]) -> dict[str, list[float]]:
        """Values of metrics in the order of their steps; metrics that were never logged are left out."""
        client = self._client
        found = {
            name: sorted((point.step, point.value) for point in client.get_metric_history(self.run_id, name))
            for name in names
        }
        return {name: [value for _, value in points] for name, points in found.items() if points}

    def log_curves(self) -> None:
        """Log pictures of all metrics that have more than one step.

        Those that differ only before the `/` share one picture.
        """
        self.send_kept()  # what other processes of the run could not send belongs into the pictures
        self._deliver({"kind": "curves"})

    def log_file(self, path: str | Path, *, folder: str = "") -> None:
        """Log a file, or a directory with its name, as artifact.

        A directory called `model` makes `runs:/ID` resolvable.
        """
        self._deliver({"kind": "file", "folder": folder}, Path(path))

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Set tags; nested mappings are flattened with dots."""
        self._deliver(
            {"kind": "tags", "tags": {name: str(value)[:5000] for name, value in _flat(tags).items()}}
        )

    def register(self, model_dir: str | Path, name: str) -> int | None:
        """Register the run's model as `register_model` does, or keep that for later where the server is away.

        Returns:
            The version number; None where `jobs.sync` has to register it.
        """
        if not self.outbox:
            return register_model(self.tracking_uri, self.run_id, model_dir, name)
        versions: list[int] = []

        def send(entry: Entry, content: Path | None) -> None:
            if entry["kind"] == "register":
                versions.append(self._register(entry))
            else:
                self._send(entry, content)

        self.send_kept()
        outbox(self.outbox).deliver(
            {"kind": "register", "model_dir": str(Path(model_dir).resolve()), "name": name}, send
        )
        if versions:
            return versions[0]
        logger.warning(
            "the model is kept in %s; when %s is back, `%s` registers it as %s",
            model_dir,
            self.tracking_uri,
            self._sync_command,
            name,
        )
        return None

    def _deliver(self, entry: Entry, content: Path | None = None) -> None:
        if self.outbox:
            outbox(self.outbox).deliver(entry, self._send, content)
        else:
            self._apply(entry, content)

    def _send(self, entry: Entry, content: Path | None) -> None:
        """Raises `ConnectionError` when the server is away, quickly."""
        try:
            probe(self.tracking_uri, timeout_s=PATIENCE_S)
            self._apply(entry, content)
        except Exception as error:
            if is_away(error):
                raise ConnectionError(f"the tracking server {self.tracking_uri} is away") from error
            raise

    def _apply(self, entry: Entry, content: Path | None) -> None:
        """Do one entry. Twice is as good as once.

        Because nobody knows whether a server that went away had done it.
        """
        client, kind = self._client, entry["kind"]
        from mlflow.entities import Metric, Param

        if kind == "metrics":
            batch = [
                Metric(name, value, entry["time_ms"], entry["step"])
                for name, value in entry["metrics"].items()
            ]
            for start in range(0, len(batch), 1000):  # the most that the store takes at once
                client.log_batch(self.run_id, metrics=batch[start : start + 1000])
        elif kind == "params":
            params = [Param(name, value) for name, value in entry["params"].items()]
            for start in range(0, len(params), 100):
                client.log_batch(self.run_id, params=params[start : start + 100])
        elif kind == "tags":
            for name, value in entry["tags"].items():
                client.set_tag(self.run_id, name, value)
        elif kind == "text":
            client.log_text(self.run_id, entry["text"], entry["path"])
        elif kind == "file":
            assert content is not None
            if content.is_dir():
                client.log_artifacts(
                    self.run_id,
                    str(content),
                    "/".join(part for part in (entry["folder"], content.name) if part),
                )
            else:
                client.log_artifact(self.run_id, str(content), entry["folder"] or None)
        elif kind == "curves":
            self._log_curves()
        elif kind == "register":
            self._register(entry)
        elif kind == "running":
            if client.get_run(self.run_id).info.status != "RUNNING":  # a resumed job
                client.update_run(self.run_id, status="RUNNING")
        else:
            assert kind == "end", f"unknown entry {kind!r}"
            if (
                entry["status"] == "FINISHED" and "error" in client.get_run(self.run_id).data.tags
            ):  # of an attempt that was resumed
                client.delete_tag(self.run_id, "error")
            client.set_terminated(self.run_id, entry["status"], entry["time_ms"])

    @property
    def _sync_command(self) -> str:
        return f"python -m jobs.sync --run-dir {self.outbox.removesuffix('/outbox')}"

    def _log_curves(self) -> None:
        client = self._client
        groups: dict[str, dict[str, list[tuple[int, float]]]] = {}
        for key in client.get_run(self.run_id).data.metrics:
            points = sorted(
                (point.step, point.value) for point in client.get_metric_history(self.run_id, key)
            )
            if len(points) > 1:
                groups.setdefault(key.rpartition("/")[2], {})[key] = points
        for name, curves in groups.items():
            client.log_figure(
                self.run_id,
                learning_figure(name, curves),
                f"curves/{re.sub(r'[^A-Za-z0-9_.-]', '_', name)}.png",
            )

    def _register(self, entry: Entry) -> int:
        return register_model(self.tracking_uri, self.run_id, entry["model_dir"], entry["name"])

    @property
    def _client(self) -> Any:
        if self.tracking_uri.startswith("sqlite:") and not sqlite_path(self.tracking_uri).is_file():
            raise ValueError(
                f"run {self.run_id} is kept in {self.tracking_uri}, a file that this machine"
                f" ({platform.node()}) does not have;"
                " for a job on several nodes set tracking.uri to an MLflow server (http://HOST:PORT)"
            )
        return mlflow_client(self.tracking_uri)


@dataclass(frozen=True, kw_only=True)
class LoggedRun:
    """A run as its store has it."""

    run_id: str
    name: str
    status: str
    """FINISHED, FAILED, KILLED or RUNNING."""
    started_ms: int
    ended_ms: int | None
    tags: Mapping[str, str]
    metrics: Mapping[str, float]
    """Last value of each."""
    artifacts: tuple[str, ...]
    """Paths of all files but those of the model."""
    store: str

    def history(self, key: str) -> list[tuple[int, float]]:
        """(step, value) points of a metric, by step."""
        return sorted(
            (point.step, point.value)
            for point in mlflow_client(self.store).get_metric_history(self.run_id, key)
        )

    def file(self, path: str) -> Path:
        """A file of the run on this machine; a downloaded one lasts until this process ends."""
        return Path(mlflow_client(self.store).download_artifacts(self.run_id, path, scratch_folder()))


def logged_run(run_id: str, tracking: TrackingConfig | None = None) -> LoggedRun:
    """Read a run.

    Args:
        run_id: MLflow's identifier, or `runs:/ID`.
        tracking: Where runs are kept; the default is that of the configuration.

    Raises:
        ValueError: There is no such run.
        ConnectionError: The tracking server does not answer.
    """
    store, run_id = tracking_uri(tracking or TrackingConfig()), run_id.removeprefix("runs:/")
    probe(store)
    client = mlflow_client(store)
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
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
    """Fetch an artifact of a run; a downloaded one lasts until this process ends.

    Raises:
        ValueError: No such run or artifact.
        ConnectionError: The tracking server does not answer.
    """
    store = tracking_uri(tracking)
    probe(store)
    mlflow_client(store)
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    target = tempfile.mkdtemp(prefix="screformer-artifact-")
    atexit.register(shutil.rmtree, target, ignore_errors=True)
    try:
        return Path(
            download_artifacts(run_id=run_id, artifact_path=name, dst_path=target, tracking_uri=store)
        )
    except (MlflowException, OSError) as error:
        raise ValueError(f"run {run_id!r} in {store} has no artifact {name}: {error}") from error


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat
