"""Check SOMA value filters and read table rows with them."""

from __future__ import annotations

import difflib
import logging
import re
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from data_ingest.filter_grammar import Comparison, comparisons
from data_ingest.filter_rows import matching
from screformer.config import QueryConfig

logger = logging.getLogger(__name__)

_MOST_LISTED = 20
SEPARATOR = " || "
"""Separates several values of a cell, for example two diseases, as in Census."""


def full_obs_filter(query: QueryConfig) -> str:
    """The obs filter of a query, including the primary data condition."""
    primary, given = "is_primary_data == True", query.obs_filter.strip()
    if not query.is_primary_data:
        return given
    return f"({given}) and {primary}" if given else primary


def read_filtered(table: Any, value_filter: str, columns: list[str], field: str) -> pd.DataFrame:
    """The rows of a SOMA table that match a filter, in joinid order.

    The filter's columns are read first, then the others, between the first and the last row that matches.

    Args:
        table: An open table.
        value_filter: The filter; one that `check_filter` refuses is refused here too, or gives wrong rows.
        columns: Columns to read, with `soma_joinid`.
        field: Name of the setting, for messages.
    """
    needed = {comparison.column for comparison in comparisons(value_filter, field)}
    if not needed:
        rows = table.read(column_names=columns).concat()
    else:
        parts = table.read(column_names=["soma_joinid", *sorted(needed - {"soma_joinid"})])
        found = (part.filter(matching(value_filter, part))["soma_joinid"] for part in parts)
        joinids = pa.chunked_array([chunk for part in found for chunk in part.chunks], type=pa.int64())
        by_joinid = tuple(table.index_column_names) == ("soma_joinid",)
        ends = pc.min_max(joinids)
        within = (slice(ends["min"].as_py(), ends["max"].as_py()),) if by_joinid and len(joinids) else ()
        read = table.read(within, column_names=columns)
        if not len(joinids):
            read = [next(read)]  # the columns, without reading all rows
        rows = pa.concat_tables(part.filter(pc.is_in(part["soma_joinid"], joinids)) for part in read)
    for index, column in enumerate(rows.column_names):
        if _is_string(rows.schema.field(column).type):
            rows = rows.set_column(index, column, rows[column].dictionary_encode())
    return rows.select(columns).to_pandas().sort_values("soma_joinid", ignore_index=True)


def check_filter(value_filter: str, table: Any, field: str) -> None:
    """Find mistakes that SOMA does not report.

    These are columns that do not exist, values whose type does not match the column (SOMA would round them),
    and strings that do not occur in the column.

    Raises:
        ValueError: Names the mistake and lists what exists, closest matches first.
    """
    for comparison in comparisons(value_filter, field):
        require_column(comparison.column, table, field)
        for value in comparison.values:
            _check_type(comparison, value, table, field)
        texts = [value for value in comparison.values if isinstance(value, str)]
        if comparison.exact and texts:
            _check_texts(comparison.column, texts, table, field)


def _check_type(comparison: Comparison, value: Any, table: Any, field: str) -> None:
    column, kind = comparison.column, table.schema.field(comparison.column).type
    if pa.types.is_dictionary(kind) and not comparison.exact:
        raise ValueError(f"{field}: {column} is categorical, without an order; compare it with ==, != or in")
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if value is None:
        if comparison.listed or not comparison.exact:
            raise ValueError(f"{field}: {column} can only be == None or != None")
    elif _is_string(kind):
        if not isinstance(value, str):
            raise ValueError(f"{field}: {column} is text; write {column} == '{value}', with quotes")
    elif isinstance(value, str):
        raise ValueError(f"{field}: {column} is {kind}, not text; {value!r} can't be compared with it")
    elif pa.types.is_boolean(kind):
        if comparison.listed:
            raise ValueError(f"{field}: {column} is True or False; write {column} == {value!r}, not a list")
        if value not in (True, False):
            raise ValueError(f"{field}: {column} is True or False, never {value!r}")
    elif isinstance(value, bool):
        raise ValueError(f"{field}: {column} is a number, never {value!r}")
    elif pa.types.is_integer(kind) and not (
        abs(value) < 2 ** (kind.bit_width - 1) and float(value).is_integer()
    ):
        raise ValueError(
            f"{field}: {column} is a whole number ({kind}), and SOMA would round {value!r}; write a whole"
            f" number"
        )
    elif pa.types.is_integer(kind) and comparison.listed and isinstance(value, float):
        raise ValueError(f"{field}: {column} is a whole number; write {int(value)} instead of {value!r}")


def _check_texts(column: str, texts: list[str], table: Any, field: str) -> None:
    known = _strings_of(table, column) or []
    for text in texts:
        if text not in known:
            near = difflib.get_close_matches(text, known, n=_MOST_LISTED, cutoff=0.6)
            listed = near + [item for item in sorted(known, key=_natural) if item not in near]
            more = f" and {len(listed) - _MOST_LISTED} more" if len(listed) > _MOST_LISTED else ""
            raise ValueError(
                f"{field}: {column} is never {text!r}; its values are"
                f" {', '.join(map(repr, listed[:_MOST_LISTED]))}{more}"
            )
        joined = [other for other in known if text in other.split(SEPARATOR) and other != text]
        if joined:
            logger.warning(
                "%s: %s == %r misses cells that have it along with other values: %s; write %s in [%r, ...] to"
                " include them",
                field,
                column,
                text,
                ", ".join(map(repr, joined[:_MOST_LISTED])),
                column,
                text,
            )


def require_column(column: str, table: Any, field: str) -> None:
    """Reject a column that a table does not have."""
    names = [name for name in table.schema.names if not name.startswith("soma_")]
    if column not in table.schema.names:
        near = difflib.get_close_matches(column, names, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(
            f"{field}: the atlas has no column {column!r}; {hint}it has {', '.join(sorted(names))}"
        )


def _strings_of(table: Any, column: str) -> list[str] | None:
    """The distinct strings in a column; None if it is not a string column."""
    kind = table.schema.field(column).type
    if pa.types.is_dictionary(kind):
        return (
            table.get_enumeration_values([column])[column].drop_null().to_pylist()
            if _is_string(kind.value_type)
            else None
        )
    if not _is_string(kind):
        return None
    found = [pc.unique(part[column]) for part in table.read(column_names=[column])]
    return pc.unique(pa.chunked_array(found, type=kind)).drop_null().to_pylist()


def _natural(text: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", text)]


def _is_string(kind: Any) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)
