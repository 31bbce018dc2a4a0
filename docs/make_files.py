"""Print docs/files.md: every module with the first line of its docstring.

`make docs/files.md` runs it; a test fails when the page is not current.
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]

HEAD = """# Files

<!-- Made from the docstrings by `make docs/files.md`; edit them there. -->

Every module, with its purpose. [Design](design.md) explains how they fit together.
"""

FOLDERS = (
    "data_ingest",
    "screformer",
    "jobs",
    "jobs/training",
    "jobs/studies",
    "jobs/tracking",
    "jobs/labelling",
    "jobs/explaining",
    "jobs/reports",
    "jobs/chain",
    "jobs/checkup",
    "jobs/benchmark",
    "cluster",
)
"""Folders in the order of the flow; others follow."""


def page() -> str:
    """The text of docs/files.md."""
    found = {
        str(path.parent.relative_to(ROOT))
        for top in ("screformer", "data_ingest", "jobs", "cluster")
        for path in (ROOT / top).rglob("*.py")
    }
    parts = [HEAD]
    for folder in (*FOLDERS, *sorted(found - set(FOLDERS))):
        rows = {path.name: purpose(path) for path in sorted((ROOT / folder).glob("*.py"))}
        about = rows.pop("__init__.py", "")
        if rows:
            parts.append(f"## {folder}\n\n{about}\n\n| File | Purpose |\n|---|---|")
            parts += [f"| `{name}` | {text} |" for name, text in rows.items()]
            parts.append("")
    return "\n".join(parts)


def purpose(path: Path) -> str:
    """The first line of a file's docstring."""
    return (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0].replace("|", "\\|")


if __name__ == "__main__":
    print(page(), end="")
