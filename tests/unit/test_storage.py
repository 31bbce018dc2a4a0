"""Locations that cannot be written are reported with the cause and how to resume."""

import contextlib
import pickle
import resource
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from helpers.small_disk import small_disk
from screformer.storage import StorageError, writing

TENSORS = {"weights": torch.zeros(300_000)}


def _sqlite(folder: Path) -> None:
    with contextlib.closing(sqlite3.connect(folder / "a.db")) as store:
        store.execute("create table t (x)")
        store.execute("insert into t values (?)", (b"0" * 1_000_000,))
        store.commit()


WRITERS: dict[str, Callable[[Path], object]] = {
    "python": lambda folder: (folder / "a").write_bytes(b"0" * 1_000_000),
    "safetensors": lambda folder: save_file(TENSORS, folder / "a"),
    "sqlite": _sqlite,
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_and_a_read_only_disk(tmp_path: Path, writer: str) -> None:
    with small_disk(tmp_path / "disk", "400k") as change:
        disk = tmp_path / "disk"
        message = (
            rf"^{disk}\S* cannot be written: no space is left \(0 MB free\); free some space, then go on$"
        )
        with pytest.raises(StorageError, match=message), writing(disk, "go on"):
            WRITERS[writer](disk)
        for path in disk.iterdir():
            path.unlink()
        (disk / "a.db").touch()
        change("ro")
        with pytest.raises(StorageError, match="it is read-only; make it writable, then"), writing(disk, "x"):
            WRITERS[writer](disk)


def test_other_faults_of_the_place(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="a file is where a folder should be; choose another location"):
        with writing(tmp_path / "file" / "out", "go on"):
            (tmp_path / "file" / "out").mkdir(parents=True)
    (tmp_path / "gone").mkdir()
    with pytest.raises(StorageError, match="gone was removed; restore it, then go on"):
        with writing(tmp_path / "gone", "go on"):
            shutil.rmtree(tmp_path / "gone")
            raise RuntimeError("whatever follows from it")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(StorageError, match="the file would be too large; raise `ulimit -f`"):
            with writing(tmp_path, "go on"):
                (tmp_path / "large").write_bytes(b"0" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_is_no_fault_of_the_place_passes(tmp_path: Path) -> None:
    for error in (
        FileNotFoundError(2, "no such file", str(tmp_path / "input.h5ad")),
        PermissionError(13, "denied", "/elsewhere/input.h5ad"),
        ValueError("another"),
    ):
        with pytest.raises(type(error)) as caught, writing(tmp_path / "out", "go on"):
            raise error
        assert caught.value is error


def test_the_inner_place_is_named_and_the_error_travels(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="inner cannot be written") as caught:
        with writing(tmp_path / "outer", "go on"), writing(tmp_path / "inner", "resume"):
            raise OSError(28, "No space left on device")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
