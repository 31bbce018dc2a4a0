"""The folder of a training run: run.json, attempts and checkpoints."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.fs
import ray
import ray.train.torch

from screformer.config import ExperimentConfig, Task
from screformer.training_checkpoint import damage, read_position

RUN_FILE = "run.json"


def new_run_dir(config: ExperimentConfig, task: Task, run_id: str) -> str:
    """Path or URI of a new run's folder."""
    name, storage = f"{task}-{run_id[:8]}-{uuid.uuid4().hex[:4]}", config.cluster.storage_path
    return (
        f"{storage.rstrip('/')}/{name}" if "://" in storage else str(Path(storage or "runs").resolve() / name)
    )


def _filesystem(run_dir: str) -> tuple[pyarrow.fs.FileSystem, str]:
    return pyarrow.fs.FileSystem.from_uri(run_dir if "://" in run_dir else Path(run_dir).resolve().as_uri())


def write_run(run_dir: str, tree: dict[str, Any]) -> None:
    """Write `run.json`."""
    files, path = _filesystem(run_dir)
    files.create_dir(path, recursive=True)
    with files.open_output_stream(f"{path}/{RUN_FILE}") as out:
        out.write(json.dumps(tree, indent=2).encode())


def read_run(run_dir: str, *, option: str = "--resume") -> dict[str, Any]:
    """What a run wrote into its folder when it started.

    `config`, `task`, `init_from`, `query_hash` and `run`.

    Raises:
        ValueError: No such folder; the message names the command's option.
    """
    files, path = _filesystem(run_dir)
    try:
        with files.open_input_stream(f"{path}/{RUN_FILE}") as source:
            return json.loads(source.read())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{option} {run_dir}: no {RUN_FILE} there ({error}); give the folder that the run printed when it"
            f" started"
        ) from error


def attempts(run_dir: str) -> list[str]:
    """Folders of the run's attempts, oldest first."""
    files, path = _filesystem(run_dir)
    found = files.get_file_info(pyarrow.fs.FileSelector(path, allow_not_found=True))
    return sorted(
        info.path
        for info in found
        if info.type == pyarrow.fs.FileType.Directory and info.base_name.startswith("attempt-")
    )


def newest_checkpoint(run_dir: str) -> ray.train.Checkpoint | None:
    """The last checkpoint that was written to its end, or None where there is none yet.

    Raises:
        ValueError: The run is finished.
    """
    files, _ = _filesystem(run_dir)
    for attempt in reversed(attempts(run_dir)):
        folders = [
            info
            for info in files.get_file_info(pyarrow.fs.FileSelector(attempt))
            if info.type == pyarrow.fs.FileType.Directory and info.base_name.startswith("checkpoint_")
        ]
        for info in sorted(folders, key=lambda info: info.base_name, reverse=True):
            checkpoint = ray.train.Checkpoint(info.path, filesystem=files)
            with checkpoint.as_directory() as folder:
                if fault := damage(folder):
                    print(f"{info.path} is left out: {fault}", flush=True)
                    continue
                if read_position(folder)["finished"]:
                    raise ValueError(
                        f"--resume {run_dir}: that run is finished; its model is in {folder}/model"
                    )
                return checkpoint
    print(f"{run_dir} has no complete checkpoint yet: starting from its beginning", flush=True)
    return None


@contextmanager
def resumable(run_dir: str | Path) -> Iterator[None]:
    """Make a Ctrl-C within say how the run is resumed."""
    try:
        yield
    except KeyboardInterrupt as stop:
        stop.add_note(f"resume with --resume {run_dir}")
        raise
