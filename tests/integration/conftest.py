"""One Ray for all tests of this folder, so that not each module pays for its start and its workers'
imports."""

import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def ray_local() -> None:
    """A private Ray of four CPUs, which later modules go on with."""
    from helpers.local_ray import start_ray

    start_ray()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """End it after the folder's last test: others want none."""
    last = nextitem is None or Path(__file__).parent not in nextitem.path.parents
    if last and "ray" in sys.modules:
        sys.modules["ray"].shutdown()
