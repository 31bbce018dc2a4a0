"""The cells that baselines are fitted, tuned and tested on.

Axes: n cells, g genes, k classes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from scipy import sparse

from screformer.counts import CellCounts
from screformer.metrics import LabelCounts

if TYPE_CHECKING:
    from jobs.training.cells import TrainingCells

MOST_FITTED = 50_000
"""Most training cells that a baseline gets; a random sample if there are more. Limits memory."""


@dataclass(frozen=True, eq=False)
class Cells:
    """Some cells, without their labels."""

    counts: CellCounts

    @cached_property
    def x_ng(self) -> sparse.csr_matrix:
        """log1p of counts per 10,000, float32; genes that were not measured are 0."""
        values = sparse.csr_matrix(self.counts.normalised())
        # 32-bit indices: scikit-learn's solvers accept nothing else.
        values.indices, values.indptr = values.indices.astype(np.int32), values.indptr.astype(np.int32)
        return values


@dataclass(frozen=True, eq=False, kw_only=True)
class Part:
    """Cells of one part."""

    cells: Cells
    labels_n: np.ndarray
    """Class, int64."""
    datasets_n: np.ndarray
    """Code of each cell's data set, int64."""

    @property
    def x_ng(self) -> sparse.csr_matrix:
        """As `Cells.x_ng`."""
        return self.cells.x_ng


@dataclass(frozen=True, eq=False, kw_only=True)
class BaselineCells:
    """The cells a baseline is fitted, tuned and tested on."""

    train: Part
    val: Part
    """Empty if the split has no validation cells; settings are then chosen on the training cells."""
    test: Cells
    num_classes: int
    """k; classes without a training cell are never predicted."""
    genes: tuple[str, ...]

    @property
    def chooser(self) -> Part:
        """The cells that settings are chosen on."""
        return self.val if len(self.val.labels_n) else self.train


class Labels(NamedTuple):
    """A method's labels of some cells."""

    predicted_n: np.ndarray
    """Class, int64."""
    probabilities_nk: np.ndarray | None
    """float32; None for a method without probabilities."""


class Candidate(NamedTuple):
    """A method with one setting, fitted."""

    setting: dict[str, Any]
    label: Callable[[Cells], Labels]
    parameters: Callable[[], int]
    """Number of values learned or stored."""


Candidates = Generator[Candidate, None, None]


@dataclass(frozen=True, eq=False, kw_only=True)
class Answer:
    """A method's labels for the test cells, from its best candidate."""

    predicted_n: np.ndarray
    """Class, int64."""
    probabilities_nk: np.ndarray | None
    """float32; None for a method without probabilities."""
    chosen: dict[str, Any]
    """Settings chosen on the validation cells."""
    parameters: int
    """Number of values learned or stored."""


def choose(cells: BaselineCells, candidates: Candidates, *, patience: int = 0) -> Answer:
    """Score candidates by macro-F1 on the validation cells, and label the test cells with the best one.

    Args:
        cells: The cells.
        candidates: At least one, each fitted only when drawn; of equally good ones, the first wins.
        patience: Stop after this many candidates without an improvement; 0 tries all.
    """
    best: Candidate | None = None
    best_score, worse = -1.0, 0
    with contextlib.closing(candidates):
        for candidate in candidates:
            predicted_n = candidate.label(cells.chooser.cells).predicted_n
            score = macro_f1(cells.chooser.labels_n, predicted_n, cells.num_classes)
            if score > best_score:
                best, best_score, worse = candidate, score, 0
            else:
                worse += 1
            if patience and worse == patience:
                break
    assert best is not None
    predicted_n, probabilities_nk = best.label(cells.test)
    return Answer(
        predicted_n=predicted_n,
        probabilities_nk=probabilities_nk,
        chosen=best.setting,
        parameters=best.parameters(),
    )


def baseline_parts(cells: TrainingCells) -> tuple[dict[str, Part], np.ndarray]:
    """Read the parts of a run in the form that baselines take. Ray must be running.

    Returns:
        The cells of each part, at most `MOST_FITTED` of them for training; and the joinid of each test cell.
    """
    parts, joinids = {}, np.zeros(0, np.int64)
    for part, positions in cells.parts.items():
        most = min(len(positions), MOST_FITTED) if part == "train" else len(positions)
        if not len(positions):
            none = CellCounts.of(np.zeros((0, len(cells.genes))))
            parts[part] = Part(
                cells=Cells(none), labels_n=np.zeros(0, np.int64), datasets_n=np.zeros(0, np.int64)
            )
            continue
        found = cells.sample(part, most)
        places = np.searchsorted(cells.query.obs_joinids, found.joinids_n)
        parts[part] = Part(
            cells=Cells(found.cells), labels_n=found.labels_n, datasets_n=cells.datasets_n[places]
        )
        joinids = found.joinids_n if part == "test" else joinids
    return parts, joinids


def macro_f1(labels_n: np.ndarray, predicted_n: Any, num_classes: int) -> float:
    """Macro-F1 of predicted classes."""
    counts = LabelCounts(num_classes)
    counts.add(torch.from_numpy(labels_n), torch.from_numpy(np.asarray(predicted_n, np.int64)))
    return counts.macro_f1


def spread(probabilities: np.ndarray, classes: np.ndarray, num_classes: int) -> np.ndarray:
    """Scores of the classes a method knows, moved to their columns among all k."""
    whole = np.zeros((len(probabilities), num_classes), np.float32)
    whole[:, np.asarray(classes, np.int64)] = probabilities
    return whole


def variable_genes(x_ng: sparse.csr_matrix, most: int) -> np.ndarray:
    """Columns with the largest variance, in increasing order."""
    mean_g = np.asarray(x_ng.mean(0)).ravel()
    variance_g = np.asarray(x_ng.multiply(x_ng).mean(0)).ravel() - mean_g**2
    return np.sort(np.argsort(-variance_g, kind="stable")[:most])
