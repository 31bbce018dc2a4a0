"""Read tab-separated tables supplied by the user."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from screformer.gene_names import ensembl_id


def read_table(path: str | Path, option: str, columns: Sequence[str]) -> pd.DataFrame:
    """Read a tab-separated table of strings and check that it has these columns.

    Raises:
        ValueError: The file is missing, unreadable, or lacks a column; the message names `option`.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path} ({option}) does not exist or is not a file")
    try:
        table = pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False)
    except (ValueError, OSError) as e:
        raise ValueError(f"{path} ({option}) is not a tab-separated table: {e}") from e
    missing = [name for name in columns if name not in table.columns]
    if missing:
        raise ValueError(
            f"{path} ({option}) has no column {missing[0]!r}; it has: {listing(table.columns)}; it must be"
            f" tab-separated with a header"
        )
    return table


def read_symbol_table(path: str | Path) -> dict[str, str]:
    """Read a table of gene symbols and Ensembl ids.

    Args:
        path: Tab-separated (may be .gz), with columns `symbol` and `feature_id` (or `ensembl_id`).

    Returns:
        Symbol to feature id. Symbols with several ids are ambiguous and left out.

    Raises:
        ValueError: The file or a column is missing, or it contains no Ensembl gene id.
    """
    table = read_table(path, "--symbol-table", ("symbol",))
    column = next((name for name in ("feature_id", "ensembl_id") if name in table.columns), None)
    if column is None:
        raise ValueError(
            f"{path} (--symbol-table) has no column 'feature_id'; it has: {listing(table.columns)}"
        )
    table = table[(table["symbol"] != "") & (table[column] != "")]
    feature_ids = table[column].map(ensembl_id)
    human = feature_ids != ""
    if not human.any():
        raise ValueError(
            f"{path} (--symbol-table): column {column!r} has no human Ensembl gene id such as"
            f" ENSG00000156738; "
            f"it starts with {table[column].head(1).tolist()}"
        )
    table, feature_ids = table[human], feature_ids[human]
    pairs = pd.DataFrame({"symbol": table["symbol"], "feature_id": feature_ids}).drop_duplicates()
    pairs = pairs[~pairs["symbol"].duplicated(keep=False)]
    return dict(zip(pairs["symbol"], pairs["feature_id"], strict=True))


def listing(names: Sequence[str] | pd.Index, limit: int = 30) -> str:
    """The first names, for messages."""
    shown = ", ".join(str(name) for name in list(names)[:limit])
    return (shown + (", ..." if len(names) > limit else "")) or "none"
