"""The Ray of the tests: a private one of four CPUs, never a cluster that happens to run on this machine."""

import ray

ONE_READER = ("cluster.cpus_per_worker=0.5", "cluster.cpus_per_read_task=1.5")
"""Settings of a training whose ranks read with one process each, not with as many as there is room for:
each takes two seconds to start."""


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
