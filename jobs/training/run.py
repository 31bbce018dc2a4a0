"""A training run from configuration to registered model.

Axes: n cells of the query, g genes of the vocabulary, k classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import ray
import ray.train.torch
import yaml

from cluster.connect import connect
from jobs.reports.artifacts import log_curves, log_test_cells
from jobs.tracking.runs import TrackedRun, start_run
from jobs.training.cells import TrainingCells, describe, prepare_cells
from jobs.training.launch import check_layout, train
from jobs.training.run_folder import new_run_dir, newest_checkpoint, read_run, resumable, write_run
from jobs.training.start import load_start
from jobs.training.task import training_task
from screformer.config import ExperimentConfig, Task
from screformer.predictor import Predictor

SHOWN_CELLS, SHOWN_TOKENS = 2000, 2_000_000
"""Most test cells, and most tokens, whose embeddings a run keeps for its report; the driver, which may have
no GPU, computes them."""


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """What a training run leaves."""

    run_id: str
    """MLflow run."""
    run_dir: str
    """Folder or URI of checkpoints; `--resume` takes it."""
    model_dir: str
    """Local directory of the best model."""
    metrics: dict[str, float]
    """`best_val/...` and `test/...` of the best model."""
    model_version: int | None
    """Version in the registry; None for pre-training, and where the tracking server is away and `jobs.sync`
    has to register it."""


def run_training(
    config: ExperimentConfig,
    task: Task,
    *,
    init_from: str | None = None,
    resume: str | None = None,
    overrides: Sequence[str] = (),
) -> TrainingResult:
    """Train a model with Ray Train; connects to Ray where no connection is.

    Args:
        config: The run's settings. When resuming, those that the run was started with are taken instead, with
            `overrides`.
        task: `pretrain` or `finetune`.
        init_from: Model to start from: a run id, `runs:/...`, `models:/NAME@ALIAS` or a model directory.
        resume: Run folder of a training that was killed; it goes on after its newest complete checkpoint.
        overrides: Settings that differ when resuming, such as `cluster.num_workers=1`.

    Raises:
        ValueError: Settings, cells, start model or cluster do not allow the run.
        ray.train.TrainingFailedError: A worker failed more often than `cluster.max_failures`.
    """
    saved: dict[str, Any] = {}
    if resume is not None:
        saved = read_run(resume)
        config, task, init_from = (
            ExperimentConfig.from_saved(saved["config"], resume=True).merge(overrides, command=saved["task"]),
            saved["task"],
            saved["init_from"],
        )
    workers, cpus_per_worker = config.cluster.num_workers, config.cluster.cpus_per_worker
    connect(num_cpus=workers * cpus_per_worker + config.cluster.cpus_per_read_task)
    check_layout(config, ray.nodes())
    start = load_start(config, init_from) if init_from else None
    cells = prepare_cells(config, task, start=start)
    config = cells.config
    run = TrackedRun(**saved["run"]) if saved else start_run(config, task)
    run_dir = resume or new_run_dir(config, task, run.run_id)
    run = run.kept_in(run_dir)
    with run, resumable(run_dir):
        checkpoint = None
        if saved:
            if saved["query_hash"] != cells.query.hash:
                raise ValueError(
                    f"{run_dir} was trained on other cells (query hash {saved['query_hash'][:12]}, now"
                    f" {cells.query.hash[:12]})"
                )
            checkpoint = newest_checkpoint(run_dir)
        else:
            plain = {
                "config": config.to_dict(),
                "task": task,
                "init_from": init_from,
                "query_hash": cells.query.hash,
            }
            write_run(run_dir, {**plain, "run": dataclasses.asdict(run)})
            run.log_identity(cells.identity())
            if start is not None:
                run.set_tags({"start": {"model": init_from, "run_id": start.meta.get("run_id", "")}})
        print(cells.attention, flush=True)
        for note in cells.notes:
            print(f"note: {note}", flush=True)
        print(f"{task} in {run_dir} (resume after an interruption with --resume {run_dir})", flush=True)
        trained = train(training_task(task, cells, run, model=start, checkpoint=checkpoint), run_dir)
        version = None
        if task == "finetune":
            _log_test_cells(run, cells, trained.model_dir)
            version = run.register(trained.model_dir, config.tracking.model_name)
        else:
            run.log_file(trained.model_dir)
        log_curves(run)
    return TrainingResult(
        run_id=run.run_id,
        run_dir=run_dir,
        model_dir=str(trained.model_dir),
        metrics=trained.metrics,
        model_version=version,
    )


def describe_training(
    config: ExperimentConfig,
    task: Task,
    *,
    init_from: str | None = None,
    resume: str | None = None,
    overrides: Sequence[str] = (),
) -> str:
    """What `run_training` would do, as YAML: its settings, then cells, steps, memory and notes.

    Args and errors are those of `run_training`; nothing is written, and Ray is not started.
    """
    if resume is not None:
        saved = ExperimentConfig.from_saved(read_run(resume)["config"], resume=True)
        config = saved.merge(overrides, command=task)
    start = load_start(config, init_from) if init_from else None
    cells = prepare_cells(config, task, start=start)
    parts = (cells.config.to_dict(task), describe(cells))
    return "\n".join(yaml.safe_dump(part, sort_keys=False) for part in parts) + cells.attention


def _log_test_cells(run: TrackedRun, cells: TrainingCells, model_dir: Path) -> None:
    """Log what the model says of some test cells.

    With their embeddings, for the pictures of `jobs.report`.
    """
    if not len(cells.parts["test"]):
        return
    predictor = Predictor.load(model_dir)
    most_cells = min(SHOWN_CELLS, SHOWN_TOKENS // cells.config.tokens.most_slots(len(cells.genes)))
    found = cells.sample("test", most_cells)
    said = predictor.predict(found.cells)
    position = np.searchsorted(cells.query.obs_joinids, found.joinids_n)
    groups = {
        name: cells.query.obs[name].astype(str).to_numpy()[position] for name in ("dataset_id", "donor_id")
    }
    table = pd.DataFrame(
        {
            "joinid": found.joinids_n,
            **groups,
            "label": np.array(cells.labels["names"], dtype=object)[found.labels_n],
            "prediction": said.best_labels,
            "confidence": said.probabilities_nk.max(axis=1),
            "said": said.labels,
            "embedding": list(said.embedding_nd),
        }
    )
    log_test_cells(run, table)
