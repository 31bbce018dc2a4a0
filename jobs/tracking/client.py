"""Find and reach the MLflow tracking store: the only place that imports mlflow."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.tracking.identity import package_version

if TYPE_CHECKING:
    from screformer.config import TrackingConfig

PATIENCE_S = 2.0
"""For one quick question to the server before anything is sent to it in a running job."""

_ENVIRONMENT = {
    # Without it the import starts a thread that reports usage over the network.
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # MLflow would try seven times for minutes; what fails is kept in the outbox and tried again from there.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}
"""Defaults of what MLflow reads from the environment when it is imported."""

_CHATTY = ("mlflow.store.db.utils", "mlflow.pyfunc")
"""Loggers that report each new table, and the check of the input example."""


@cache
def mlflow_package() -> Any:
    """The `mlflow` package, with the submodules used here, in the environment that it reads at import."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import mlflow
    import mlflow.artifacts
    import mlflow.entities
    import mlflow.exceptions
    import mlflow.models
    import mlflow.pyfunc

    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
    return mlflow


@lru_cache(maxsize=4)
def mlflow_client(uri: str) -> Any:
    """MLflow's client of a store.

    Raises:
        ValueError: MLflow cannot open it.
    """
    if uri.startswith("sqlite:") and not sqlite_path(uri).parent.is_dir():
        raise ValueError(
            f"tracking.uri={uri} is in a folder that does not exist; create it, or give http://HOST:PORT of"
            f" an MLflow server"
        )
    mlflow = mlflow_package()
    try:
        return mlflow.MlflowClient(uri, registry_uri=uri)
    except mlflow.exceptions.MlflowException as error:
        raise ValueError(
            f"tracking.uri={uri!r} cannot be opened by MLflow {package_version('mlflow')}: {error.message}"
        ) from error


def tracking_uri(tracking: TrackingConfig) -> str:
    """The tracking store: `tracking.uri`, else MLFLOW_TRACKING_URI, else `./mlflow.db`.

    Raises:
        ValueError: A folder or something else that MLflow 3 has no store for.
    """
    uri = tracking.uri or os.environ.get("MLFLOW_TRACKING_URI", "") or "sqlite:///mlflow.db"
    if uri.endswith(".db") and "://" not in uri:
        uri = f"sqlite:///{uri}"
    if uri.startswith("sqlite:"):
        return f"sqlite:///{sqlite_path(uri)}"
    if not uri.startswith(("http://", "https://", "postgresql", "mysql", "mssql", "databricks")):
        raise ValueError(
            f"tracking.uri={uri!r} is no tracking store; give http://HOST:PORT of an MLflow server, or"
            f" sqlite:///PATH/mlflow.db (MLflow 3 keeps no runs in plain folders)"
        )
    return uri


def sqlite_path(uri: str) -> Path:
    """The file of a SQLite store."""
    return Path(uri.removeprefix("sqlite:///")).resolve()


def scratch_folder() -> str:
    """A folder that lasts until this process ends."""
    folder = tempfile.mkdtemp(prefix="screformer-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def probe(uri: str, *, timeout_s: float = 10) -> None:
    """Ask a server one quick question, because MLflow retries for minutes before it reports an absence.

    Raises:
        ConnectionError: Nobody answers, or somebody else does.
    """
    if not uri.startswith(("http://", "https://")):
        return
    try:
        urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=timeout_s).close()
    except urllib.error.HTTPError as error:
        # Something answers; a proxy may hide /health, or be in front of a server that is away.
        if error.code in (502, 503, 504):
            raise ConnectionError(f"tracking.uri={uri} does not answer: {error}") from error
    except OSError as error:
        raise ConnectionError(
            f"tracking.uri={uri} does not answer ({error}); start `mlflow server` there, correct tracking.uri"
            f" or MLFLOW_TRACKING_URI, or leave both empty to keep runs in ./mlflow.db"
        ) from error


def metric_points(uri: str, run_id: str, key: str) -> list[tuple[int, float]]:
    """(step, value) points of a metric, by step."""
    points = mlflow_client(uri).get_metric_history(run_id, key)
    return sorted((point.step, point.value) for point in points)


@contextlib.contextmanager
def answering(uri: str) -> Iterator[None]:
    """Turn what MLflow raises when the server fails into one clear line.

    Raises:
        ConnectionError: The server is away or not well.
    """
    try:
        yield
    except Exception as error:
        if is_away(error):
            raise ConnectionError(f"tracking.uri={uri} does not answer: {error}") from error
        raise


def is_away(error: BaseException) -> bool:
    """Whether an error of MLflow's client comes from a server that is away or not well.

    And not from what the server was asked.
    """
    from requests.exceptions import HTTPError, RequestException

    if isinstance(error, mlflow_package().exceptions.RestException):
        return error.get_http_status_code() >= 500 or error.get_http_status_code() == 429
    if isinstance(error, HTTPError) and error.response is not None:
        return error.response.status_code >= 500 or error.response.status_code == 429
    if isinstance(error, RequestException | ConnectionError):
        return True
    inner = error.__cause__ or error.__context__
    return inner is not None and is_away(inner)
