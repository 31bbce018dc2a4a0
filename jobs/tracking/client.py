"""Find and reach the MLflow tracking store: the only place that imports mlflow."""

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

_LOGIN = (
    "; a proxy or a login page may be in front of it, or the token may have expired: check the address, and"
    " MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
)

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
    """MLflow's client of a store, which is made where it is a SQLite file that does not exist.

    Args:
        uri: As `tracking_uri` gives it.

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
    """Let one process at a time make the tables of a SQLite file: two at once break each other."""
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
    """The tracking store to read from; nothing is made.

    Raises:
        ValueError: A SQLite file that does not exist.
        ConnectionError: The server does not answer.
    """
    uri = tracking_uri(tracking)
    if uri.startswith("sqlite:") and not sqlite_path(uri).is_file():
        raise ValueError(
            f"there is no tracking store {uri}, so no run or model either; name the one that has it in"
            f" tracking.uri (--tracking-uri) or MLFLOW_TRACKING_URI"
        )
    probe(uri)
    return uri


def require_here(uri: str) -> None:
    """Refuse a SQLite file that another machine has.

    Raises:
        ValueError: This machine does not have it.
    """
    if uri.startswith("sqlite:") and not sqlite_path(uri).is_file():
        raise ValueError(
            f"the run is kept in {uri}, a file that this machine ({platform.node()}) does not have; for a job"
            f" on several nodes set tracking.uri to an MLflow server (http://HOST:PORT)"
        )


def tracking_uri(tracking: TrackingConfig) -> str:
    """The tracking store: `tracking.uri`, else MLFLOW_TRACKING_URI, else `./mlflow.db`.

    Never with a password: that of a server goes into MLflow's own variables, and that of a database is `***`,
    which `store_address` replaces where the environment has it.

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
            f"tracking.uri={without_secret(uri)!r} is no tracking store; give http://HOST:PORT of an MLflow"
            f" server, or sqlite:///PATH/mlflow.db (MLflow 3 keeps no runs in plain folders)"
        )
    if uri.startswith("http"):
        return _adopt_password(uri)
    return without_secret(uri)


def store_address(uri: str) -> str:
    """What MLflow needs to reach a store: the URI with its password, from MLFLOW_TRACKING_URI.

    Raises:
        ValueError: The environment of this process does not have it.
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
    """Move user and password of a server's address into the variables that MLflow reads them from."""
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
    request = urllib.request.Request(f"{uri.rstrip('/')}/health", headers=_credentials())
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            answer = response.read(200)
    except urllib.error.HTTPError as error:
        # Something answers; a proxy may hide /health, or be in front of a server that is away.
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
    """The header that MLflow's client would send."""
    token = os.environ.get("MLFLOW_TRACKING_TOKEN")
    if token:
        return {"Authorization": f"Bearer {token}"}
    user, password = (os.environ.get(f"MLFLOW_TRACKING_{name}") for name in ("USERNAME", "PASSWORD"))
    if user and password:
        return {"Authorization": f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"}
    return {}


def metric_points(uri: str, run_id: str, key: str) -> list[tuple[int, float]]:
    """(step, value) points of a metric, by step."""
    points = mlflow_client(uri).get_metric_history(run_id, key)
    return sorted((point.step, point.value) for point in points)


@contextlib.contextmanager
def answering(uri: str) -> Iterator[None]:
    """Turn what MLflow raises when the server fails into one clear line.

    Raises:
        ConnectionError: The server is away or not well, or something else answers in its place.
    """
    try:
        yield
    except ConnectionError:
        raise
    except Exception as error:
        if not is_away(error):
            raise
        first = " ".join(str(error).split())[:200]
        raise ConnectionError(
            f"tracking.uri={uri} does not answer as MLflow does ({first}){_LOGIN}"
        ) from error


def is_away(error: BaseException) -> bool:
    """Whether an error of MLflow's client is not about what was asked, but about who answers.

    The server is absent, overloaded or broken, or a proxy or a login page answers in its place. The same
    request can succeed later, or with another token.
    """
    from requests.exceptions import HTTPError, RequestException

    exceptions = mlflow_package().exceptions
    if isinstance(error, exceptions.RestException):
        return _is_elsewhere(error.get_http_status_code())
    if isinstance(error, exceptions.MlflowException) and error.message.startswith("API request to"):
        return True  # the answer is no JSON, so it is not MLflow's
    if isinstance(error, HTTPError) and error.response is not None:
        return _is_elsewhere(error.response.status_code)
    if isinstance(error, RequestException | ConnectionError):
        return True
    inner = error.__cause__ or error.__context__
    return inner is not None and is_away(inner)


def _is_elsewhere(status: int) -> bool:
    return status >= 500 or status in (401, 403, 407, 408, 429)
