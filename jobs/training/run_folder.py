"""Folder of a training run on disk or in an object store: settings, checkpoints, result."""

from __future__ import annotations

import json
import platform
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.fs
import ray.train

from data_ingest.claims import only_writer
from jobs.tracking.naming import flat
from screformer.config import ExperimentConfig, Task
from screformer.storage import filesystem, writing
from screformer.training_checkpoint import damage, read_position

RUN_FILE, RESULT_FILE = "run.json", "result.json"
_ATTEMPT = re.compile(r"attempt-\d+")
_CHECKPOINT = re.compile(r"checkpoint_\d[\d_.-]*")
"""Ray Train's names. It also keeps `checkpoint_manager_snapshot.json` next to the checkpoints."""


def new_run_dir(config: ExperimentConfig, task: Task, run_id: str) -> str:
    """Path or URI of a new run's folder."""
    name, storage = f"{task}-{run_id[:8]}-{uuid.uuid4().hex[:4]}", config.cluster.storage_path
    return (
        f"{storage.rstrip('/')}/{name}" if "://" in storage else str(Path(storage or "runs").resolve() / name)
    )


def require_writable(place: str, what: str) -> None:
    """Refuse a folder or URI that this machine cannot write to.

    Args:
        place: The folder, which is created, or the URI.
        what: The setting or option that named it.

    Raises:
        ValueError: It cannot be written to.
    """
    name = f"writable-{uuid.uuid4().hex}"
    try:
        write_json(place, name, {})
        files, path = filesystem(place)
        files.delete_file(f"{path}/{name}")
    except OSError as error:
        raise ValueError(
            f"{what}={place} cannot be written ({error}); use a folder or URI that this machine and all nodes"
            f" can write to"
        ) from error


@contextmanager
def only_run(run_dir: str) -> Iterator[None]:
    """Be the only process that writes to the folder.

    Raises:
        ValueError: Another process does, or it cannot be written.
    """
    files, path = filesystem(run_dir)
    with only_writer(files, f"{path}/writing", run_dir):
        yield


def is_begun(run_dir: str, asked: dict[str, Any], *, file: str = RUN_FILE) -> bool:
    """Whether the folder has a run of the same command.

    Args:
        run_dir: The folder; it need not exist.
        asked: Plain values of what the command asks for, which a run saves as `asked`.
        file: The file that the run saves it in.

    Raises:
        ValueError: It has a run of another command.
    """
    try:
        saved = _read_json(run_dir, file).get("asked", {})
    except (OSError, ValueError):
        return False
    ours, theirs = flat(json.loads(json.dumps(asked))), flat(saved)
    different = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    if different:
        name = different[0]
        raise ValueError(
            f"--run-dir {run_dir} has a run with {name.removeprefix('settings.')}={theirs.get(name)!r}, now"
            f" it is {ours.get(name)!r}; use another folder, or resume that run with --resume {run_dir}"
        )
    return True


def require_seen(run_dir: str) -> None:
    """Reject a run folder that this node cannot access.

    Raises:
        ValueError: It is a path that does not exist on this node.
    """
    if "://" not in run_dir and not Path(run_dir).is_dir():
        raise ValueError(
            f"node {platform.node()} cannot access {run_dir}; cluster.storage_path must be a folder shared by"
            f" all nodes, or a URI such as s3://BUCKET/runs"
        )


def write_json(run_dir: str, name: str, tree: dict[str, Any]) -> None:
    """Write a JSON file to the folder; a missing folder is created."""
    files, path = filesystem(run_dir)
    files.create_dir(path, recursive=True)
    with files.open_output_stream(f"{path}/{name}") as out:
        out.write(json.dumps(tree, indent=2).encode())


def read_run(run_dir: str, *, option: str = "--resume") -> dict[str, Any]:
    """Read the file that a run wrote when it started.

    It has `config`, `task`, `init_from`, `query_hash` and `run`.

    Raises:
        ValueError: There is no such folder; the message names the command's option.
    """
    try:
        return _read_json(run_dir, RUN_FILE)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{option} {run_dir} has no {RUN_FILE} ({error}); give the folder that the run printed when it"
            f" started"
        ) from error


def read_result(run_dir: str) -> dict[str, Any] | None:
    """The result of a finished run; None if the run did not finish."""
    try:
        return _read_json(run_dir, RESULT_FILE)
    except (OSError, ValueError):
        return None


def attempts(run_dir: str) -> list[str]:
    """Folders of the run's attempts, oldest first."""
    files, path = filesystem(run_dir)
    return list(_folders(files, path, _ATTEMPT))


def newest_checkpoint(run_dir: str) -> tuple[ray.train.Checkpoint, bool] | None:
    """The newest complete checkpoint and whether training ended with it, or None if there is none yet.

    A damaged checkpoint is reported, and the one before it is used.
    """
    files, _ = filesystem(run_dir)
    for attempt in reversed(attempts(run_dir)):
        for path in reversed(list(_folders(files, attempt, _CHECKPOINT))):
            checkpoint = ray.train.Checkpoint(path, filesystem=files)
            with checkpoint.as_directory() as folder:
                fault = damage(folder)
                if not fault:
                    return checkpoint, bool(read_position(folder)["finished"])
            print(f"{path} is skipped: {fault}", flush=True)
    print(f"{run_dir} has no complete checkpoint yet; training starts from the beginning", flush=True)
    return None


@contextmanager
def resumable(run_dir: str | Path) -> Iterator[None]:
    """Add how to resume the run to a KeyboardInterrupt or to the error about a folder that is not writable.

    Raises:
        StorageError: The run folder, or a temporary one, cannot be written.
    """
    try:
        with writing(run_dir, f"resume with --resume {run_dir}"):
            yield
    except KeyboardInterrupt as stop:
        stop.add_note(f"resume with --resume {run_dir}")
        raise


def keep_model(checkpoint: ray.train.Checkpoint, run_dir: str) -> Path:
    """Copy a checkpoint's model to the run folder, where it outlives the checkpoints.

    If the run folder is remote, a temporary folder is used.
    """
    target = model_folder(run_dir)
    with checkpoint.as_directory() as folder:
        shutil.copytree(Path(folder) / "model", target, dirs_exist_ok=True)
    return target


def model_folder(run_dir: str) -> Path:
    """Local folder for the model of a run."""
    return Path(tempfile.mkdtemp(prefix="screformer-model-") if "://" in run_dir else run_dir) / "model"


def _read_json(run_dir: str, name: str) -> dict[str, Any]:
    files, path = filesystem(run_dir)
    with files.open_input_stream(f"{path}/{name}") as source:
        return json.loads(source.read())


def _folders(files: pyarrow.fs.FileSystem, path: str, name: re.Pattern[str]) -> Iterator[str]:
    """Subfolders whose name matches, sorted by name."""
    found = files.get_file_info(pyarrow.fs.FileSelector(path, allow_not_found=True))
    for info in sorted(found, key=lambda info: info.base_name):
        if info.type == pyarrow.fs.FileType.Directory and name.fullmatch(info.base_name):
            yield info.path
