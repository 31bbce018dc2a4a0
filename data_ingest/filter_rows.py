"""Find the rows of a table that a SOMA value filter describes, as SOMA would.

TileDB-SOMA 2.3.0 corrupts memory in about one of several hundred filtered reads (its issue 4437), so we read
without a filter and apply it here.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from functools import reduce
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from data_ingest.filter_grammar import column_name, constant, without_not

_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: pc.equal,
    ast.NotEq: pc.not_equal,
    ast.Lt: pc.less,
    ast.LtE: pc.less_equal,
    ast.Gt: pc.greater,
    ast.GtE: pc.greater_equal,
}
_MIRRORED = {ast.Lt: ast.Gt, ast.LtE: ast.GtE, ast.Gt: ast.Lt, ast.GtE: ast.LtE}


def matching(value_filter: str, rows: pa.Table) -> pa.ChunkedArray:
    """Which rows satisfy a filter; bool without nulls.

    Args:
        value_filter: A filter accepted by `check_filter`, not empty.
        rows: A table with the filter's columns.
    """
    return _evaluated(ast.parse(without_not(value_filter), mode="eval").body, rows)


def _evaluated(node: ast.expr, rows: pa.Table) -> pa.ChunkedArray:
    if isinstance(node, ast.BoolOp):
        join = pc.and_ if isinstance(node.op, ast.And) else pc.or_
        return reduce(join, (_evaluated(part, rows) for part in node.values))
    assert isinstance(node, ast.Compare)
    sides = [node.left, *node.comparators]
    return reduce(
        pc.and_,
        (
            _compared(left, op, right, rows)
            for left, op, right in zip(sides, node.ops, sides[1:], strict=False)
        ),
    )


def _compared(left: ast.expr, op: ast.cmpop, right: ast.expr, rows: pa.Table) -> pa.ChunkedArray:
    kind, name = type(op), column_name(left)
    if name is None:  # VALUE < COLUMN
        kind, name, right = _MIRRORED.get(kind, kind), column_name(right), left
    assert name is not None
    column = rows[name]
    if isinstance(right, ast.List):
        inside = _tested(column, lambda part: pc.is_in(part, _constants(right.elts, part.type)))
        return inside if kind is ast.In else pc.and_not(pc.is_valid(column), inside)
    value = constant(right)
    if value is None:
        return pc.is_null(column) if kind is ast.Eq else pc.is_valid(column)
    found = _tested(column, lambda part: _COMPARE[kind](part, pa.scalar(value, type=part.type)))
    return pc.fill_null(found, False)


def _constants(nodes: list[ast.expr], kind: pa.DataType) -> pa.Array:
    return pa.array([constant(node) for node in nodes], type=kind)


def _tested(column: pa.ChunkedArray, test: Callable[[Any], Any]) -> pa.ChunkedArray:
    """The result of a test of each value; of a dictionary, each distinct value is tested once."""
    if not pa.types.is_dictionary(column.type):
        return test(column)
    chunks = [pc.take(test(chunk.dictionary), chunk.indices) for chunk in column.chunks]
    return pa.chunked_array(chunks, type=pa.bool_())
