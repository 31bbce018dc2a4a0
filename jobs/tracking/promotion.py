"""Compare a candidate with the champion on the same folds or held-out cells, and promote it.

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
from jobs.tracking.models import CANDIDATE, CHAMPION, model_aliases, move_alias, resolve_model
from jobs.tracking.runs import start_run
from screformer.config import TrackingConfig
from screformer.genes import MIN_GENE_OVERLAP
from screformer.predictor import Predictor

_CELLS_PER_CHUNK = 2_048


_MOST_CELLS = 20_000


_SAMPLES = 1_000


_CONFIDENCE = 0.95


_LEAST_CELLS = 30


MOST_LOST = 0.01
"""Balanced accuracy that a model moved to another query may lose on cells of its own one."""


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
    table: pd.DataFrame
    """One row per type: `label`, `cells`, `candidate`, `champion` (shares of correct cells), `difference`,
    `low`, `high`."""


def compare(right_n: dict[str, np.ndarray], labels_n: np.ndarray, groups: Sequence[str]) -> Comparison:
    """Compare two models cell by cell.

    Args:
        right_n: For `candidate` and `champion`, which cells they labelled correctly, bool (n,).
        labels_n: True label of each cell, object (n,).
        groups: Groups that the cells belong to.
    """
    rng = np.random.default_rng(0)
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
    return compare({name: answers == labels_n for name, answers in answers_n.items()}, labels_n, groups)


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


def _measured(
    candidate: Predictor, champion: Predictor | None
) -> tuple[str, str, dict[str, Any], Comparison | None]:
    """Metric, cells and numbers of a comparison: on shared folds if there are any, else cell by cell."""
    own = candidate.meta.get("folds")
    if champion is None:
        folds = compare_folds_with_floor(own, len(candidate.label_names))
    else:
        folds = compare_folds(own, champion.meta.get("folds"))
    if folds is not None:
        whose = "of the candidate's cross-validation" if champion is None else "of both cross-validations"
        return "macro-F1", f"the {folds['folds']} {folds['kind']} folds {whose}", folds, None
    old_groups = candidate.meta.get("move", {}).get("old_test_groups", [])
    new_groups = None
    if champion is not None and old_groups:
        new_groups = [group for group in candidate.meta["split"]["groups"]["test"] if group not in old_groups]
    comparison = compare_models(candidate, champion, among=new_groups)
    measured = _numbers(comparison)
    where = f"{comparison.num_cells:,} cells of {', '.join(comparison.groups)}"
    if new_groups is not None:
        measured["known_cells"] = _numbers(compare_models(candidate, champion, among=old_groups))
    return "balanced accuracy", where, measured, comparison


def _numbers(comparison: Comparison) -> dict[str, Any]:
    keys = ("difference", "low", "high", "num_cells", "accuracy")
    return {key: getattr(comparison, key) for key in keys} | {"groups": list(comparison.groups)}


def promote(
    name: str, tracking: TrackingConfig, *, margin: float = 0.0, force: bool = False
) -> dict[str, Any]:
    """Compare candidate and champion, and move the alias if the candidate is better.

    If there is no champion yet, the candidate must beat the most frequent label for every cell.

    Args:
        name: Registered model.
        tracking: Where it is kept.
        margin: The lower end of the interval must be above this.
        force: Move the alias anyway. The version's tag and the run record the reason and that it was forced.

    Returns:
        `promoted`, `reason`, versions, and the numbers of the comparison if there was one.

    Raises:
        ValueError: There is no candidate, or the two cannot be compared and `force` is False.
    """
    aliases = model_aliases(name, tracking)
    if CANDIDATE not in aliases:
        raise ValueError(
            f"model {name} has no version with the alias {CANDIDATE!r}; register one with `python -m"
            f" jobs.finetune`"
        )
    version, before = aliases[CANDIDATE], aliases.get(CHAMPION)
    found: dict[str, Any] = {"model": name, "candidate": version, "champion_before": before, "forced": force}
    if before == version:
        return {**found, "promoted": False, "reason": f"version {version} is already the champion"}
    candidate, comparison = Predictor.load(resolve_model(f"models:/{name}/{version}", tracking)), None
    measured: dict[str, Any] = {}
    try:
        champion = Predictor.load(resolve_model(f"models:/{name}/{before}", tracking)) if before else None
        metric, where, measured, comparison = _measured(candidate, champion)
        better = measured["low"] > margin
        reason = (
            f"{metric} {measured['difference']:+.4f} (95 % interval {measured['low']:+.4f} to"
            f" {measured['high']:+.4f}) on {where}; the interval must be above {margin:+.4f}"
        )
        known = measured.get("known_cells")
        if known:
            better = better and known["difference"] >= -MOST_LOST
            reason += (
                f"; {known['difference']:+.4f} on {known['num_cells']:,} cells of the query that the start"
                f" model was trained on; it may lose {MOST_LOST}"
            )
        if champion is None:
            reason = f"there is no champion; compared with the most frequent label for every cell: {reason}"
    except ValueError as error:
        if not force:
            raise
        better, reason = False, f"not compared: {error}"
    found |= {
        "promoted": better or force,
        "reason": reason,
        "champion": version if better or force else before,
    }
    if measured:
        found["comparison"] = measured
    config = candidate.config.merge({"tracking.uri": tracking.uri, "tracking.run_name": ""})
    with start_run(config, "promote", what=name) as run:
        run.set_tags({f"promote.{key}": value for key, value in found.items()})
        if comparison is not None:
            run.log_table(comparison.table, "promote/per_type.csv")
        if measured:
            run.log_metrics(
                {"promote/difference": measured["difference"], "promote/low": measured["low"]}, step=0
            )
        if found["promoted"]:
            move_alias(name, CHAMPION, version, reason={**found, "run": run.run_id}, tracking=tracking)
    return found
