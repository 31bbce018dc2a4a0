"""The only door to MLflow: one run per job, model versions, aliases.

`TrackedRun` is a plain picklable handle, so that rank 0 of a Ray worker group logs into the run that the driver started. Nothing
here touches MLflow's global state (active run, tracking URI), and MLflow itself is imported on first use, because that takes seconds.
"""

from __future__ import annotations

import atexit
import dataclasses
import importlib.metadata
import json
import logging
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import yaml

import data_ingest
import screformer
from jobs.outbox import Entry, outbox
from screformer.config import ExperimentConfig, TrackingConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

CANDIDATE, CHAMPION = "candidate", "champion"
"""Aliases of the newest registered version, and of the one in use, which is moved by hand or by `jobs.promote` only."""

_PATIENCE_S = 2.0
"""For one quick question to the server before anything is sent to it in a running job."""
_WEIGHTS = "weights.safetensors"
_MODEL_FOLDER = "model"
_PACKAGES = ("torch", "deepspeed", "ray", "tiledbsoma", "cellxgene-census", "mlflow", "numpy", "scipy", "pandas", "pyarrow", "safetensors")
_LOADING_PACKAGES = ("mlflow", "torch", "numpy", "scipy", "pandas", "safetensors", "pyyaml", "anndata", "h5py")
_DESCRIPTION_CHARACTERS = 5000  # the most that MLflow's database keeps


def code_identity() -> dict[str, Any]:
    """Which code runs, with what, on which machine: version, git revision, package versions and host facts, as plain values."""
    root = Path(screformer.__file__).resolve().parents[1]
    gpus: list[str] = []
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "screformer": _version("screformer"),
        "git": _git_revision(root),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "host": {
            "platform": platform.platform(),
            "cpus": os.cpu_count(),
            "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            "gpus": gpus,
        },
    }


