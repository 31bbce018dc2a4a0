import json
import pickle
import re
import subprocess
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from matplotlib.figure import Figure
from mlflow import MlflowClient

from helpers.processes import REPO_ROOT, run_python, start_python
from helpers.stores import new_store
from jobs.reports.artifacts import log_confusion, log_curves
from jobs.tracking.client import tracking_uri
from jobs.tracking.identity import code_identity, git_revision
from jobs.tracking.logged import logged_run
from jobs.tracking.models import pinned_model, resolve_model
from jobs.tracking.runs import TrackedRun, start_run
from screformer.config import ExperimentConfig, TrackingConfig


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return new_store(tmp_path_factory.mktemp("tracking"))


@pytest.fixture(scope="module")
def config(store: str) -> ExperimentConfig:
    return ExperimentConfig().merge({"tracking.uri": store, "model.n_hashes": 2})


def _artifact(run: TrackedRun, path: str) -> Path:
    return Path(MlflowClient(run.tracking_uri).download_artifacts(run.run_id, path))


def test_a_run_holds_configuration_identity_metrics_tables_and_pictures(
    config: ExperimentConfig, store: str
) -> None:
    with start_run(config, "finetune") as run:
        run.log_identity(
            {
                "atlas": {"uri": "s3://atlases/blood", "timestamp_ms": 12},
                "query": {"hash": "ab12", "num_cells": 7},
            }
        )
        for step in range(3):
            run.log_metrics(
                {"train/loss": 1.0 / (step + 1), "val/loss": 2.0 / (step + 1), "val/f1 of CD4+ T": 0.5},
                step=step,
            )
        log_confusion(run, np.array([[3, 1], [0, 0]]), ["B cell", "T cell"], "test")
        run.log_table(pd.DataFrame({"label": ["B cell"], "f1": [0.5]}), "test/per_class.csv")
        log_curves(run)

    logged = MlflowClient(store).get_run(run.run_id)
    assert logged.info.status == "FINISHED"
    assert logged.data.params["model.n_hashes"] == "2"
    assert len(logged.data.params) == sum(len(section) for section in config.to_dict("finetune").values())
    assert ExperimentConfig.from_dict(yaml.safe_load(_artifact(run, "config.yaml").read_text())) == config
    tags = logged.data.tags
    assert (tags["job"], tags["atlas.uri"], tags["atlas.timestamp_ms"], tags["query.hash"]) == (
        "finetune",
        "s3://atlases/blood",
        "12",
        "ab12",
    )
    identity = json.loads(_artifact(run, "identity.json").read_text())
    assert identity["code"]["packages"]["mlflow"].startswith("3.") and identity["code"]["host"]["cpus"] >= 1
    assert tags["code.git"] == identity["code"]["git"]
    assert logged.data.metrics["val/f1 of CD4_ T"] == 0.5
    history = MlflowClient(store).get_metric_history(run.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(0, 1.0), (1, 0.5), (2, pytest.approx(1 / 3))]
    confusion = pd.read_csv(_artifact(run, "test/confusion.csv"))
    assert confusion.set_index("true_label").loc["B cell"].tolist() == [3, 1]
    assert pd.read_csv(_artifact(run, "test/per_class.csv"))["f1"].tolist() == [0.5]
    for picture in ("test/confusion.png", "curves/loss.png"):
        assert _artifact(run, picture).read_bytes().startswith(b"\x89PNG")


