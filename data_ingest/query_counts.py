"""Counts of a query's cells by label, assay, disease and major type."""

from __future__ import annotations

from typing import Any

import pandas as pd

from data_ingest.filters import SEPARATOR
from data_ingest.query_labels import MAJOR, labels_of

REPORTED = ("assay", "disease", "nnz", MAJOR)
"""Optional obs columns that only the report of a query reads."""


def summary_of(obs: pd.DataFrame, label_column: str) -> dict[str, Any]:
    """Counts of cells, donors and datasets, and of cells by label, assay, disease and major type.

    A cell with several diseases counts for each of them. Cells without a label are counted by their cell
    type. What needs a column that is not in obs is left out.

    Args:
        obs: As `QueryResult.obs`.
        label_column: As `QueryResult.label_column`.
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
    """As `count_values`, where a value may be several, joined by `SEPARATOR`."""
    parts: dict[str, int] = {}
    for value, count in count_values(values).items():
        for part in value.split(SEPARATOR):
            parts[part] = parts.get(part, 0) + count
    return dict(sorted(parts.items(), key=lambda item: (-item[1], item[0])))
