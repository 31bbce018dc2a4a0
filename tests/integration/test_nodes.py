"""A training on a cluster that loses processes and nodes, gets one back, and is stopped and started again.

The head node and each other node are real raylets. A worker takes all CPUs of its node, so that readers have
the least room."""

import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_ingest.ingest import ingest
from helpers.processes import read_until
from helpers.raylets import Job, Raylets, end, raylets

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]  # minutes, mostly of waiting


@pytest.fixture(scope="module")
def cluster() -> Iterator[Raylets]:
    with raylets(2) as cluster:
        yield cluster


def test_training_goes_on_with_what_is_left(cluster: Raylets, sim_h5ads: list[Path], tmp_path: Path) -> None:
    atlas = str(tmp_path / "atlas")
    ingest(sim_h5ads[:2], atlas)
    shutil.copytree(atlas, tmp_path / "before")
    for name in ("disturbed", "undisturbed"):
        (tmp_path / name).mkdir()
    run = Job(cluster, atlas, tmp_path / "disturbed", "cluster.num_workers=2")
    readers, other = cluster.add(1), cluster.add(2)
    job = run.start()
    try:
        read_until(job, r"^step +20/")
        read_until(job, r"^step +\d+/")
        cluster.processes("RayTrainWorker")[-1].kill()
        read_until(job, r"^resumed after step \d+ \([^)]*\)$")
        read_until(job, r"^step ")

        lost_s = time.monotonic()
        cluster.lose(readers, other)
        read_until(job, r"^resumed after step .* with 1 of 2 workers")
        read_until(job, r"^step ")
        # On a quiet machine, in less than a minute. No CPU is free, yet readers run.
        assert time.monotonic() - lost_s < 240

        cluster.add(2)
        read_until(job, r"^resumed after step \d+ \([^)]*\)$")
        read_until(job, r"^step ")
        job.send_signal(signal.SIGTERM)
        printed, _ = job.communicate(timeout=60)
        assert job.returncode == 130, printed
        stopped = re.search(r"interrupted; saved a checkpoint at step (\d+); resume with --resume", printed)
        assert stopped, printed
    finally:
        end(job)

    ingest(sim_h5ads, atlas)  # the run keeps the version that it began with
    job = run.start()
    try:
        assert read_until(job, r"^resumed after step (\d+) ")[1] == stopped[1]
        read_until(job, r"^step ")
        (controller,) = cluster.processes("TrainController")
        controller.kill()
        printed, _ = job.communicate(timeout=60)
        assert job.returncode == 1 and "Traceback" not in printed, printed
        assert re.search(rf"controls the workers was lost: .*; resume with --resume {run.run_dir}\n", printed)
    finally:
        end(job)
    found = run.losses()

    alone = Job(cluster, str(tmp_path / "before"), tmp_path / "undisturbed")
    job = alone.start()
    try:
        read_until(job, rf"^step +{max(found)}/.*validation")
        job.send_signal(signal.SIGTERM)
        job.communicate(timeout=60)
    finally:
        end(job)
    expected = alone.losses()
    assert len(found) >= 4, "each with the cells of 20 steps"
    assert found == pytest.approx({step: expected[step] for step in found}, rel=1e-4)
