"""Atlas to pre-trained to fine-tuned model under the real Ray Train with two workers, one of which is killed
on the way."""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from jobs.arguments import train_command
from jobs.training.launch import check_layout
from screformer.checkpoint import load_model
from screformer.config import ExperimentConfig

REPO_ROOT = Path(__file__).resolve().parents[2]
SMOKE = str(REPO_ROOT / "jobs" / "recipes" / "smoke.yaml")


def _run(folder: Path, *words: str) -> tuple[dict[str, Any], str]:
    """A job as users start it, in a folder of its own; its last line and all that it printed."""
    environment = {**os.environ, "PYTHONPATH": str(REPO_ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stdout + done.stderr


@pytest.fixture(scope="module")
def settings(small_atlas: str) -> list[str]:
    return [
        "--config",
        SMOKE,
        f"atlas.uri={small_atlas}",
        "cluster.num_workers=2",
        "cluster.cpus_per_worker=0.5",
    ]


@pytest.fixture(scope="module")
def pretrained(
    settings: list[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], str, Path]:
    folder = tmp_path_factory.mktemp("jobs")
    return *_run(folder, "jobs.pretrain", *settings), folder


@pytest.fixture(scope="module")
def finetuned(
    pretrained: tuple[dict[str, Any], str, Path], settings: list[str]
) -> tuple[dict[str, Any], str]:
    result, _, folder = pretrained
    return _run(
        folder, "jobs.finetune", "--from", result["run_id"], *settings, "train.max_steps=30", "train.lr=5e-3"
    )


def test_pretraining_learns_and_leaves_a_model(pretrained: tuple[dict[str, Any], str, Path]) -> None:
    result, printed, _ = pretrained
    losses = [float(value) for value in re.findall(r"train/loss ([\d.]+)", printed)]
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert result["metrics"].keys() == {"best_val/loss", "test/loss"}
    assert result["model_version"] is None
    model = load_model(result["model_dir"])
    assert model.labels["names"] == [] and model.vocabulary.mean_expression_g.any()
    assert model.meta["query"]["atlas"]["timestamp_ms"] > 0
    assert not set(model.meta["split"]["groups"]["train"]) & set(model.meta["split"]["groups"]["test"])
    for noise in ("Traceback", "FutureWarning", "Failed to query", "Reporting training result"):
        assert noise not in printed


def test_finetuning_learns_and_registers(
    finetuned: tuple[dict[str, Any], str], pretrained: tuple[dict[str, Any], str, Path]
) -> None:
    from mlflow import MlflowClient

    result, _ = finetuned
    before, after = load_model(pretrained[0]["model_dir"]), load_model(result["model_dir"])
    assert after.vocabulary.feature_ids == before.vocabulary.feature_ids
    assert after.meta["split"] == before.meta["split"], "pre-training held the same donors out"
    assert len(after.labels["names"]) >= 5 and all(
        cl_id.startswith("CL:") for cl_id in after.labels["cl_ids"]
    )
    assert result["metrics"]["test/accuracy"] > 0.3
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"], registry_uri=os.environ["MLFLOW_TRACKING_URI"])
    registered = client.get_model_version(
        ExperimentConfig().tracking.model_name, str(result["model_version"])
    )
    assert registered.run_id == result["run_id"], "the store may hold models of other tests"
    run = client.get_run(result["run_id"])
    assert run.info.status == "FINISHED"
    for name in (
        "train/loss",
        "train/lr",
        "train/cells_per_s",
        "data/wait_share",
        "mem/peak_gb",
        "val/macro_f1",
        "test/macro_f1",
    ):
        assert name in run.data.metrics, name
    assert run.data.params["model.dim"] == "16"
    kept = {
        entry.path
        for folder in ("", "test", "calibration")
        for entry in client.list_artifacts(result["run_id"], folder)
    }
    assert {"config.yaml", "identity.json", "test/confusion.png", "test/per_class.csv"} <= kept
    assert {"calibration/reliability.csv", "calibration/reliability.png"} <= kept
    measured = after.calibration.measured
    assert measured is not None and measured["ece_after"] == pytest.approx(
        result["metrics"]["best_val/ece"], abs=1e-4
    )
    assert 0 <= run.data.metrics["test/ece"] <= 1 and "test/unknown_share" in run.data.metrics
    assert len(after.calibration.logit_mean_k) == len(after.labels["names"])
    assert after.meta["code"]["screformer"] and after.meta["code"]["git"]
    assert after.meta["metrics"] == result["metrics"] and 0 < after.meta["best_step"] <= 30


def test_a_killed_job_resumes_to_the_same_result(
    finetuned: tuple[dict[str, Any], str], settings: list[str], tmp_path: Path
) -> None:
    """The driver, its Ray and its workers die by SIGKILL after the second checkpoint; a new process goes on,
    here with one worker."""
    start_model = json.loads((Path(finetuned[0]["run_dir"]) / "run.json").read_text())["init_from"]
    words = [
        sys.executable,
        "-m",
        "jobs.finetune",
        "--from",
        start_model,
        *settings,
        "train.max_steps=30",
        "train.lr=5e-3",
    ]
    job = subprocess.Popen(
        words,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPO_ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert job.stdout is not None
    run_dir, deadline = "", time.monotonic() + 300
    for line in job.stdout:
        assert time.monotonic() < deadline
        if found := re.search(r"--resume (\S+)\)", line):
            run_dir = found[1]
        if re.search(r"step 1[02]/30", line):
            break
    for process in [*psutil.Process(job.pid).children(recursive=True), job]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    job.wait()
    result, printed = _run(tmp_path, "jobs.finetune", "--resume", run_dir, "cluster.num_workers=1")
    resumed = re.search(r"resumed after step (\d+)", printed)
    assert resumed and int(resumed[1]) >= 4
    for name, value in finetuned[0]["metrics"].items():
        counted = name.endswith(
            ("ece", "ece_uncalibrated", "unknown_share")
        )  # by bins and bounds that rounding lets a cell cross
        assert result["metrics"][name] == pytest.approx(value, rel=1e-3, abs=0.03 if counted else None), name


def test_dry_run_prints_and_stops(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert train_command("finetune", "", ["--dry-run", *settings]) == 0
    printed = capsys.readouterr().out
    assert "max_genes: 64" in printed and "parameters:" in printed and "memory_gb_per_worker:" in printed
    assert re.search(r"cells:\n  train: \d+", printed)
    assert list(tmp_path.iterdir()) == [], "nothing is written"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.max_step=5"], "unknown setting train.max_step; did you mean train.max_steps?"),
        (["atlas.uri=nowhere", "--dry-run"], "nowhere' does not exist"),
        (
            ["labels.min_cells=100000", "--dry-run"],
            "fine-tuning needs at least 2 labels with labels.min_cells=100000 training cells",
        ),
        (["--resume", "nowhere"], "no run.json there"),
        (["--from", "nowhere", "--dry-run"], "model 'nowhere' is no directory with weights.safetensors"),
    ],
)
def test_bad_input_is_said_in_one_line(
    settings: list[str], words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_command("finetune", "", [*settings, *words]) == 1
    assert message in capsys.readouterr().err


def test_auto_attention_is_settled_once_and_a_start_model_settles_it(
    pretrained: tuple[dict[str, Any], str, Path], settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "attention: lsh\n" in pretrained[1], "what the recipe says stays, and is said"
    auto = [*settings, "model.attention=auto", "--dry-run"]
    assert train_command("pretrain", "", auto) == 0
    printed = capsys.readouterr().out
    assert "attention: full\n" in printed, "the configuration holds what was taken, not auto"
    assert (
        "attention: full (auto: cells have up to 65 tokens" in printed
        and "model.n_hashes=2 and model.bucket_size=16 without" in printed
    )
    assert train_command("finetune", "", ["--from", pretrained[0]["model_dir"], *auto]) == 0
    assert capsys.readouterr().out.endswith("attention: lsh\n"), "the start model's weights fit no other"
    assert (
        train_command(
            "finetune",
            "",
            ["--from", pretrained[0]["model_dir"], *settings, "model.attention=full", "--dry-run"],
        )
        == 1
    )
    assert "model.attention='full', but the model" in capsys.readouterr().err


def test_another_architecture_than_the_start_model_is_refused(
    pretrained: tuple[dict[str, Any], str, Path], settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        train_command(
            "finetune", "", ["--from", pretrained[0]["model_dir"], *settings, "model.dim=32", "--dry-run"]
        )
        == 1
    )
    assert "model.dim=32, but the model" in capsys.readouterr().err
    few = "query.var_filter=feature_id == 'ENSG00000156738'"
    assert (
        train_command("finetune", "", ["--from", pretrained[0]["model_dir"], *settings, few, "--dry-run"])
        == 1
    )
    assert re.search(
        r"1 of the start model's \d+ genes are in the query .* fewer than 50%", capsys.readouterr().err
    )


def test_a_layout_that_cannot_fit_is_refused_with_the_sum() -> None:
    def node(cpus: float, gpus: float = 0) -> dict[str, Any]:
        return {"Alive": True, "Resources": {"CPU": cpus, "GPU": gpus}}

    def config(**cluster: Any) -> ExperimentConfig:
        return ExperimentConfig().merge({f"cluster.{name}": value for name, value in cluster.items()})

    check_layout(config(num_workers=2), [node(2), node(1)])
    with pytest.raises(
        ValueError, match=r"num_workers=2 x cpus_per_worker=1 \+ .*=0.5 = 2.5 CPUs, but Ray has 2"
    ):
        check_layout(config(num_workers=2), [node(2)])
    with pytest.raises(ValueError, match="lets only 1 workers fit on the nodes"):
        check_layout(config(num_workers=2, cpus_per_worker=2.0), [node(3), node(1), node(1)])
    with pytest.raises(ValueError, match="need one GPU each, but Ray has 1"):
        check_layout(config(num_workers=2, use_gpu=True), [node(8, 1)])
