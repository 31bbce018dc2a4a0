"""What a query found, in counts, and how long its cells take to read."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from data_ingest.filters import SEPARATOR
from data_ingest.query_labels import MAJOR, labels_of

if TYPE_CHECKING:
    from data_ingest.query import QueryResult

REPORTED = ("assay", "disease", "nnz", MAJOR)
"""obs columns that only the report of a query reads, where the atlas has them."""
BYTES_PER_COUNT = 8
"""A stored count in memory: gene and value."""
_RUNS, _RUN_LENGTH = 8, 64


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


def seconds_to_read(result: QueryResult) -> float:
    """Time that one reader needs for all cells of a query, by that for a few hundred of them."""
    from data_ingest.datasource import gene_of_var, read_cells

    vocabulary = result.vocabulary()
    genes, joinids = gene_of_var(result.atlas, vocabulary), result.obs_joinids
    panels = result.panels(genes, len(vocabulary))
    starts = np.linspace(0, max(len(joinids) - _RUN_LENGTH, 0), _RUNS).astype(int)
    cells = np.unique(np.concatenate([np.arange(start, start + _RUN_LENGTH) for start in starts]))
    cells = cells[cells < len(joinids)]
    read_cells(result.atlas, joinids[cells[:1]], genes, panels.take(cells[:1]))  # opens the atlas
    started = time.perf_counter()
    read_cells(result.atlas, joinids[cells], genes, panels.take(cells))
    return (time.perf_counter() - started) * len(joinids) / len(cells)


def report(result: QueryResult, *, seconds: float | None = None) -> str:
    """The summary of a result in words.

    Args:
        result: The result.
        seconds: As `seconds_to_read`; None leaves it out.
    """
    summary = result.summary()
    lines = [
        f"atlas     {result.atlas.uri} at timestamp_ms={result.atlas.timestamp_ms}",
        *(f"{name:<9} {summary[name]:,}" for name in ("cells", "genes", "donors", "datasets")),
    ]
    if "stored_counts" in summary:
        stored = summary["stored_counts"]
        lines.append(f"size      {stored:,} counts, {stored * BYTES_PER_COUNT / 1e9:,.2f} GB in memory")
    if seconds is not None:
        lines.append(f"reading   about {_duration(seconds)} with one reader, each time they are streamed")
    for name, title in (("assays", "assay"), ("diseases", "disease"), ("major_types", "major type")):
        if name in summary:
            lines += [f"{title}, cells:", *_rows(summary[name])]
    lines += [f"{result.label_column}, cells:", *_rows(summary["labels"])]
    if summary["unmapped_cells"]:
        lines += [
            f"without a label {summary['unmapped_cells']:,} cells, which no training with labels uses, by"
            f" cell_type:",
            *_rows(summary["unmapped_cell_types"]),
        ]
    return "\n".join([*lines, f"hash      {result.hash}"])


_MOST_ROWS = 30


def _rows(counts: Mapping[str, int]) -> list[str]:
    rows = [f"  {count:>11,}  {name}" for name, count in list(counts.items())[:_MOST_ROWS]]
    return [*rows, f"  and {len(counts) - _MOST_ROWS} more"] if len(counts) > _MOST_ROWS else rows


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
