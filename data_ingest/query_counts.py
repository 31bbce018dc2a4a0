"""Counts of a query's cells by label, assay, disease and major type."""

from __future__ import annotations

from typing import Any

import pandas as pd

from data_ingest.filters import SEPARATOR
from data_ingest.query_labels import MAJOR, labels_of

REPORTED = ("assay", "disease", "nnz", MAJOR)
"""Optional obs columns, read only for the report of a query."""


def summary_of(obs: pd.DataFrame, label_column: str) -> dict[str, Any]:
    """Counts of cells, donors and datasets, and of cells by label, assay, disease and major type.

    A cell with several diseases counts for each of them. Cells without a label are counted by cell type.
    Counts that need a missing obs column are left out.

    Args:
        obs: As in `QueryResult.obs`.
        label_column: As in `QueryResult.label_column`.
    """
    unmapped = obs["label"].isna()
    found: dict[str, Any] = {
        "cells": len(obs),
        "donors": int(obs["donor_id"].nunique()),
        "datasets": int(obs["dataset_id"].nunique()),
        "labels": count_values(obs["label"]),
        "unmapped_cells": int(unmapped.sum()),
        "unmapped_cell_types": count_values(obs["cell_type"][unmapped]),
    }
    if label_column != MAJOR:
        found["major_types"] = count_values(pd.Series(labels_of(obs, MAJOR)[0]))
    if "assay" in obs:
        found["assays"] = count_values(obs["assay"])
    if "disease" in obs:
        found["diseases"] = count_parts(obs["disease"])
    if "nnz" in obs:
        found["stored_counts"] = int(obs["nnz"].sum())
    return found


def count_values(values: pd.Series) -> dict[str, int]:
    """How often each value occurs, most frequent first; unused categories are omitted."""
    counts = values.value_counts()
    return {str(name): int(count) for name, count in counts.items() if count}


def count_parts(values: pd.Series) -> dict[str, int]:
    """Like `count_values`, but splits values at `SEPARATOR` and counts the parts."""
    parts: dict[str, int] = {}
    for value, count in count_values(values).items():
        for part in value.split(SEPARATOR):
            parts[part] = parts.get(part, 0) + count
    return dict(sorted(parts.items(), key=lambda item: (-item[1], item[0])))
