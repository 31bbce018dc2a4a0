"""A study: methods over the folds of one query's cells. What `jobs.crossval` and `jobs.ablate` share.

Every finished (configuration, fold) and (baseline, fold) leaves two files in the study's folder, predictions and an account of them, so
that a study that was interrupted goes on where it stopped, and reports are made from files alone.

Axes: n cells of the query, g genes, k classes of the whole query.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_ingest.dataset import CellStream
from data_ingest.folds import FILE, FoldKind, Folds, load_folds, make_folds
from data_ingest.ontology import lineage
from data_ingest.query import QueryResult, run_query
from data_ingest.split import Split
from jobs import tracking
from jobs.baselines import BASELINES, Baseline, BaselineCells, Part, baseline_parts, check_names, run_baseline
from jobs.train import TrainingCells, initial_arrays, prepare_cells, settled, train_on_cluster
from jobs.worker import train_alone
from screformer.calibration import fit_calibration
from screformer.checkpoint import add_meta, load_model, save_model
from screformer.config import ExperimentConfig, Task
from screformer.predictor import Predictor
from screformer.training import label_prior

OURS = "scReformer-BERT"
STUDY = "study.json"
_CELLS_AT_ONCE = 8192
"""Test cells that are held in memory together."""
PRETRAIN_IGNORES = {
    "train": ("max_steps", "class_weighting", "freeze_encoder", "gene_dropout"),
    "model": ("linear_skip", "linear_start_cells"),
    "cluster": None,
    "tracking": None,
    "labels": None,
    "zero": None,
}
"""Settings that pre-training does not read (None: the whole section), so that configurations that differ in them share it."""


@dataclass(frozen=True, kw_only=True)
class CrossvalConfig:
    """How a cross-validation divides and compares."""

    split: FoldKind = "donor"
    """What a fold keeps together: `donor`; `dataset`, each of which is a fold; or nothing (`random` cells, which flatters)."""
    num_folds: int = 5
    """Folds, where `split` does not fix their number."""
    val_fraction: float = 0.1
    """Share of a fold's training cells that choose the step and the settings of baselines; whole donors where that works out."""
    max_cells: int = 0
    """Use so many cells of the query only, the same share of each donor and label; 0 uses all."""
    pretrain: Literal["fold", "once", "none"] = "fold"
    """Pre-train in each fold without its test cells, once on all of them (which flatters), or not at all."""
    pretrain_steps: int = 100
    """Optimizer steps of pre-training."""
    baselines: tuple[str, ...] = ("all",)
    """Methods to compare with, by name; empty compares with none."""
    concurrent_folds: int = 1
    """Folds of a configuration that are trained at a time."""
    register: bool = False
    """In the end train the (best) configuration on the cells of all folds, and add it to `tracking.model_name` with its folds' scores."""

    def __post_init__(self) -> None:
        check_names(self.baselines)
        for name in ("pretrain_steps", "concurrent_folds"):
            if getattr(self, name) < 1:
                raise ValueError(f"crossval.{name}={getattr(self, name)} must be at least 1")
        if self.num_folds < 2:
            raise ValueError(f"crossval.num_folds={self.num_folds} must be at least 2")
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"crossval.val_fraction={self.val_fraction} must lie between 0 and 1: something has to choose the step")
        if self.max_cells < 0:
            raise ValueError(f"crossval.max_cells={self.max_cells} must not be negative; 0 uses all cells")


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """Which configurations are tried. With an empty space it is the recipe's alone."""

    space: Mapping[str, str] = field(default_factory=dict)
    """Setting to its values: a list (`[2, 4]`), or `uniform(a, b)`, `loguniform(a, b)`, `randint(a, b)` with b left out."""
    algorithm: Literal["grid", "random", "optuna"] = "grid"
    """`grid` takes every combination of lists; the others draw `num_samples`."""
    num_samples: int = 8
    """Configurations that `random` and `optuna` try."""
    scheduler: Literal["none", "asha"] = "none"
    """`asha` stops the worse configurations after their first folds."""
    concurrent_trials: int = 1
    """Configurations that are tried at a time."""

    def __post_init__(self) -> None:
        for name in ("num_samples", "concurrent_trials"):
            if getattr(self, name) < 1:
                raise ValueError(f"search.{name}={getattr(self, name)} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class AblationConfig:
    """What an ablation varies."""

    axes: Mapping[str, str] = field(default_factory=dict)
    """Name of a group to its list of variants, each some settings as on the command line: `[model.attention=none, ...]`."""
    num_seeds: int = 1
    """Seeds of each variant, counted up from `train.seed`; folds are the same for all."""

    def __post_init__(self) -> None:
        if self.num_seeds < 1:
            raise ValueError(f"ablation.num_seeds={self.num_seeds} must be at least 1")


@dataclass(frozen=True)
class StudyConfig(ExperimentConfig):
    """A recipe of a study: the settings of its runs, and how they are compared."""

    crossval: CrossvalConfig = field(default_factory=CrossvalConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    ablation: AblationConfig = field(default_factory=AblationConfig)

    @property
    def experiment(self) -> ExperimentConfig:
        """The settings of a single run."""
        names = [item.name for item in dataclasses.fields(ExperimentConfig)]
        tree = self.to_dict()
        return ExperimentConfig.from_dict({name: tree[name] for name in names})


@dataclass(frozen=True, eq=False, kw_only=True)
class FoldResult:
    """What a method said of the test cells of one fold, and what it took."""

    method: str
    """`OURS`, or the name of a baseline."""
    fold: int
    joinids_n: np.ndarray
    labels_n: np.ndarray
    """True class among the k of the whole query, int64."""
    predicted_n: np.ndarray
    probabilities_nk: np.ndarray | None
    known: list[int]
    """Classes that the fold's training cells have."""
    account: dict[str, Any]
    """`seconds`, `cells_per_s` of training, `peak_memory_gb`, `parameters`, `chosen` settings, `notes`; `prior`, the share of each of the k
    classes in training."""

    def save(self, folder: Path) -> None:
        """Write both files; the account last, which marks the fold as finished."""
        self.save_predictions(folder)
        self.finish(folder)

    def save_predictions(self, folder: Path) -> None:
        """Write the predictions alone."""
        folder.mkdir(parents=True, exist_ok=True)
        columns = {"joinid": self.joinids_n, "label": self.labels_n.astype(np.int16), "predicted": self.predicted_n.astype(np.int16)}
        if self.probabilities_nk is not None:
            flat = pa.array(self.probabilities_nk.astype(np.float32).ravel())
            columns["probabilities"] = pa.FixedSizeListArray.from_arrays(flat, self.probabilities_nk.shape[1])
        pq.write_table(pa.table(columns), folder / f"fold-{self.fold}.parquet")

    def finish(self, folder: Path) -> None:
        """Write the account: the fold won't be run again."""
        tree = {"method": self.method, "fold": self.fold, "known": self.known, **self.account}
        _write_whole(folder / f"fold-{self.fold}.json", json.dumps(tree, indent=2))

    @classmethod
    def load(cls, folder: Path, fold: int) -> FoldResult | None:
        """A finished fold, or None."""
        path = folder / f"fold-{fold}.json"
        if not path.is_file():
            return None
        account = json.loads(path.read_text())
        table = pq.read_table(folder / f"fold-{fold}.parquet")
        probabilities = None
        if "probabilities" in table.column_names:
            lists = table["probabilities"].combine_chunks()
            probabilities = lists.values.to_numpy().reshape(len(table), -1)
        return cls(
            method=account.pop("method"),
            fold=account.pop("fold"),
            joinids_n=table["joinid"].to_numpy(),
            labels_n=table["label"].to_numpy().astype(np.int64),
            predicted_n=table["predicted"].to_numpy().astype(np.int64),
            probabilities_nk=probabilities,
            known=account.pop("known"),
            account=account,
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class Study:
    """The cells, folds and classes of a study, and the folder of its results. Picklable; Ray tasks get it by reference."""

    config: StudyConfig
    query: QueryResult
    folds: Folds
    label_names: tuple[str, ...]
    """The k classes."""
    label_cl_ids: tuple[str, ...]
    labels_n: np.ndarray
    """Class of each cell, int64; -1 for none."""
    run_dir: Path
    run: tracking.TrackedRun | None
    """The parent run."""

    @property
    def donors(self) -> np.ndarray:
        """Donor of each cell."""
        return self.query.obs["donor_id"].astype(str).to_numpy()

    def split(self, fold: int) -> Split:
        """The parts of one fold."""
        return self.folds.parts(fold, self.donors, self.labels_n, self.config.crossval.val_fraction)

    def notes(self) -> list[str]:
        """What is to be known before anything runs."""
        notes = list(self.folds.notes)
        for label, name in self.folds.labels_of_one_fold(self.labels_n).items():
            notes.append(
                f"all cells of {self.label_names[label]!r} are in fold {name}: no method can learn it there, and each of its"
                " test cells counts as an error"
            )
        least = self.config.labels.min_cells
        for fold in range(len(self.folds)):
            split = self.split(fold)
            notes += split.notes
            labels = self.labels_n[split["train"]]
            counts_k = np.bincount(labels[labels >= 0], minlength=len(self.label_names))
            few = [f"{self.label_names[k]} ({counts_k[k]})" for k in np.flatnonzero((counts_k > 0) & (counts_k < least))]
            if few:
                notes.append(
                    f"fold {self.folds.names[fold]}: fewer than labels.min_cells={least} training cells, so not learned: {', '.join(few)}"
                )
        if self.config.crossval.pretrain == "once":
            notes.append("pre-training saw the cells of every fold, without their labels: it flatters scReformer-BERT")
        unlabelled = int((self.labels_n < 0).sum())
        if unlabelled:
            notes.append(f"{unlabelled} cells without a label serve pre-training only")
        return notes

    def trial_folder(self, settings: Mapping[str, Any]) -> Path:
        """Where the folds of a configuration leave their results."""
        config = self.config.merge(settings)
        pretraining = [config.crossval.pretrain, config.crossval.pretrain_steps]
        return self.run_dir / "trials" / settings_key([config.experiment.to_dict(), pretraining])

    def baseline_folder(self, name: str) -> Path:
        """Where the folds of a baseline leave their results."""
        return self.run_dir / "baselines" / name

    def missing_baselines(self) -> dict[str, list[str]]:
        """Wanted baselines that cannot run, with the modules that they lack."""
        wanted = {name: BASELINES[name].missing for name in check_names(self.config.crossval.baselines)}
        return {name: missing for name, missing in wanted.items() if missing}

    def cells(self, config: ExperimentConfig, task: Task, fold: int, model_dir: Path | None = None) -> TrainingCells:
        """The training and validation cells of a fold, without its test cells."""
        split = self.split(fold)
        split["test"] = np.zeros(0, np.int64)
        start = load_model(model_dir) if model_dir else None
        return prepare_cells(config, task, start=start, query=self.query, split=split)

    def test_stream(self, cells: TrainingCells, positions: np.ndarray) -> CellStream:
        """Given cells with their class among all k, read over the genes of a fold's model."""
        whole = dataclasses.replace(cells, codes_n=self.labels_n, parts={**cells.parts, "test": positions})
        return whole.stream("test")

    def known(self, cells: TrainingCells) -> list[int]:
        """The classes of a fold's training cells, in the order of its model's."""
        return [self.label_names.index(name) for name in cells.labels["names"]]


def open_study(config: StudyConfig, *, run_dir: Path | None = None, folds_from: str | None = None, resume: bool = False) -> Study:
    """Run the query, and make or read the folds. Nothing is written.

    Args:
        config: The recipe with its overrides.
        run_dir: The study's folder; None is for a look ahead.
        folds_from: A study's folder, its folds file, or the id of its MLflow run.
        resume: The folder holds a study that was begun.

    Raises:
        ValueError: The query, labels or folds do not allow it.
    """
    query = run_query(config)
    labels_n = query.obs["label"].cat.codes.to_numpy().astype(np.int64)
    names = [str(name) for name in query.obs["label"].cat.categories]
    crossval = config.crossval
    if crossval.max_cells and crossval.max_cells < len(labels_n):
        kept = _sample(query.obs["donor_id"].astype(str).to_numpy(), labels_n, crossval.max_cells, config.train.seed)
        query = dataclasses.replace(query, obs_joinids=query.obs_joinids[kept], obs=query.obs.iloc[kept].reset_index(drop=True))
        labels_n = labels_n[kept]
    present = np.unique(labels_n[labels_n >= 0])
    if len(present) < 2:
        raise ValueError(
            f"labels.column={config.labels.column!r} has {len(present)} labels among the query's cells; comparing needs at least 2"
        )
    new_code = np.full(len(names) + 1, -1, np.int64)
    new_code[present] = np.arange(len(present))
    labels_n = new_code[labels_n]
    names = [names[code] for code in present]
    if folds_from or resume:
        path = _folds_file(folds_from, config) if folds_from else Path(run_dir or ".") / FILE
        folds = load_folds(path, query.obs_joinids)
    else:
        donors, datasets = (query.obs[column].astype(str).to_numpy() for column in ("donor_id", "dataset_id"))
        folds = make_folds(crossval.split, donors, datasets, labels_n, crossval.num_folds, config.train.seed)
    return Study(
        config=config.merge({"atlas.uri": query.locator.uri, "atlas.timestamp_ms": query.locator.timestamp_ms}),
        query=query,
        folds=folds,
        label_names=tuple(names),
        label_cl_ids=tuple(query.label_cl_ids.get(name, "") for name in names),
        labels_n=labels_n,
        run_dir=Path(run_dir or "."),
        run=None,
    )


def run_fold(study: Study, settings: Mapping[str, Any], fold: int) -> FoldResult:
    """Train ours on one fold and label its test cells, or read what an earlier run left. Ray must be running.

    Args:
        study: The study.
        settings: Overrides of this configuration.
        fold: Which fold.
    """
    folder = study.trial_folder(settings)
    found = FoldResult.load(folder, fold)
    if found is not None:
        return found
    _reset_peak_memory()
    start_s, cpu_start_s = time.perf_counter(), time.process_time()
    crossval, config = study.config.merge(settings).crossval, study.config.merge(settings).experiment
    config = config.merge({"tracking.run_name": f"fold {study.folds.names[fold]}"})
    with tracking.start_run(config, "crossval", parent=study.run) as run:
        run.set_tags({"fold": study.folds.names[fold], "settings": json.dumps(dict(settings))})
        start_dir = None if crossval.pretrain == "none" else _pretrained(study, crossval, config, fold, run)
        cells = study.cells(config, "finetune", fold, start_dir)
        begun_s = time.perf_counter()
        model_dir, trained = _train(config, "finetune", cells, start_dir, run, folder / f"fold-{fold}")
        train_s = time.perf_counter() - begun_s
        predictor = Predictor.load(model_dir, device=None if config.cluster.use_gpu else "cpu")
        known = study.known(cells)
        positions = study.split(fold)["test"]
        positions = positions[study.labels_n[positions] >= 0]
        probabilities = np.zeros((len(positions), len(study.label_names)), np.float32)
        joinids, begun_s = np.zeros(len(positions), np.int64), time.perf_counter()
        for first in range(0, len(positions), _CELLS_AT_ONCE):
            rows = slice(first, first + _CELLS_AT_ONCE)
            sample = study.test_stream(cells, positions[rows]).sample_counts(_CELLS_AT_ONCE, 0)
            counts = sample.counts_ng
            offsets = counts.indptr.astype(np.int64)
            said = predictor.predict(counts.indices, counts.data, offsets, total_counts=sample.total_n, panels=sample.panels)
            probabilities[rows, known], joinids[rows] = said.probabilities_nk, sample.joinids_n
        prior = np.zeros(len(study.label_names))
        prior[known] = label_prior(cells.class_counts_k, config.train.class_weighting)
        account = {
            "prior": prior.tolist(),
            "seconds": time.perf_counter() - start_s,
            "cpu_seconds": time.process_time() - cpu_start_s,
            "train_seconds": train_s,
            "predict_seconds": time.perf_counter() - begun_s,
            "parameters": sum(parameter.numel() for parameter in load_model(model_dir).model.parameters()),
            "chosen": {"step": trained.pop("best_step", None)},
            "notes": list(cells.notes),
            "run_id": run.run_id,
            **trained,
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
    result.finish(folder)  # after its run has ended, so that a kill between the two leaves no finished fold with an open run
    return result


def register_final(study: Study, settings: Mapping[str, Any], folds: Mapping[str, Any]) -> int | None:
    """Train a configuration on the cells of all folds and add it to the registry. Ray must be running.

    Args:
        study: The study.
        settings: Overrides of the configuration.
        folds: What its folds gave; goes into the model's meta data, where the model card and `jobs.promote` find it.

    Returns:
        The version; None where the tracking server is away and takes the model later.
    """
    registered = study.run_dir / "registered.json"
    if registered.exists():  # a study that is resumed after its end registers nothing twice
        version: int | None = json.loads(registered.read_text())["version"]
        return version
    everything = len(study.folds)  # no cell is tested there, so all take part
    crossval, config = study.config.merge(settings).crossval, study.config.merge(settings).experiment
    config = config.merge({"tracking.run_name": "all folds"})
    with tracking.start_run(config, "crossval", parent=study.run) as run:
        run.set_tags({"fold": "all", "settings": json.dumps(dict(settings))})
        start_dir = None if crossval.pretrain == "none" else _pretrained(study, crossval, config, everything, run)
        cells = study.cells(config, "finetune", everything, start_dir)
        model_dir, _ = _train(config, "finetune", cells, start_dir, run, study.run_dir / "final")
        add_meta(model_dir, {"folds": dict(folds)})
        version = run.register(model_dir, config.tracking.model_name)
    registered.write_text(json.dumps({"version": version, "settings": dict(settings)}))
    return version


def read_baseline_cells(study: Study, fold: int) -> tuple[BaselineCells, np.ndarray, np.ndarray, list[int]]:
    """A fold's cells for the baselines, in the classes of the whole query. Ray must be running.

    Returns:
        The cells; joinid and class of each test cell; the classes that can be learned.
    """
    cells = study.cells(study.config.experiment, "finetune", fold)
    known = study.known(cells)
    learned_n = np.where(np.isin(study.labels_n, known), study.labels_n, -1)
    split = study.split(fold)
    positions = {part: split[part][learned_n[split[part]] >= 0] for part in ("train", "val")}
    positions["test"] = split["test"][study.labels_n[split["test"]] >= 0]
    parts, joinids = baseline_parts(dataclasses.replace(cells, codes_n=study.labels_n, parts=positions))
    test: Part = parts["test"]
    found = BaselineCells(
        train=parts["train"],
        val=parts["val"],
        test_x_ng=test.x_ng,
        num_classes=len(study.label_names),
        genes=cells.vocabulary.feature_ids,
    )
    return found, joinids, test.labels_n, known


def run_baseline_fold(
    study: Study, name: str, fold: int, cells: BaselineCells, joinids: np.ndarray, labels: np.ndarray, known: list[int]
) -> None:
    """Fit a baseline on one fold and leave its result; the body of a Ray task."""
    _reset_peak_memory()
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
            "prior": (np.bincount(cells.train.labels_n, minlength=cells.num_classes) / len(cells.train.labels_n)).tolist(),
            "seconds": cost.seconds,
            "cpu_seconds": cost.cpu_seconds,
            "peak_memory_gb": cost.peak_memory_gb,
            "cells_per_s": len(cells.train.labels_n) / max(cost.seconds, 1e-9),
            "parameters": answer.parameters,
            "chosen": answer.chosen,
            "notes": [],
        },
    ).save(study.baseline_folder(name))


def results_of(folder: Path, num_folds: int) -> list[FoldResult]:
    """The finished folds of one method, in their order."""
    found = (FoldResult.load(folder, fold) for fold in range(num_folds))
    return [result for result in found if result is not None]


def _pretrained(study: Study, crossval: CrossvalConfig, config: ExperimentConfig, fold: int, run: tracking.TrackedRun) -> Path:
    """The pre-trained model of a fold: made once and shared by all configurations that pre-train alike."""
    config = config.merge({"train.max_steps": crossval.pretrain_steps, "train.patience_evals": 0, "model.eval_n_hashes": 0})
    tree = config.to_dict()
    for section, names in PRETRAIN_IGNORES.items():
        for name in names if names is not None else list(tree[section]):
            tree[section].pop(name, None)
    key = settings_key({**tree, "steps": crossval.pretrain_steps, "fold": fold if crossval.pretrain == "fold" else "all"})
    target = study.run_dir / "pretrained" / key
    if not target.is_dir():
        cells = study.cells(config, "pretrain", fold)
        if crossval.pretrain == "once":
            whole = np.sort(np.concatenate([cells.parts["train"], study.split(fold)["test"]]))
            cells = dataclasses.replace(cells, parts={**cells.parts, "train": whole})
        scratch = study.run_dir / "pretrained" / f"{key}.{os.getpid()}"
        name = f"fold {study.folds.names[fold]}" if fold < len(study.folds) else "all folds"
        config = config.merge({"tracking.run_name": f"pre-training, {name}"})
        with tracking.start_run(config, "pretrain", parent=run) as own_run:
            model_dir, _ = _train(config, "pretrain", cells, None, own_run, scratch)
        try:
            model_dir.rename(target)  # at once or not at all; another trial may have been faster
        except OSError:
            if not target.is_dir():
                raise
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _train(
    config: ExperimentConfig, task: Task, cells: TrainingCells, start_dir: Path | None, run: tracking.TrackedRun, folder: Path
) -> tuple[Path, dict[str, Any]]:
    """Train on a fold's cells; the folder of the best model, and cells/s, peak memory and best step."""
    start = load_model(start_dir) if start_dir else None
    config, _ = settled(config, cells, start)
    cells, arrays = initial_arrays(cells, start, None)
    meta = {"task": task, **cells.identity(), "run_id": run.run_id}
    history: dict[str, list[float]] = {}
    if config.cluster.num_workers > 1:
        result = train_on_cluster(config, task, cells, arrays, run, str(folder / task), None)
        with result.checkpoint.as_directory() as found:
            shutil.copytree(Path(found) / "model", folder / "model", dirs_exist_ok=True)
        history |= run.history(("train/cells_per_s", "mem/peak_gb", "best_step"))
    else:

        def report(metrics: dict[str, float], step: int) -> None:
            run.log_metrics(metrics, step=step)
            for name, value in metrics.items():
                history.setdefault(name, []).append(value)

        streams = {part: cells.stream(part) for part, positions in cells.parts.items() if len(positions)}
        outcome = train_alone(config, task, streams, cells.labels, cells.class_counts_k, arrays, report)
        calibration = None
        if outcome.val_outputs is not None and len(outcome.val_outputs):
            prior_k = label_prior(cells.class_counts_k, config.train.class_weighting)
            calibration = fit_calibration(outcome.val_outputs, lineage(cells.labels["cl_ids"]), prior_k=prior_k)
        save_model(folder / "model", outcome.weights, config, cells.vocabulary, cells.labels, meta, calibration)
    speeds = history.get("train/cells_per_s", [0.0])
    return folder / "model", {
        "cells_per_s": float(np.median(speeds)),
        "peak_memory_gb": max(history.get("mem/peak_gb", [0.0])),
        "best_step": int(history.get("best_step", [0])[-1]),
    }


def _folds_file(given: str, config: StudyConfig) -> Path:
    path = Path(given)
    if path.is_dir():
        return path / FILE
    return path if path.exists() else tracking.run_file(given, FILE, config.tracking)


def _sample(donors: np.ndarray, labels: np.ndarray, most: int, seed: int) -> np.ndarray:
    """Positions of an equal share of each (donor, label), increasing; at least one cell of each."""
    pair_n = np.unique(np.stack([np.unique(donors, return_inverse=True)[1], labels]), axis=1, return_inverse=True)[1].ravel()
    order = np.random.default_rng([seed, 15]).permutation(len(pair_n))
    ranked = order[np.argsort(pair_n[order], kind="stable")]
    counts = np.bincount(pair_n)
    rank = np.arange(len(pair_n)) - np.repeat(np.cumsum(counts) - counts, counts)
    wanted = np.maximum(1, np.round(counts * most / len(pair_n)))
    return np.sort(ranked[rank < wanted[pair_n[ranked]]])


def _reset_peak_memory() -> None:
    """Start the process's peak of resident memory anew, since a warm process would report that of an earlier fold; Linux only."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def settings_key(tree: Any) -> str:
    """A short name for settings, alike for equal ones."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _write_whole(path: Path, text: str) -> None:
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(text)
    scratch.rename(path)


def baseline_title(name: str) -> str:
    """How a method is called in reports."""
    found: Baseline | None = BASELINES.get(name)
    return found.title if found else name
