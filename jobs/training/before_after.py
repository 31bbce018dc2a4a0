"""A model before and after it was trained on cells of another query: on these, and on those it knew.

Axes: n cells.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from jobs.reports.artifacts import log_before_and_after
from jobs.tracking.runs import TrackedRun
from jobs.training.cells import TrainingCells
from jobs.training.reference import cells_to_show
from screformer.checkpoint import add_meta
from screformer.extension import known_part
from screformer.metrics import LabelCounts
from screformer.predictor import Predictor

NEW, OLD = "new query", "the model's own query"


def before_and_after(cells: TrainingCells, before: Predictor, after: Predictor) -> pd.DataFrame:
    """Scores of two models on test cells of the new query and of the first model's own. Ray must be running.

    Args:
        cells: The run's cells, with `move` set.
        before: The model that the training started from.
        after: The trained one, whose first genes are those of `before`.

    Returns:
        One row for all types of each query (`type` is empty) and one per type: `cells of`, `type`, `cells`,
        and `... before`, `... after` for accuracy (of best labels), macro-F1 over the true types, and the
        share of unknown cells.
    """
    assert cells.move is not None
    found = cells.sample("test", cells_to_show(cells))
    position = np.searchsorted(cells.query.obs_joinids, found.joinids_n)
    truth = np.array(cells.labels["names"], dtype=object)[found.labels_n]
    said = {
        "before": before.predict(known_part(found.cells, len(before.vocabulary))),
        "after": after.predict(found.cells),
    }
    rows = []
    for name, inside in ((NEW, cells.move.new_n[position]), (OLD, ~cells.move.new_n[position])):
        for label in ["", *sorted(set(truth[inside]))]:
            own = inside & (truth == label) if label else inside
            if not own.any():
                continue
            row = {"cells of": name, "type": label, "cells": int(own.sum())}
            for when, answers in said.items():
                row[f"accuracy {when}"] = float((answers.best_labels[own] == truth[own]).mean())
                if not label:
                    row[f"macro-F1 {when}"] = LabelCounts.of_names(
                        truth[own], answers.best_labels[own]
                    ).macro_f1_true
                row[f"unknown {when}"] = float(answers.unknown[own].mean())
            rows.append(row)
    return pd.DataFrame(rows)


def move_scores(table: pd.DataFrame) -> dict[str, float]:
    """The rows for all types as metrics: `move/new/macro_f1_before` and so on."""
    scores = {}
    for name, short in ((NEW, "new"), (OLD, "old")):
        for _, row in table[(table["cells of"] == name) & (table["type"] == "")].iterrows():
            for score in ("accuracy", "macro-F1"):
                for when in ("before", "after"):
                    key = f"move/{short}/{score.replace('-', '_').lower()}_{when}"
                    scores[key] = float(row[f"{score} {when}"])
    return scores


def log_move(run: TrackedRun, cells: TrainingCells, before: Predictor, after: Predictor) -> None:
    """Log scores before and after, and keep them with the model."""
    if not len(cells.parts["test"]):
        return
    table = before_and_after(cells, before, after)
    scores = move_scores(table)
    log_before_and_after(run, table)
    run.log_metrics(scores, step=cells.config.train.max_steps)
    add_meta(after.directory, {"move": {**after.meta["move"], "scores": scores}})
    print(table[table["type"] == ""].to_string(index=False, float_format="{:.3f}".format), flush=True)
