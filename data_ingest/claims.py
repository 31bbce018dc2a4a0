"""One writer at a time in a place that several processes reach: a local disk, a shared one, an object store.

A process that wants to write puts a claim, a small file of its own, into a folder for claims, and then lists
the folder. It goes ahead only if it sees no other live claim. Of two that come together, at least the one
that lists last sees both and gives up, so there are never two. This needs no locks of the file system, only
that a written file is listed at once, which S3 guarantees.

A claim is renewed as long as its process works. A claim of this machine is dead once its process is gone. A
claim of another machine is dead when it was not renewed for two minutes, by the clocks, and is not renewed
while we watch it either.
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
"""Age from which a claim of another machine may be dead."""


@contextmanager
def only_writer(files: fs.FileSystem, path: str, what: str) -> Iterator[None]:
    """Be the only one that writes something.

    Args:
        files: Where its claims are kept.
        path: Folder of its claims there; made and, where it can be, removed again.
        what: What is written, for messages, such as `--atlas ATLAS`.

    Raises:
        ValueError: Another process is writing it, or the folder cannot be written.
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
        raise ValueError(
            f"{what}: {path} cannot be written ({error}); name a place that you may write"
        ) from error
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
                with suppress(FileNotFoundError):  # it was given back meanwhile
                    try:
                        with self.files.open_input_stream(info.path) as stream:
                            found[info.base_name] = json.loads(stream.read())
                    except ValueError:  # half written
                        found[info.base_name] = {"renewed": info.mtime.timestamp()}
        return found

    def write(self, name: str, claim: dict[str, Any]) -> None:
        with self.files.open_output_stream(f"{self.path}/{name}") as stream:
            stream.write(json.dumps(claim).encode())

    def remove(self, name: str) -> None:
        with suppress(OSError):
            self.files.delete_file(f"{self.path}/{name}")
        if isinstance(self.files, fs.LocalFileSystem):
            with suppress(OSError):  # another claim is in it
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
    """This machine; containers that share its name have processes of their own."""
    with suppress(OSError):
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return str(os.getuid())


def _process(pid: int) -> str:
    """Something that tells a process from a later one of the same number; empty if there is none."""
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[19]  # when it started
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
