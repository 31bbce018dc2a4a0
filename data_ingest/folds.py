"""Cross-validation folds: a division of cells, its parts, and its file.

Axes: `n` cells, `f` folds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_ingest.split import Split, choose_validation, random_cells

FILE = "folds.parquet"
_META = b"screformer.folds"
_KINDS = {"donor_id": "donor", "dataset_id": "dataset", "none": "random"}
"""Name of the kind of folds for each grouping; files of earlier versions contain it."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Folds:
    """A division of cells into test folds.

    Every cell is tested once; a fold's validation cells come from its other cells.
    """

    group_by: str
    """obs column whose groups stay together; `none` assigns single cells."""
    fold_n: np.ndarray
    """Test fold of each cell, int16 (n,)."""
    names: tuple[str, ...]
    """Name of each fold: its number, or for columns other than `donor_id` its value, such as a dataset."""
    seed: int
    notes: tuple[str, ...]
    """Caveats for readers of the results."""

    def __len__(self) -> int:
        return len(self.names)

    @property
    def kind(self) -> str:
        """The kind of folds, such as `donor`, `dataset` or `random`."""
        return _KINDS.get(self.group_by, self.group_by)

    def name(self, fold: int) -> str:
        """The name of a fold; `all` for `fold` = f, which has no test cells."""
        return self.names[fold] if fold < len(self) else "all"

    def parts(
        self, fold: int, donors: Sequence[str] | np.ndarray, labels: np.ndarray, val_fraction: float
    ) -> Split:
        """The training, validation and test cells of one fold.

        The validation part consists of whole donors if possible (see `choose_validation`), and of random
        cells if the folds are random cells.

        Args:
            fold: In [0, f]; f means no test cells.
            donors: Shape (n,), donor of each cell.
            labels: Shape (n,), label code of each cell, -1 for none.
            val_fraction: Share of the cells outside the fold used for validation; 0 for none.
        """
        rng, test = np.random.default_rng([self.seed, 13, fold]), self.fold_n == fold
        val, notes = np.zeros(len(test), bool), []
        label_n = np.asarray(labels, np.int64)
        if val_fraction and self.group_by == "none":
            val[random_cells(np.flatnonzero(~test), label_n, val_fraction, rng)] = True
        elif val_fraction:
            _, donor_n = np.unique(np.asarray(donors, dtype=str), return_inverse=True)
            val, note = choose_validation(donor_n, label_n, ~test, val_fraction, rng)
            notes = [f"fold {self.name(fold)}: {note}"] if note else []
        return Split(
            {"train": np.flatnonzero(~test & ~val), "val": np.flatnonzero(val), "test": np.flatnonzero(test)},
            notes,
        )

    def labels_of_one_fold(self, labels: np.ndarray) -> dict[int, str]:
        """Label codes whose cells are all in one fold, with the fold's name.

        When that fold is tested, no method can have learned them.
        """
        labels = np.asarray(labels, np.int64)
        found = {
            int(label): np.unique(self.fold_n[labels == label]) for label in np.unique(labels[labels >= 0])
        }
        return {label: self.names[int(fold_f[0])] for label, fold_f in found.items() if len(fold_f) == 1}

    def hash(self, joinids: np.ndarray) -> str:
        """Hash of the division of these cells; equal hashes mean equal test cells in every fold."""
        pairs = np.stack([np.asarray(joinids, np.int64), self.fold_n.astype(np.int64)])
        return hashlib.sha256(np.ascontiguousarray(pairs[:, np.argsort(pairs[0])]).tobytes()).hexdigest()

    def save(self, path: str | Path, joinids: np.ndarray) -> None:
        """Write (joinid, fold) as Parquet; `load_folds` reads it."""
        meta = {"group_by": self.group_by, "names": self.names, "seed": self.seed, "notes": self.notes}
        table = pa.table({"joinid": np.asarray(joinids, np.int64), "fold": self.fold_n})
        pq.write_table(table.replace_schema_metadata({_META: json.dumps(meta).encode()}), path)


def load_folds(path: str | Path, joinids: np.ndarray) -> Folds:
    """Read folds for the cells of a query.

    Args:
        path: Written by `Folds.save`.
        joinids: Shape (n,), the query's cells; the file may contain more.

    Raises:
        ValueError: The file or some of the cells are missing.
    """
    table, meta = _read(path)
    theirs = table["joinid"].to_numpy()
    order = np.argsort(theirs)
    place = np.minimum(np.searchsorted(theirs, joinids, sorter=order), max(len(theirs) - 1, 0))
    missing = np.flatnonzero(theirs[order[place]] != joinids) if len(theirs) else np.arange(len(joinids))
    if len(missing):
        raise ValueError(
            f"folds {path} lack {len(missing)} of the query's {len(joinids)} cells (for example joinid"
            f" {joinids[missing[0]]}); use the query"
            " and the atlas version that they were made for"
        )
    return Folds(
        group_by=meta["group_by"],
        fold_n=table["fold"].to_numpy()[order[place]].astype(np.int16),
        names=tuple(meta["names"]),
        seed=meta["seed"],
        notes=tuple(meta["notes"]),
    )


def saved_group_by(path: str | Path) -> str:
    """The column that saved folds are grouped by; raises like `load_folds`."""
    group_by: str = _read(path)[1]["group_by"]
    return group_by


def _read(path: str | Path) -> tuple[pa.Table, dict[str, Any]]:
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise ValueError(
            f"folds {path} cannot be read ({error}); use the folder of a jobs.crossval run, or its {FILE}"
        ) from error
    saved = (table.schema.metadata or {}).get(_META)
    if saved is None:
        raise ValueError(f"{path} contains no folds; use the {FILE} of a jobs.crossval run")
    meta: dict[str, Any] = json.loads(saved)
    of_kind = {kind: group_by for group_by, kind in _KINDS.items()}
    return table, {"group_by": of_kind.get(meta.get("kind", "")), **meta}
