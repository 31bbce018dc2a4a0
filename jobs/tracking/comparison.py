"""Compare two models on the same folds or on cells that neither was trained on.

Axes: n cells.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from data_ingest.atlas_cells import AtlasCells
from data_ingest.query import QueryResult, find_cells, saved_query
from jobs.studies.scores import mean_interval
from jobs.tracking.models import CANDIDATE, CHAMPION
from screformer.genes import MIN_GENE_OVERLAP
from screformer.metrics import LabelCounts
from screformer.predictor import Predictor

_CELLS_PER_CHUNK = 2_048
_MOST_CELLS = 20_000
_SAMPLES = 1_000
_CONFIDENCE = 0.95
_LEAST_CELLS = 30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """Difference between candidate and champion on the same cells."""

    num_cells: int
    groups: tuple[str, ...]
    """Groups that the cells belong to, for example donors."""
    difference: float
    """Candidate minus champion, in balanced accuracy: the mean over types of the share of correct labels."""
    low: float
    """Lower end of the 95 % interval of the difference."""
    high: float
    accuracy: dict[str, float]
    """Share of correct cells, for `candidate` and `champion`."""
    macro_f1: dict[str, float]
    """Macro-F1 over the true types, for both."""
    table: pd.DataFrame
    """One row per type: `label`, `cells`, `candidate`, `champion` (shares of correct cells), `difference`,
    `low`, `high`."""


def compare(answers_n: dict[str, np.ndarray], labels_n: np.ndarray, groups: Sequence[str]) -> Comparison:
    """Compare two models cell by cell.

    Args:
        answers_n: Labels by `candidate` and `champion`, object (n,).
        labels_n: True label of each cell, object (n,).
        groups: Groups that the cells belong to.
    """
    rng = np.random.default_rng(0)
    right_n = {name: answers == labels_n for name, answers in answers_n.items()}
    gain_n = right_n[CANDIDATE].astype(np.int8) - right_n[CHAMPION]
    rows, samples = [], []
    for label in sorted(set(labels_n)):
        inside = labels_n == label
        gain = gain_n[inside]
        # A gain has three possible values, so bootstrapping its mean is a multinomial draw.
        shares = np.array([(gain == value).mean() for value in (-1, 0, 1)])
        drawn = rng.multinomial(len(gain), shares, size=_SAMPLES) @ np.array([-1, 0, 1]) / len(gain)
        samples.append(drawn)
        low, high = np.quantile(drawn, [(1 - _CONFIDENCE) / 2, (1 + _CONFIDENCE) / 2])
        shares_right = {name: float(right[inside].mean()) for name, right in right_n.items()}
        rows.append(
            {
                "label": label,
                "cells": int(inside.sum()),
                **shares_right,
                "difference": gain.mean(),
                "low": low,
                "high": high,
            }
        )
    table = pd.DataFrame(rows)
    low, high = np.quantile(np.mean(samples, axis=0), [(1 - _CONFIDENCE) / 2, (1 + _CONFIDENCE) / 2])
    return Comparison(
        num_cells=len(labels_n),
        groups=tuple(groups),
        difference=float(table["difference"].mean()),
        low=float(low),
        high=float(high),
        accuracy={name: float(right.mean()) for name, right in right_n.items()},
        macro_f1={
            name: LabelCounts.of_names(labels_n, answers).macro_f1_true for name, answers in answers_n.items()
        },
        table=table,
    )


def compare_folds(
    candidate: Mapping[str, Any] | None, champion: Mapping[str, Any] | None
) -> dict[str, Any] | None:
    """Candidate minus champion over the folds that both were cross-validated on.

    Args:
        candidate: The candidate's fold scores (`folds` in its meta data), or None if it has none.
        champion: The same for the champion.

    Returns:
        `difference` of macro-F1, `low` and `high` of its 95 % interval, `folds` and their `kind`; None if
        the two do not have the same folds.
    """
    if candidate is None or champion is None or candidate["hash"] != champion["hash"]:
        return None
    ours, theirs = (folds["metrics"]["macro_f1"] for folds in (candidate, champion))
    difference, low, high = mean_interval(np.subtract(ours, theirs).tolist())
    return {"difference": difference, "low": low, "high": high, "folds": len(ours), "kind": candidate["kind"]}


def compare_folds_with_floor(candidate: Mapping[str, Any] | None, num_labels: int) -> dict[str, Any] | None:
    """Candidate minus a baseline over the candidate's folds; the baseline predicts the most frequent label.

    A constant label has a macro-F1 of at most 1 / `num_labels`; that bound is used as the baseline's score.

    Args:
        candidate: As in `compare_folds`.
        num_labels: Number of labels.
    """
    if candidate is None:
        return None
    floor = {**candidate, "metrics": {"macro_f1": [1 / num_labels] * len(candidate["names"])}}
    return compare_folds(candidate, floor)


def compare_models(
    candidate: Predictor, champion: Predictor | None, *, among: Collection[str] | None = None
) -> Comparison:
    """Compare both models on cells that neither was trained on.

    Args:
        candidate: The candidate.
        champion: The champion; None compares with the most frequent label for every cell.
        among: Held-out groups to compare on; None takes all.

    Raises:
        ValueError: The candidate's training held out no cells, its atlas no longer exists, or the champion
            was trained on those cells.
    """
    split, query = candidate.meta.get("split", {}), candidate.meta.get("query", {})
    groups = _groups_to_compare_on(split, champion)
    if among is not None:
        groups = [group for group in groups if group in among]
    if not groups or not query:
        raise ValueError(
            "the candidate's training held out no cells to compare on; train it with split.test_fraction"
            " above 0"
        )
    atlas, filters, expected_hash = saved_query(query)
    result = find_cells(
        atlas, filters, candidate.label_column, (split["group_by"],), expected_hash=expected_hash
    )
    own = (
        result.obs[split["group_by"]].astype(str).isin(groups).to_numpy()
        & result.obs["label"].notna().to_numpy()
    )
    positions = np.flatnonzero(own)
    if len(positions) > _MOST_CELLS:
        positions = np.sort(np.random.default_rng(0).choice(positions, _MOST_CELLS, replace=False))
    labels_n = result.obs["label"].astype(str).to_numpy(dtype=object)[positions]
    if len(positions) < _LEAST_CELLS:
        raise ValueError(
            f"only {len(positions)} labelled cells are left to compare on, but {_LEAST_CELLS} are needed;"
            f" hold out more"
        )
    answers_n = {CANDIDATE: _best_labels(candidate, result, positions)}
    if champion is not None:
        answers_n[CHAMPION] = _best_labels(champion, result, positions)
    else:
        values, counts = np.unique(labels_n.astype(str), return_counts=True)
        answers_n[CHAMPION] = np.full(len(labels_n), values[counts.argmax()], dtype=object)
    return compare(answers_n, labels_n, groups)


def _best_labels(predictor: Predictor, result: QueryResult, positions: np.ndarray) -> np.ndarray:
    source = AtlasCells.open(predictor, result, min_gene_overlap=MIN_GENE_OVERLAP)
    chunks = range(0, len(positions), _CELLS_PER_CHUNK)
    read = (source.read(positions[start : start + _CELLS_PER_CHUNK]) for start in chunks)
    return np.concatenate([predictor.predict(cells).best_labels for cells in read])


def _groups_to_compare_on(split: Mapping[str, Any], champion: Predictor | None) -> list[str]:
    """The candidate's held-out groups that the champion was not trained on."""
    held_out = set(split.get("groups", {}).get("test", []))
    if champion is None or not held_out:
        return sorted(held_out)
    theirs = champion.meta.get("split", {})
    if theirs.get("group_by") != split["group_by"]:
        raise ValueError(
            f"the candidate was split by {split['group_by']!r} and the champion by"
            f" {theirs.get('group_by')!r}, so cells that neither was trained on cannot be determined; train"
            f" the candidate with the champion's split.group_by"
        )
    seen = {group for part in ("train", "val") for group in theirs["groups"].get(part, [])}
    if held_out <= seen:
        raise ValueError(
            f"the champion was trained on all of the candidate's held-out groups"
            f" ({', '.join(sorted(held_out))}); train the candidate with"
            f" split.test_groups={theirs['groups'].get('test', [])}"
        )
    return sorted(held_out - seen)
