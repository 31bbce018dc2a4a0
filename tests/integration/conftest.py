"""One Ray for all tests of this folder, so that not each module pays for its start and its workers' imports."""

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="package")
def _end_of_ray() -> Iterator[None]:
    import ray

    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def ray_local(_end_of_ray: None) -> None:
    """A private Ray of four CPUs, which later modules go on with."""
    from local_ray import start_ray

    start_ray()
