"""MLflow runs: start a run and log to it.

`TrackedRun` is a plain picklable handle, so rank 0 of a Ray worker group can log to the run that the driver
started. This module does not touch MLflow's global state (active run, tracking URI). It does not depend on
what is logged either: names of artifacts and figures are in `jobs.reports.artifacts`.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.tracking.beginning import create_run, is_placeholder, placeholder, real_id
from jobs.tracking.client import (
    PATIENCE_S,
    answering,
    metric_points,
    mlflow_client,
    probe,
    require_here,
    tracking_uri,
)
from jobs.tracking.entries import Entry, send_entry
from jobs.tracking.identity import code_identity
from jobs.tracking.naming import cells_of, dataset, flat, run_name
from jobs.tracking.outbox import outbox
from screformer.files import csv_text
from screformer.storage import absolute

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from screformer.config import ExperimentConfig

logger = logging.getLogger(__name__)

CONFIG, IDENTITY = "config.yaml", "identity.json"
"""Artifacts of every run: settings to start it again with, and the data and code it used."""


def start_run(
    config: ExperimentConfig,
    job: str,
    *,
    parent: TrackedRun | None = None,
    what: str = "",
    kept_in: Path | None = None,
) -> TrackedRun:
    """Start the run of a job and log its configuration.

    Args:
        config: The job's settings; `config.tracking` sets the store, experiment and name of the run.
        job: Name of the command, for example `finetune`; stored as a tag.
        parent: Parent run, for example of a cross-validation.
        what: The job's input, for the run's name; by default, the atlas and the query.
        kept_in: Parent folder for the run's outbox. With it, the run can start while the server is down. None
            needs the server now.

    Returns:
        The run, for use in a `with` statement. An exception marks it FAILED and logs the error; otherwise it
        ends FINISHED.

    Raises:
        ConnectionError: The tracking server does not answer, and `kept_in` is None.
        ValueError: MLflow cannot use `tracking.uri`.
    """
    uri = tracking_uri(config.tracking)
    tags = {
        "job": job,
        "mlflow.source.name": f"jobs.{job}",
        "mlflow.source.type": "JOB",
        "mlflow.user": os.environ.get("USER", "unknown"),
    }
    if parent is not None:
        tags["mlflow.parentRunId"] = parent.run_id
    what = what or cells_of(config)
    tags["mlflow.note.content"] = f"`screformer {job}`" + (f" on {what}" if what else "")
    name = config.tracking.run_name or run_name(job, what)
    beginning: Entry = {"kind": "create", "name": name, "experiment": config.tracking.experiment}
    beginning |= {"tags": tags, "time_ms": int(time.time() * 1000)}
    try:
        with answering(uri):
            probe(uri)
            run = TrackedRun(tracking_uri=uri, run_id=create_run(uri, beginning))
    except ConnectionError:
        if kept_in is None:
            raise
        run = TrackedRun(tracking_uri=uri, run_id=placeholder())
    if kept_in is not None:
        run = run.kept_in(str(kept_in / run.run_id))
    if is_placeholder(run.run_id):
        run._deliver(beginning)
    run.log_config(config.to_dict(job))
    logger.info("run %s (%s) in experiment %s of %s", run.run_id, name, config.tracking.experiment, uri)
    return run


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """A run of one job. Picklable; any process that has it may log."""

    tracking_uri: str
    """Absolute, so it is valid in every process of this machine; other nodes need a server."""
    run_id: str
    """MLflow's run id, or a placeholder while the run is not on the server."""

    outbox: str = ""
    """Folder or URI that keeps entries while the server is down; if empty, logging raises instead."""

    def kept_in(self, run_dir: str) -> TrackedRun:
        """The same run with an outbox: entries that cannot be sent wait in `outbox/` of the run folder."""
        if not self.tracking_uri.startswith("http"):
            return self
        return dataclasses.replace(self, outbox=f"{absolute(run_dir)}/outbox")

    def __enter__(self) -> TrackedRun:
        self._deliver({"kind": "running"})
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            self.end(error=error)
        except Exception as second:  # noqa: BLE001 - it must not hide the error that ended the run
            if error is None:
                raise
            logger.warning("run %s could not be marked as failed: %s", self.run_id, second)

    def end(self, *, error: BaseException | None = None) -> None:
        """Mark the run FINISHED, or with an error FAILED (KILLED if interrupted).

        The error is logged as a tag, its traceback as an artifact.
        """
        entry: Entry = {"kind": "end", "status": "FINISHED", "time_ms": int(time.time() * 1000)}
        if error is not None:
            self.set_tags({"error": f"{type(error).__name__}: {error}"})
            self._log_text("error.txt", "".join(traceback.format_exception(error)))
            entry["status"] = "KILLED" if isinstance(error, KeyboardInterrupt | SystemExit) else "FAILED"
        self.send_kept()
        self._deliver(entry)
        left = len(outbox(self.outbox).names()) if self.outbox else 0
        if left:
            logger.warning(
                "%d entries of run %s did not reach %s and are kept in %s; `%s` sends them once it is back",
                left,
                self.run_id,
                self.tracking_uri,
                self.outbox,
                self._sync_command,
            )

    def send_kept(self) -> tuple[int, int]:
        """Send the entries in the outbox; returns the numbers of entries sent and left."""
        self.settle()
        return outbox(self.outbox).flush(self._send) if self.outbox else (0, 0)

    def settle(self) -> None:
        """Wait until all metrics logged by this process are sent or kept; call before the process ends."""
        if self.outbox:
            outbox(self.outbox).settle()

    def log_config(self, tree: Mapping[str, Any]) -> None:
        """Log every setting as a parameter (`model.n_hashes`) and all of them as `config.yaml`.

        A job can be started again from `config.yaml`.

        Args:
            tree: The settings that the job uses, as nested plain values.
        """
        import yaml

        params = {
            f"{section}.{name}": str(value)[:6000]
            for section, fields in tree.items()
            for name, value in fields.items()
        }
        self._deliver({"kind": "params", "params": params})
        self._log_text(CONFIG, yaml.safe_dump(tree, sort_keys=False))

    def log_identity(self, identity: Mapping[str, Any]) -> None:
        """Log the data and code that the run used.

        Args:
            identity: Nested plain values, for example `{"atlas": atlas.to_dict(), "query": {"hash": ...,
                "num_cells": ...}}`. They are logged as tags (`atlas.uri`) and, with `code_identity()`, as the
                artifact `identity.json`.
        """
        whole = {**identity, "code": code_identity()}
        tags = {name: value for name, value in flat(whole).items() if not name.startswith("code.packages.")}
        if re.fullmatch(r"[0-9a-f]{40}.*", whole["code"]["git"]):
            tags["mlflow.source.git.commit"] = whole["code"]["git"][:40]
        self.set_tags(tags)
        query = identity.get("query")
        if isinstance(query, Mapping) and "hash" in query:
            self._deliver({"kind": "dataset", **dataset(query)})
        self._log_text(IDENTITY, json.dumps(whole, indent=2, default=str))

    def log_metrics(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Log scalars like `{"train/loss": 0.3}`; with an outbox, a thread sends them.

        Characters that MLflow rejects become `_`.
        """
        named = {re.sub(r"[^\w\-. :/]", "_", name): float(value) for name, value in metrics.items()}
        entry = {"kind": "metrics", "metrics": named, "step": step, "time_ms": int(time.time() * 1000)}
        if self.outbox:
            outbox(self.outbox).post(entry, self._send)
        else:
            self._deliver(entry)

    def log_table(self, table: pd.DataFrame, path: str) -> None:
        """Log a table without its index as CSV under `path`, for example `test/per_class.csv`."""
        self._log_text(path, csv_text(table))

    def log_figure(self, draw: Callable[[], Figure], path: str, *, dpi: int = 120) -> None:
        """Log a figure under `path`, for example `test/confusion.png`.

        If a figure cannot be drawn, it is skipped with a warning; it never ends a run.
        """
        folder, _, name = path.rpartition("/")
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / name
            try:
                draw().savefig(file, dpi=dpi)
            except Exception as error:  # noqa: BLE001 - a name or number in it may raise anything
                logger.warning("figure %s could not be drawn and is skipped: %s", path, str(error).strip())
                return
            self.log_file(file, folder=folder)

    def histories(self, names: Sequence[str] | None = None) -> dict[str, list[tuple[int, float]]]:
        """(step, value) points of some or all metrics; ConnectionError if the server does not answer."""
        require_here(self.tracking_uri)
        with answering(self.tracking_uri):
            run_id = real_id(self.tracking_uri, self.run_id)
            logged = mlflow_client(self.tracking_uri).get_run(run_id).data.metrics
            wanted = logged if names is None else [name for name in names if name in logged]
            return {name: metric_points(self.tracking_uri, run_id, name) for name in wanted}

    def log_file(self, path: str | Path, *, folder: str = "") -> None:
        """Log a file, or a directory under its name, as an artifact.

        A directory called `model` is what `runs:/ID` resolves to.
        """
        self._deliver({"kind": "file", "folder": folder}, Path(path))

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Set tags; nested mappings are flattened with dots."""
        values = {name: str(value)[:5000] for name, value in flat(tags).items()}
        self._deliver({"kind": "tags", "tags": values})

    def register(self, model_dir: str | Path, name: str) -> int | None:
        """Register the run's model with `register_model`, or later if the server is down.

        Returns:
            The version number, or None if `jobs.sync` has to register the model later.
        """
        if self.outbox:
            self.send_kept()
        version: int | None = self._deliver(
            {"kind": "register", "model_dir": str(Path(model_dir).resolve()), "name": name}
        )
        if version is None:
            logger.warning(
                "the model is kept in %s; once %s is back, `%s` registers it as %s",
                model_dir,
                self.tracking_uri,
                self._sync_command,
                name,
            )
        return version

    def _log_text(self, path: str, text: str) -> None:
        self._deliver({"kind": "text", "path": path, "text": text})

    def _deliver(self, entry: Entry, content: Path | None = None) -> Any:
        if self.outbox:
            self.settle()
            return outbox(self.outbox).deliver(entry, self._send, content)
        require_here(self.tracking_uri)
        with answering(self.tracking_uri):
            return send_entry(self.tracking_uri, self.run_id, entry, content)

    def _send(self, entry: Entry, content: Path | None) -> Any:
        """Send one entry; raises `ConnectionError` quickly if the server is down."""
        with answering(self.tracking_uri):
            probe(self.tracking_uri, timeout_s=PATIENCE_S)
            return send_entry(self.tracking_uri, self.run_id, entry, content)

    @property
    def _sync_command(self) -> str:
        return f"python -m jobs.sync --run-dir {self.outbox.removesuffix('/outbox')}"
