"""A study: methods over the folds of one query's cells. Shared by `jobs.crossval` and `jobs.ablate`.

Axes: n cells of the query, k classes of the whole query.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_ingest.folds import FILE, Folds, load_folds, saved_group_by
from data_ingest.make_folds import make_folds
from data_ingest.query import QueryResult, run_query
from data_ingest.split import Split, few_of_each, sample_cells
from jobs.studies.baselines import BASELINES, check_names
from jobs.tracking.logged import run_file
from jobs.tracking.runs import TrackedRun
from jobs.training.cells import TrainingCells
from jobs.training.prepare import prepare_cells
from jobs.training.start import load_start, settings_of_start
from screformer.checkpoint import LoadedModel, load_model
from screformer.config import ExperimentConfig, Task, touching
from screformer.metrics import OURS


@dataclass(frozen=True, eq=False, kw_only=True)
class Study:
    """The cells, folds and classes of a study, and the folder of its results.

    Picklable; passed to Ray tasks by reference.
    """

    config: ExperimentConfig
    query: QueryResult
    folds: Folds
    label_names: tuple[str, ...]
    """The k classes: those of the cells, then those that only a start model knows."""
    label_cl_ids: tuple[str, ...]
    labels_n: np.ndarray
    """Class of each cell, int64; -1 for unlabelled."""
    run_dir: Path
    run: TrackedRun | None
    """The parent run."""

    @property
    def donors(self) -> np.ndarray:
        """Donor of each cell."""
        return self.query.obs["donor_id"].astype(str).to_numpy()

    def split(self, fold: int) -> Split:
        """The parts of one fold; if `fold` equals the number of folds, no cell is held out for testing."""
        return self.folds.parts(fold, self.donors, self.labels_n, self.config.crossval.val_fraction)

    def notes(self) -> list[str]:
        """Warnings to read before anything runs."""
        notes = list(self.folds.notes)
        for label, name in self.folds.labels_of_one_fold(self.labels_n).items():
            notes.append(
                f"all cells of {self.label_names[label]!r} are in fold {name}: no method can learn it there,"
                f" so each of its test cells counts as an error"
            )
        if excluded := [name for name in self.config.labels.exclude if name in self.label_names]:
            listed = ", ".join(excluded)
            notes.append(f"labels.exclude: no method learns {listed}; their test cells count as errors")
        for fold in range(len(self.folds)):
            notes += [*self.split(fold).notes, *self._rare_labels(fold)]
        if self.config.crossval.pretrain == "once":
            notes.append(f"pre-training saw the cells of every fold, without labels, which favours {OURS}")
        unlabelled = int((self.labels_n < 0).sum())
        if unlabelled:
            notes.append(f"{unlabelled} cells without a label are used for pre-training only")
        return notes

    def _rare_labels(self, fold: int) -> list[str]:
        least, labels = self.config.labels.min_cells, self.labels_n[self.split(fold)["train"]]
        counts_k = np.bincount(labels[labels >= 0], minlength=len(self.label_names))
        few = np.flatnonzero((counts_k > 0) & (counts_k < least))
        listed = ", ".join(f"{self.label_names[k]} ({counts_k[k]})" for k in few)
        text = (
            f"fold {self.folds.names[fold]}: fewer than labels.min_cells={least} training cells, so not"
            f" learned: {listed}"
        )
        return [text] if listed else []

    def trial_folder(self, settings: Mapping[str, Any]) -> Path:
        """Folder for the results of a configuration's folds."""
        return self.run_dir / "trials" / settings_key(self.config.merge(settings).differences(self.config))

    def pretrained_folder(self, settings: Mapping[str, Any], fold: int) -> Path:
        """Folder of a fold's pre-trained model, shared by all configurations that pre-train alike."""
        config = self.config.merge(settings)
        changed, read = config.differences(self.config), touching("pretraining")
        alike = {name: value for name, value in changed.items() if name in read}
        part = fold if config.crossval.pretrain == "fold" else "all"
        return self.run_dir / "pretrained" / settings_key({**alike, "fold": part})

    def baseline_folder(self, name: str) -> Path:
        """Folder for the results of a baseline's folds."""
        sizes = self.config.crossval.cells_per_type
        return self.run_dir / "baselines" / (f"{name}-{sizes[0]}" if sizes else name)

    def missing_baselines(self) -> dict[str, list[str]]:
        """Selected baselines that cannot run, with their missing modules."""
        wanted = {name: BASELINES[name].missing for name in check_names(self.config.crossval.baselines)}
        return {name: missing for name, missing in wanted.items() if missing}

    def cells(
        self, config: ExperimentConfig, task: Task, fold: int, model_dir: Path | None = None
    ) -> TrainingCells:
        """The training and validation cells of a fold, without its test cells.

        With `crossval.cells_per_type`, fine-tuning gets only so many of each type, for training.
        """
        split = self.split(fold)
        split["test"] = np.zeros(0, np.int64)
        if config.crossval.cells_per_type and task == "finetune":
            outside = np.concatenate([split["train"], split["val"]])
            few = few_of_each(outside, self.labels_n, config.crossval.cells_per_type[0], config.train.seed)
            split |= {"train": few, "val": np.zeros(0, np.int64)}
        start = load_model(model_dir) if model_dir else None
        if start is not None and config.crossval.start:
            config = settings_of_start(config, start, config.crossval.start)
        return prepare_cells(config, task, start=start, query=self.query, split=split)

    def test_cells(self, cells: TrainingCells, positions: np.ndarray) -> TrainingCells:
        """A fold's cells with the given test cells, with classes among all k."""
        return dataclasses.replace(cells, codes_n=self.labels_n, parts={**cells.parts, "test": positions})

    def known(self, cells: TrainingCells) -> list[int]:
        """The classes of a fold's training cells, in the order of its model's classes."""
        return [self.label_names.index(name) for name in cells.labels["names"]]


