"""Names of what a model says of a cell, in the tables of users: what may be overwritten, and is no label.

Light to import: readers of files need it without the model.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

ANSWER_COLUMNS = (
    "predicted_labels",
    "conf_score",
    "cell_type_ontology_term_id",
    "label_level",
    "unknown",
    "unknown_score",
    "best_label",
    "unknown_reason",
)
"""What is said of a cell, as columns: made by `Predictions.table`."""

_OURS_ALONE = {"predicted_labels", "label_level", "unknown_score", "best_label"}
"""Columns that every version of ours wrote, and that no other tool writes together."""

PROVENANCE = "screformer"
"""Where `uns` says which model wrote which columns."""


def predicted_columns(columns: Collection[str], record: Any) -> set[str]:
    """Which columns of obs a model wrote.

    Args:
        columns: Columns of obs.
        record: `uns[PROVENANCE]`, or None. It gets lost when files are joined; then all of our columns
            together tell.
    """
    if isinstance(record, Mapping):
        return set(columns) & set(record.get("columns", ANSWER_COLUMNS))
    return set(columns) & set(ANSWER_COLUMNS) if set(columns) >= _OURS_ALONE else set()


def original_column(name: str, columns: Collection[str]) -> str | None:
    """Where the column is that was in the place of one of ours, None where there was none."""
    kept = [column for column in columns if column.startswith(f"{name}_original")]
    return max(kept, key=lambda column: (len(column), column), default=None)
