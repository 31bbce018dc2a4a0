"""What could not be sent to the tracking server, kept until it can be.

Each entry is a file of its own, written whole or not at all, so that a driver and its workers may share a
folder, also in an object store, and a killed process leaves nothing half. Names sort by time. What an entry
means is `jobs.tracking.entries`' business.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow.fs

logger = logging.getLogger(__name__)

Entry = dict[str, Any]


Send = Callable[[Entry, Path | None], Any]
"""Sends an entry with its file or folder, if it has one. Raises `ConnectionError` when the server is away."""


_RETRY_S, _MOST_RETRY_S, _SHARE = 5.0, 60.0, 0.05
"""The server is asked again after 5 s or, where asking takes long, so seldom that it costs 5 % of the time;
at least once a minute."""


_ENTRY = "entry.json"


_counter = itertools.count()


class Outbox:
    """The entries of one run, in a folder.

    Get it from `outbox`, so that a process has one for each folder.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._files, self._path = pyarrow.fs.FileSystem.from_uri(
            folder if "://" in folder else Path(folder).resolve().as_uri()
        )
        self._waiting = bool(self.names())
        self._next_try = 0.0

    def deliver(self, entry: Entry, send: Send, content: Path | None = None) -> Any:
        """Send an entry after those that wait, or keep it; never waits for a server that is away.

        Args:
            entry: Plain values of JSON.
            send: How to send it, and those before it.
            content: A file or folder that belongs to it; a copy is kept.

        Returns:
            What `send` returned, or None where the entry was kept.
        """
        if not self._waiting:
            began = time.monotonic()
            try:
                return send(entry, content)
            except ConnectionError as error:
                self._put(entry, content)
                self._later(began)
                logger.warning(
                    "%s; the job goes on, what it logs is kept in %s and sent when the server is back",
                    error,
                    self.folder,
                )
            return None
        self._put(entry, content)
        if time.monotonic() >= self._next_try:
            self.flush(send)
        return None

    def flush(self, send: Send) -> tuple[int, int]:
        """Send what waits, oldest first, until the server is away again.

        An entry that the server refuses stays, so that nothing is lost, and those after it are sent.

        Returns:
            Entries sent, and entries left.
        """
        began, num_sent, num_refused = time.monotonic(), 0, 0
        names = self.names()
        for name in names:
            try:
                with self._read(name) as (entry, content):
                    send(entry, content)
            except FileNotFoundError:  # another process of the run has just sent it
                continue
            except ConnectionError:
                self._later(began)
                return num_sent, len(names) - num_sent
            except Exception as error:  # noqa: BLE001 - whatever the server says to one entry must not hold up the others
                logger.warning("%s/%s was refused: %s: %s", self.folder, name, type(error).__name__, error)
                num_refused += 1
                continue
            with contextlib.suppress(FileNotFoundError):
                self._files.delete_dir(f"{self._path}/{name}")
            num_sent += 1
        if num_sent:
            logger.warning("the tracking server is back: %d kept entries were sent", num_sent)
        self._waiting = False
        return num_sent, num_refused

    def names(self) -> list[str]:
        """The entries that wait, oldest first."""
        found = self._files.get_file_info(
            pyarrow.fs.FileSelector(self._path, recursive=True, allow_not_found=True)
        )
        return sorted(Path(info.path).parent.name for info in found if info.base_name == _ENTRY)

    def _put(self, entry: Entry, content: Path | None) -> None:
        name = f"{time.time_ns():020d}-{platform.node()}-{os.getpid()}-{next(_counter)}"
        folder = f"{self._path}/{name}"
        self._files.create_dir(folder, recursive=True)
        if content is not None:
            pyarrow.fs.copy_files(
                str(content), f"{folder}/{content.name}", destination_filesystem=self._files
            )
        with self._files.open_output_stream(f"{folder}/{_ENTRY}.part") as out:
            out.write(json.dumps({"entry": entry, "content": content.name if content else None}).encode())
        self._files.move(f"{folder}/{_ENTRY}.part", f"{folder}/{_ENTRY}")
        self._waiting = True

    @contextlib.contextmanager
    def _read(self, name: str) -> Iterator[tuple[Entry, Path | None]]:
        folder = f"{self._path}/{name}"
        with self._files.open_input_stream(f"{folder}/{_ENTRY}") as source:
            tree = json.loads(source.read())
        if tree["content"] is None:
            yield tree["entry"], None
            return
        with tempfile.TemporaryDirectory() as scratch:
            target = Path(scratch) / tree["content"]
            pyarrow.fs.copy_files(f"{folder}/{tree['content']}", str(target), source_filesystem=self._files)
            yield tree["entry"], target

    def _later(self, began: float) -> None:
        now = time.monotonic()
        self._next_try = now + min(_MOST_RETRY_S, max(_RETRY_S, (now - began) / _SHARE))
        self._waiting = True


@lru_cache(maxsize=64)
def outbox(folder: str) -> Outbox:
    """The outbox of a folder or URI in this process; the folder is made with the first entry."""
    return Outbox(folder)