def settings_key(tree: Any) -> str:
    """A short name for settings; equal settings get the same name."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True, default=str).encode()).hexdigest()[:12]


def open_study(
    config: ExperimentConfig,
    *,
    run_dir: Path | None = None,
    folds_from: str | None = None,
    resume: bool = False,
) -> Study:
    """Run the query, and create or read the folds. Writes nothing.

    Args:
        config: The recipe with its overrides.
        run_dir: The study's folder; None for a dry run.
        folds_from: A study's folder, its folds file, or the id of its MLflow run.
        resume: The folder contains a study that was started.

    Raises:
        ValueError: The query, labels or folds do not allow a study.
    """
    crossval = config.crossval
    check_names(crossval.baselines)
    path = _folds_file(folds_from, config) if folds_from else Path(run_dir or ".") / FILE if resume else None
    group_by = saved_group_by(path) if path else crossval.group_by
    column = "donor_id" if group_by == "none" else group_by
    query, labels_n, names = _labelled_cells(config, column)
    cl_ids = tuple(query.label_cl_ids.get(name, "") for name in names)
    if crossval.start:
        start = load_start(config, crossval.start)
        names, cl_ids = _with_labels_of(start, config.labels.column, names, cl_ids)
    if path:
        folds = load_folds(path, query.obs_joinids)
    else:
        donors, groups = (query.obs[name].astype(str).to_numpy() for name in ("donor_id", column))
        folds = make_folds(group_by, donors, groups, labels_n, crossval.num_folds, config.train.seed)
    settled = {
        "atlas.uri": query.atlas.uri,
        "atlas.timestamp_ms": query.atlas.timestamp_ms,
        "crossval.group_by": folds.group_by,
    }
    if folds.group_by != "none":  # every model of the study records this as what was held out
        settled["split.group_by"] = folds.group_by
    return Study(
        config=config.merge(settled),
        query=query,
        folds=folds,
        label_names=names,
        label_cl_ids=cl_ids,
        labels_n=labels_n,
        run_dir=Path(run_dir or "."),
        run=None,
    )


def _labelled_cells(config: ExperimentConfig, column: str) -> tuple[QueryResult, np.ndarray, tuple[str, ...]]:
    """The query's cells (at most `crossval.max_cells`), the class of each, and the names of the classes.

    Args:
        config: The recipe.
        column: obs column to read with them.
    """
    query = run_query(config, (column,))
    labels_n = query.obs["label"].cat.codes.to_numpy().astype(np.int64)
    most = config.crossval.max_cells
    if most and most < len(labels_n):
        kept = sample_cells(query.obs["donor_id"].astype(str).to_numpy(), labels_n, most, config.train.seed)
        query = dataclasses.replace(
            query, obs_joinids=query.obs_joinids[kept], obs=query.obs.iloc[kept].reset_index(drop=True)
        )
        labels_n = labels_n[kept]
    present, all_names = np.unique(labels_n[labels_n >= 0]), query.obs["label"].cat.categories
    if len(present) < 2:
        raise ValueError(
            f"labels.column={config.labels.column!r} has {len(present)} labels among the query's cells;"
            f" a comparison needs at least 2"
        )
    new_code = np.full(len(all_names) + 1, -1, np.int64)
    new_code[present] = np.arange(len(present))
    return query, new_code[labels_n], tuple(str(all_names[code]) for code in present)


def _with_labels_of(
    start: LoadedModel, column: str, names: tuple[str, ...], cl_ids: tuple[str, ...]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The classes of a study with those that only the start model knows, which it may predict by mistake."""
    if start.labels["column"] != column:
        return names, cl_ids
    known = zip(start.labels["names"], start.labels["cl_ids"], strict=True)
    others = [(name, cl_id) for name, cl_id in known if name not in names]
    return names + tuple(name for name, _ in others), cl_ids + tuple(cl_id for _, cl_id in others)


def _folds_file(given: str, config: ExperimentConfig) -> Path:
    path = Path(given)
    if path.is_dir():
        return path / FILE
    return path if path.exists() else run_file(given, FILE, config.tracking)
