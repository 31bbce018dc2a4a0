"""A study: methods over the folds of one query's cells. What `jobs.crossval` and `jobs.ablate` share.

Every finished (configuration, fold) and (baseline, fold) leaves two files in the study's folder, predictions
and an account of them, so that a study that was interrupted goes on where it stopped, and reports are made
from files alone.

Axes: n cells of the query, g genes, k classes of the whole query.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from cluster.connect import connect
from data_ingest.folds import FILE, Folds, load_folds, make_folds
from data_ingest.query import QueryResult, run_query
from data_ingest.split import Split
from data_ingest.stream import CellStream
from jobs.studies.baselines import BASELINES, Baseline, check_names
from jobs.studies.layout import check_study_layout, num_cpus, search_space
from jobs.studies.settings import StudyConfig
from jobs.tracking.runs import TrackedRun, run_file, start_run
from jobs.training.cells import TrainingCells, prepare_cells
from screformer.checkpoint import load_model
from screformer.config import ExperimentConfig, Task
from screformer.files import write_whole

OURS = "scReformer-BERT"


STUDY = "study.json"


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
    """`seconds`, `cells_per_s` of training, `peak_memory_gb`, `parameters`, `chosen` settings, `notes`;
    `prior`, the share of each of the k classes in training."""

    def save(self, folder: Path) -> None:
        """Write both files; the account last, which marks the fold as finished."""
        self.save_predictions(folder)
        self.finish(folder)

    def save_predictions(self, folder: Path) -> None:
        """Write the predictions alone."""
        folder.mkdir(parents=True, exist_ok=True)
        columns = {
            "joinid": self.joinids_n,
            "label": self.labels_n.astype(np.int16),
            "predicted": self.predicted_n.astype(np.int16),
        }
        if self.probabilities_nk is not None:
            flat = pa.array(self.probabilities_nk.astype(np.float32).ravel())
            columns["probabilities"] = pa.FixedSizeListArray.from_arrays(flat, self.probabilities_nk.shape[1])
        pq.write_table(pa.table(columns), folder / f"fold-{self.fold}.parquet")

    def finish(self, folder: Path) -> None:
        """Write the account: the fold won't be run again."""
        tree = {"method": self.method, "fold": self.fold, "known": self.known, **self.account}
        write_whole(folder / f"fold-{self.fold}.json", json.dumps(tree, indent=2))

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
    """The cells, folds and classes of a study, and the folder of its results.

    Picklable; Ray tasks get it by reference.
    """

    config: StudyConfig
    query: QueryResult
    folds: Folds
    label_names: tuple[str, ...]
    """The k classes."""
    label_cl_ids: tuple[str, ...]
    labels_n: np.ndarray
    """Class of each cell, int64; -1 for none."""
    run_dir: Path
    run: TrackedRun | None
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
                f"all cells of {self.label_names[label]!r} are in fold {name}: no method can learn it there,"
                f" and each of its"
                " test cells counts as an error"
            )
        least = self.config.labels.min_cells
        for fold in range(len(self.folds)):
            split = self.split(fold)
            notes += split.notes
            labels = self.labels_n[split["train"]]
            counts_k = np.bincount(labels[labels >= 0], minlength=len(self.label_names))
            few = [
                f"{self.label_names[k]} ({counts_k[k]})"
                for k in np.flatnonzero((counts_k > 0) & (counts_k < least))
            ]
            if few:
                notes.append(
                    f"fold {self.folds.names[fold]}: fewer than labels.min_cells={least} training cells, so"
                    f" not learned: {', '.join(few)}"
                )
        if self.config.crossval.pretrain == "once":
            notes.append(
                "pre-training saw the cells of every fold, without their labels: it flatters scReformer-BERT"
            )
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

    def cells(
        self, config: ExperimentConfig, task: Task, fold: int, model_dir: Path | None = None
    ) -> TrainingCells:
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


def open_study(
    config: StudyConfig, *, run_dir: Path | None = None, folds_from: str | None = None, resume: bool = False
) -> Study:
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
        kept = _sample(
            query.obs["donor_id"].astype(str).to_numpy(), labels_n, crossval.max_cells, config.train.seed
        )
        query = dataclasses.replace(
            query, obs_joinids=query.obs_joinids[kept], obs=query.obs.iloc[kept].reset_index(drop=True)
        )
        labels_n = labels_n[kept]
    present = np.unique(labels_n[labels_n >= 0])
    if len(present) < 2:
        raise ValueError(
            f"labels.column={config.labels.column!r} has {len(present)} labels among the query's cells;"
            f" comparing needs at least 2"
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
        config=config.merge(
            {"atlas.uri": query.locator.uri, "atlas.timestamp_ms": query.locator.timestamp_ms}
        ),
        query=query,
        folds=folds,
        label_names=tuple(names),
        label_cl_ids=tuple(query.label_cl_ids.get(name, "") for name in names),
        labels_n=labels_n,
        run_dir=Path(run_dir or "."),
        run=None,
    )


