"""Names of the columns that a model writes into users' tables.

They may be overwritten and are never used as labels. Cheap to import, for file readers that need no model.
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
"""The columns of a cell's answer, built by `Predictions.table`."""

_OURS_ALONE = {"predicted_labels", "label_level", "unknown_score", "best_label"}
"""Columns that every version writes; no other tool writes all of them."""

PROVENANCE = "screformer"
"""Key in `uns` of the record of which model wrote which columns."""


def predicted_columns(columns: Collection[str], record: Any) -> set[str]:
    """Which obs columns were written by a model.

    Args:
        columns: Columns of obs.
        record: `uns[PROVENANCE]`, or None. It is lost when files are concatenated; our columns are then
            recognised if all of `_OURS_ALONE` are present.
    """
    if isinstance(record, Mapping):
        return set(columns) & set(record.get("columns", ANSWER_COLUMNS))
    return set(columns) & set(ANSWER_COLUMNS) if set(columns) >= _OURS_ALONE else set()


def original_column(name: str, columns: Collection[str]) -> str | None:
    """New name of the input column that ours replaced; None if there was none."""
    kept = [column for column in columns if column.startswith(f"{name}_original")]
    return max(kept, key=lambda column: (len(column), column), default=None)
