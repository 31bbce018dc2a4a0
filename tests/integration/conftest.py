"""One Ray for all tests in this folder, so that it starts, and its workers import, only once."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from helpers.census import Census
    from helpers.servers import S3


@pytest.fixture(scope="module")
def ray_local() -> None:
    """A private Ray with four CPUs, which later modules share."""
    from helpers.local_ray import start_ray

    start_ray()


@pytest.fixture(scope="session")
def census(s3: "S3", small_atlas: str, tmp_path_factory: pytest.TempPathFactory) -> "Census":
    """A copy of Census, whose stable release is the small atlas."""
    from helpers.census import publish

    return publish(s3, small_atlas, tmp_path_factory.mktemp("census"))


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Stop Ray after the folder's last test, because other tests must not have one."""
    last = nextitem is None or Path(__file__).parent not in nextitem.path.parents
    if last and "ray" in sys.modules:
        sys.modules["ray"].shutdown()
