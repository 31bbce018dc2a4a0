"""Outbox: keeps log entries on disk until the tracking server accepts them.

Each entry is written completely or not at all. A driver and its workers can therefore share a folder, even in
an object store, and a killed process leaves no partial entry. Names sort by time. The content of entries is
defined in `jobs.tracking.entries`.
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
"""Sends an entry with its file or folder, if any. Raises `ConnectionError` if the server is down."""


RETRY_S, _MOST_RETRY_S, _SHARE = 5.0, 60.0, 0.05
"""The server is retried after 5 s. If attempts are slow, they are spaced out to take at most 5 % of the time,
but with at least one attempt per minute."""


_PATIENCE_S = 30.0
"""Time for the sending thread to finish; entries it has not started by then go to the folder."""


_ENTRY = "entry.json"


_counter = itertools.count()


class Outbox:
    """The kept entries of one run, in a folder.

    Use `outbox` to get one, so that a process has a single instance per folder.
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
        """Queue an entry for a sending thread of this process and return at once.

        The caller never waits for a slow server. While the thread is busy, entries are written to the folder
        if it is on this machine, so that a killed process loses none of them.

        Args:
            entry: Plain JSON values.
            send: Sends this entry and any earlier ones.
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
                if self._waiting and time.monotonic() >= self._next_try:  # posted in the meantime
                    self.flush(send)
            except Exception as error:  # noqa: BLE001 - one rejected entry must not end the thread
                logger.warning("metrics were rejected and are kept: %s: %s", type(error).__name__, error)
                self._put(entry, None)
            finally:
                self._queue.task_done()

    def settle(self) -> None:
        """Wait until all posted entries are sent or kept; after `_PATIENCE_S`, the rest are kept."""
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
        """Send an entry after all kept ones, or keep it; does not wait for a server that is down.

        Args:
            entry: Plain JSON values.
            send: Sends this entry and any earlier ones.
            content: The entry's file or folder; a copy is kept.

        Returns:
            The result of `send`, or None if the entry was kept.
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
        """Send the kept entries, oldest first; stop if the server is down again.

        An entry that the server rejects stays in the outbox, and the entries after it are sent.

        Returns:
            Entries sent, and entries left.
        """
        with self._sending:
            return self._flush(send)

    def _flush(self, send: Send) -> tuple[int, int]:
        began, num_sent, num_refused = time.monotonic(), 0, 0
        self._waiting = False  # set again by every entry kept from now on
        names = self.names()
        for name in names:
            try:
                with self._read(name) as (entry, content):
                    send(entry, content)
            except FileNotFoundError:  # another process of this run just sent it
                continue
            except ConnectionError as error:
                self._away(error, began)
                return num_sent, len(names) - num_sent
            except Exception as error:  # noqa: BLE001 - one rejected entry must not block others
                logger.warning("%s/%s was rejected: %s: %s", self.folder, name, type(error).__name__, error)
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
        """Names of the kept entries, oldest first."""
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
        """Report once that the server is down, and do not try it again for a while."""
        if not self._is_away:
            logger.warning(
                "%s; the job continues; its log entries are kept in %s and sent when the server is back",
                error,
                self.folder,
            )
        self._is_away = True
        now = time.monotonic()
        self._next_try = now + min(_MOST_RETRY_S, max(RETRY_S, (now - began) / _SHARE))
        self._waiting = True


@lru_cache(maxsize=64)
def outbox(folder: str) -> Outbox:
    """This process's outbox for a folder or URI; the folder is created with the first entry."""
    return Outbox(folder)
