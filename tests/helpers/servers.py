"""Real servers on loopback, each in its own process: S3, MLflow tracking, and a served model."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from helpers.processes import end_group


def free_ports(count: int) -> list[int]:
    """Unused ports on 127.0.0.1."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def free_port() -> int:
    """An unused port on 127.0.0.1."""
    return free_ports(1)[0]


class Server:
    """A Python module that listens on a port; keeps its port and folder across restarts."""

    def __init__(
        self, folder: Path, words: Sequence[str], *, ready: str, environment: Mapping[str, str] | None = None
    ) -> None:
        """Prepare the server.

        Args:
            folder: Working directory and place of the log.
            words: The module with its arguments; `{port}` stands for the port.
            ready: Path that responds once the server is up.
            environment: Environment variables that differ from this process's.
        """
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.folder = folder
        self._command = [sys.executable, "-m", *(word.format(port=self.port) for word in words)]
        self._ready = ready
        self._environment = {**os.environ, **(environment or {})}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the server and wait until it responds."""
        path = self.folder / "server.log"
        with path.open("a") as log:
            self._process = process = subprocess.Popen(
                self._command,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                env=self._environment,
                start_new_session=True,
            )
        deadline = time.monotonic() + 400  # seconds of work, on a machine that may be busy
        while True:
            try:
                urllib.request.urlopen(f"{self.url}{self._ready}", timeout=5).close()
                return
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, path.read_text()
                time.sleep(0.1)

    def stop(self) -> None:
        """Kill the server and its workers, if running."""
        if self._process is not None:
            end_group(self._process)
            self._process = None

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()


def mlflow_server(folder: Path) -> Server:
    """A tracking server that stores runs in SQLite and proxies artifacts."""
    words = ["mlflow", "server", "--host", "127.0.0.1", "--port", "{port}", "--workers", "1"]
    words += ["--backend-store-uri", f"sqlite:///{folder}/server.db"]
    words += ["--artifacts-destination", str(folder / "served")]
    # Otherwise it starts an evaluation queue with its own workers.
    return Server(folder, words, ready="/health", environment={"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"})


def model_server(folder: Path, model: str, tracking_uri: str) -> Server:
    """The server that MLflow starts for a registered model."""
    words = ["mlflow", "models", "serve", "-m", model, "--env-manager", "local"]
    words += ["--host", "127.0.0.1", "--port", "{port}", "--workers", "1"]
    # It runs `uvicorn`, which is on the PATH of an activated environment.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {"MLFLOW_TRACKING_URI": tracking_uri, "PATH": path}
    return Server(folder, words, ready="/ping", environment=environment)


@dataclass(frozen=True)
class S3:
    """A bucket on an S3 server. Credentials are in the environment."""

    endpoint: str
    """URL of the server."""
    bucket: str
    uri: str
    """URI of the bucket, for example s3://bucket."""
    tiledb_config: dict[str, str]
    """TileDB settings to access it."""


@contextmanager
def s3_server(folder: Path) -> Iterator[S3]:
    """A server with one empty bucket.

    It runs in its own process, because TileDB holds the interpreter lock while it creates a group.
    """
    import boto3

    words = ["moto.server", "-H", "127.0.0.1", "-p", "{port}"]
    with Server(folder, words, ready="/moto-api/") as server:
        client = boto3.client("s3", endpoint_url=server.url, region_name="us-east-1")
        client.create_bucket(Bucket="atlases")
        reach = {
            "endpoint_override": f"127.0.0.1:{server.port}",
            "scheme": "http",
            "region": "us-east-1",
            "use_virtual_addressing": "false",
            # TileDB gives up after 3 s; a busy machine may need longer.
            "request_timeout_ms": "60000",
        }
        tiledb_config = {f"vfs.s3.{name}": value for name, value in reach.items()}
        yield S3(server.url, "atlases", "s3://atlases", tiledb_config)
