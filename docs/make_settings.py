"""Print docs/settings.md, made from the fields and docstrings of `screformer/config.py`.

`make docs/settings.md` runs it; a test fails when the page is not current.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import typing
from typing import Any

from screformer import config
from screformer.config import WITHOUT_EFFECT, sections
from screformer.settings import plain

HEAD = """# Settings

<!-- Made from screformer/config.py by `make docs/settings.md`; edit it there. -->

Give settings in a YAML recipe (`--config FILE`, `model: {dim: 64}`) or on the command line
(`model.dim=64`; `'search.space.train.lr=loguniform(1e-4, 1e-2)'` for a key of a mapping). What you leave out
keeps its default. A command refuses settings that have no effect in it.
"""


def page() -> str:
    """The text of docs/settings.md."""
    parts = [HEAD]
    for section, cls in sections().items():
        about, meanings = _docstrings(cls)
        unused = [command for command, names in WITHOUT_EFFECT.items() if section in names]
        parts.append(
            f"## {section}\n\n{about}" + (f" Refused by {_listed(unused)}." if unused else "") + "\n"
        )
        parts.append("| Setting | Values | Default | Meaning |\n|---|---|---|---|")
        hints, default = typing.get_type_hints(cls), plain(cls())
        for item in dataclasses.fields(cls):
            name = f"{section}.{item.name}"
            refused = [command for command, names in WITHOUT_EFFECT.items() if name in names]
            meaning = meanings[item.name] + (f" Refused by {_listed(refused)}." if refused else "")
            row = (f"`{name}`", _values(hints[item.name]), f"`{_value(default[item.name])}`", meaning)
            parts.append("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
        parts.append("")
    return "\n".join(parts)


def _docstrings(cls: type) -> tuple[str, dict[str, str]]:
    """Docstring of a section, and that of each of its fields."""
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


def _values(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(f"`{choice}`" for choice in typing.get_args(hint))
    origin = typing.get_origin(hint)
    words = {bool: "true or false", int: "integer", float: "number", str: "text", tuple: "list"}
    return words.get(origin or hint, "mapping")


def _value(default: Any) -> str:
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, list):
        return f"[{', '.join(default)}]"
    return f"{default:g}" if isinstance(default, float) else str(default) or '""'


def _listed(names: list[str]) -> str:
    words = [f"`{name}`" for name in names]
    return " and ".join([", ".join(words[:-1]), words[-1]] if words[1:] else words)


if __name__ == "__main__":
    print(page(), end="")
