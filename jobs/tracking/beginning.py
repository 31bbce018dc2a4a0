"""Create a run on the server, now or when the server is back.

Until then, a placeholder replaces MLflow's run id. It is stored as a tag of the run, to find the run later.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

from jobs.tracking.client import mlflow_client, mlflow_package, sqlite_path

_PREFIX, _TAG = "later-", "screformer.stand_in"
_found: dict[tuple[str, str], str] = {}


def placeholder() -> str:
    """Create a placeholder id for a run that is not on the server yet."""
    return _PREFIX + uuid.uuid4().hex


def is_placeholder(run_id: str) -> bool:
    """Whether a run id is a placeholder."""
    return run_id.startswith(_PREFIX)


def create_run(uri: str, entry: Mapping[str, Any], run_id: str = "") -> str:
    """Create a run, or find the one created with the same placeholder.

    Args:
        uri: The tracking store.
        entry: `experiment`, `name`, `tags` and `time_ms` (the start time).
        run_id: The run's placeholder, or empty.

    Returns:
        MLflow's run id.
    """
    known = _by_placeholder(uri, run_id) if run_id else ""
    if known:
        return known
    tags = {**entry["tags"], **({_TAG: run_id} if run_id else {})}
    parent = tags.get("mlflow.parentRunId", "")
    if parent:
        tags["mlflow.parentRunId"] = real_id(uri, parent)
    client = mlflow_client(uri)
    info = client.create_run(
        _experiment(uri, entry["experiment"]), entry["time_ms"], tags=tags, run_name=entry["name"]
    ).info
    created: str = info.run_id
    return created


def real_id(uri: str, run_id: str) -> str:
    """MLflow's id for a run id or placeholder.

    Raises:
        ConnectionError: The run is not on the server yet.
    """
    if not is_placeholder(run_id):
        return run_id
    found = _by_placeholder(uri, run_id)
    if not found:
        raise ConnectionError(f"{uri} does not have the run {run_id} yet")
    return found


def _by_placeholder(uri: str, run_id: str) -> str:
    if (uri, run_id) not in _found:
        client = mlflow_client(uri)
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        runs = client.search_runs(experiments, f"tags.`{_TAG}` = '{run_id}'", max_results=1)
        if not runs:
            return ""
        _found[uri, run_id] = runs[0].info.run_id
    return _found[uri, run_id]


def _experiment(uri: str, name: str) -> str:
    """The id of an experiment; a missing one is created."""
    client = mlflow_client(uri)
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        # A server has its own artifact store. A SQLite file has none, and MLflow would use the working
        # directory of each process.
        artifacts = sqlite_path(uri).parent / "mlartifacts" if uri.startswith("sqlite:") else None
        try:
            created: str = client.create_experiment(name, artifacts.as_uri() if artifacts else None)
            return created
        except mlflow_package().exceptions.MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            experiment = client.get_experiment_by_name(name)  # another job created it first
    found: str = experiment.experiment_id
    return found