def start_run(config: ExperimentConfig, job: str, *, parent: TrackedRun | None = None) -> TrackedRun:
    """Start the run of a job and log its configuration.

    Args:
        config: The job's settings; `config.tracking` says where runs are kept and what they are called.
        job: Name of the command, such as `finetune`; kept as a tag.
        parent: Run that this one belongs to, such as that of a cross-validation.

    Returns:
        The run, to be used in a `with` statement: an exception marks it FAILED with the error, else it ends FINISHED.

    Raises:
        ConnectionError: The tracking server does not answer.
        ValueError: `tracking.uri` names something that MLflow cannot use.
    """
    uri = tracking_uri(config.tracking)
    _probe(uri)
    client = _client(uri)
    experiment = client.get_experiment_by_name(config.tracking.experiment)
    if experiment is None:
        # A server chooses its own artifact store; a SQLite file has none, and MLflow would take the working directory of each process.
        artifacts = _sqlite_path(uri).parent / "mlartifacts" if uri.startswith("sqlite:") else None
        experiment_id = client.create_experiment(config.tracking.experiment, artifact_location=artifacts.as_uri() if artifacts else None)
    else:
        experiment_id = experiment.experiment_id
    tags = {"job": job, "mlflow.source.name": f"jobs.{job}", "mlflow.source.type": "JOB", "mlflow.user": os.environ.get("USER", "unknown")}
    if parent is not None:
        tags["mlflow.parentRunId"] = parent.run_id
    info = client.create_run(experiment_id, tags=tags, run_name=config.tracking.run_name or None).info
    run = TrackedRun(tracking_uri=uri, run_id=info.run_id)
    run.log_config(config)
    logger.info("run %s (%s) in experiment %s of %s", info.run_id, info.run_name, config.tracking.experiment, uri)
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
        """The same run, which loses nothing while its server is away: what cannot be sent waits in `outbox/` of the run folder."""
        if not self.tracking_uri.startswith("http"):
            return self
        folder = run_dir.rstrip("/") if "://" in run_dir else str(Path(run_dir).resolve())
        return dataclasses.replace(self, outbox=f"{folder}/outbox")

    def __enter__(self) -> TrackedRun:
        self._deliver({"kind": "running"})
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.end(error=error)

    def end(self, *, error: BaseException | None = None) -> None:
        """Mark the run FINISHED, or FAILED (KILLED when interrupted) with the error as a tag and its traceback as an artifact."""
        entry: Entry = {"kind": "end", "status": "FINISHED", "time_ms": int(time.time() * 1000)}
        if error is not None:
            self.set_tags({"error": f"{type(error).__name__}: {error}"})
            self._deliver({"kind": "text", "path": "error.txt", "text": "".join(traceback.format_exception(error))})
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

    def log_config(self, config: ExperimentConfig) -> None:
        """Log every setting as a parameter (`model.n_hashes`) and the whole as `config.yaml`, which a job can be started from again."""
        tree = config.to_dict()
        params = {f"{section}.{name}": str(value)[:6000] for section, fields in tree.items() for name, value in fields.items()}
        self._deliver({"kind": "params", "params": params})
        self._deliver({"kind": "text", "path": "config.yaml", "text": yaml.safe_dump(tree, sort_keys=False)})

    def log_identity(self, identity: Mapping[str, Any]) -> None:
        """Log what the run read and which code it ran.

        Args:
            identity: Nested plain values, such as `{"atlas": locator.to_dict(), "query": {"hash": ..., "num_cells": ...}}`. They become
                tags (`atlas.uri`) and, with `code_identity()`, the artifact `identity.json`.
        """
        whole = {**identity, "code": code_identity()}
        tags = {name: value for name, value in _flat(whole).items() if not name.startswith("code.packages.")}
        if re.fullmatch(r"[0-9a-f]{40}.*", whole["code"]["git"]):
            tags["mlflow.source.git.commit"] = whole["code"]["git"][:40]
        self.set_tags(tags)
        self._deliver({"kind": "text", "path": "identity.json", "text": json.dumps(whole, indent=2, default=str)})

    def log_metrics(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Log scalars, such as `{"train/loss": 0.3}`, in one request. Characters that MLflow refuses become `_`."""
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
        found = {name: sorted((point.step, point.value) for point in client.get_metric_history(self.run_id, name)) for name in names}
        return {name: [value for _, value in points] for name, points in found.items() if points}

    def log_curves(self) -> None:
        """Log pictures of all metrics that have more than one step; those that differ only before the `/` share one picture."""
        self.send_kept()  # what other processes of the run could not send belongs into the pictures
        self._deliver({"kind": "curves"})

    def log_file(self, path: str | Path, *, folder: str = "") -> None:
        """Log a file, or a directory with its name, as artifact; a directory called `model` makes `runs:/ID` resolvable."""
        self._deliver({"kind": "file", "folder": folder}, Path(path))

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Set tags; nested mappings are flattened with dots."""
        self._deliver({"kind": "tags", "tags": {name: str(value)[:5000] for name, value in _flat(tags).items()}})

    def register(self, model_dir: str | Path, name: str) -> int | None:
        """Register the run's model as `register_model` does, or keep that for later where the server is away.

        Returns:
            The version number; None where `jobs.sync` has to register it.
        """
        if not self.outbox:
            return register_model(self, model_dir, name)
        versions: list[int] = []

        def send(entry: Entry, content: Path | None) -> None:
            if entry["kind"] == "register":
                versions.append(self._register(entry))
            else:
                self._send(entry, content)

        self.send_kept()
        outbox(self.outbox).deliver({"kind": "register", "model_dir": str(Path(model_dir).resolve()), "name": name}, send)
        if versions:
            return versions[0]
        logger.warning(
            "the model is kept in %s; when %s is back, `%s` registers it as %s", model_dir, self.tracking_uri, self._sync_command, name
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
            _probe(self.tracking_uri, timeout_s=_PATIENCE_S)
            self._apply(entry, content)
        except Exception as error:
            if _is_away(error):
                raise ConnectionError(f"the tracking server {self.tracking_uri} is away") from error
            raise

    def _apply(self, entry: Entry, content: Path | None) -> None:
        """Do one entry. Twice is as good as once, because nobody knows whether a server that went away had done it."""
        client, kind = self._client, entry["kind"]
        from mlflow.entities import Metric, Param

        if kind == "metrics":
            batch = [Metric(name, value, entry["time_ms"], entry["step"]) for name, value in entry["metrics"].items()]
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
                client.log_artifacts(self.run_id, str(content), "/".join(part for part in (entry["folder"], content.name) if part))
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
            if entry["status"] == "FINISHED" and "error" in client.get_run(self.run_id).data.tags:  # of an attempt that was resumed
                client.delete_tag(self.run_id, "error")
            client.set_terminated(self.run_id, entry["status"], entry["time_ms"])

    @property
    def _sync_command(self) -> str:
        return f"python -m jobs.sync --run-dir {self.outbox.removesuffix('/outbox')}"

    def _log_curves(self) -> None:
        client = self._client
        groups: dict[str, dict[str, list[tuple[int, float]]]] = {}
        for key in client.get_run(self.run_id).data.metrics:
            points = sorted((point.step, point.value) for point in client.get_metric_history(self.run_id, key))
            if len(points) > 1:
                groups.setdefault(key.rpartition("/")[2], {})[key] = points
        for name, curves in groups.items():
            client.log_figure(self.run_id, curve_figure(name, curves), f"curves/{re.sub(r'[^A-Za-z0-9_.-]', '_', name)}.png")

    def _register(self, entry: Entry) -> int:
        return register_model(self, entry["model_dir"], entry["name"])

    @property
    def _client(self) -> Any:
        if self.tracking_uri.startswith("sqlite:") and not _sqlite_path(self.tracking_uri).is_file():
            raise ValueError(
                f"run {self.run_id} is kept in {self.tracking_uri}, a file that this machine ({platform.node()}) does not have;"
                " for a job on several nodes set tracking.uri to an MLflow server (http://HOST:PORT)"
            )
        return _client(self.tracking_uri)


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
        return sorted((point.step, point.value) for point in _client(self.store).get_metric_history(self.run_id, key))

    def file(self, path: str) -> Path:
        """A file of the run on this machine; a downloaded one lasts until this process ends."""
        return Path(_client(self.store).download_artifacts(self.run_id, path, _scratch_folder()))


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
    _probe(store)
    client = _client(store)
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
            elif entry.path != _MODEL_FOLDER:
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


def register_model(run: TrackedRun, model_dir: str | Path, name: str, *, alias: str = CANDIDATE) -> int:
    """Register a fine-tuned model directory as the next version of a model, and give it an alias.

    The version is an MLflow `pyfunc` from code: the file `jobs/registry.py`, copies of the `screformer` package and of the reader of .h5ad
    files, the model directory itself and a model card, which is also the version's description. It loads in a process that has neither
    this repository nor Ray, and holds no pickle.

    Args:
        run: The run that made the model.
        model_dir: Directory written by `screformer.checkpoint.save_model`, with labels.
        name: Registered model, created where it does not exist.
        alias: Moved to the new version; empty moves none.

    Returns:
        The version number.

    Raises:
        ValueError: The directory is not a model, or has no classification head.
    """
    client = _client(run.tracking_uri)
    from mlflow.entities import LoggedModelOutput
    from mlflow.exceptions import MlflowException
    from mlflow.models import Model
    from mlflow.pyfunc import save_model

    from jobs import registry
    from jobs.model_card import model_card

    model_dir = _model_directory(Path(model_dir), str(model_dir))
    signature, example = registry.signature_and_example(model_dir)
    card = model_card(model_dir, name=name, run_id=run.run_id)
    experiment_id = client.get_run(run.run_id).info.experiment_id
    logged = client.create_logged_model(experiment_id, name=_MODEL_FOLDER, source_run_id=run.run_id, model_type="cell-type-classifier")
    with tempfile.TemporaryDirectory() as scratch:
        # The folder of an artifact is named after its source; a fixed name keeps versions alike wherever they were trained.
        source = Path(scratch) / "source" / _MODEL_FOLDER
        shutil.copytree(model_dir, source)
        package = Path(scratch) / "source" / "screformer"
        shutil.copytree(Path(screformer.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
        reader = Path(scratch) / "source" / "data_ingest"
        reader.mkdir()
        for module in ("__init__.py", "h5ad.py"):
            shutil.copyfile(Path(data_ingest.__file__).parent / module, reader / module)
        target = Path(scratch) / "pyfunc"
        save_model(
            str(target),
            python_model=registry.__file__,
            artifacts={_MODEL_FOLDER: str(source)},
            code_paths=[str(package), str(reader)],
            pip_requirements=[f"{package_name}=={_version(package_name).partition('+')[0]}" for package_name in _LOADING_PACKAGES],
            signature=signature,
            input_example=example,
            mlflow_model=Model(run_id=run.run_id, model_id=logged.model_id),
        )
        (target / "MODEL_CARD.md").write_text(card)
        client.log_model_artifacts(logged.model_id, str(target))
    client.finalize_logged_model(logged.model_id, "READY")
    client.log_outputs(run.run_id, [LoggedModelOutput(logged.model_id, step=0)])
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    # A database store looks `models:/` sources up in the global tracking URI, which may be another one; a server takes nothing else.
    source_uri = f"models:/{logged.model_id}" if run.tracking_uri.startswith("http") else logged.artifact_location
    short = card
    if len(card) > _DESCRIPTION_CHARACTERS:
        short = f"{card[: _DESCRIPTION_CHARACTERS - 60]}\n\n... more in MODEL_CARD.md\n"
    version = client.create_model_version(name, source_uri, run.run_id, model_id=logged.model_id, description=short)
    if alias:
        client.set_registered_model_alias(name, alias, version.version)
    logger.info("registered %s version %s%s", name, version.version, f" as {alias}" if alias else "")
    return int(version.version)


def model_aliases(name: str, tracking: TrackingConfig | None = None) -> dict[str, int]:
    """The aliases of a registered model and the versions they name.

    Raises:
        ValueError: There is no such model.
    """
    store = tracking_uri(tracking or TrackingConfig())
    _probe(store)
    client = _client(store)
    from mlflow.exceptions import MlflowException

    try:
        aliases = client.get_registered_model(name).aliases
    except MlflowException as error:
        raise ValueError(f"no registered model {name!r} in {store}: {error.message}") from error
    return {alias: int(version) for alias, version in aliases.items()}


def move_alias(name: str, alias: str, version: int, *, reason: Mapping[str, Any], tracking: TrackingConfig | None = None) -> None:
    """Let an alias name another version, which keeps the reason as tag `promotion.ALIAS`."""
    client = _client(tracking_uri(tracking or TrackingConfig()))
    client.set_model_version_tag(name, str(version), f"promotion.{alias}", json.dumps(dict(reason), default=str)[:5000])
    client.set_registered_model_alias(name, alias, str(version))


def pinned_model(uri: str, tracking: TrackingConfig | None = None) -> str:
    """The model URI with its alias replaced by the version number that it names now; any other URI or path as it is.

    Raises:
        ValueError: There is no such model, alias or version; the message lists what there is.
    """
    if not uri.startswith("models:/"):
        return uri
    store = tracking_uri(tracking or TrackingConfig())
    _probe(store)
    name, version = _registered(uri, store)
    return f"models:/{name}/{version.version}"


def resolve_model(uri: str, tracking: TrackingConfig | None = None) -> Path:
    """Find a model directory on this machine, downloading it where needed.

    Args:
        uri: `models:/NAME@ALIAS`, `models:/NAME/VERSION`, `runs:/RUN_ID` (the model that the run logged), a bare run id, or a
            directory: that of a model, or of a checkpoint that holds one.
        tracking: Where models are kept; the default is that of the configuration.

    Returns:
        Directory with weights, configuration, vocabulary and labels. A downloaded one lasts until this process ends.

    Raises:
        ValueError: Nothing of that name, or it holds no model.
        ConnectionError: The tracking server does not answer.
    """
    is_run = uri.startswith("runs:/") or re.fullmatch(r"[0-9a-f]{32}", uri)
    if not uri.startswith("models:/") and not is_run:
        return _model_directory(Path(uri.removeprefix("file://")), uri)
    store = tracking_uri(tracking or TrackingConfig())
    _probe(store)
    location = _run_model(uri.removeprefix("runs:/"), store) if is_run else _version_location(uri, store)
    from mlflow.artifacts import download_artifacts

    target: str | None = None
    if not location.startswith(("/", "file:")):  # files are read where they lie
        target = _scratch_folder()
    return _model_directory(Path(download_artifacts(artifact_uri=location, dst_path=target, tracking_uri=store)), uri)


def run_file(run_id: str, name: str, tracking: TrackingConfig) -> Path:
    """Fetch an artifact of a run; a downloaded one lasts until this process ends.

    Raises:
        ValueError: No such run or artifact.
        ConnectionError: The tracking server does not answer.
    """
    store = tracking_uri(tracking)
    _probe(store)
    _client(store)
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    target = tempfile.mkdtemp(prefix="screformer-artifact-")
    atexit.register(shutil.rmtree, target, ignore_errors=True)
    try:
        return Path(download_artifacts(run_id=run_id, artifact_path=name, dst_path=target, tracking_uri=store))
    except (MlflowException, OSError) as error:
        raise ValueError(f"run {run_id!r} in {store} has no artifact {name}: {error}") from error


def tracking_uri(tracking: TrackingConfig) -> str:
    """The tracking store: `tracking.uri`, else MLFLOW_TRACKING_URI, else the SQLite file `mlflow.db` in the working directory.

    Raises:
        ValueError: A folder or another thing that MLflow 3 has no store for.
    """
    uri = tracking.uri or os.environ.get("MLFLOW_TRACKING_URI", "") or "sqlite:///mlflow.db"
    if uri.endswith(".db") and "://" not in uri:
        uri = f"sqlite:///{uri}"
    if uri.startswith("sqlite:"):
        return f"sqlite:///{_sqlite_path(uri)}"
    if not uri.startswith(("http://", "https://", "postgresql", "mysql", "mssql", "databricks")):
        raise ValueError(
            f"tracking.uri={uri!r} is no tracking store; give http://HOST:PORT of an MLflow server, or sqlite:///PATH/mlflow.db"
            " (MLflow 3 keeps no runs in plain folders)"
        )
    return uri


def _scratch_folder() -> str:
    folder = tempfile.mkdtemp(prefix="screformer-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _sqlite_path(uri: str) -> Path:
    return Path(uri.removeprefix("sqlite:///")).resolve()


def _probe(uri: str, *, timeout_s: float = 10) -> None:
    """One quick request, because MLflow retries for minutes before it says that nobody is there."""
    if not uri.startswith(("http://", "https://")):
        return
    try:
        urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=timeout_s).close()
    except urllib.error.HTTPError as error:
        # Something answers; a proxy may hide /health, or stand before a server that is away.
        if error.code in (502, 503, 504):
            raise ConnectionError(f"tracking.uri={uri} does not answer: {error}") from error
    except OSError as error:
        raise ConnectionError(
            f"tracking.uri={uri} does not answer ({error}); start `mlflow server` there, correct tracking.uri or MLFLOW_TRACKING_URI,"
            " or leave both empty to keep runs in ./mlflow.db"
        ) from error


def _is_away(error: BaseException) -> bool:
    """Whether an error of MLflow's client comes from a server that is not there or not well, rather than from what it was asked."""
    from mlflow.exceptions import RestException
    from requests.exceptions import HTTPError, RequestException

    if isinstance(error, RestException):
        return error.get_http_status_code() >= 500 or error.get_http_status_code() == 429
    if isinstance(error, HTTPError) and error.response is not None:
        return error.response.status_code >= 500 or error.response.status_code == 429
    if isinstance(error, RequestException | ConnectionError):
        return True
    inner = error.__cause__ or error.__context__
    return inner is not None and _is_away(inner)


@lru_cache(maxsize=4)
def _client(uri: str) -> Any:
    # Read when mlflow is imported, so every import of mlflow here comes after a call of this function: without it the import starts a
    # thread that reports usage over the network.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    # MLflow would try seven times for minutes, while a step waits; what fails is kept in the outbox and tried again from there.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    for chatty in ("mlflow.store.db.utils", "mlflow.pyfunc"):  # its new tables, its check of the input example
        logging.getLogger(chatty).setLevel(logging.WARNING)
    if uri.startswith("sqlite:") and not _sqlite_path(uri).parent.is_dir():
        raise ValueError(
            f"tracking.uri={uri} lies in a folder that does not exist; create it, or give http://HOST:PORT of an MLflow server"
        )
    try:
        return MlflowClient(uri, registry_uri=uri)
    except MlflowException as error:
        raise ValueError(f"tracking.uri={uri!r} cannot be opened by MLflow {_version('mlflow')}: {error.message}") from error


def _registered(uri: str, store: str) -> tuple[str, Any]:
    """Name and version entity of a `models:/` URI."""
    client = _client(store)
    from mlflow.exceptions import MlflowException

    found = re.fullmatch(r"models:/(?P<name>[^@/]+)(?:@(?P<alias>[^@/]+)|/(?P<version>\d+))", uri)
    if found is None:
        raise ValueError(f"model {uri!r} must read models:/NAME@ALIAS or models:/NAME/VERSION")
    name = found["name"]
    try:
        if found["alias"]:
            return name, client.get_model_version_by_alias(name, found["alias"])
        return name, client.get_model_version(name, found["version"])
    except MlflowException as error:
        models = {model.name: model for model in client.search_registered_models()}
        if name not in models:
            known = f"there are {', '.join(sorted(models))}" if models else "nothing is registered there yet"
            raise ValueError(f"model {uri!r}: no registered model {name!r} in {store}; {known}") from error
        versions = sorted(int(version.version) for version in client.search_model_versions(f"name='{name}'"))
        aliases = ", ".join(f"{alias} -> {version}" for alias, version in sorted(client.get_registered_model(name).aliases.items()))
        raise ValueError(
            f"model {uri!r} is not in {store}; {name} has versions {', '.join(map(str, versions)) or 'none'}"
            f" and aliases {aliases or 'none'}"
        ) from error


def _version_location(uri: str, store: str) -> str:
    name, version = _registered(uri, store)
    return str(_client(store).get_model_version_download_uri(name, version.version))


def _run_model(run_id: str, store: str) -> str:
    """Where the artifacts of a run's model lie: the registered one, else the directory `model` among the run's artifacts."""
    client = _client(store)
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        raise ValueError(f"run {run_id!r} is not in {store}: {error.message}") from error
    models = run.outputs.model_outputs if run.outputs else []
    if models:
        return str(client.get_logged_model(models[-1].model_id).artifact_location)
    if not any(entry.path == _MODEL_FOLDER for entry in client.list_artifacts(run_id)):
        raise ValueError(f"run {run_id} ({run.info.status}) logged no model; give a run of pretrain or finetune that ended well")
    return f"{run.info.artifact_uri.rstrip('/')}/{_MODEL_FOLDER}"


def _model_directory(directory: Path, uri: str) -> Path:
    for candidate in (directory, directory / _MODEL_FOLDER, directory / "artifacts" / _MODEL_FOLDER):
        if (candidate / _WEIGHTS).is_file():
            return candidate
    what = "holds no" if directory.is_dir() else "is no directory with"
    raise ValueError(f"model {uri!r} {what} {_WEIGHTS}; give models:/NAME@ALIAS, models:/NAME/VERSION, runs:/RUN_ID or a model directory")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _git_revision(root: Path) -> str:
    """Commit of the source tree, with `+changes` when files differ from it."""
    try:
        ask = [["git", "-C", str(root), *words] for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])]
        revision, status = (subprocess.run(words, capture_output=True, text=True, check=True, timeout=20).stdout.strip() for words in ask)
    except (OSError, subprocess.SubprocessError):
        return "not a git checkout"
    return revision + ("+changes" if status else "")


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def confusion_figure(counts_kk: np.ndarray, names: Sequence[str]) -> Figure:
    """Cells by true (row) and predicted (column) label, rows normalised to 1; `counts_kk` is (k, k), `names` the k labels."""
    from matplotlib.figure import Figure

    rows = counts_kk.sum(axis=1, keepdims=True)
    share = np.divide(counts_kk, rows, out=np.zeros(counts_kk.shape), where=rows > 0)
    size = max(4.0, 1.8 + 0.45 * len(names))
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(names)), [str(name) for name in names], rotation=60, ha="right")
    axes.set_yticks(range(len(names)), [f"{name} ({int(count)})" for name, count in zip(names, rows[:, 0], strict=True)])
    axes.set_xlabel("predicted")
    axes.set_ylabel("true (cells)")
    if len(names) <= 25:
        for row, column in np.argwhere(counts_kk > 0):
            value = share[row, column]
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color="white" if value > 0.6 else "black")
    figure.colorbar(image, ax=axes, label="share of the true label's cells", shrink=0.8)
    return figure


def curve_figure(name: str, curves: Mapping[str, list[tuple[int, float]]]) -> Figure:
    """Metrics of one `name` over optimizer steps; `curves` maps each to its (step, value) points."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for key, points in sorted(curves.items()):
        finite = [(step, value) for step, value in points if math.isfinite(value)]
        axes.plot([step for step, _ in finite], [value for _, value in finite], label=key, marker="." if len(finite) < 30 else None)
    axes.set_xlabel("optimizer step")
    axes.locator_params(axis="x", integer=True)
    axes.set_ylabel(name)
    axes.legend()
    axes.grid(alpha=0.3)
    return figure