def results_of(folder: Path, num_folds: int) -> list[FoldResult]:
    """The finished folds of one method, in their order."""
    found = (FoldResult.load(folder, fold) for fold in range(num_folds))
    return [result for result in found if result is not None]


def _folds_file(given: str, config: StudyConfig) -> Path:
    path = Path(given)
    if path.is_dir():
        return path / FILE
    return path if path.exists() else run_file(given, FILE, config.tracking)


def _sample(donors: np.ndarray, labels: np.ndarray, most: int, seed: int) -> np.ndarray:
    """Positions of an equal share of each (donor, label), increasing; at least one cell of each."""
    pair_n = np.unique(
        np.stack([np.unique(donors, return_inverse=True)[1], labels]), axis=1, return_inverse=True
    )[1].ravel()
    order = np.random.default_rng([seed, 15]).permutation(len(pair_n))
    ranked = order[np.argsort(pair_n[order], kind="stable")]
    counts = np.bincount(pair_n)
    rank = np.arange(len(pair_n)) - np.repeat(np.cumsum(counts) - counts, counts)
    wanted = np.maximum(1, np.round(counts * most / len(pair_n)))
    return np.sort(ranked[rank < wanted[pair_n[ranked]]])


def settings_key(tree: Any) -> str:
    """A short name for settings, alike for equal ones."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True, default=str).encode()).hexdigest()[:12]


def baseline_title(name: str) -> str:
    """How a method is called in reports."""
    found: Baseline | None = BASELINES.get(name)
    return found.title if found else name


@contextmanager
def opened(
    config: StudyConfig, job: str, *, folds_from: str | None = None, resume: str | None = None
) -> Iterator[Study]:
    """A running study: Ray connected, the layout checked, folder and parent run made or taken up again.

    Args:
        config: The recipe; when resuming, that of the interrupted study is taken instead.
        job: `crossval` or `ablate`.
        folds_from: As `open_study`.
        resume: Folder of the interrupted study.

    Raises:
        ValueError: Settings, cells, folds or cluster do not allow it.
    """
    saved = read_study(resume) if resume else {}
    config = StudyConfig.from_dict(saved["config"]) if saved else config
    storage = config.cluster.storage_path or "runs"
    if "://" in storage:
        raise ValueError(
            f"cluster.storage_path={storage!r}: a study needs a folder that all nodes see, not a URI"
        )
    connect(num_cpus=num_cpus(config))
    check_study_layout(config, ray.nodes())
    search_space(config)
    run_dir = Path(
        resume or Path(storage) / f"{job}-{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:4]}"
    ).resolve()
    study = open_study(config, run_dir=run_dir, folds_from=folds_from, resume=bool(saved))
    if saved and saved["query_hash"] != study.query.hash:
        raise ValueError(
            f"{run_dir} was begun on other cells (query hash {saved['query_hash'][:12]}, now"
            f" {study.query.hash[:12]})"
        )
    run = TrackedRun(**saved["run"]) if saved else start_run(study.config.experiment, job)
    study = dataclasses.replace(study, run=run)
    with run:
        if not saved:
            run_dir.mkdir(parents=True, exist_ok=True)
            study.folds.save(run_dir / FILE, study.query.obs_joinids)
            plain = {
                "config": study.config.to_dict(),
                "query_hash": study.query.hash,
                "job": job,
                "run": dataclasses.asdict(run),
            }
            (run_dir / STUDY).write_text(json.dumps(plain, indent=2))
            run.log_identity({"query": study.query.identity(), "split": study.folds.kind})
            run.log_file(run_dir / FILE)
        print(f"{job} in {run_dir} (go on after an interruption with --resume {run_dir})", flush=True)
        yield study


def read_study(run_dir: str) -> dict[str, Any]:
    """What was written when a study began.

    Raises:
        ValueError: There is none.
    """
    try:
        tree: dict[str, Any] = json.loads((Path(run_dir) / STUDY).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--resume {run_dir}: no {STUDY} there ({error}); give the folder that the study printed when it"
            f" started"
        ) from error
    return tree
