"""One Ray for all tests in this folder, so that it starts, and its workers import, only once."""

import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def ray_local() -> None:
    """A private Ray with four CPUs, which later modules share."""
    from helpers.local_ray import start_ray

    start_ray()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Stop Ray after the folder's last test, because other tests must not have one."""
    last = nextitem is None or Path(__file__).parent not in nextitem.path.parents
    if last and "ray" in sys.modules:
        sys.modules["ray"].shutdown()
