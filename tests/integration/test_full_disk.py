"""A full or read-only disk ends a command at once, in one line; with more room, the command completes."""

import contextlib
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from mlflow import MlflowClient

from helpers.local_ray import ONE_READER
from helpers.processes import REPO_ROOT, run_here
from helpers.small_disk import small_disk
from helpers.stores import new_store
from helpers.tiny_model import tiny_vocabulary, write_tiny_model
from jobs import annotate, crossval, finetune, ingest
from jobs.tracking.client import mlflow_client
from jobs.training.run_folder import resumable
from screformer.storage import StorageError


def _main(command: object, words: Sequence[object], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    status = command([str(word) for word in words])  # type: ignore[operator]
    return status, capsys.readouterr().err


def test_an_ingest(
    sim_h5ads: list[Path], ray_local: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = tmp_path / "disk"
    words = ["-q", "--h5ad", *sim_h5ads, "--atlas", disk / "atlas"]
    with small_disk(disk, "600k") as change:
        status, said = _main(ingest.main, words, capsys)
        assert status == 2 and said == (
            f"screformer ingest: {disk}/atlas cannot be written: no space is left (0 MB free); free some"
            f" space, then run the same command again, which completes the ingest\n"
        )
        change("size=8m")
        assert _main(ingest.main, [*words, "--verify"], capsys) == (0, "")
        change("ro")
        status, said = _main(ingest.main, words, capsys)
        assert status == 2 and "it is read-only; make it writable" in said and said.count("\n") == 1


def test_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, disk, source = write_tiny_model(tmp_path / "model"), tmp_path / "disk", tmp_path / "in.h5ad"
    counts = np.random.default_rng(0).poisson(2.0, (2000, 40)).astype(np.float32)
    AnnData(counts, var=pd.DataFrame(index=list(tiny_vocabulary().feature_ids))).write_h5ad(source)
    for name in ("out.h5ad", "out.parquet"):
        words = ["-q", "--model", model, "--device", "cpu", "--h5ad", source, "--out", disk / name]
        with small_disk(disk, "32k") as change:
            status, said = _main(annotate.main, words, capsys)
            assert status == 2 and said.startswith(f"screformer annotate: {disk}/") and said.count("\n") == 1
            assert "no space is left" in said and "run the same command again" in said
            change("size=8m")
            assert _main(annotate.main, words, capsys) == (0, "")
            change("ro")
            status, said = _main(annotate.main, [*words, "--overwrite"], capsys)
            assert status == 2 and "it is read-only; make it writable" in said and said.count("\n") == 1
        disk.rmdir()


def test_a_study(ray_local: None, small_atlas: str, tmp_path: Path) -> None:
    """It is refused before its run starts; later, the error of a fold ends it with the way to resume."""
    (tmp_path / "file").touch()
    words = ["--config", REPO_ROOT / "jobs" / "recipes" / "smoke.yaml", f"atlas.uri={small_atlas}"]
    words += [f"cluster.storage_path={tmp_path / 'file'}", "cluster.cpus_per_worker=0.5"]
    _, said = run_here(crossval.main, *words, cwd=tmp_path, status=2)
    assert said.count("\n") == 1 and f"cluster.storage_path={tmp_path / 'file'} cannot be written" in said
    with pytest.raises(StorageError, match=r"/study cannot be written: no space is left .* --resume /study$"):
        with resumable("/study"):
            raise RuntimeError("a trial failed: OSError: [Errno 28] No space left on device: '/study/x'")


def test_a_training(small_atlas: str, ray_local: None, tmp_path: Path) -> None:
    """The disk fills up at the first checkpoint: no further attempt is made. With more room, the same command
    resumes the run."""
    disk, smoke = tmp_path / "disk", REPO_ROOT / "jobs" / "recipes" / "smoke.yaml"
    tracking, run_dir = new_store(tmp_path), disk / "run"
    words = ["--config", smoke, f"atlas.uri={small_atlas}", *ONE_READER]
    words += [f"tracking.uri={tracking}", "tracking.model_name=full"]
    same = [*words, "--run-dir", run_dir]
    filled = False

    def fill() -> None:
        nonlocal filled
        while not list(disk.glob("run/attempt-000/checkpoint_*")):
            time.sleep(0.01)
        with contextlib.suppress(OSError), (disk / "other").open("wb", buffering=0) as file:
            while file.write(b"0" * 4096):
                filled = True

    with small_disk(disk, "900k") as change:
        _, said = run_here(finetune.main, *same, cwd=tmp_path, status=2)
        assert "3 checkpoints of" in said and f"{run_dir} has 0.0 GB free; free some" in said
        change("size=8m")
        threading.Thread(target=fill, daemon=True).start()
        _, said = run_here(finetune.main, *same, cwd=tmp_path, status=2)
        assert filled
        assert said.splitlines()[-1] == (
            f"screformer finetune: {run_dir} cannot be written: no space is left (0 MB free); free some"
            f" space, then resume with --resume {run_dir}"
        )
        assert "Traceback" not in said
        client: MlflowClient = mlflow_client(tracking)
        (run,) = client.search_runs([client.get_experiment_by_name("screformer").experiment_id])
        assert run.info.status == "FAILED" and "no space is left" in run.data.tags["error"]
        _, said = run_here(finetune.main, *same, "train.lr=0.5", cwd=tmp_path, status=2)
        assert f"--run-dir {run_dir} has a run with train.lr=" in said and "now it is 0.5" in said

        (disk / "other").unlink()
        result, said = run_here(finetune.main, *same, cwd=tmp_path)
        assert f"resume after an interruption with --resume {run_dir}" in said
        assert result["model_version"] == 1
        again, said = run_here(finetune.main, *same, cwd=tmp_path)
        assert "is already finished" in said and again == result
        change("ro")
        _, said = run_here(finetune.main, *words, f"cluster.storage_path={disk}", cwd=tmp_path, status=2)
        assert f"cluster.storage_path={disk} cannot be written" in said and "Read-only" in said
        (run,) = client.search_runs([run.info.experiment_id])
        assert run.info.status == "FINISHED", "one run for all of it"