def test_a_figure_never_ends_a_run(
    config: ExperimentConfig, store: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Names come from files; figures that matplotlib cannot draw are skipped."""
    counts_kk = np.array([[3, 1], [0, 2]])

    def broken() -> Figure:
        figure = Figure()
        figure.text(0, 0, r"$\bad$")
        return figure

    with start_run(config, "finetune") as run:
        log_confusion(run, counts_kk, [r"$\bad$", "$"], "test")
        run.log_figure(broken, "broken.png")
    assert "figure broken.png could not be drawn and is skipped" in caplog.text
    found = MlflowClient(store).list_artifacts(run.run_id, "test")
    assert {entry.path for entry in found} == {"test/confusion.csv", "test/confusion.png"}
    assert MlflowClient(store).get_run(run.run_id).info.status == "FINISHED"


def test_another_process_logs_into_the_run_and_is_quiet(
    config: ExperimentConfig, store: str, tmp_path: Path
) -> None:
    with start_run(config, "finetune") as run:
        (tmp_path / "run.pkl").write_bytes(pickle.dumps(run))
        code = (
            "import pickle, socket, sys\n"
            "def refuse(*args, **kwargs): raise AssertionError('the network was used')\n"
            "socket.getaddrinfo = refuse\n"
            "run = pickle.loads(open(sys.argv[1], 'rb').read())\n"
            "run.log_metrics({'train/loss': 0.25}, step=9)\n"
            "from jobs.tracking.runs import start_run\n"
            "from screformer.config import ExperimentConfig\n"
            "with start_run(ExperimentConfig().merge({'tracking.uri': 'sqlite:///fresh.db'}), 'pretrain') as"
            " other:\n"
            "    other.log_metrics({'train/loss': 1.0}, step=0)\n"
            "    other.log_identity({})\n"
        )
        environment = {"PYTHONPATH": str(REPO_ROOT), "PATH": "/nowhere"}  # even without a git executable
        done = run_python("-c", code, tmp_path / "run.pkl", cwd=tmp_path, env=environment)
    assert (done.stdout, done.stderr) == ("", "")
    point = MlflowClient(store).get_metric_history(run.run_id, "train/loss")[0]
    assert (point.step, point.value) == (9, 0.25)
    assert (tmp_path / "mlartifacts").is_dir() and (tmp_path / "fresh.db").is_file()


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError("no such column"), "FAILED"), (KeyboardInterrupt(), "KILLED")]
)
def test_a_failed_job_marks_its_run(
    config: ExperimentConfig, store: str, error: BaseException, status: str
) -> None:
    with pytest.raises(type(error)), start_run(config, "finetune") as run:
        raise error
    logged = MlflowClient(store).get_run(run.run_id)
    assert logged.info.status == status
    assert logged.data.tags["error"] == f"{type(error).__name__}: {error}"
    assert "test_tracking.py" in _artifact(run, "error.txt").read_text()
    with run:  # resumed
        assert MlflowClient(store).get_run(run.run_id).info.status == "RUNNING"
    logged = MlflowClient(store).get_run(run.run_id)
    assert logged.info.status == "FINISHED" and "error" not in logged.data.tags


def test_a_missing_server_is_reported_at_once(config: ExperimentConfig) -> None:
    began = time.monotonic()
    with pytest.raises(
        ConnectionError, match=r"tracking.uri=http://127.0.0.1:9 does not answer .*start `mlflow server`"
    ):
        start_run(config.merge({"tracking.uri": "http://127.0.0.1:9"}), "finetune")
    assert time.monotonic() - began < 15


def test_stores_are_named_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert tracking_uri(TrackingConfig()) == f"sqlite:///{tmp_path}/mlflow.db"
    assert tracking_uri(TrackingConfig(uri="runs/mine.db")) == f"sqlite:///{tmp_path}/runs/mine.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracker:5000")
    assert tracking_uri(TrackingConfig()) == "http://tracker:5000"
    assert tracking_uri(TrackingConfig(uri="sqlite:///a.db")) == f"sqlite:///{tmp_path}/a.db"
    with pytest.raises(ValueError, match=r"tracking.uri='./mlruns' is not a tracking store"):
        tracking_uri(TrackingConfig(uri="./mlruns"))
    with pytest.raises(ValueError, match="is in a folder that does not exist; create it"):
        start_run(
            ExperimentConfig().merge({"tracking.uri": "sqlite:////no/such/folder/mlflow.db"}), "finetune"
        )


def test_a_run_in_a_file_of_another_node_says_what_to_do(tmp_path: Path) -> None:
    run = TrackedRun(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db", run_id="0" * 32)
    with pytest.raises(
        ValueError,
        match=r"a file that this machine .* does not have; for a job on several nodes set tracking.uri",
    ):
        run.log_metrics({"train/loss": 1.0}, step=1)
    assert not list(tmp_path.iterdir())


def test_two_jobs_that_start_together_on_a_new_store_both_work(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from jobs.tracking.runs import start_run\n"
        "from screformer.config import ExperimentConfig\n"
        "with start_run(ExperimentConfig().merge({'tracking.uri': 'sqlite:///new.db'}), 'pretrain') as run:\n"
        "    run.log_metrics({'train/loss': 1.0}, step=0)\n"
        "print(run.run_id)\n"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    jobs = [start_python("-c", code, cwd=tmp_path, **pipes) for _ in range(3)]
    ids = set()
    for job in jobs:
        out, err = job.communicate(timeout=240)
        assert job.returncode == 0, err
        ids.add(out.strip())
    client = MlflowClient(f"sqlite:///{tmp_path}/new.db")
    runs = client.search_runs([client.get_experiment_by_name("screformer").experiment_id])
    assert {run.info.run_id for run in runs} == ids and len(ids) == 3


def test_a_lookup_creates_no_store(tmp_path: Path) -> None:
    tracking = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db")
    for look in (
        lambda: resolve_model("models:/blood@champion", tracking),
        lambda: pinned_model("models:/blood@champion", tracking),
        lambda: logged_run("0" * 32, tracking),
    ):
        with pytest.raises(ValueError, match=r"tracking store sqlite:.* does not exist.*--tracking-uri"):
            look()
    assert not list(tmp_path.iterdir())


def test_a_run_is_named_by_what_it_does(config: ExperimentConfig, store: str) -> None:
    on_blood = config.merge({"atlas.uri": "s3://atlases/blood/", "query.obs_filter": "tissue == 'blood'"})
    with start_run(on_blood, "finetune") as run:
        atlas = {"uri": "s3://atlases/blood/", "timestamp_ms": 12}
        run.log_identity({"query": {"hash": "ab" * 32, "atlas": atlas, "obs_filter": "tissue == 'blood'"}})
    logged = MlflowClient(store).get_run(run.run_id)
    assert re.fullmatch(r"finetune blood, tissue == 'blood', \d{4}-\d\d-\d\d \d\d:\d\d", logged.info.run_name)
    assert logged.data.tags["mlflow.note.content"] == "`screformer finetune` on blood, tissue == 'blood'"
    (dataset,) = (entry.dataset for entry in logged.inputs.dataset_inputs)
    assert (dataset.name, dataset.digest) == ("blood@12", ("ab" * 32)[:36])
    with start_run(on_blood.merge({"tracking.run_name": "mine"}), "finetune") as run:
        pass
    assert MlflowClient(store).get_run(run.run_id).info.run_name == "mine"


def test_git_revision_or_its_absence(tmp_path: Path) -> None:
    assert git_revision(tmp_path) == "not a git checkout"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run([*git, *words], check=True)
    head = subprocess.run(
        [*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True
    ).stdout.strip()
    assert git_revision(tmp_path) == head
    (tmp_path / "file").write_text("a")
    subprocess.run([*git, "add", "file"], check=True)
    assert git_revision(tmp_path) == f"{head}+changes"
    assert set(code_identity()) == {"screformer", "git", "python", "packages", "host"}


def test_models_that_are_not_there(config: ExperimentConfig, tmp_path: Path) -> None:
    store = config.tracking
    with start_run(config, "pretrain") as run:
        pass
    with pytest.raises(ValueError, match=r"no registered model 'blood' in sqlite.*; it has no models yet"):
        pinned_model("models:/blood@candidate", store)
    client = MlflowClient(store.uri)
    client.create_registered_model("blood")
    with pytest.raises(ValueError, match=r"no registered model 'bood' in .*; it has blood"):
        pinned_model("models:/bood@candidate", store)
    with pytest.raises(ValueError, match=r"blood has versions none and aliases none"):
        resolve_model("models:/blood/3", store)
    with pytest.raises(ValueError, match=r"must be models:/NAME@ALIAS or models:/NAME/VERSION"):
        resolve_model("models:/blood", store)
    with pytest.raises(ValueError, match=r"run '0{32}' is not in"):
        resolve_model("runs:/" + "0" * 32, store)
    with pytest.raises(ValueError, match=r"\(FINISHED\) logged no model"):
        resolve_model(run.run_id, store)
    with pytest.raises(ValueError, match=r"is not a directory with weights.safetensors"):
        resolve_model(str(tmp_path / "missing"), store)
    with pytest.raises(ValueError, match=r"has no weights.safetensors"):
        resolve_model(str(tmp_path), store)
