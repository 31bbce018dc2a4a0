"""A place that cannot be written, in one line: which one, what is wrong, and how to resume."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_FAULTS = {
    # number: what is wrong, what to do, and what libraries say that keep no number
    errno.ENOSPC: ("no space is left", "make room", ("no space left on device", "database or disk is full")),
    errno.EDQUOT: ("the quota is used up", "make room", ("disk quota exceeded",)),
    errno.EROFS: (
        "it is read-only",
        "make it writable",
        ("read-only file system", "attempt to write a readonly database"),
    ),
    errno.EFBIG: ("files may not grow that large", "raise `ulimit -f`", ("file too large",)),
    errno.EACCES: ("it may not be written", "allow writing", ()),
    errno.EPERM: ("it may not be written", "allow writing", ()),
    errno.ENOTDIR: ("a file is where a folder should be", "name another place", ()),
    errno.EEXIST: ("a file is where a folder should be", "name another place", ()),
}
_OF_READS_TOO = (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST)
"""Errors that a file to read can have as well."""


class StorageError(OSError):
    """A place cannot be written; the message names it, the fault and the remedy."""


@contextmanager
def writing(place: str | Path, remedy: str) -> Iterator[None]:
    """Report within one line that a place, or a temporary folder on the way there, cannot be written.

    Args:
        place: Path or URI of what is written.
        remedy: How to resume once it can be written, such as "run the same command again".

    Raises:
        StorageError: The place is full, read-only, forbidden or gone.
    """
    there = Path(place).exists()
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        fault = _fault(error, str(place))
        if not fault and there and not Path(place).exists():
            fault = f"{place} was removed; bring it back"
        if not fault:
            raise
        raise StorageError(f"{fault}, then {remedy}") from error


def _fault(error: BaseException, place: str) -> str:
    """What is wrong, and what to do; empty if the error has another cause."""
    for each in _chain(error):
        number, named = None, None
        if isinstance(each, OSError):
            number, named = each.errno, each.filename2 or each.filename  # of a copy, where it goes
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
    """How much room there is, for a place on this machine."""
    if "://" in place:
        return ""
    path = Path(place).absolute()
    there = next(each for each in (path, *path.parents) if each.exists())
    return f" ({shutil.disk_usage(there).free / 1e6:.0f} MB free)"
