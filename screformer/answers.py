"""Names of the columns a model writes into users' tables: they may be overwritten and are never labels.

Light to import: file readers need it without the model.
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
"""The columns of a cell's answer, as built by `Predictions.table`."""

_OURS_ALONE = {"predicted_labels", "label_level", "unknown_score", "best_label"}
"""Columns that every version writes and that no other tool writes together."""

PROVENANCE = "screformer"
"""Key in `uns` of the record of which model wrote which columns."""


def predicted_columns(columns: Collection[str], record: Any) -> set[str]:
    """Which columns of obs a model wrote.

    Args:
        columns: Columns of obs.
        record: `uns[PROVENANCE]`, or None. It is lost when files are joined; then the columns are recognised
            if all of ours are present.
    """
    if isinstance(record, Mapping):
        return set(columns) & set(record.get("columns", ANSWER_COLUMNS))
    return set(columns) & set(ANSWER_COLUMNS) if set(columns) >= _OURS_ALONE else set()


def original_column(name: str, columns: Collection[str]) -> str | None:
    """New name of the column that ours replaced; None if there was none."""
    kept = [column for column in columns if column.startswith(f"{name}_original")]
    return max(kept, key=lambda column: (len(column), column), default=None)
