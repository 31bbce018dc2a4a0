"""A killed ingest leaves the atlas unchanged, or the next one completes it. Real processes are killed."""

import json
import signal
import time
from pathlib import Path

import pytest

from data_ingest import schema
from data_ingest.ingest import ingest
from data_ingest.ingest_options import IngestOptions
from helpers.cells import atlas_content, cells, differences, write
from helpers.processes import run_python, start_python


def three_files(folder: Path) -> None:
    write(folder / "a.h5ad", cells(40, range(100, 130)))
    # New genes before and between the known ones, and 15 cells that are also in the first file.
    write(folder / "b.h5ad", cells(50, range(90, 125), first=25, seed=0))
    write(folder / "c.h5ad", cells(30, range(110, 150), dataset="blood_two", seed=3))


@pytest.mark.parametrize(
    ("base", "files", "other", "stride", "start", "at_least"),
    [
        pytest.param("", "a.h5ad,c.h5ad", "", 9, 1, 4, id="new atlas"),
        pytest.param("a.h5ad", "b.h5ad,c.h5ad", "", 5, 7, 4, id="append"),
        pytest.param("a.h5ad", "b.h5ad,c.h5ad", "c.h5ad", 7, 9, 3, id="append, then other files first"),
    ],
)
def test_killed_at_any_operation(
    tmp_path: Path, base: str, files: str, other: str, stride: int, start: int, at_least: int
) -> None:
    three_files(tmp_path)
    program = Path(__file__).parent / "ingest_kills.py"
    done = run_python(program, tmp_path, str(stride), str(start), base, files, other)
    result = json.loads(done.stdout.splitlines()[-1])
    assert not result["wrong"], "\n".join([*result["wrong"], done.stderr])
    assert len(result["tried"]) >= at_least


def test_command_on_ray_killed_while_it_writes(tmp_path: Path, ray_local) -> None:
    sample = cells(6_000, range(100, 500), seed=1)
    path = write(tmp_path / "many.h5ad", sample)
    options = IngestOptions(values_per_fragment=50_000, cells_per_chunk=256)
    ingest([path], str(tmp_path / "whole"), options)
    program = (
        "import sys, ray; from pathlib import Path; from data_ingest.ingest import ingest\n"
        "from data_ingest.ingest_options import IngestOptions\n"
        "ray.init(address='local', num_cpus=2, object_store_memory=100 * 2**20, include_dashboard=False,"
        " log_to_driver=False)\n"
        "ingest([Path(sys.argv[1])], sys.argv[2], IngestOptions(values_per_fragment=50_000,"
        " cells_per_chunk=256))\n"
    )
    atlas = tmp_path / "atlas"
    job = start_python("-c", program, path, atlas)
    fragments = atlas / schema.X / "__commits"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (fragments.is_dir() and len(list(fragments.iterdir())) >= 3):
        assert job.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    job.send_signal(signal.SIGKILL)
    job.wait()
    assert len(atlas_content(str(atlas))[schema.OBS]) == 0, "cells may be visible only when all are written"
    report = ingest([path], str(atlas), options)
    assert report.resumed and report.cells_added == 6_000
    assert not differences(atlas_content(str(atlas)), atlas_content(str(tmp_path / "whole")))
