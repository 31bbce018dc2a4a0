"""Print the report of a query, with the time needed to read its cells."""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np

from data_ingest.datasource import gene_of_var, read_cells
from data_ingest.query import QueryResult

BYTES_PER_COUNT = 8
"""Memory for a stored count: gene and value."""
_RUNS, _RUN_LENGTH = 8, 64


def seconds_to_read(result: QueryResult) -> float:
    """Estimate from a few hundred cells how many seconds one reader needs for all cells of a query."""
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
    """Describe a query's result.

    Args:
        result: The result.
        seconds: From `seconds_to_read`; None leaves the time out.
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
        lines.append(f"reading   about {_duration(seconds)} per pass with one reader")
    for name, title in (("assays", "assay"), ("diseases", "disease"), ("major_types", "major type")):
        if name in summary:
            lines += [f"{title}, cells:", *_rows(summary[name])]
    lines += [f"{result.label_column}, cells:", *_rows(summary["labels"])]
    if summary["unmapped_cells"]:
        lines += [
            f"{summary['unmapped_cells']:,} cells have no label and are not used for fine-tuning; by"
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
