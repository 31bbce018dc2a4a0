"""Train and test one fold, and the final model on all folds.

Axes: n cells, g genes, k classes of the whole query.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jobs.studies.baseline_cells import BaselineCells, Part, baseline_parts
from jobs.studies.baselines import run_baseline
from jobs.studies.results import FoldResult
from jobs.studies.study import Study
from jobs.tracking.models import resolve_model
from jobs.tracking.runs import TrackedRun, start_run
from jobs.training.cells import TrainingCells
from jobs.training.launch import Trained, train
from jobs.training.run_folder import RUN_FILE, write_json
from jobs.training.task import training_task
from screformer.checkpoint import add_meta, load_model
from screformer.config import ExperimentConfig, Task
from screformer.cost import reset_peak_memory
from screformer.metrics import OURS
from screformer.predictor import Predictor

_CELLS_AT_ONCE = 8192
"""Test cells held in memory at a time."""


def run_fold(study: Study, settings: Mapping[str, Any], fold: int) -> FoldResult:
    """Train our model on one fold and label its test cells, or read an earlier result. Needs Ray.

    Args:
        study: The study.
        settings: Overrides of this configuration.
        fold: Which fold.
    """
    folder = study.trial_folder(settings)
    found = FoldResult.load(folder, fold)
    if found is not None:
        return found
    reset_peak_memory()
    start_s, cpu_start_s = time.perf_counter(), time.process_time()
    config = study.config.merge({**settings, "tracking.run_name": f"fold {study.folds.names[fold]}"})
    with _start(study, config, "crossval", study.run) as run:
        run.set_tags({"fold": study.folds.names[fold], "settings": json.dumps(dict(settings))})
        start_dir = _start_model(study, settings, fold, run)
        cells = study.cells(config, "finetune", fold, start_dir)
        begun_s = time.perf_counter()
        trained = train_fold("finetune", cells, start_dir, run, folder / f"fold-{fold}")
        model_dir, took = trained.model_dir, trained.account
        train_s = time.perf_counter() - begun_s
        predictor = Predictor.load(model_dir, device=None if config.cluster.use_gpu else "cpu")
        begun_s = time.perf_counter()
        positions, joinids, probabilities = _label_test_cells(study, cells, predictor, fold)
        known = study.known(cells)
        prior = np.zeros(len(study.label_names))
        prior[known] = cells.prior_k
        account = {
            "prior": prior.tolist(),
            "seconds": time.perf_counter() - start_s,
            "cpu_seconds": time.process_time() - cpu_start_s,
            "train_seconds": train_s,
            "predict_seconds": time.perf_counter() - begun_s,
            "parameters": sum(parameter.numel() for parameter in load_model(model_dir).model.parameters()),
            "chosen": {"step": took.best_step},
            "notes": list(cells.notes),
            "run_id": run.run_id,
            "cells_per_s": took.cells_per_s,
            "peak_memory_gb": took.peak_memory_gb,
        }
        result = FoldResult(
            method=OURS,
            fold=fold,
            joinids_n=joinids,
            labels_n=study.labels_n[positions],
            predicted_n=probabilities.argmax(1),
            probabilities_nk=probabilities,
            known=known,
            account=account,
        )
        result.save_predictions(folder)
        run.log_file(folder / f"fold-{fold}.parquet")
    # Written after the run has ended: a kill between the two leaves no finished fold with an open run.
    result.finish(folder)
    return result


def _label_test_cells(
    study: Study, cells: TrainingCells, predictor: Predictor, fold: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Predict the test cells of a fold that have a label.

    Returns:
        Their positions among the query's cells, joinids, and probabilities float32 (n, k).
    """
    known, positions = study.known(cells), study.split(fold)["test"]
    positions = positions[study.labels_n[positions] >= 0]
    probabilities_nk = np.zeros((len(positions), len(study.label_names)), np.float32)
    joinids = np.zeros(len(positions), np.int64)
    for first in range(0, len(positions), _CELLS_AT_ONCE):
        rows = slice(first, first + _CELLS_AT_ONCE)
        sample = study.test_cells(cells, positions[rows]).sample("test", _CELLS_AT_ONCE)
        joinids[rows] = sample.joinids_n
        probabilities_nk[rows, known] = predictor.predict(sample.cells).probabilities_nk
    return positions, joinids, probabilities_nk


def register_final(study: Study, settings: Mapping[str, Any], folds: Mapping[str, Any]) -> int | None:
    """Train a configuration on the cells of all folds and add it to the registry. Ray must be running.

    Args:
        study: The study.
        settings: Overrides of the configuration.
        folds: Results of its folds; stored in the model's metadata for the model card and `jobs.promote`.

    Returns:
        The version; None if the tracking server is unreachable and gets the model later.
    """
    registered = study.run_dir / "registered.json"
    if registered.exists():  # a study resumed after its end does not register the model twice
        version: int | None = json.loads(registered.read_text())["version"]
        return version
    everything = len(study.folds)  # this fold has no test cells, so all cells are used
    config = study.config.merge({**settings, "tracking.run_name": "all folds"})
    with _start(study, config, "crossval", study.run) as run:
        run.set_tags({"fold": "all", "settings": json.dumps(dict(settings))})
        start_dir = _start_model(study, settings, everything, run)
        cells = study.cells(config, "finetune", everything, start_dir)
        model_dir = train_fold("finetune", cells, start_dir, run, study.run_dir / "final").model_dir
        add_meta(model_dir, {"folds": dict(folds)})
        version = run.register(model_dir, config.tracking.model_name)
    registered.write_text(json.dumps({"version": version, "settings": dict(settings)}))
    return version


