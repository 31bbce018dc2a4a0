"""Results of a study: a method's predictions for the test cells of a fold, in two files.

A finished fold has its predictions and a summary on disk. An interrupted study resumes from these files, and
reports need nothing else.

Axes: n test cells, k classes of the whole query.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from screformer.files import write_whole


@dataclass(frozen=True, eq=False, kw_only=True)
class FoldResult:
    """What a method predicted for the test cells of one fold, and what it cost."""

    method: str
    """`screformer.metrics.OURS`, or the name of a baseline."""
    fold: int
    joinids_n: np.ndarray
    labels_n: np.ndarray
    """True class among the k of the whole query, int64."""
    predicted_n: np.ndarray
    probabilities_nk: np.ndarray | None
    known: list[int]
    """Classes present in the fold's training cells."""
    account: dict[str, Any]
    """`seconds`, `cells_per_s` of training, `peak_memory_gb`, `parameters`, `chosen` settings, `notes`;
    `prior`, the share of each of the k classes in training."""

    def save(self, folder: Path) -> None:
        """Write both files, the summary last: it marks the fold as finished."""
        self.save_predictions(folder)
        self.finish(folder)

    def save_predictions(self, folder: Path) -> None:
        """Write only the predictions."""
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
        """Write the summary: the fold will not run again."""
        tree = {"method": self.method, "fold": self.fold, "known": self.known, **self.account}
        write_whole(folder / f"fold-{self.fold}.json", json.dumps(tree, indent=2))

    @classmethod
    def load(cls, folder: Path, fold: int) -> FoldResult | None:
        """Read a finished fold; None if it is not finished."""
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


def results_of(folder: Path, num_folds: int) -> list[FoldResult]:
    """The finished folds of one method, in order."""
    found = (FoldResult.load(folder, fold) for fold in range(num_folds))
    return [result for result in found if result is not None]
