"""The Ray of the tests: a private one of four CPUs, never a cluster that happens to run on this machine."""

from collections.abc import Iterator
from contextlib import contextmanager

import ray


def start_ray() -> None:
    """Start it, unless this process has it already."""
    if not ray.is_initialized():
        ray.init(
            address="local",
            num_cpus=4,
            object_store_memory=300 * 2**20,
            include_dashboard=False,
            log_to_driver=False,
        )


@contextmanager
def some_ray() -> Iterator[None]:
    """The Ray that runs, or one for the time being."""
    if ray.is_initialized():
        yield
        return
    start_ray()
    try:
        yield
    finally:
        ray.shutdown()