def read_baseline_cells(study: Study, fold: int) -> tuple[BaselineCells, np.ndarray, np.ndarray, list[int]]:
    """A fold's cells for the baselines, in the classes of the whole query. Ray must be running.

    They are fitted on the cells that our model trains on: `labels.max_cells` holds for all.

    Returns:
        The cells; joinid and class of each test cell; the classes that can be learned.
    """
    cells = study.cells(study.config, "finetune", fold)
    known = study.known(cells)
    test_n = study.split(fold)["test"]
    positions = {**cells.parts, "test": test_n[study.labels_n[test_n] >= 0]}
    parts, joinids = baseline_parts(dataclasses.replace(cells, codes_n=study.labels_n, parts=positions))
    test: Part = parts["test"]
    found = BaselineCells(
        train=parts["train"],
        val=parts["val"],
        test=test.cells,
        num_classes=len(study.label_names),
        genes=cells.genes.feature_ids,
    )
    return found, joinids, test.labels_n, known


def run_baseline_fold(
    study: Study,
    name: str,
    fold: int,
    cells: BaselineCells,
    joinids: np.ndarray,
    labels: np.ndarray,
    known: list[int],
) -> None:
    """Fit a baseline on one fold and save its result; the body of a Ray task."""
    reset_peak_memory()
    answer, cost = run_baseline(name, cells, study.config.train.seed)
    FoldResult(
        method=name,
        fold=fold,
        joinids_n=joinids,
        labels_n=labels,
        predicted_n=answer.predicted_n,
        probabilities_nk=answer.probabilities_nk,
        known=known,
        account={
            "prior": (
                np.bincount(cells.train.labels_n, minlength=cells.num_classes) / len(cells.train.labels_n)
            ).tolist(),
            "seconds": cost.seconds,
            "cpu_seconds": cost.cpu_seconds,
            "peak_memory_gb": cost.peak_memory_gb,
            "cells_per_s": len(cells.train.labels_n) / max(cost.seconds, 1e-9),
            "parameters": answer.parameters,
            "chosen": answer.chosen,
            "notes": [],
        },
    ).save(study.baseline_folder(name))


def _start_model(study: Study, settings: Mapping[str, Any], fold: int, run: TrackedRun) -> Path | None:
    """The model that a fold's training starts from; None without one.

    It is that of `crossval.start`, or a pre-trained one, shared by all configurations that pre-train alike.
    """
    config = study.config.merge(settings)
    if config.crossval.start:
        return resolve_model(config.crossval.start, config.tracking)
    crossval, target = config.crossval, study.pretrained_folder(settings, fold)
    if crossval.pretrain == "none" or config.model.encoder == "additive":
        return None
    if target.is_dir():
        return target
    config = config.merge(
        {
            "train.max_steps": crossval.pretrain_steps,
            "train.patience_evals": 0,
            "model.eval_n_hashes": 0,
            "tracking.run_name": f"pre-training, fold {study.folds.name(fold)}",
        }
    )
    cells = study.cells(config, "pretrain", fold)
    if crossval.pretrain == "once":
        whole = np.sort(np.concatenate([cells.parts["train"], study.split(fold)["test"]]))
        cells = dataclasses.replace(cells, parts={**cells.parts, "train": whole})
    scratch = target.with_name(f"{target.name}.{os.getpid()}")
    with _start(study, config, "pretrain", run) as own_run:
        model_dir = train_fold("pretrain", cells, None, own_run, scratch).model_dir
    try:
        model_dir.rename(target)  # atomic; another trial may have been faster
    except OSError:
        if not target.is_dir():
            raise
    shutil.rmtree(scratch, ignore_errors=True)
    return target


def _start(study: Study, config: ExperimentConfig, job: str, parent: TrackedRun | None) -> TrackedRun:
    """Start a run whose entries wait in the study's folder while its server is slow or away."""
    run = start_run(config, job, parent=parent, kept_in=study.run_dir / "tracking")
    if run.outbox:  # `jobs.sync --run-dir` finds the run there
        write_json(run.outbox.removesuffix("/outbox"), RUN_FILE, {"run": dataclasses.asdict(run)})
    return run


def train_fold(
    task: Task, cells: TrainingCells, start_dir: Path | None, run: TrackedRun, folder: Path
) -> Trained:
    """Train on a fold's cells."""
    start = load_model(start_dir) if start_dir else None
    if start is not None:
        run.set_tags({"start": {"run_id": start.meta.get("run_id", "")}})
    training = training_task(task, cells, run, model=start)
    return train(training, str(folder), in_process=cells.config.cluster.num_workers == 1)
