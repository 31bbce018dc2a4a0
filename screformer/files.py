"""Write files that other processes read."""

from __future__ import annotations

import os
import socket
from pathlib import Path


def write_whole(path: str | Path, content: str | bytes) -> None:
    """Write a file at once or not at all.

    A reader sees the old content or the new one, and a killed process leaves neither half. Several processes
    may write one file: the last one wins.

    Args:
        path: The file; its folder exists.
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
