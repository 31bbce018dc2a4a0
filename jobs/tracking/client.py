"""Find and reach the MLflow tracking store."""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import tempfile
import urllib.error
import urllib.request
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from screformer.config import TrackingConfig

if TYPE_CHECKING:
    pass
from jobs.tracking.identity import package_version

PATIENCE_S = 2.0
"""For one quick question to the server before anything is sent to it in a running job."""


def tracking_uri(tracking: TrackingConfig) -> str:
    """The tracking store: `tracking.uri`, else MLFLOW_TRACKING_URI.

    Else the SQLite file `mlflow.db` in the working directory.

    Raises:
        ValueError: A folder or another thing that MLflow 3 has no store for.
    """
    uri = tracking.uri or os.environ.get("MLFLOW_TRACKING_URI", "") or "sqlite:///mlflow.db"
    if uri.endswith(".db") and "://" not in uri:
        uri = f"sqlite:///{uri}"
    if uri.startswith("sqlite:"):
        return f"sqlite:///{sqlite_path(uri)}"
    if not uri.startswith(("http://", "https://", "postgresql", "mysql", "mssql", "databricks")):
        raise ValueError(
            f"tracking.uri={uri!r} is no tracking store; give http://HOST:PORT of an MLflow server, or"
            f" sqlite:///PATH/mlflow.db"
            " (MLflow 3 keeps no runs in plain folders)"
        )
    return uri


def scratch_folder() -> str:
    """A folder that lasts until this process ends."""
    folder = tempfile.mkdtemp(prefix="screformer-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def sqlite_path(uri: str) -> Path:
    """The file of a SQLite store."""
    return Path(uri.removeprefix("sqlite:///")).resolve()


def probe(uri: str, *, timeout_s: float = 10) -> None:
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
            f"tracking.uri={uri} does not answer ({error}); start `mlflow server` there, correct tracking.uri"
            f" or MLFLOW_TRACKING_URI,"
            " or leave both empty to keep runs in ./mlflow.db"
        ) from error


def is_away(error: BaseException) -> bool:
    """Whether an error of MLflow's client comes from a server that is not there or not well.

    Rather than from what it was asked.
    """
    from mlflow.exceptions import RestException
    from requests.exceptions import HTTPError, RequestException

    if isinstance(error, RestException):
        return error.get_http_status_code() >= 500 or error.get_http_status_code() == 429
    if isinstance(error, HTTPError) and error.response is not None:
        return error.response.status_code >= 500 or error.response.status_code == 429
    if isinstance(error, RequestException | ConnectionError):
        return True
    inner = error.__cause__ or error.__context__
    return inner is not None and is_away(inner)


@lru_cache(maxsize=4)
def mlflow_client(uri: str) -> Any:
    """MLflow's client of a store; the only place that imports MLflow first."""
    # Read when mlflow is imported, so every import of mlflow here comes after a call of this function:
    # without it the import starts a thread that reports usage over the network.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    # MLflow would try seven times for minutes, while a step waits; what fails is kept in the outbox and tried
    # again from there.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    for chatty in (
        "mlflow.store.db.utils",
        "mlflow.pyfunc",
    ):  # its new tables, its check of the input example
        logging.getLogger(chatty).setLevel(logging.WARNING)
    if uri.startswith("sqlite:") and not sqlite_path(uri).parent.is_dir():
        raise ValueError(
            f"tracking.uri={uri} lies in a folder that does not exist; create it, or give http://HOST:PORT of"
            f" an MLflow server"
        )
    try:
        return MlflowClient(uri, registry_uri=uri)
    except MlflowException as error:
        raise ValueError(
            f"tracking.uri={uri!r} cannot be opened by MLflow {package_version('mlflow')}: {error.message}"
        ) from error
