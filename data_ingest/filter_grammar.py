"""Parse SOMA value filters into comparisons, and locate errors in them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

_EXAMPLE = "\"tissue_general == 'blood' and assay in ['10x 3\\' v3']\""
_MEMBER = (ast.In, ast.NotIn)
_EXACT = (ast.Eq, ast.NotEq, *_MEMBER)
_ORDER = (ast.Lt, ast.LtE, ast.Gt, ast.GtE)
_OPPOSITE: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Eq: ast.NotEq,
    ast.Lt: ast.GtE,
    ast.Gt: ast.LtE,
    ast.In: ast.NotIn,
}
_OPPOSITE |= {theirs: ours for ours, theirs in _OPPOSITE.items()}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A comparison of a column with constants."""

    column: str
    values: tuple[Any, ...]
    exact: bool
    """Whether it tests equality or membership rather than order."""
    listed: bool = False
    """Whether it tests membership in a list."""


def comparisons(value_filter: str, field: str) -> list[Comparison]:
    """All comparisons of a filter, in order; none if it is empty.

    SOMA parses filters as Python. If a filter does not have the documented form, SOMA fails internally or
    ignores part of it. Such filters are rejected here.

    Args:
        value_filter: The filter.
        field: Name of the setting, for messages.

    Raises:
        ValueError: It does not have that form; the message gives the position.
    """
    if not value_filter.strip():
        return []
    return list(_Parser(value_filter.strip(), field).comparisons())


def without_not(value_filter: str) -> str:
    """The same filter without `not`: TileDB crashes if it negates `in` or a compound condition.

    Args:
        value_filter: A filter accepted by `comparisons`.
    """
    if not value_filter.strip():
        return ""
    return ast.unparse(_resolved(ast.parse(value_filter.strip(), mode="eval").body, negate=False))


def _resolved(node: ast.expr, *, negate: bool) -> ast.expr:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return _resolved(node.operand, negate=not negate)
    if isinstance(node, ast.BoolOp | ast.BinOp):
        parts = node.values if isinstance(node, ast.BoolOp) else [node.left, node.right]
        joins_all = isinstance(node.op, ast.And | ast.BitAnd)
        return ast.BoolOp(
            op=ast.And() if joins_all != negate else ast.Or(),
            values=[_resolved(part, negate=negate) for part in parts],
        )
    assert isinstance(node, ast.Compare)
    if not negate:
        return node
    sides = [node.left, *node.comparators]
    parts = [
        ast.Compare(left=left, ops=[_OPPOSITE[type(op)]()], comparators=[right])
        for left, op, right in zip(sides, node.ops, sides[1:], strict=False)
    ]
    return parts[0] if len(parts) == 1 else ast.BoolOp(op=ast.Or(), values=parts)


class _Parser:
    def __init__(self, text: str, field: str) -> None:
        self._text, self._field = text, field

    def comparisons(self) -> Iterator[Comparison]:
        try:
            self._text.encode()
            tree = ast.parse(self._text, mode="eval")
        except SyntaxError as error:
            place = f" at character {error.offset}" if error.offset else " at its end"
            raise ValueError(f"{self._start}{error.msg}{place}; write for example {_EXAMPLE}") from error
        except (ValueError, RecursionError, MemoryError) as error:
            raise ValueError(f"{self._start}{error or 'it is nested too deeply'}") from error
        try:
            ast.parse(f"({self._text})", mode="eval")
        except SyntaxError as error:
            raise ValueError(f"{self._start}it ends with a comment; drop everything from # on") from error
        try:
            yield from self._condition(tree.body)
        except RecursionError as error:
            raise ValueError(f"{self._start}it is nested too deeply") from error

    @property
    def _start(self) -> str:
        return f"{self._field}={self._text!r}: SOMA rejects it: "

    def _condition(self, node: ast.expr) -> Iterator[Comparison]:
        if isinstance(node, ast.BoolOp):
            for part in node.values:
                yield from self._condition(part)
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitAnd | ast.BitOr):
            yield from self._condition(node.left)
            yield from self._condition(node.right)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            yield from self._condition(node.operand)
        elif isinstance(node, ast.Compare):
            yield self._comparison(node)
        else:
            self._refuse(node, f"is not a condition; write for example {_EXAMPLE}")

    def _comparison(self, node: ast.Compare) -> Comparison:
        sides = [node.left, *node.comparators]
        if any(isinstance(op, _MEMBER) for op in node.ops):
            column, listed = column_name(node.left), node.comparators[0]
            if column is None:
                self._refuse(node.left, "is not a column; write COLUMN in [VALUE, ...]")
            if len(node.ops) > 1:
                self._refuse(node, "compares twice; join two conditions with `and`")
            if not isinstance(listed, ast.List) or not listed.elts:
                self._refuse(listed, "is not a list of values; write COLUMN in [VALUE, ...]")
            signed = next((part for part in listed.elts if isinstance(part, ast.UnaryOp)), None)
            if signed is not None:
                self._refuse(signed, "has a sign, which lists do not allow; write COLUMN == VALUE or ...")
            values = tuple(map(self._value, listed.elts))
            return Comparison(column=column, values=values, exact=True, listed=True)
        for op in node.ops:
            if not isinstance(op, (*_EXACT, *_ORDER)):
                self._refuse(node, "is compared with `is`; write == or !=")
        named = [index for index, side in enumerate(sides) if column_name(side) is not None]
        if len(named) != 1 or (len(sides) > 2 and (len(sides), named[0]) != (3, 1)):
            self._refuse(node, "must compare one column with a value; write COLUMN == VALUE")
        column = column_name(sides[named[0]])
        assert column is not None
        values = tuple(self._value(side) for index, side in enumerate(sides) if index != named[0])
        return Comparison(column=column, values=values, exact=all(isinstance(op, _EXACT) for op in node.ops))

    def _value(self, node: ast.expr) -> Any:
        try:
            return constant(node)
        except TypeError:
            self._refuse(node, "is not a value; write text in quotes, or a number")

    def _refuse(self, node: ast.expr, what: str) -> NoReturn:
        line = self._text.splitlines()[node.lineno - 1]
        before = len(line.encode()[: node.col_offset].decode(errors="ignore"))
        part = ast.get_source_segment(self._text, node) or ""
        raise ValueError(f"{self._start}{part!r} at character {before + 1} {what}")


def column_name(node: ast.expr) -> str | None:
    """The column that a part of a filter names, or None."""
    match node:
        case ast.Name(id=name):
            return name
        case ast.Call(func=ast.Name(id="attr"), args=[ast.Constant(value=str(name))], keywords=[]):
            return name
    return None


def constant(node: ast.expr) -> str | bool | int | float | None:
    """The constant that a part of a filter is.

    Raises:
        TypeError: It is none.
    """
    match node:
        case ast.Call(func=ast.Name(id="val"), args=[ast.Constant(value=value)], keywords=[]):
            pass
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() as op, operand=ast.Constant(value=number)) if isinstance(
            number, int | float
        ):
            value = -number if isinstance(op, ast.USub) else number
        case ast.Constant(value=value):
            pass
        case _:
            raise TypeError("not a constant")
    if value is not None and not isinstance(value, str | bool | int | float):
        raise TypeError("not a constant of a filter")
    return value
