"""Ray for the tests: a private one with four CPUs, never a cluster that happens to run on this machine."""

import ray

from cluster.connect import environment

ONE_READER = ("cluster.cpus_per_worker=0.5", "cluster.cpus_per_read_task=1.5")
"""Settings with which each rank reads with one process instead of as many as fit, because each takes two
seconds to start."""


WATCHERS = {
    "REPORTER_UPDATE_INTERVAL_MS": "60000",
    "RAY_LOG_MONITOR_MANY_FILES_THRESHOLD": "0",
    "LOG_NAME_UPDATE_INTERVAL_S": "60",
}
"""With these, Ray looks at its processes and logs less often, because no test reads what it finds."""


def start_ray() -> None:
    """Start Ray, unless this process is already connected."""
    if ray.is_initialized():
        return
    with environment(WATCHERS):
        ray.init(
            address="local",
            num_cpus=4,
            object_store_memory=300 * 2**20,
            include_dashboard=False,
            log_to_driver=False,
        )
