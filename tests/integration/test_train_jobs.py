"""From an atlas to a fine-tuned model under a real Ray Train with two workers, one of which is killed."""

import json
import os
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from helpers.local_ray import ONE_READER
from helpers.processes import REPO_ROOT, kill_tree, read_until, run_here, start_command
from jobs import finetune, pretrain
from jobs.training.launch import check_layout
from screformer.checkpoint import load_model
from screformer.config import ExperimentConfig

SMOKE = str(REPO_ROOT / "jobs" / "recipes" / "smoke.yaml")
LONGER = ["train.max_steps=30", "train.lr=5e-3"]


def tracking_client() -> MlflowClient:
    uri = os.environ["MLFLOW_TRACKING_URI"]
    return MlflowClient(uri, registry_uri=uri)


@pytest.fixture(scope="module")
def settings(small_atlas: str) -> list[str]:
    return [
        "--config",
        SMOKE,
        f"atlas.uri={small_atlas}",
        "cluster.num_workers=2",
        *ONE_READER,
    ]


@pytest.fixture(scope="module")
def pretrained(
    settings: list[str], ray_local: None, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], str]:
    return run_here(pretrain.main, *settings, cwd=tmp_path_factory.mktemp("pretrain"))


@pytest.fixture(scope="module")
def finetuned(
    pretrained: tuple[dict[str, Any], str], settings: list[str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    words = ["--from", pretrained[0]["run_id"], *settings, "cluster.num_workers=1", *LONGER]
    return run_here(finetune.main, *words, cwd=tmp_path_factory.mktemp("finetune"))[0]


def test_pretraining_learns_and_leaves_a_model(pretrained: tuple[dict[str, Any], str]) -> None:
    result, printed = pretrained
    history = tracking_client().get_metric_history(result["run_id"], "train/loss")
    losses = [point.value for point in sorted(history, key=lambda point: point.step)]
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert result["metrics"].keys() == {"best_val/loss", "test/loss"}
    assert result["model_version"] is None
    estimate = re.search(
        r"needs about (\S+) GB of memory per worker .* object store 0.\d+ GB; 8 steps", printed
    )
    assert estimate is not None
    peak = tracking_client().get_run(result["run_id"]).data.metrics["mem/peak_gb"]
    assert float(estimate[1]) == pytest.approx(peak, rel=0.3)
    model = load_model(result["model_dir"])
    assert model.labels["names"] == [] and model.vocabulary.mean_expression_g.any()
    assert model.meta["query"]["atlas"]["timestamp_ms"] > 0
    assert not set(model.meta["split"]["groups"]["train"]) & set(model.meta["split"]["groups"]["test"])


def test_finetuning_learns_and_registers(
    finetuned: dict[str, Any], pretrained: tuple[dict[str, Any], str]
) -> None:
    result = finetuned
    before, after = load_model(pretrained[0]["model_dir"]), load_model(result["model_dir"])
    assert after.vocabulary.feature_ids == before.vocabulary.feature_ids
    assert after.meta["split"] == before.meta["split"], "pre-training held out the same donors"
    assert len(after.labels["names"]) >= 5 and all(
        cl_id.startswith("CL:") for cl_id in after.labels["cl_ids"]
    )
    assert result["metrics"]["test/accuracy"] > 0.3
    client = tracking_client()
    registered = client.get_model_version(
        ExperimentConfig().tracking.model_name, str(result["model_version"])
    )
    assert registered.run_id == result["run_id"], "the store may have models of other tests"
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
    assert run.data.tags["start.run_id"] == pretrained[0]["run_id"]
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
    finetuned: dict[str, Any], settings: list[str], tmp_path: Path
) -> None:
    """SIGKILL ends driver, Ray and two workers after the second checkpoint. The run resumes on one, and ends
    like a run that had one throughout."""
    start_model = json.loads((Path(finetuned["run_dir"]) / "run.json").read_text())["init_from"]
    job = start_command("jobs.finetune", "--from", start_model, *settings, *LONGER, cwd=tmp_path)
    run_dir = read_until(job, r"--resume (\S+)\)")[1]
    line = read_until(job, r"^step 1[02]/30.*")[0]
    kill_tree(job)
    assert re.fullmatch(r"step 1\d/30  loss \S+  \S+ cells/s.*  .* left", line.strip()), "no prefix"
    killed_ms = time.time() * 1000
    result, _ = run_here(finetune.main, "--resume", run_dir, "cluster.num_workers=1", cwd=tmp_path)
    history = tracking_client().get_metric_history(result["run_id"], "train/loss")
    assert min(point.step for point in history if point.timestamp > killed_ms) > 4, "it started again"
    for name, value in finetuned["metrics"].items():
        counted = name.endswith(
            ("ece", "ece_uncalibrated", "unknown_share")
        )  # rounding can move a cell across bins and thresholds
        assert result["metrics"][name] == pytest.approx(value, rel=1e-3, abs=0.03 if counted else None), name


def interrupt_after_a_checkpoint(folder: Path, ended: threading.Event) -> None:
    """Send SIGINT to this process, once the job in its main thread has a checkpoint below the folder."""
    while not ended.wait(0.1):
        if list(folder.rglob("position.json")):
            os.kill(os.getpid(), signal.SIGINT)
            return


def test_an_interrupted_job_says_how_to_resume(settings: list[str], ray_local: None, tmp_path: Path) -> None:
    ended = threading.Event()
    interrupting = threading.Thread(target=interrupt_after_a_checkpoint, args=(tmp_path, ended))
    interrupting.start()
    try:
        words = [*settings, "cluster.num_workers=1", "train.max_steps=5000"]
        _, said = run_here(pretrain.main, *words, cwd=tmp_path, status=130)
    finally:
        ended.set()
        interrupting.join()
    found = re.search(r"--resume (\S+)\)", said)
    assert found and re.fullmatch(
        r"screformer pretrain: interrupted; saved a checkpoint at step \d+;"
        rf" resume with --resume {found[1]}",
        said.splitlines()[-1],
    ), said


def test_dry_run_prints_and_stops(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert finetune.main(["--dry-run", *settings]) == 0
    printed = capsys.readouterr().out
    assert "max_genes: 64" in printed and "parameters:" in printed and "memory_gb_per_worker:" in printed
    assert re.search(r"cells:\n  train: \d+", printed)
    assert re.search(r"time_per_epoch: about \d+ \w+\n", printed) and "disk_gb: 0.00" in printed
    assert re.search(r"stream:\n  hours_per_epoch: .*\n  reader_cores: 0\.\d+\n", printed)
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
        (["--resume", "nowhere"], "--resume nowhere has no run.json"),
        (["--from", "nowhere", "--dry-run"], "model 'nowhere' is not a directory with weights.safetensors"),
    ],
)
def test_bad_input_is_reported_in_one_line(
    settings: list[str], words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune.main([*settings, *words]) == 2
    assert message in capsys.readouterr().err


def test_auto_attention_is_resolved_once_or_by_the_start_model(
    pretrained: tuple[dict[str, Any], str], settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "attention: lsh\n" in pretrained[1], "the recipe's setting is kept and reported"
    auto = [*settings, "model.attention=auto", "--dry-run"]
    assert pretrain.main(auto) == 0
    printed = capsys.readouterr().out
    assert "attention: full\n" in printed, "the configuration has the resolved value, not auto"
    assert (
        "attention: full (auto: cells have up to 65 tokens" in printed
        and "model.n_hashes=2 and model.bucket_size=16 without" in printed
    )
    assert finetune.main(["--from", pretrained[0]["model_dir"], *auto]) == 0
    assert capsys.readouterr().out.endswith("attention: lsh\n"), "the start model's weights fit no other kind"
    assert (
        finetune.main(
            ["--from", pretrained[0]["model_dir"], *settings, "model.attention=full", "--dry-run"],
        )
        == 2
    )
    assert "model.attention='full', but the model" in capsys.readouterr().err


def test_an_architecture_unlike_the_start_models_is_refused(
    pretrained: tuple[dict[str, Any], str], settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune.main(["--from", pretrained[0]["model_dir"], *settings, "model.dim=32", "--dry-run"]) == 2
    assert "model.dim=32, but the model" in capsys.readouterr().err
    few = "query.var_filter=feature_id == 'ENSG00000156738'"
    assert finetune.main(["--from", pretrained[0]["model_dir"], *settings, few, "--dry-run"]) == 2
    assert re.search(
        r"1 of the start model's \d+ genes are in the query .* less than 50%", capsys.readouterr().err
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
    with pytest.raises(ValueError, match="cpus_per_worker=2, only 1 workers fit on the nodes"):
        check_layout(config(num_workers=2, cpus_per_worker=2.0), [node(3), node(1), node(1)])
    with pytest.raises(ValueError, match="needs one GPU each, but Ray has 1"):
        check_layout(config(num_workers=2, use_gpu=True), [node(8, 1)])
