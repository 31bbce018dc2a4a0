"""Create a run on the server: at once, or once it is back.

Until then a name stands in for MLflow's identifier; the run carries it as a tag, by which it is found.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

from jobs.tracking.client import mlflow_client, mlflow_package, sqlite_path

_STAND_IN, _TAG = "later-", "screformer.stand_in"
_found: dict[tuple[str, str], str] = {}


def stand_in() -> str:
    """A name for a run that the server does not know yet."""
    return _STAND_IN + uuid.uuid4().hex


def is_stand_in(run_id: str) -> bool:
    """Whether a run's identifier is such a name."""
    return run_id.startswith(_STAND_IN)


def create_run(uri: str, entry: Mapping[str, Any], run_id: str = "") -> str:
    """Create a run, unless it exists under its stand-in.

    Args:
        uri: The tracking store.
        entry: `experiment`, `name`, `tags` and `time_ms`, when it began.
        run_id: Its stand-in; empty for none.

    Returns:
        MLflow's identifier.
    """
    known = _by_stand_in(uri, run_id) if run_id else ""
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
    """MLflow's identifier of a run.

    Raises:
        ConnectionError: The run is not on the server yet.
    """
    if not is_stand_in(run_id):
        return run_id
    found = _by_stand_in(uri, run_id)
    if not found:
        raise ConnectionError(f"{uri} does not have the run {run_id} yet")
    return found


def _by_stand_in(uri: str, run_id: str) -> str:
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
