"""Fixtures for all tests: local Ray, S3 server on loopback, simulated files, small atlas, real data if
present.

Nothing is mocked: Ray, TileDB, the S3 protocol, MLflow and .h5ad files are real, only small.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from helpers.servers import S3

# Set before any test imports Ray, torch or MLflow, because the processes they start inherit it.
os.environ.update(
    RAY_USAGE_STATS_ENABLED="0",
    MLFLOW_DISABLE_TELEMETRY="true",
    DO_NOT_TRACK="true",
    AWS_ACCESS_KEY_ID="test",
    AWS_SECRET_ACCESS_KEY="test",
    AWS_DEFAULT_REGION="us-east-1",
    AWS_EC2_METADATA_DISABLED="true",
    RAY_TRAIN_ENABLE_PREEMPTION_WATCHER="0",  # as in the local Ray of our commands
)
# The tests start about a hundred processes, each of which would otherwise compile our sources again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers on two cores; more threads would only compete

REPO_ROOT = Path(__file__).resolve().parents[1]
MEMORY, MEMORY_GB = Path("/dev/shm"), 8

if MEMORY.is_dir() and os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > MEMORY_GB * 2**30:
    # Temporary folders in memory: MLflow's SQLite and TileDB wait for the disk thousands of times.
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))


@pytest.fixture(autouse=True, scope="session")
def _mlflow_in_tmp(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep tests from writing runs to the working directory; tests with their own store set this again."""
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real .h5ad files next to the repository; tests that need it are skipped if it is missing."""
    folder = REPO_ROOT.parent / "shared" / "data"
    if not (folder / "pbmc3k_10x.h5ad").exists():
        pytest.skip(f"no real data in {folder}")
    return folder


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator["S3"]:
    """An S3 server with one bucket, shared by several tests; each uses its own prefix."""
    from helpers.servers import s3_server

    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(scope="session")
def sim_h5ads(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three small simulated data sets as .h5ad, 900 cells of 12 donors in total; read-only."""
    from data_ingest.simulate import simulate_h5ads

    return simulate_h5ads(tmp_path_factory.mktemp("h5ad"), num_cells=900, seed=0)


@pytest.fixture(scope="session")
def small_atlas(tmp_path_factory: pytest.TempPathFactory, sim_h5ads: list[Path]) -> str:
    """URI of an atlas with the cells of `sim_h5ads`, ingested once for all xdist workers; read-only."""
    from data_ingest.ingest import ingest

    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    atlas, done = shared / "small-atlas", shared / "small-atlas.done"
    with (shared / "small-atlas.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            ingest(sim_h5ads, str(atlas))
            done.touch()
    return str(atlas)


LONGEST_FIRST = (
    "test_train_jobs.py",
    "test_crossval.py",
    "test_ray_job.py",
    "test_quickstart.py",
    "test_resume_run.py",
    "test_full_disk.py",
    "test_move.py",
    "test_census.py",
    "test_secrets_stay_out.py",
    "test_explain_job.py",
    "test_stream.py",
    "test_ingest_kill.py",
    "test_ingest.py",
    "test_outage.py",
    "test_doctor.py",
    "test_resume.py",
    "test_registry.py",
    "test_zero.py",
    "test_annotate.py",
    "test_s3.py",
    "test_tracking.py",
    "test_training_ends.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run integration tests first, longest files first, so two workers finish at about the same time and Ray
    stops once. The makefile keeps this order with `--no-loadscope-reorder`."""
    ranks = {name: rank for rank, name in enumerate(LONGEST_FIRST)}
    items.sort(
        key=lambda item: (
            "integration" not in item.path.parts,
            ranks.get(item.path.name, len(ranks)),
            item.path.name,
        )
    )
