"""A training run, from configuration to registered model.

Axes: n cells of the query, g genes of the vocabulary, k classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import nullcontext
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
from jobs.training.before_after import log_move
from jobs.training.cells import TrainingCells
from jobs.training.launch import check_layout, train
from jobs.training.preflight import (
    describe,
    local_memory,
    preflight,
    preflight_line,
    refuse_what_cannot_fit,
)
from jobs.training.prepare import prepare_cells
from jobs.training.reference import cells_to_show, keep_reference
from jobs.training.run_folder import (
    RESULT_FILE,
    RUN_FILE,
    is_begun,
    keep_model,
    new_run_dir,
    newest_checkpoint,
    only_run,
    read_result,
    read_run,
    require_writable,
    resumable,
    write_json,
)
from jobs.training.start import load_start, settings_of_start
from jobs.training.task import training_task
from screformer.checkpoint import LoadedModel, load_model
from screformer.config import ExperimentConfig, Task
from screformer.predictor import Predictor
from screformer.storage import absolute


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """Result of a training run."""

    run_id: str
    """MLflow run."""
    run_dir: str
    """Run folder or URI, for `--resume`."""
    model_dir: str
    """Local directory of the best model."""
    metrics: dict[str, float]
    """`best_val/...` and `test/...` of the best model."""
    model_version: int | None
    """Version in the registry. None for pre-training, or if the tracking server is down and `jobs.sync` has
    to register the model later."""


def run_training(
    config: ExperimentConfig,
    task: Task,
    *,
    init_from: str | None = None,
    resume: str | None = None,
    overrides: Sequence[str] = (),
    folder: str | None = None,
) -> TrainingResult:
    """Train a model with Ray Train; connects to Ray if needed.

    Args:
        config: The run's settings. When resuming, the run's original settings with `overrides` are used
            instead.
        task: `pretrain` or `finetune`.
        init_from: Model to start from: a run id, `runs:/...`, `models:/NAME@ALIAS` or a model directory.
        resume: Run folder of an interrupted training, which resumes from its newest complete checkpoint.
        overrides: Settings to change when resuming, for example `cluster.num_workers=1`.
        folder: Path or URI of the run folder; if it has a run of the same settings, that one is resumed. By
            default, a new one in `cluster.storage_path`.

    Raises:
        ValueError: The settings, cells, start model or cluster do not allow the run; another process is
            writing to the run folder; `folder` has a run of other settings; or a loss or weight became NaN or
            infinite.
        KeyboardInterrupt: SIGTERM or SIGINT arrived; the exception's notes show how to resume.
        RuntimeError: Workers failed more often than `cluster.max_failures`, or could not be started.
        StorageError: The run folder cannot be written.
    """
    asked = {"task": task, "init_from": init_from, "settings": config.to_dict()}
    if folder is not None:
        folder = absolute(folder)
        resume = folder if is_begun(folder, asked) else None
        overrides = () if resume else overrides
    if resume is not None:
        read_run(resume)
        if found := _finished(resume):
            return found
    elif folder is not None:
        require_writable(folder, "--run-dir")
    else:
        require_writable(config.cluster.storage_path or "runs", "cluster.storage_path")
    given = resume or folder
    with only_run(given) if given else nullcontext():
        if folder is not None and is_begun(folder, asked):
            resume = folder
        if resume is not None and (found := _finished(resume)):  # by another process, in the meantime
            return found
        return _run(config, asked, given, resumes=resume is not None, overrides=overrides)


def _finished(run_dir: str) -> TrainingResult | None:
    """The result of a finished run."""
    found = read_result(run_dir)
    if found is None:
        return None
    print(f"{run_dir} is already finished; there is nothing to resume", flush=True)
    return TrainingResult(**found)


def _run(
    config: ExperimentConfig,
    asked: dict[str, Any],
    given: str | None,
    *,
    resumes: bool,
    overrides: Sequence[str],
) -> TrainingResult:
    """A run in a folder that no other process writes to; without a given one, in a new folder."""
    task, init_from, saved = asked["task"], asked["init_from"], {}
    if resumes:
        assert given is not None
        saved = read_run(given)
        task, init_from = saved["task"], saved["init_from"]
        config = ExperimentConfig.from_saved(saved["config"], resume=True).merge(overrides, command=task)
    workers, cpus_per_worker = config.cluster.num_workers, config.cluster.cpus_per_worker
    connect(num_cpus=workers * cpus_per_worker + config.cluster.cpus_per_read_task)
    check_layout(config, ray.nodes(), resumes=resumes)
    start = None
    if init_from:
        start = load_start(config, init_from)
        own, config = config, settings_of_start(config, start, init_from)
        if taken := config.differences(own):
            print(
                f"note: taken from {init_from}: {', '.join(f'{k}={v}' for k, v in taken.items())}", flush=True
            )
    cells = prepare_cells(config, task, start=start)
    if saved and saved["query_hash"] != cells.query.hash:
        raise ValueError(
            f"{given} was trained on other cells (query hash {saved['query_hash'][:12]}, now"
            f" {cells.query.hash[:12]})"
        )
    order = cells.cache.order_hash if cells.cache else ""
    if saved and saved.get("cache", "") != order:
        raise ValueError(
            f"{given} was trained {_with_cache(saved.get('cache', ''))}, now {_with_cache(order)}; the order"
            " of its cells would change in the middle of an epoch, so resume it with the same stream.cache"
        )
    needs, nodes = preflight(cells), ray.nodes()
    refuse_what_cannot_fit(
        cells.config,
        needs,
        given or config.cluster.storage_path,
        [node["Resources"].get("memory", 0) for node in nodes if node["Alive"]],
    )
    run = TrackedRun(**saved["run"]) if saved else start_run(cells.config, task)
    run_dir = given or new_run_dir(config, task, run.run_id)
    run = run.kept_in(run_dir)
    with run, resumable(run_dir), nullcontext() if given else only_run(run_dir):
        if not saved:
            started = {"config": cells.config.to_dict(), "task": task, "init_from": init_from}
            started |= {"query_hash": cells.query.hash, "run": dataclasses.asdict(run), "asked": asked}
            started["cache"] = order
            write_json(run_dir, RUN_FILE, started)
            run.log_identity(cells.identity())
            if start is not None:
                run.set_tags({"start": {"model": init_from, "run_id": start.meta.get("run_id", "")}})
        print(cells.attention, flush=True)
        print(preflight_line(needs, nodes), flush=True)
        for note in cells.notes:
            print(f"note: {note}", flush=True)
        print(f"{task} in {run_dir} (resume after an interruption with --resume {run_dir})", flush=True)
        model_dir = _trained_model(task, cells, run, run_dir, model=start, resumes=bool(saved))
        version = None
        if task == "finetune":
            predictor = Predictor.load(model_dir)
            keep_reference(cells, predictor)
            if start is not None and start.labels["names"] and cells.move is not None:
                log_move(run, cells, Predictor(start, ""), predictor)
            _log_test_cells(run, cells, predictor)
            version = run.register(model_dir, cells.config.tracking.model_name)
        else:
            run.log_file(model_dir)
        log_curves(run)
    result = TrainingResult(
        run_id=run.run_id,
        run_dir=run_dir,
        model_dir=str(model_dir),
        metrics=load_model(model_dir).meta["metrics"],
        model_version=version,
    )
    write_json(run_dir, RESULT_FILE, dataclasses.asdict(result))
    return result


def _with_cache(order: str) -> str:
    return f"with a shard cache of order {order[:12]}" if order else "without a shard cache"


def _trained_model(
    task: Task,
    cells: TrainingCells,
    run: TrackedRun,
    run_dir: str,
    *,
    model: LoadedModel | None,
    resumes: bool,
) -> Path:
    """Train, resume from the newest checkpoint, or return the model of a training that already ended."""
    newest = newest_checkpoint(run_dir) if resumes else None
    checkpoint, ended = newest or (None, False)
    if checkpoint is not None and ended:
        print("training had already ended; completing the rest of the run", flush=True)
        return keep_model(checkpoint, run_dir)
    training = training_task(task, cells, run, model=model, checkpoint=checkpoint)
    return train(training, run_dir, elastic=True).model_dir


def describe_training(
    config: ExperimentConfig,
    task: Task,
    *,
    init_from: str | None = None,
    resume: str | None = None,
    overrides: Sequence[str] = (),
) -> str:
    """A plan of `run_training` as YAML: its settings, then cells, steps, memory and notes.

    Args and errors are as in `run_training`. Nothing is written, and Ray is not started.
    """
    if resume is not None:
        saved = ExperimentConfig.from_saved(read_run(resume)["config"], resume=True)
        config = saved.merge(overrides, command=task)
    start = None
    if init_from:
        start = load_start(config, init_from)
        config = settings_of_start(config, start, init_from)
    cells = prepare_cells(config, task, start=start)
    described = describe(cells)
    refuse_what_cannot_fit(cells.config, described, resume or config.cluster.storage_path, local_memory())
    parts = (cells.config.to_dict(task), described)
    return "\n".join(yaml.safe_dump(part, sort_keys=False) for part in parts) + cells.attention


def _log_test_cells(run: TrackedRun, cells: TrainingCells, predictor: Predictor) -> None:
    """Log predictions and embeddings of some test cells, for the figures of `jobs.report`."""
    if not len(cells.parts["test"]):
        return
    found = cells.sample("test", cells_to_show(cells))
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
