"""The folder of a run on disk and on S3: which checkpoint a resume uses, and who may write."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from data_ingest.claims import only_writer
from helpers.processes import REPO_ROOT, run_here, run_python
from helpers.servers import S3
from jobs import crossval, finetune
from jobs.training.run import run_training
from jobs.training.run_folder import (
    attempts,
    is_begun,
    keep_model,
    newest_checkpoint,
    only_run,
    read_result,
    write_json,
)
from jobs.training.worker import latest_checkpoint
from screformer.config import ExperimentConfig
from screformer.storage import filesystem
from screformer.training_checkpoint import read_position


@pytest.fixture(params=["disk", "s3"])
def run_dir(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "disk":
        return str(tmp_path / "run")
    s3: S3 = request.getfixturevalue("s3")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint)
    return f"{s3.uri}/{tmp_path.name}"


def _write(run_dir: str, name: str, content: bytes) -> None:
    files, path = filesystem(run_dir)
    target = f"{path}/{name}"
    files.create_dir(target.rpartition("/")[0], recursive=True)
    with files.open_output_stream(target) as out:
        out.write(content)


def _checkpoint(run_dir: str, attempt: int, number: int, *, finished: bool = False) -> str:
    """A sealed checkpoint with a file for its model, named as by Ray Train."""
    name = f"attempt-{attempt:03d}/checkpoint_2026-11-26_17-00-{number:02d}.000001"
    files = {
        "position.json": json.dumps({"finished": finished, "global_step": number}).encode(),
        "model/part.bin": b"model %d" % number,
    }
    for file, content in files.items():
        _write(run_dir, f"{name}/{file}", content)
    manifest = {
        file: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for file, content in files.items()
    }
    _write(run_dir, f"{name}/manifest.json", json.dumps({"format": "1", "files": manifest}).encode())
    return name


def _step(run_dir: str) -> tuple[int, bool] | None:
    found = newest_checkpoint(run_dir)
    if found is None:
        return None
    with found[0].as_directory() as folder:
        return json.loads((Path(folder) / "position.json").read_text())["global_step"], found[1]


def test_a_resume_takes_the_newest_whole_checkpoint(run_dir: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert attempts(run_dir) == [] and _step(run_dir) is None
    _checkpoint(run_dir, 0, 1)
    _write(run_dir, "attempt-000/checkpoint_manager_snapshot.json", b"{}")
    _write(run_dir, "attempt-000/checkpoint_notes/anything", b"")
    assert _step(run_dir) == (1, False)
    newest = _checkpoint(run_dir, 1, 3)
    _checkpoint(run_dir, 1, 2)
    _write(run_dir, "attempt-002/checkpoint_manager_snapshot.json", b"{}")  # killed before its first one
    assert [path.rpartition("/")[2] for path in attempts(run_dir)] == [f"attempt-{n:03d}" for n in range(3)]
    assert _step(run_dir) == (3, False)

    for spoil, reason in (
        (
            lambda: _write(run_dir, f"{newest}/model/part.bin", b"Model 3"),
            "part.bin was changed: its SHA-256",
        ),
        (lambda: _write(run_dir, f"{newest}/model/part.bin", b"\0"), "part.bin has 1 bytes, not 7"),
        (
            lambda: _write(run_dir, f"{newest}/manifest.json", b'{"format"'),
            "it has no complete manifest.json",
        ),
    ):
        spoil()
        capsys.readouterr()
        assert _step(run_dir) == (2, False)
        printed = capsys.readouterr().out
        assert f"{newest} is skipped: " in printed and reason in printed


def test_a_run_that_ended_is_known_by_its_checkpoint_or_its_result(run_dir: str) -> None:
    _checkpoint(run_dir, 0, 1)
    _checkpoint(run_dir, 0, 2, finished=True)
    found = newest_checkpoint(run_dir)
    assert found is not None and found[1]
    assert (keep_model(found[0], run_dir) / "part.bin").read_bytes() == b"model 2"
    assert read_result(run_dir) is None
    write_json(run_dir, "result.json", {"model_version": 3})
    assert read_result(run_dir) == {"model_version": 3}


def test_ranks_that_start_again_fall_back_like_a_resume(
    run_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """After the loss of a worker Ray Train would take its newest checkpoint unread."""
    _checkpoint(run_dir, 0, 1)
    newest = _checkpoint(run_dir, 0, 2)
    _write(run_dir, f"{newest}/model/part.bin", b"Model 2")
    own_group = not torch.distributed.is_initialized()
    if own_group:
        torch.distributed.init_process_group(
            "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
        )
    try:
        found = latest_checkpoint(run_dir)
    finally:
        if own_group:
            torch.distributed.destroy_process_group()
    assert found is not None
    with found.as_directory() as folder:
        assert read_position(folder)["global_step"] == 1
    assert "part.bin was changed: its SHA-256" in capsys.readouterr().out


def test_the_same_command_finds_its_run_again(run_dir: str) -> None:
    config = ExperimentConfig()
    asked = {"task": "finetune", "init_from": None, "settings": config.to_dict()}
    assert not is_begun(run_dir, asked)
    write_json(run_dir, "run.json", {"asked": asked})
    assert is_begun(run_dir, asked)
    other = {**asked, "settings": config.merge({"train.lr": 0.5}).to_dict()}
    with pytest.raises(ValueError, match=r"has a run with train.lr=0.001, now it is 0.5; use another folder"):
        is_begun(run_dir, other)


def test_one_process_writes_a_run_and_a_dead_one_does_not_count(run_dir: str) -> None:
    files, path = filesystem(run_dir)
    refused = pytest.raises(ValueError, match=r"is being written by process \d+ of .* wait for it")
    with (
        only_writer(files, f"{path}/writing", run_dir),
        refused,
        only_writer(files, f"{path}/writing", run_dir),
    ):
        pass
    # A killed process leaves its claim behind.
    script = (
        "import os, sys; from data_ingest.claims import only_writer;"
        " from screformer.storage import filesystem; files, path = filesystem(sys.argv[1]);"
        " only_writer(files, f'{path}/writing', 'run').__enter__(); print('claimed', flush=True); os._exit(0)"
    )
    assert "claimed" in run_python("-c", script, run_dir).stdout
    with only_writer(files, f"{path}/writing", run_dir):
        pass


@pytest.mark.parametrize("command", [finetune, crossval])
def test_a_second_start_is_refused_before_it_leaves_anything(command: Any, tmp_path: Path) -> None:
    """Two starts of one new `--run-dir`: no run in MLflow that would be RUNNING for ever."""
    words = ["--config", REPO_ROOT / "jobs" / "recipes" / "smoke.yaml", "atlas.uri=not-read-yet"]
    words += [f"tracking.uri=sqlite:///{tmp_path / 'mlflow.db'}", "--run-dir", tmp_path / "run"]
    with only_run(str(tmp_path / "run")):
        _, printed = run_here(command.main, *words, cwd=tmp_path, status=2)
    assert f"{tmp_path / 'run'} is being written by process" in printed and printed.count("\n") == 1
    assert [path.name for path in tmp_path.rglob("*")] == ["run"]


def test_what_another_process_finished_in_the_meantime_is_not_run_again(tmp_path: Path) -> None:
    """A start that saw no run in its folder gets it when the first one is done."""
    found = {"run_id": "1", "run_dir": str(tmp_path), "model_dir": "m", "metrics": {}, "model_version": None}
    config = ExperimentConfig().merge({"atlas.uri": "not-read"})
    asked = {"task": "finetune", "init_from": None, "settings": config.to_dict()}

    @contextmanager
    def after_the_other(run_dir: str) -> Iterator[None]:
        write_json(run_dir, "run.json", {"asked": asked})
        write_json(run_dir, "result.json", found)
        with only_run(run_dir):
            yield

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jobs.training.run.only_run", after_the_other)
        assert dataclasses.asdict(run_training(config, "finetune", folder=str(tmp_path))) == found
