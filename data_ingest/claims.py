"""Mutual exclusion between writers on any storage: a local disk, a shared disk, or an object store.

A process that wants to write puts a small claim file into a folder, then lists the folder. It continues only
if it sees no other live claim. If two processes start together, at least the one that lists last sees both
claims and gives up, so there are never two writers. This needs no file system locks, only that a new file is
listed at once, which S3 guarantees.

A process renews its claim while it runs. A claim from this machine is dead once its process is gone. A claim
from another machine is dead if, by the clocks, it was not renewed for two minutes, and it is not renewed
while we watch.
"""

from __future__ import annotations

import getpass
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyarrow import fs

RENEW_S = 20.0
"""How often a claim is renewed."""
STALE_S = 120.0
"""Age from which a claim from another machine may be dead."""


@contextmanager
def only_writer(files: fs.FileSystem, path: str, what: str) -> Iterator[None]:
    """Hold an exclusive claim to write something.

    Args:
        files: File system for the claims.
        path: Folder for the claims; created, and removed again when empty.
        what: What is written, for messages, for example `--atlas ATLAS`.

    Raises:
        ValueError: Another process is writing it, or the folder is not writable.
    """
    folder, name = _Folder(files, path), f"{uuid.uuid4().hex}.json"
    claim = {
        "user": _user(),
        "host": _host(),
        "pid": os.getpid(),
        "process": _process(os.getpid()),
        "since": time.time(),
    }
    try:
        _refuse_others(folder, name, what)
        if isinstance(files, fs.LocalFileSystem):
            os.makedirs(path, exist_ok=True)
        folder.write(name, claim | {"renewed": time.time()})
    except OSError as error:
        raise ValueError(f"{what}: {path} cannot be written ({error}); choose a writable location") from error
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(RENEW_S):
            with suppress(OSError):  # the next one may succeed
                folder.write(name, claim | {"renewed": time.time()})

    thread = threading.Thread(target=renew, name="claim", daemon=True)
    thread.start()
    try:
        _refuse_others(folder, name, what)
        yield
    finally:
        ended.set()
        thread.join()
        folder.remove(name)


@dataclass(frozen=True)
class _Folder:
    files: fs.FileSystem
    path: str

    def claims(self) -> dict[str, dict[str, Any]]:
        """The claims of all processes, by name."""
        found = {}
        for info in self.files.get_file_info(fs.FileSelector(self.path, allow_not_found=True)):
            if info.base_name.endswith(".json"):
                with suppress(FileNotFoundError):  # released in the meantime
                    try:
                        with self.files.open_input_stream(info.path) as stream:
                            found[info.base_name] = json.loads(stream.read())
                    except ValueError:  # partly written
                        found[info.base_name] = {"renewed": info.mtime.timestamp()}
        return found

    def write(self, name: str, claim: dict[str, Any]) -> None:
        with self.files.open_output_stream(f"{self.path}/{name}") as stream:
            stream.write(json.dumps(claim).encode())

    def remove(self, name: str) -> None:
        with suppress(OSError):
            self.files.delete_file(f"{self.path}/{name}")
        if isinstance(self.files, fs.LocalFileSystem):
            with suppress(OSError):  # it contains another claim
                os.rmdir(self.path)


def _refuse_others(folder: _Folder, own: str, what: str) -> None:
    for name, claim in folder.claims().items():
        if name == own:
            continue
        if _is_live(folder, name, claim):
            age = time.time() - claim["renewed"]
            seen = (
                f"last seen {age:.0f} s ago" if age >= 0 else f"its clock is {-age:.0f} s ahead of this one"
            )
            since = time.strftime("%Y-%m-%d %H:%M", time.localtime(claim.get("since", claim["renewed"])))
            host = str(claim.get("host", "?")).partition(" ")[0]
            raise ValueError(
                f"{what} is being written by process {claim.get('pid', '?')} of {claim.get('user', '?')} on"
                f" {host}, since {since}, {seen}; wait for it, then run this command again"
            )
        folder.remove(name)


def _is_live(folder: _Folder, name: str, claim: dict[str, Any]) -> bool:
    if claim.get("host") == _host():
        return _process(claim["pid"]) == claim["process"] != ""
    if time.time() - claim["renewed"] < STALE_S:
        return True
    time.sleep(2 * RENEW_S)
    return folder.claims().get(name, claim)["renewed"] != claim["renewed"]


def _host() -> str:
    """Host name and process namespace: containers may share a host name but not process ids."""
    with suppress(OSError):
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # in a container, a user may have no name
        return str(os.getuid())


def _process(pid: int) -> str:
    """Start time of a process, to detect a reused process id; empty if the process is gone."""
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[19]  # start time
    except OSError:
        if Path("/proc/self/stat").exists():
            return ""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass
    return "alive"
