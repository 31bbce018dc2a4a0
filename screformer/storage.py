"""Folders on disk and in object stores, and one line that says why one cannot be written."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

_FAULTS = {
    # error number: cause, remedy, and messages of libraries that drop the number
    errno.ENOSPC: (
        "no space is left",
        "free some space",
        ("no space left on device", "database or disk is full"),
    ),
    errno.EDQUOT: ("the quota is exceeded", "free some space", ("disk quota exceeded",)),
    errno.EROFS: (
        "it is read-only",
        "make it writable",
        ("read-only file system", "attempt to write a readonly database"),
    ),
    errno.EFBIG: ("the file would be too large", "raise `ulimit -f`", ("file too large",)),
    errno.EACCES: ("permission is denied", "allow writing", ()),
    errno.EPERM: ("permission is denied", "allow writing", ()),
    errno.ENOTDIR: ("a file is where a folder should be", "choose another location", ()),
    errno.EEXIST: ("a file is where a folder should be", "choose another location", ()),
}
_OF_READS_TOO = (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST)
"""Errors that can also occur when reading a file."""


class StorageError(OSError):
    """A location cannot be written; the message names it, the cause and the remedy."""


def absolute(place: str) -> str:
    """A folder as a path that is valid in every process, or its URI."""
    return place.rstrip("/") if "://" in place else str(Path(place).expanduser().resolve())


def filesystem(place: str) -> tuple[FileSystem, str]:
    """The file system of a folder, given as a path or URI, and its path there."""
    from pyarrow.fs import FileSystem

    place = absolute(place)
    return FileSystem.from_uri(place if "://" in place else Path(place).as_uri())


@contextmanager
def writing(place: str | Path, remedy: str) -> Iterator[None]:
    """Report in one line if a location, or a temporary folder used for it, cannot be written.

    Args:
        place: Path or URI to write to.
        remedy: How to resume after fixing the cause, for example "run the same command again".

    Raises:
        StorageError: The location is full, read-only, not permitted or gone.
    """
    there = Path(place).exists()
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        fault = _fault(error, str(place))
        if not fault and there and not Path(place).exists():
            fault = f"{place} was removed; restore it"
        if not fault:
            raise
        raise StorageError(f"{fault}, then {remedy}") from error


def _fault(error: BaseException, place: str) -> str:
    """The cause and what to do; empty if the error has another cause."""
    for each in _chain(error):
        number, named = None, None
        if isinstance(each, OSError):
            number, named = each.errno, each.filename2 or each.filename  # for a copy, the target
        text = str(each).lower()
        number = next((known for known, (_, _, signs) in _FAULTS.items() if _says(text, signs)), number)
        if number not in _FAULTS:
            continue
        found = named if isinstance(named, str) and Path(named).is_absolute() else place
        if number in _OF_READS_TOO and not _related(Path(found), Path(place)):
            continue
        what, mend, _ = _FAULTS[number]
        room = _free(found) if number == errno.ENOSPC else ""
        return f"{found} cannot be written: {what}{room}; {mend}"
    return ""


def _says(text: str, signs: tuple[str, ...]) -> bool:
    return any(sign in text for sign in signs)


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in seen:
        seen.append(following)
        yield following
        following = following.__cause__ or following.__context__


def _related(one: Path, other: Path) -> bool:
    one, other = one.absolute(), other.absolute()
    return one in (other, *other.parents) or other in one.parents


def _free(place: str) -> str:
    """Free space at a local path, as text; empty for a URI."""
    if "://" in place:
        return ""
    path = Path(place).absolute()
    there = next(each for each in (path, *path.parents) if each.exists())
    return f" ({shutil.disk_usage(there).free / 1e6:.0f} MB free)"
