"""Declare, read, check, override and write trees of settings.

`screformer.config` declares the settings; nothing here depends on them.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

import yaml

Touch = Literal["cells", "pretraining", "weights"]
"""What changing a setting affects.

`cells`: the cells, labels or folds. `pretraining`: the result of pre-training on given cells. `weights`:
their shapes or meaning, so a model to start from must have the same value.
"""
TOUCHES = typing.get_args(Touch)


def setting(default: Any, *touches: Touch) -> Any:
    """A field of a section, with its default and what it affects."""
    metadata = {"touches": touches}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def require(holds: bool, message: str) -> None:
    """Check a condition on a setting.

    Raises:
        ValueError: With `message`, if `holds` is false.
    """
    if not holds:
        raise ValueError(message)


def names(cls: type) -> list[str]:
    """Names of a dataclass's fields, in order."""
    return [item.name for item in dataclasses.fields(cls)]


def check_known(name: str, known: list[str], *, where: str) -> None:
    """Reject unknown names of settings.

    Raises:
        ValueError: The message suggests the closest known name, or lists all.
    """
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {where}{near[0]}?" if near else f"; known are {', '.join(known)}"
    require(name in known, f"unknown setting {where}{name}{hint}")


def parse_override(text: str) -> tuple[str, Any]:
    """Name and value of `section.field=value`, with the value in YAML.

    Raises:
        ValueError: The `=` is missing.
    """
    path, equals, value = text.partition("=")
    require(bool(equals), f"override {text!r} must read section.field=value")
    return path.strip(), yaml.safe_load(value) if value else ""


def build(cls: type, tree: Mapping[str, Any], *, where: str = "") -> Any:
    """Build a tree of dataclasses from nested plain values; missing fields keep their defaults.

    Args:
        cls: The dataclass; fields may be dataclasses.
        tree: Field to value.
        where: Path of `cls` in the whole tree, for errors; empty, or ending with a dot.

    Raises:
        ValueError: A field is unknown, or a value has the wrong type.
    """
    hints = typing.get_type_hints(cls)
    for name in tree:
        check_known(str(name), names(cls), where=where)
    values = {}
    for name, value in tree.items():
        kind, path = hints[name], f"{where}{name}"
        if dataclasses.is_dataclass(kind):
            section = typing.cast(type, kind)
            require(isinstance(value, Mapping), f"{path}={value!r} must be a section of {names(section)}")
            values[name] = build(section, value, where=f"{path}.")
        else:
            values[name] = _checked(kind, value, path)
    return cls(**values)


def plain(value: Any) -> Any:
    """Nested str, int, float, bool, list and dict, suitable for YAML, JSON and other processes."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {name: plain(getattr(value, name)) for name in names(type(value))}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, tuple | list) else value


def _checked(kind: Any, value: Any, path: str) -> Any:
    """Convert a value to the field's type: YAML reads `1e-3` as a string, and `4` may be meant as a float."""
    origin = typing.get_origin(kind)
    if origin is Literal:
        choices = typing.get_args(kind)
        matches = [choice for choice in choices if choice == value and type(choice) is type(value)]
        require(bool(matches), f"{path}={value!r} must be one of {', '.join(map(str, choices))}")
        return value
    if origin is tuple:
        require(isinstance(value, list | tuple), f"{path}={value!r} must be a list, for example [A, B]")
        item_kind = typing.get_args(kind)[0]
        return tuple(_checked(item_kind, item, path) for item in value)
    if origin is not None and issubclass(origin, Mapping):
        require(isinstance(value, Mapping), f"{path}={value!r} must be a mapping")
        item_kind = typing.get_args(kind)[1]
        return {str(key): _text(item) if item_kind is str else plain(item) for key, item in value.items()}
    assert not isinstance(kind, types.UnionType), (
        f"{path} has a type that the configuration does not support: {kind}"
    )
    if kind is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError as error:
            raise ValueError(f"{path}={value!r} must be a number") from error
    if kind is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    require(type(value) is kind, f"{path}={value!r} must be of type {kind.__name__}")
    return value


def _text(value: Any) -> str:
    """Convert a value in a mapping of strings; TileDB expects true, not True."""
    return str(value).lower() if isinstance(value, bool) else str(value)
