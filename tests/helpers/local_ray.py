"""The Ray of the tests: a private one of four CPUs, never a cluster that happens to run on this machine."""

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
