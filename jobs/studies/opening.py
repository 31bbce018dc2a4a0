"""Start or resume a study: its folder, its MLflow run, and the check that the cluster has room."""

from __future__ import annotations

import dataclasses
import json
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from cluster.connect import connect
from data_ingest.folds import FILE
from jobs.studies.layout import check_study_layout, num_cpus, search_space
from jobs.studies.study import Study, open_study
from jobs.tracking.identity import code_identity
from jobs.tracking.runs import TrackedRun, start_run
from jobs.training.run_folder import is_begun, only_run, require_writable, resumable
from screformer.config import Command, ExperimentConfig

STUDY = "study.json"
FORMAT = 2
"""Format of the study's folder; 2 names trial folders by how they differ from the study's settings."""


@contextmanager
def opened(
    config: ExperimentConfig,
    job: Command,
    *,
    folds_from: str | None = None,
    resume: str | None = None,
    folder: str | None = None,
    axes: Sequence[str] = (),
) -> Iterator[Study]:
    """A running study: Ray connected, layout checked, folder and parent run created or resumed.

    Args:
        config: The recipe; when resuming, the interrupted study's is used instead.
        job: `crossval` or `ablate`.
        folds_from: As in `open_study`.
        resume: Folder of the interrupted study.
        folder: The study's folder; if it has a study of the same command, that one is resumed. By default, a
            new one in `cluster.storage_path`.
        axes: What the command asks for besides its settings.

    Raises:
        ValueError: The settings, cells, folds or cluster do not allow it; another process is writing to the
            folder; or `folder` has another study.
    """
    asked = {"job": job, "folds": folds_from, "axes": list(axes), "settings": config.to_dict()}
    place, option = (folder, "--run-dir") if folder else (config.cluster.storage_path, "cluster.storage_path")
    place = place or "runs"
    if "://" in (resume or place):
        raise ValueError(f"{option}={place!r}: a study needs a folder that all nodes can see, not a URI")
    if resume:
        read_study(resume)
    else:
        require_writable(place, option)
    name = f"{job}-{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:4]}"
    run_dir = Path(resume or folder or Path(place) / name).resolve()
    with only_run(str(run_dir)):
        begun = bool(resume) or is_begun(str(run_dir), asked, file=STUDY)
        with _open(config, job, run_dir, asked, begun=begun) as study:
            yield study


@contextmanager
def _open(
    config: ExperimentConfig, job: Command, run_dir: Path, asked: dict[str, Any], *, begun: bool
) -> Iterator[Study]:
    """A study in a folder that no other process writes to."""
    saved = read_study(str(run_dir)) if begun else {}
    config = ExperimentConfig.from_saved(saved["config"], resume=True) if saved else config
    connect(num_cpus=num_cpus(config))
    check_study_layout(config, ray.nodes())
    search_space(config)
    folds_from = None if begun else asked["folds"]
    study = open_study(config, run_dir=run_dir, folds_from=folds_from, resume=bool(saved))
    if saved and saved["query_hash"] != study.query.hash:
        raise ValueError(
            f"{run_dir} was started on different cells (query hash {saved['query_hash'][:12]}, now"
            f" {study.query.hash[:12]})"
        )
    run = TrackedRun(**saved["run"]) if saved else start_run(study.config, job)
    study = dataclasses.replace(study, run=run)
    with run, resumable(run_dir):
        if not saved:
            _begin(study, run, job, asked)
        print(f"{job} in {run_dir} (resume after an interruption with --resume {run_dir})", flush=True)
        yield study


def _begin(study: Study, run: TrackedRun, job: Command, asked: dict[str, Any]) -> None:
    """Write what a resumed study needs, and log the study's parameters."""
    study.run_dir.mkdir(parents=True, exist_ok=True)
    study.folds.save(study.run_dir / FILE, study.query.obs_joinids)
    tree = {
        "format": FORMAT,
        "code": code_identity(),
        "job": job,
        "config": study.config.to_dict(),
        "query_hash": study.query.hash,
        "run": dataclasses.asdict(run),
        "asked": asked,
    }
    (study.run_dir / STUDY).write_text(json.dumps(tree, indent=2))
    run.log_identity({"query": study.query.identity(), "split": {"group_by": study.folds.group_by}})
    run.log_file(study.run_dir / FILE)


def read_study(run_dir: str) -> dict[str, Any]:
    """Read what a study wrote into its folder when it started.

    Raises:
        ValueError: The file is missing, or was written by another version.
    """
    try:
        tree: dict[str, Any] = json.loads((Path(run_dir) / STUDY).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--resume {run_dir}: no {STUDY} there ({error}); give the folder printed when the study started"
        ) from error
    if tree.get("format") != FORMAT:
        writer = tree.get("code", {}).get("git", "commit 2dc0365 or earlier")
        raise ValueError(
            f"--resume {run_dir}: its format is {tree.get('format', 1)}, this version resumes {FORMAT};"
            f" resume it with git {writer}, or start a new study on the same folds with --folds {run_dir}"
        )
    return tree
