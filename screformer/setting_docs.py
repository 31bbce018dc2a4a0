"""Describe all settings, from the docstrings in `screformer/config.py`."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from screformer import config
from screformer.config import WITHOUT_EFFECT, sections
from screformer.settings import plain


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One field of a section."""

    name: str
    """For example `model.dim`."""
    values: tuple[str, ...]
    """The allowed values; empty if there is no fixed list."""
    kind: str
    """`text`, `integer`, `number`, `true or false`, `list` or `mapping`."""
    default: str
    """As written on the command line."""
    meaning: str
    refused_by: tuple[str, ...]
    """Commands in which the setting has no effect."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """The settings of one stage."""

    name: str
    about: str
    settings: tuple[Setting, ...]
    refused_by: tuple[str, ...]


def described() -> list[Section]:
    """All sections, in order."""
    return [_section(name, cls) for name, cls in sections().items()]


def written(value: Any) -> str:
    """A value as written on the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(str, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value) if value != "" else '""'


def listed(names: Sequence[str]) -> str:
    """Names as a phrase: `a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)


def _section(section: str, cls: type) -> Section:
    about, meanings = _docstrings(cls)
    hints, default = typing.get_type_hints(cls), plain(cls())
    settings = []
    for item in dataclasses.fields(cls):
        hint, name = hints[item.name], f"{section}.{item.name}"
        choices = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()
        words = {bool: "true or false", int: "integer", float: "number", str: "text", tuple: "list"}
        settings.append(
            Setting(
                name=name,
                values=tuple(map(str, choices)),
                kind=words.get(typing.get_origin(hint) or hint, "text" if choices else "mapping"),
                default=written(default[item.name]),
                meaning=meanings[item.name],
                refused_by=_refused_by(name),
            )
        )
    return Section(name=section, about=about, settings=tuple(settings), refused_by=_refused_by(section))


def _refused_by(name: str) -> tuple[str, ...]:
    return tuple(command for command, names in WITHOUT_EFFECT.items() if name in names)


def _docstrings(cls: type) -> tuple[str, dict[str, str]]:
    """Docstrings of a section and of its fields."""
    (tree,) = (
        node
        for node in ast.parse(inspect.getsource(config)).body
        if isinstance(node, ast.ClassDef) and node.name == cls.__name__
    )
    meanings = {}
    for field, text in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            assert isinstance(field.target, ast.Name) and isinstance(text.value, ast.Constant)
            meanings[field.target.id] = " ".join(str(text.value.value).split())
    return " ".join((ast.get_docstring(tree) or "").split()), meanings
