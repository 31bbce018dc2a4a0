"""SOMA value filters: what they say is checked before SOMA reads by them."""

from __future__ import annotations

import ast
import difflib
import logging
import re
from collections.abc import Iterator
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import tiledbsoma

from screformer.config import QueryConfig

logger = logging.getLogger(__name__)

_MOST_LISTED = 20


def full_obs_filter(query: QueryConfig) -> str:
    """The filter of a query's cells, with that of primary data."""
    primary, given = "is_primary_data == True", query.obs_filter.strip()
    if not query.is_primary_data:
        return given
    return f"({given}) and {primary}" if given else primary


def read_filtered(table: Any, value_filter: str, columns: list[str], field: str) -> pd.DataFrame:
    """The rows of a table of SOMA that fulfil a filter, in order of joinids; `field` is for messages."""
    try:
        rows = table.read(column_names=columns, value_filter=value_filter or None).concat()
    except (tiledbsoma.SOMAError, TypeError, ValueError, KeyError) as error:
        raise ValueError(f"{field}: SOMA does not take it: {str(error).splitlines()[0]}") from error
    for index, column in enumerate(rows.column_names):
        if _is_string(rows.schema.field(column).type):
            rows = rows.set_column(index, column, rows[column].dictionary_encode())
    return rows.select(columns).to_pandas().sort_values("soma_joinid", ignore_index=True)


def check_filter(value_filter: str, table: Any, field: str) -> None:
    """Find what SOMA would not tell: columns that do not exist, and strings that their column never holds."""
    if not value_filter.strip():
        return
    try:
        tree = ast.parse(value_filter, mode="eval")
    except SyntaxError as error:
        raise ValueError(
            f"{field}={value_filter!r}: SOMA does not take it: {error.msg} at character {error.offset}; write"
            f" such as"
            " \"tissue_general == 'blood' and assay in ['10x 3\\' v3']\""
        ) from error
    for node in ast.walk(tree):
        column = _column(node)
        if column is not None:
            require_column(column, table, field)
    for column, number in _comparisons(tree, (int, float)):
        if _strings_of(table, column) is not None and not isinstance(number, bool):
            raise ValueError(f"{field}: {column} holds text; write {column} == '{number}', with quotes")
    for column, value in _comparisons(tree, (str,)):
        known = _strings_of(table, column)
        if known is not None and value not in known:
            near = difflib.get_close_matches(value, known, n=_MOST_LISTED, cutoff=0.6)
            listed = near + [item for item in sorted(known, key=_natural) if item not in near]
            more = f" and {len(listed) - _MOST_LISTED} more" if len(listed) > _MOST_LISTED else ""
            raise ValueError(
                f"{field}: {column} never is {value!r}; there is"
                f" {', '.join(map(repr, listed[:_MOST_LISTED]))}{more}"
            )
        joined = [text for text in known or () if value in text.split(" || ") and text != value]
        if joined:
            logger.warning(
                "%s: %s == %r leaves out cells that have it with other values: %s; write %s in [%r, ...] to"
                " include them",
                field,
                column,
                value,
                ", ".join(map(repr, joined[:_MOST_LISTED])),
                column,
                value,
            )


def _column(node: ast.AST) -> str | None:
    if isinstance(node, ast.Name) and node.id not in ("attr", "val"):
        return node.id
    if (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "attr"
        and len(node.args) == 1
    ):
        return (
            node.args[0].value
            if isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str)
            else None
        )
    return None


def _comparisons(tree: ast.AST, kinds: tuple[type, ...]) -> Iterator[tuple[str, Any]]:
    """Each column that is compared with a constant of some kinds, and the constant."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            columns = [column for column in map(_column, sides) if column is not None]
            exact = all(isinstance(op, ast.Eq | ast.NotEq | ast.In | ast.NotIn) for op in node.ops)
            values = [
                item for side in sides for item in (side.elts if isinstance(side, ast.List) else [side])
            ]
            if len(columns) == 1 and exact:
                yield from (
                    (columns[0], item.value)
                    for item in values
                    if isinstance(item, ast.Constant) and isinstance(item.value, kinds)
                )


def require_column(column: str, table: Any, field: str) -> None:
    """Refuse a column that a table does not have."""
    names = [name for name in table.schema.names if not name.startswith("soma_")]
    if column not in table.schema.names:
        near = difflib.get_close_matches(column, names, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(
            f"{field}: the atlas has no column {column!r}; {hint}there is {', '.join(sorted(names))}"
        )


def _strings_of(table: Any, column: str) -> list[str] | None:
    """The strings that a column holds, None where it holds no strings."""
    kind = table.schema.field(column).type
    if pa.types.is_dictionary(kind):
        return (
            table.get_enumeration_values([column])[column].to_pylist()
            if _is_string(kind.value_type)
            else None
        )
    if not _is_string(kind):
        return None
    found = [pc.unique(part[column]) for part in table.read(column_names=[column])]
    return pc.unique(pa.chunked_array(found, type=kind)).to_pylist()


def _natural(text: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", text)]


def _is_string(kind: Any) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)
