"""One writer per atlas at a time, on a local disk, a shared one, or an object store.

A process that wants to write puts a claim, a small file of its own, into a folder that belongs to the atlas,
and then lists the folder. It goes ahead only if it sees no other live claim. Of two that come together, at
least the one that lists last sees both and gives up, so there are never two. This needs no locks of the file
system, only that a written file is listed at once, which S3 guarantees.

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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyarrow import fs

from data_ingest import schema

RENEW_S = 20.0
"""How often a claim is renewed."""
STALE_S = 120.0
"""Age from which a claim of another machine may be dead."""


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


@contextmanager
def locked(atlas_uri: str, tiledb_config: Mapping[str, str]) -> Iterator[None]:
    """Be the only one that writes an atlas.

    Args:
        atlas_uri: An absolute path, or `s3://...`; the atlas need not exist yet.
        tiledb_config: How TileDB reaches it; its `vfs.s3` settings are used here too.

    Raises:
        ValueError: Another process is writing the atlas, or its place cannot be written.
    """
    folder = _folder(atlas_uri, tiledb_config)
    name = f"{uuid.uuid4().hex}.json"
    claim = {
        "user": _user(),
        "host": _host(),
        "pid": os.getpid(),
        "process": _process(os.getpid()),
        "since": time.time(),
    }
    try:
        _refuse_others(folder, name, atlas_uri)
        if isinstance(folder.files, fs.LocalFileSystem):
            os.makedirs(folder.path, exist_ok=True)
        folder.write(name, claim | {"renewed": time.time()})
    except OSError as error:
        raise ValueError(
            f"--atlas {atlas_uri}: {folder.path} cannot be written ({error}); name a place that you may write"
        ) from error
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(RENEW_S):
            with suppress(OSError):  # the next one may succeed
                folder.write(name, claim | {"renewed": time.time()})

    thread = threading.Thread(target=renew, name="atlas-lock", daemon=True)
    thread.start()
    try:
        _refuse_others(folder, name, atlas_uri)
        yield
    finally:
        ended.set()
        thread.join()
        folder.remove(name)


def _refuse_others(folder: _Folder, own: str, atlas_uri: str) -> None:
    for name, claim in folder.claims().items():
        if name == own:
            continue
        if _is_live(folder, name, claim):
            age = time.time() - claim["renewed"]
            seen = (
                f"last seen {age:.0f} s ago" if age >= 0 else f"its clock is {-age:.0f} s ahead of this one"
            )
            since = time.strftime("%Y-%m-%d %H:%M", time.localtime(claim.get("since", claim["renewed"])))
            raise ValueError(
                f"--atlas {atlas_uri} is being written by process {claim.get('pid', '?')} of"
                f" {claim.get('user', '?')} on {claim.get('host', '?').split()[0]}, since {since}, {seen};"
                f" wait for it, then run this command again"
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


def _folder(atlas_uri: str, tiledb_config: Mapping[str, str]) -> _Folder:
    if not schema.is_remote(atlas_uri):
        return _Folder(fs.LocalFileSystem(), f"{atlas_uri}.writing")
    if not atlas_uri.startswith("s3://"):
        files, path = fs.FileSystem.from_uri(atlas_uri)
        return _Folder(files, f"{path}/__writing")
    s3 = {name.removeprefix("vfs.s3."): value for name, value in tiledb_config.items()}
    names = {
        "region": "region",
        "scheme": "scheme",
        "endpoint_override": "endpoint_override",
        "aws_access_key_id": "access_key",
        "aws_secret_access_key": "secret_key",
        "aws_session_token": "session_token",
    }
    options: dict[str, Any] = {ours: s3[theirs] for theirs, ours in names.items() if s3.get(theirs)}
    if s3.get("use_virtual_addressing") == "true" and "endpoint_override" in options:
        options["force_virtual_addressing"] = True
    return _Folder(fs.S3FileSystem(**options), f"{atlas_uri.removeprefix('s3://')}/__writing")
