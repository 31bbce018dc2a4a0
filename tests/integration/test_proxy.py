"""Between a run and its tracking server: an impatient proxy, a login page, a slow connection."""

import http.server
import logging
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from helpers.servers import Server, mlflow_server
from jobs.tracking.outbox import outbox
from jobs.tracking.runs import start_run
from screformer.config import ExperimentConfig

LOGIN = b"<!doctype html><html><body>Please log in</body></html>"


class Proxy(http.server.ThreadingHTTPServer):
    """Forwards requests to a server, or answers in its place."""

    daemon_threads = True

    def __init__(self, target: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target = target
        self.answer: tuple[int, bytes] | None = None
        self.delay_s = 0.0
        self.answers_health = False
        """Whether /health is always forwarded."""
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Proxy

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        time.sleep(self.server.delay_s)
        status, content, kind = 0, b"", "text/html"
        if self.server.answer and not (self.server.answers_health and self.path == "/health"):
            status, content = self.server.answer
        else:
            request = urllib.request.Request(self.server.target + self.path, data=body or None)
            request.method = self.command
            for name in ("Content-Type",):
                if name in self.headers:
                    request.add_header(name, self.headers[name])
            try:
                with urllib.request.urlopen(request, timeout=30) as found:
                    status, content, kind = found.status, found.read(), found.headers.get_content_type()
            except urllib.error.HTTPError as error:
                status, content, kind = error.code, error.read(), error.headers.get_content_type()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _pass_on

    def log_message(self, *args: object) -> None:
        """Print nothing."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with mlflow_server(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    running = Proxy(server.url)
    yield running
    running.shutdown()
    running.server_close()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("answers_health", [True, False], ids=["health passes", "nothing passes"])
@pytest.mark.parametrize("answer", [(403, b"<h1>Forbidden</h1>"), (200, LOGIN)], ids=["403", "login page"])
def test_a_refusing_proxy_loses_nothing(
    server: Server,
    proxy: Proxy,
    answer: tuple[int, bytes],
    answers_health: bool,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING)
    run = start_run(ExperimentConfig().merge({"tracking.uri": proxy.uri}), "finetune").kept_in(str(tmp_path))
    with run:
        proxy.answer, proxy.answers_health = answer, answers_health
        for step in range(5):
            run.log_metrics({"train/loss": float(step)}, step=step)
        run.settle()
        run.set_tags({"kept": "yes"})
    assert len(outbox(run.outbox).names()) == 7
    lines = [line for line in caplog.messages if "the job continues" in line]
    assert len(lines) == 1 and "token may have expired" in lines[0] and "\n" not in lines[0]
    assert "jobs.sync --run-dir" in caplog.text

    proxy.answer = None
    assert run.send_kept() == (7, 0)
    logged = MlflowClient(server.url).get_run(run.run_id)
    assert logged.info.status == "FINISHED" and logged.data.tags["kept"] == "yes"
    assert len(MlflowClient(server.url).get_metric_history(run.run_id, "train/loss")) == 5


@pytest.mark.parametrize(
    "answer", [(500, b"oops"), (403, b"<h1>Forbidden</h1>"), (200, LOGIN)], ids=["500", "403", "login page"]
)
def test_a_start_that_is_refused_is_one_line(proxy: Proxy, answer: tuple[int, bytes]) -> None:
    proxy.answer, proxy.answers_health = answer, True
    with pytest.raises(ConnectionError) as caught:
        start_run(ExperimentConfig().merge({"tracking.uri": proxy.uri}), "finetune")
    message = str(caught.value)
    assert message.startswith(f"tracking.uri={proxy.uri} ") and "\n" not in message and len(message) < 600
    assert "MLFLOW_TRACKING_TOKEN" in message


@pytest.mark.timeout(300)
def test_a_slow_server_does_not_slow_steps(server: Server, proxy: Proxy, tmp_path: Path) -> None:
    run = start_run(ExperimentConfig().merge({"tracking.uri": proxy.uri}), "finetune").kept_in(str(tmp_path))
    with run:
        proxy.delay_s = 1.0
        began = time.monotonic()
        for step in range(20):
            run.log_metrics({"train/loss": float(step)}, step=step)
        assert time.monotonic() - began < 1.0, "twenty log calls waited for a server that takes 2 s for each"
        proxy.delay_s = 0.0
    points = MlflowClient(server.url).get_metric_history(run.run_id, "train/loss")
    assert [(point.step, point.value) for point in points] == [(step, float(step)) for step in range(20)]
    assert not outbox(run.outbox).names()
