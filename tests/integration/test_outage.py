"""A tracking server over HTTP that goes away during a run and comes back: nothing stops, waits or is lost."""

import dataclasses
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow import MlflowClient

from helpers.proxy import LOGIN, Proxy
from helpers.servers import Server, mlflow_server
from helpers.tiny_model import calibrated_tiny_model, tiny_vocabulary, write_tiny_model
from jobs import sync
from jobs.reports.artifacts import log_confusion, log_curves
from jobs.tracking import outbox as outbox_module
from jobs.tracking.models import pinned_model, register_model, resolve_model
from jobs.tracking.outbox import outbox
from jobs.tracking.runs import TrackedRun, start_run
from screformer.config import ExperimentConfig, TrackingConfig
from screformer.predictor import Predictor


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with mlflow_server(tmp_path_factory.mktemp("server")) as running:
        yield running


def test_models_and_runs_go_through_the_server(server: Server, tmp_path: Path) -> None:
    tracking, model_dir = TrackingConfig(uri=server.url), calibrated_tiny_model(tmp_path / "model")
    with start_run(ExperimentConfig(tracking=tracking), "finetune") as run:
        run.log_identity({"atlas": {"uri": "a"}})
        run.log_metrics({"train/loss": 0.5}, step=1)
        log_confusion(run, np.eye(2), ["B cell", "T cell"], "test")
        version = register_model(run.tracking_uri, run.run_id, model_dir, "blood")
    client = MlflowClient(server.url)
    assert client.get_run(run.run_id).info.status == "FINISHED"
    assert {entry.path for entry in client.list_artifacts(run.run_id, "test")} == {
        "test/confusion.csv",
        "test/confusion.png",
    }
    assert pinned_model("models:/blood@candidate", tracking) == f"models:/blood/{version}"
    directory = resolve_model("models:/blood@candidate", tracking)
    assert not directory.is_relative_to(server.folder), "it comes from the server, not from its disk"
    counts = np.random.default_rng(2).poisson(2.0, size=(12, 40))
    cells = pd.DataFrame(counts, columns=list(tiny_vocabulary().feature_ids))
    predictor = Predictor.load(directory, device="cpu")
    direct = Predictor.load(model_dir, device="cpu").predict(
        predictor.genes.match(cells.columns.tolist()).select(cells.to_numpy())
    )
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(server.url)
    try:
        found = mlflow.pyfunc.load_model("models:/blood@candidate").predict(cells)
    finally:
        mlflow.set_tracking_uri(before)
    assert found["predicted_labels"].tolist() == direct.labels.tolist()
    identity = Path(client.download_artifacts(run.run_id, "identity.json"))
    assert json.loads(identity.read_text())["atlas"]["uri"] == "a"


def _steps(client: MlflowClient, run: TrackedRun) -> list[tuple[int, float]]:
    return sorted((point.step, point.value) for point in client.get_metric_history(run.run_id, "train/loss"))


