"""The entries that a run logs, and one small sending function per kind.

Sending an entry twice is harmless: after a lost connection, nobody knows whether the server stored it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jobs.tracking.beginning import create_run, real_id
from jobs.tracking.client import mlflow_client, mlflow_package
from jobs.tracking.models import register_model

Entry = dict[str, Any]
"""Plain JSON values, including `kind`."""

_METRICS_AT_ONCE, _PARAMS_AT_ONCE = 1000, 100
"""The store's limits per request."""

_DATASET_NAME = 500
"""MLflow's limit on the length of a dataset name."""


def send_entry(uri: str, run_id: str, entry: Entry, content: Path | None) -> Any:
    """Send an entry to a run.

    Args:
        uri: The tracking store.
        run_id: The run.
        entry: What to send.
        content: The entry's file or folder, if any.

    Returns:
        The version number for the kind `register`, else None.

    Raises:
        ValueError: The entry was written by another version of screformer.
    """
    kind = entry["kind"]
    if kind == "create":
        create_run(uri, entry, run_id)
        return None
    run_id = real_id(uri, run_id)
    if kind == "register":
        for version in mlflow_client(uri).search_model_versions(f"run_id='{run_id}'"):
            if version.name == entry["name"]:  # sent by a process that was killed afterwards
                return int(version.version)
        return register_model(uri, run_id, entry["model_dir"], entry["name"])
    if kind not in _SENDERS:
        raise ValueError(f"entry kind {kind!r} is from another version of screformer; sync with that version")
    _SENDERS[kind](mlflow_client(uri), run_id, entry, content)
    return None


def _metrics(client: Any, run_id: str, entry: Entry, content: Path | None) -> None:
    metric = mlflow_package().entities.Metric
    points = [
        metric(name, value, entry["time_ms"], entry["step"]) for name, value in entry["metrics"].items()
    ]
    for start in range(0, len(points), _METRICS_AT_ONCE):
        client.log_batch(run_id, metrics=points[start : start + _METRICS_AT_ONCE])


def _params(client: Any, run_id: str, entry: Entry, content: Path | None) -> None:
    param = mlflow_package().entities.Param
    params = [param(name, value) for name, value in entry["params"].items()]
    for start in range(0, len(params), _PARAMS_AT_ONCE):
        client.log_batch(run_id, params=params[start : start + _PARAMS_AT_ONCE])


def _tags(client: Any, run_id: str, entry: Entry, content: Path | None) -> None:
    for name, value in entry["tags"].items():
        client.set_tag(run_id, name, value)


def _text(client: Any, run_id: str, entry: Entry, content: Path | None) -> None:
    client.log_text(run_id, entry["text"], entry["path"])


def _file(client: Any, run_id: str, entry: Entry, content: Path | None) -> None:
    assert content is not None
    if content.is_dir():
        target = "/".join(part for part in (entry["folder"], content.name) if part)
        client.log_artifacts(run_id, str(content), target)
    else:
        client.log_artifact(run_id, str(content), entry["folder"] or None)


def _dataset(client: Any, run_id: str, entry: Entry, content: Path | None) -> None:
    entities = mlflow_package().entities
    dataset = entities.Dataset(
        name=entry["name"][:_DATASET_NAME],
        digest=entry["digest"],
        source_type="screformer",
        source=json.dumps(entry["source"]),
        profile=json.dumps(entry["profile"]),
    )
    tags = [entities.InputTag("mlflow.data.context", "query")]
    client.log_inputs(run_id, [entities.DatasetInput(dataset, tags)])


def _running(client: Any, run_id: str, entry: Entry, content: Path | None) -> None:
    if client.get_run(run_id).info.status != "RUNNING":  # the job was resumed
        client.update_run(run_id, status="RUNNING")


def _end(client: Any, run_id: str, entry: Entry, content: Path | None) -> None:
    clears_error = entry["status"] == "FINISHED" and "error" in client.get_run(run_id).data.tags
    if clears_error:  # set by an earlier attempt
        client.delete_tag(run_id, "error")
    client.set_terminated(run_id, entry["status"], entry["time_ms"])


_SENDERS: Mapping[str, Callable[[Any, str, Entry, Path | None], None]] = {
    "metrics": _metrics,
    "params": _params,
    "tags": _tags,
    "text": _text,
    "file": _file,
    "dataset": _dataset,
    "running": _running,
    "end": _end,
}
