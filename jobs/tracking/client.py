"""Access to the MLflow tracking store; other modules get `mlflow` from here."""

from __future__ import annotations

import atexit
import base64
import contextlib
import fcntl
import logging
import os
import platform
import shutil
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.tracking.identity import package_version
from screformer.secrets import without_secret
from screformer.storage import StorageError, writing

if TYPE_CHECKING:
    from screformer.config import TrackingConfig

PATIENCE_S = 2.0
"""Timeout of the health check that precedes each request of a running job."""

_ENVIRONMENT = {
    # By default, importing mlflow starts a thread that reports usage over the network.
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # MLflow's default is seven retries over minutes; here the outbox keeps and retries what failed.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}
"""Defaults for variables that MLflow reads at import."""

_LOGIN = (
    "; a proxy or a login page may be in front of it, or the token may have expired: check the address, and"
    " MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
)

_CHATTY = ("mlflow.store.db.utils", "mlflow.pyfunc")
"""Loggers that report each new database table and the check of the input example."""


@cache
def mlflow_package() -> Any:
    """Import `mlflow` and the submodules used here, with `_ENVIRONMENT` set first."""
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
    """MLflow client of a store; a missing SQLite file is created.

    Args:
        uri: The store, as returned by `tracking_uri`.

    Raises:
        ValueError: MLflow cannot open it.
    """
    mlflow, address = mlflow_package(), store_address(uri)
    with _making(uri):
        try:
            return mlflow.MlflowClient(address, registry_uri=address)
        except mlflow.exceptions.MlflowException as error:
            raise ValueError(
                f"tracking.uri={uri!r} cannot be opened by MLflow {package_version('mlflow')}:"
                f" {error.message}"
            ) from error


@contextlib.contextmanager
def _making(uri: str) -> Iterator[None]:
    """Lock a SQLite store while its tables are created: two processes at once would break it."""
    if not uri.startswith("sqlite:"):
        yield
        return
    folder = sqlite_path(uri).parent
    if not folder.is_dir():
        raise ValueError(
            f"tracking.uri={uri} is in a folder that does not exist; create it, or give http://HOST:PORT of"
            f" an MLflow server"
        )
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def existing_store(tracking: TrackingConfig) -> str:
    """The tracking store to read from; it is not created.

    Raises:
        ValueError: The SQLite file does not exist.
        ConnectionError: The server does not answer.
    """
    uri = tracking_uri(tracking)
    if uri.startswith("sqlite:") and not sqlite_path(uri).is_file():
        raise ValueError(
            f"tracking store {uri} does not exist, so it has no runs or models; set tracking.uri"
            f" (--tracking-uri) or MLFLOW_TRACKING_URI to the store that has them"
        )
    probe(uri)
    return uri


def require_here(uri: str) -> None:
    """Reject a SQLite store that is on another machine.

    Raises:
        ValueError: This machine does not have the file.
    """
    if uri.startswith("sqlite:") and not sqlite_path(uri).is_file():
        raise ValueError(
            f"the run is kept in {uri}, a file that this machine ({platform.node()}) does not have; for a job"
            f" on several nodes set tracking.uri to an MLflow server (http://HOST:PORT)"
        )


def tracking_uri(tracking: TrackingConfig) -> str:
    """The tracking store: `tracking.uri`, else MLFLOW_TRACKING_URI, else `./mlflow.db`.

    The result never contains a password. A server's is moved to MLflow's own variables. A database's is
    masked as `***`; `store_address` fills it in from the environment.

    Raises:
        ValueError: MLflow 3 has no such kind of store, for example a folder.
    """
    uri = tracking.uri or os.environ.get("MLFLOW_TRACKING_URI", "") or "sqlite:///mlflow.db"
    if uri.endswith(".db") and "://" not in uri:
        uri = f"sqlite:///{uri}"
    if uri.startswith("sqlite:"):
        return f"sqlite:///{sqlite_path(uri)}"
    if not uri.startswith(("http://", "https://", "postgresql", "mysql", "mssql", "databricks")):
        raise ValueError(
            f"tracking.uri={without_secret(uri)!r} is not a tracking store; give http://HOST:PORT of an"
            f" MLflow server, or sqlite:///PATH/mlflow.db (MLflow 3 keeps no runs in plain folders)"
        )
    if uri.startswith("http"):
        return _adopt_password(uri)
    return without_secret(uri)


def store_address(uri: str) -> str:
    """The URI of a store with its password, which is read from MLFLOW_TRACKING_URI.

    Raises:
        ValueError: MLFLOW_TRACKING_URI of this process does not have the password.
    """
    given = os.environ.get("MLFLOW_TRACKING_URI", "")
    if uri.startswith("http"):
        if given.startswith("http"):
            _adopt_password(given)
        return uri
    if without_secret(given) == uri:
        return given
    if uri != without_secret(uri) or ":***@" in uri:
        raise ValueError(
            f"the password of {uri} is not saved; set MLFLOW_TRACKING_URI in the environment of every process"
            f" of the job (for Ray jobs: runtime_env env_vars)"
        )
    return uri


def _adopt_password(address: str) -> str:
    """Move user and password from a server's address to the environment variables that MLflow reads."""
    parts = urllib.parse.urlsplit(address)
    user, at, host = parts.netloc.rpartition("@")
    if not at:
        return address
    name, _, password = user.partition(":")
    os.environ.setdefault("MLFLOW_TRACKING_USERNAME", urllib.parse.unquote(name))
    os.environ.setdefault("MLFLOW_TRACKING_PASSWORD", urllib.parse.unquote(password))
    return urllib.parse.urlunsplit(parts._replace(netloc=host))


def sqlite_path(uri: str) -> Path:
    """The file of a SQLite store."""
    return Path(uri.removeprefix("sqlite:///")).resolve()


def scratch_folder() -> str:
    """A temporary folder that is deleted when this process ends."""
    folder = tempfile.mkdtemp(prefix="screformer-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def probe(uri: str, *, timeout_s: float = 10) -> None:
    """Check that a server is up; MLflow itself retries for minutes before it reports a failure.

    Raises:
        ConnectionError: Nothing answers, or something that is not MLflow.
    """
    if not uri.startswith(("http://", "https://")):
        return
    request = urllib.request.Request(f"{uri.rstrip('/')}/health", headers=_credentials())
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            answer = response.read(200)
    except urllib.error.HTTPError as error:
        # Something answers. A proxy may hide /health, or report that the server behind it is down.
        if error.code in (502, 503, 504):
            raise ConnectionError(f"tracking.uri={uri} does not answer: {error}") from error
    except OSError as error:
        raise ConnectionError(
            f"tracking.uri={uri} does not answer ({error}); start `mlflow server` there, correct tracking.uri"
            f" or MLFLOW_TRACKING_URI, or leave both empty to keep runs in ./mlflow.db"
        ) from error
    else:
        if answer.lstrip()[:1] == b"<":
            raise ConnectionError(f"tracking.uri={uri} answers with a web page instead of MLflow{_LOGIN}")


def _credentials() -> dict[str, str]:
    """The authorization header that MLflow's client would send."""
    token = os.environ.get("MLFLOW_TRACKING_TOKEN")
    if token:
        return {"Authorization": f"Bearer {token}"}
    user, password = (os.environ.get(f"MLFLOW_TRACKING_{name}") for name in ("USERNAME", "PASSWORD"))
    if user and password:
        return {"Authorization": f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"}
    return {}


def metric_points(uri: str, run_id: str, key: str) -> list[tuple[int, float]]:
    """(step, value) points of a metric, sorted by step."""
    points = mlflow_client(uri).get_metric_history(run_id, key)
    return sorted((point.step, point.value) for point in points)


@contextlib.contextmanager
def answering(uri: str) -> Iterator[None]:
    """Turn MLflow's errors about a failing server or file into one clear line.

    Raises:
        ConnectionError: The server is down or broken, or something else answers in its place.
        StorageError: A SQLite file cannot be written.
    """
    kept = writing(sqlite_path(uri), "start or resume the run again") if uri.startswith("sqlite:") else None
    try:
        with kept or contextlib.nullcontext():
            yield
    except (ConnectionError, StorageError):
        raise
    except Exception as error:
        if not is_away(error):
            raise
        first = " ".join(str(error).split())[:200]
        raise ConnectionError(f"tracking.uri={uri} does not answer like MLflow ({first}){_LOGIN}") from error


def is_away(error: BaseException) -> bool:
    """Whether an error is about the server, not the request.

    The server is down, overloaded or broken, or a proxy or a login page answers in its place. The same
    request can succeed later, or with another token.
    """
    from requests.exceptions import HTTPError, RequestException

    exceptions = mlflow_package().exceptions
    if isinstance(error, exceptions.RestException):
        return _is_elsewhere(error.get_http_status_code())
    if isinstance(error, exceptions.MlflowException) and error.message.startswith("API request to"):
        return True  # the answer is not JSON, so it is not from MLflow
    if isinstance(error, HTTPError) and error.response is not None:
        return _is_elsewhere(error.response.status_code)
    if isinstance(error, RequestException | ConnectionError):
        return True
    inner = error.__cause__ or error.__context__
    return inner is not None and is_away(inner)


def _is_elsewhere(status: int) -> bool:
    return status >= 500 or status in (401, 403, 407, 408, 429)
