"""What could not be sent to the tracking server, kept until it can be.

Each entry is one file, written whole or not at all, so that a driver and its workers may share a
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
import queue
import tempfile
import threading
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


RETRY_S, _MOST_RETRY_S, _SHARE = 5.0, 60.0, 0.05
"""The server is asked again after 5 s or, where asking takes long, so seldom that it costs 5 % of the time;
at least once a minute."""


_PATIENCE_S = 30.0
"""For the thread that posts, before what it has not begun goes into the folder."""


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
        self._is_local = "://" not in folder
        self._waiting = bool(self.names())
        self._is_away = False
        self._next_try = 0.0
        self._sending = threading.RLock()
        self._queue: queue.Queue[tuple[Entry, Send]] = queue.Queue()
        self._thread: threading.Thread | None = None

    def post(self, entry: Entry, send: Send) -> None:
        """Hand an entry to a thread of this process that delivers it, and return at once.

        However slow the server is, whoever logs does not wait for it. While the thread is busy, entries go
        into the folder, if that is on this machine, so that a killed process loses none of them.

        Args:
            entry: Plain values of JSON.
            send: How to send it, and those before it.
        """
        if self._thread is None:
            self._thread = threading.Thread(target=self._post_all, name="screformer-log", daemon=True)
            self._thread.start()
        if self._queue.unfinished_tasks and self._is_local:
            self._put(entry, None)
        else:
            self._queue.put((entry, send))

    def _post_all(self) -> None:
        while True:
            entry, send = self._queue.get()
            try:
                self.deliver(entry, send)
                if self._waiting and time.monotonic() >= self._next_try:  # what was posted meanwhile
                    self.flush(send)
            except Exception as error:  # noqa: BLE001 - no refusal of one entry may end the thread
                logger.warning("metrics were refused and are kept: %s: %s", type(error).__name__, error)
                self._put(entry, None)
            finally:
                self._queue.task_done()

    def settle(self) -> None:
        """Wait until what was posted is sent or kept; what takes longer than `_PATIENCE_S` is kept."""
        deadline = time.monotonic() + _PATIENCE_S
        with self._queue.all_tasks_done:
            while self._queue.unfinished_tasks and time.monotonic() < deadline:
                self._queue.all_tasks_done.wait(deadline - time.monotonic())
        with contextlib.suppress(queue.Empty):
            while True:
                entry, _ = self._queue.get_nowait()
                self._put(entry, None)
                self._queue.task_done()
        self._queue.join()

    def deliver(self, entry: Entry, send: Send, content: Path | None = None) -> Any:
        """Send an entry after those that wait, or keep it; never waits for a server that is away.

        Args:
            entry: Plain values of JSON.
            send: How to send it, and those before it.
            content: A file or folder that belongs to it; a copy is kept.

        Returns:
            What `send` returned, or None where the entry was kept.
        """
        with self._sending:
            if not self._waiting:
                began = time.monotonic()
                try:
                    return send(entry, content)
                except ConnectionError as error:
                    self._put(entry, content)
                    self._away(error, began)
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
        with self._sending:
            return self._flush(send)

    def _flush(self, send: Send) -> tuple[int, int]:
        began, num_sent, num_refused = time.monotonic(), 0, 0
        self._waiting = False  # what is put from now on waits again
        names = self.names()
        for name in names:
            try:
                with self._read(name) as (entry, content):
                    send(entry, content)
            except FileNotFoundError:  # another process of the run has just sent it
                continue
            except ConnectionError as error:
                self._away(error, began)
                return num_sent, len(names) - num_sent
            except Exception as error:  # noqa: BLE001 - no refusal of one entry may hold up the others
                logger.warning("%s/%s was refused: %s: %s", self.folder, name, type(error).__name__, error)
                num_refused += 1
                continue
            with contextlib.suppress(FileNotFoundError):
                self._files.delete_dir(f"{self._path}/{name}")
            num_sent += 1
        if num_sent and self._is_away:
            logger.warning("the tracking server is back: %d kept entries were sent", num_sent)
            self._is_away = False
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

    def _away(self, error: ConnectionError, began: float) -> None:
        """Report once that the server is away, and do not ask it again for a while."""
        if not self._is_away:
            logger.warning(
                "%s; the job continues, what it logs is kept in %s and sent when the server is back",
                error,
                self.folder,
            )
        self._is_away = True
        now = time.monotonic()
        self._next_try = now + min(_MOST_RETRY_S, max(RETRY_S, (now - began) / _SHARE))
        self._waiting = True


@lru_cache(maxsize=64)
def outbox(folder: str) -> Outbox:
    """The outbox of a folder or URI in this process; the folder is made with the first entry."""
    return Outbox(folder)
