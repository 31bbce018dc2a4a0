"""Write files atomically, and CSV files that are safe to open in spreadsheets."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

_FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""First characters that make a spreadsheet treat a value as a formula."""


def write_whole(path: str | Path, content: str | bytes) -> None:
    """Write a file atomically.

    Readers see either the old or the new content, and a killed process never leaves a partial file. Several
    processes can write the same file; the last one wins.

    Args:
        path: The file; its folder must exist.
        content: Text is written as UTF-8.
    """
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    scratch = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.part")
    try:
        scratch.write_bytes(data)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def csv_text(table: pd.DataFrame) -> str:
    """Convert a table to CSV, without its index.

    Text that a spreadsheet would treat as a formula (`=1+1`, and names like `-x`) gets a leading apostrophe;
    `read_csv` removes it.
    """
    guarded = _with_text(table, lambda text: f"'{text}" if text.startswith(("'", *_FORMULA)) else text)
    return guarded.to_csv(index=False)


def read_csv(path: str | Path) -> pd.DataFrame:
    """Read the output of `csv_text`."""
    import pandas as pd

    return _with_text(
        pd.read_csv(path, keep_default_na=False, na_values=[""]),
        lambda text: text[1:] if text[:1] == "'" else text,
    )


def _with_text(table: pd.DataFrame, change: Callable[[str], str]) -> pd.DataFrame:
    def changed(value: Any) -> Any:
        return change(value) if isinstance(value, str) else value

    return table.map(changed).rename(columns=changed)