@pytest.mark.timeout(900)
def test_a_server_that_goes_away_loses_nothing(
    server: Server,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(outbox_module, "RETRY_S", 0.0)
    caplog.set_level(logging.WARNING)
    client, run_dir = MlflowClient(server.url), tmp_path / "run"
    run_dir.mkdir()
    config = ExperimentConfig().merge({"tracking.uri": server.url, "tracking.model_name": "blood"})
    run = start_run(config, "finetune").kept_in(str(run_dir))
    (run_dir / "run.json").write_text(json.dumps({"run": dataclasses.asdict(run)}))
    with run:
        run.log_metrics({"train/loss": 0.0}, step=0)
        run.settle()
        server.stop()
        began = time.monotonic()
        for step in (1, 2, 3):
            run.log_metrics({"train/loss": float(step)}, step=step)
        run.set_tags({"kept": "yes"})
        log_confusion(run, np.eye(2), ["B cell", "T cell"], "test")
        (tmp_path / "gone.txt").write_text("kept")
        run.log_file(tmp_path / "gone.txt")
        (tmp_path / "gone.txt").unlink()
        assert time.monotonic() - began < 10, "seven log calls waited for an unreachable server"
        assert (
            f"tracking.uri={server.url} does not answer" in caplog.text
            and "the job continues" in caplog.text
            and len(outbox(run.outbox).names()) == 7
        )
        logged_ms = time.time() * 1000

        server.start()
        run.log_metrics({"train/loss": 4.0}, step=4)  # sends the others too
        run.settle()
        assert not outbox(run.outbox).names()
        assert _steps(client, run) == [(step, float(step)) for step in range(5)]
        assert all(
            point.timestamp <= logged_ms for point in client.get_metric_history(run.run_id, "train/loss")[:4]
        )
        assert client.get_run(run.run_id).data.tags["kept"] == "yes"
        assert Path(client.download_artifacts(run.run_id, "gone.txt")).read_text() == "kept"
        assert {entry.path for entry in client.list_artifacts(run.run_id, "test")} == {
            "test/confusion.csv",
            "test/confusion.png",
        }

        server.stop()
        outbox.cache_clear()  # as in another process of the run
        run.log_metrics({"train/loss": 5.0}, step=5)
        run.settle()
        assert run.register(write_tiny_model(run_dir / "model"), "blood") is None
        log_curves(run)
    fold = start_run(config, "crossval", parent=run, kept_in=tmp_path / "folds")
    with fold:  # began while the server was away
        fold.log_metrics({"cv/macro_f1": 0.5}, step=1)
    fold_dir = tmp_path / "folds" / fold.run_id
    (fold_dir / "run.json").write_text(json.dumps({"run": dataclasses.asdict(fold)}))
    ended_ms = time.time() * 1000
    command = f"python -m jobs.sync --run-dir {run_dir}"
    assert f"`{command}` registers it as blood" in caplog.text and f"`{command}` sends them" in caplog.text

    assert sync.main(["--run-dir", str(run_dir)]) == 1
    assert capsys.readouterr().err.startswith("screformer sync: 3 entries of run")
    server.start()
    assert sync.main(["--run-dir", str(run_dir)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"run_id": run.run_id, "sent": 3}
    info = client.get_run(run.run_id).info
    assert info.status == "FINISHED" and info.end_time <= ended_ms, (
        "the end time is when it ended, not when that was sent"
    )
    assert _steps(client, run) == [(step, float(step)) for step in range(6)]
    assert client.get_model_version_by_alias("blood", "candidate").run_id == run.run_id
    assert [entry.path for entry in client.list_artifacts(run.run_id, "curves")] == ["curves/loss.png"]
    assert sync.main(["--run-dir", str(run_dir)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["sent"] == 0

    assert sync.main(["--run-dir", str(fold_dir)]) == 0
    found = client.search_runs([info.experiment_id], f"tags.mlflow.parentRunId = '{run.run_id}'")
    assert [child.info.status for child in found] == ["FINISHED"]
    assert found[0].data.metrics == {"cv/macro_f1": 0.5} and found[0].data.params["model.dim"]
    assert found[0].info.end_time <= ended_ms and found[0].data.tags["job"] == "crossval"


def test_a_refused_entry_stays_and_blocks_nothing(tmp_path: Path) -> None:
    sent, box = [], outbox(str(tmp_path / "outbox"))

    def away(entry: dict, content: Path | None) -> None:
        raise ConnectionError("away")

    def picky(entry: dict, content: Path | None) -> None:
        if entry["n"] == 1:
            raise ValueError("too long")
        sent.append((entry["n"], content.read_text() if content else None))

    (tmp_path / "a").write_text("text")
    for n in range(3):
        box.deliver({"n": n}, away, tmp_path / "a" if n == 2 else None)
    assert box.flush(picky) == (2, 1)
    assert sent == [(0, None), (2, "text")] and len(box.names()) == 1


def test_a_folder_without_a_run_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sync.main(["--run-dir", str(tmp_path)]) == 2
    assert f"screformer sync: --run-dir {tmp_path} has no run.json" in capsys.readouterr().err


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
