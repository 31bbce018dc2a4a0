"""Connect to Ray: the only `ray.init` outside the tests."""

from __future__ import annotations

import logging
import math
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import ray

from cluster.quiet import quiet

_GIB = 2**30
STARTS = 3
"""How often a local Ray is started before the machine counts as too busy."""
_TOO_SLOW = "timed out during startup"
logger = logging.getLogger(__name__)
CGROUP = Path("/sys/fs/cgroup")
_own_address = ""
"""Address of the local Ray that `connect` started in this process."""


def connect(address: str | None = None, *, num_cpus: float = 0) -> None:
    """Connect this process to Ray, once. A local Ray with too few CPUs for the job is replaced.

    Jobs started by `ray job submit` use that cluster, and shells with RAY_ADDRESS use the cluster it names.
    Without an address, a local Ray starts and ends with this process; it never joins a cluster that happens
    to run on this machine.

    Args:
        address: `HOST:PORT` of a cluster, `auto` for the one on this machine, `local`, or None for
            RAY_ADDRESS, else `local`.
        num_cpus: Total CPUs that the job's workers and read tasks reserve. A local Ray on a machine with
            fewer cores still reports this many; otherwise the job would wait forever for the missing ones.
            Ignored for a cluster.

    Raises:
        ValueError: A driver cannot connect to this kind of address, nothing answers there, or the cluster
            rejects this process.
    """
    quiet()
    if ray.is_initialized():
        ours = ray.get_runtime_context().gcs_address == _own_address
        if not ours or ray.cluster_resources().get("CPU", 0) >= num_cpus:
            return
        ray.shutdown()  # an earlier command in this process needed fewer CPUs
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    if address == "local":
        _start_local(num_cpus)
    else:
        _join(address)


def _start_local(num_cpus: float) -> None:
    global _own_address
    cores, memory = machine()
    packages = str(Path(__file__).resolve().parents[1])
    # Set in the environment of Ray's processes, not in a `runtime_env`, for which Ray would discard its
    # prestarted worker processes and so delay every job by a few seconds.
    inherited = {
        "PYTHONPATH": os.pathsep.join(
            filter(None, [packages, os.environ.get("PYTHONPATH")])
        ),  # our packages, from any directory
        "__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR": f"{quiet.__module__}.{quiet.__name__}",
        # One process fewer per training; this machine cannot be preempted.
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        # Ray would repeat a task that runs out of memory for ever.
        "RAY_task_oom_retries": os.environ.get("RAY_task_oom_retries", "3"),
    }
    with environment(inherited):
        start_patiently(
            lambda: ray.init(
                address="local",
                num_cpus=max(cores, math.ceil(num_cpus)),
                object_store_memory=object_store_bytes(memory),
                include_dashboard=False,
                logging_level=logging.WARNING,
            )
        )
    _own_address = ray.get_runtime_context().gcs_address


def object_store_bytes(memory: float) -> int:
    """Size of a local Ray's object store on a machine with so many bytes of memory."""
    return int(min(2 * _GIB, 0.2 * memory))


def start_patiently(start: Callable[[], object]) -> None:
    """Start Ray, again if a busy machine was too slow for it.

    Args:
        start: Starts Ray; raises Ray's own errors.

    Raises:
        RuntimeError: Ray timed out each time.
    """
    for left in reversed(range(STARTS)):
        try:
            start()
            return
        except Exception as error:  # Ray raises no narrower class
            if _TOO_SLOW not in str(error):
                raise
            ray.shutdown()
            if not left:
                raise RuntimeError(
                    f"Ray did not start in {STARTS} tries of 30 s: this machine ({socket.gethostname()}) is"
                    f" too busy; wait until it has less to do, then run the same command again"
                ) from error
            logger.warning("Ray was too slow to start; trying again")


@contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    """Set environment variables within the block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _join(address: str) -> None:
    if "://" in address:
        raise ValueError(
            f"Ray address {address!r} is not HOST:PORT; a job runs inside the cluster, so send it there:"
            " ray job submit --address http://HOST:8265 --working-dir . -- python -m jobs.NAME ... (or unset"
            " RAY_ADDRESS for a local Ray)"
        )
    if address != "auto":
        host, colon, port = address.rpartition(":")
        if not (colon and host and port.isdecimal()):
            raise ValueError(
                f"Ray address {address!r} must be HOST:PORT (such as 10.0.0.5:6379), auto or local"
            )
        try:
            # Ray's own client retries for a minute, then exits without a Python exception.
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        except OSError as error:
            raise ValueError(
                f"no Ray cluster answers at {address} ({error}); check that `ray start --head` runs there,"
                " or unset RAY_ADDRESS for a local Ray"
            ) from error
    try:
        ray.init(address=address, logging_level=logging.WARNING)
    except (ConnectionError, RuntimeError) as error:
        raise ValueError(
            f"Ray at {address} was not found or refused the connection: {error}. If the cluster requires"
            f" authentication, set RAY_AUTH_MODE=token and put its token"
            " in ~/.ray/auth_token or RAY_AUTH_TOKEN; or unset RAY_ADDRESS for a local Ray"
        ) from error


def machine(cgroup: Path = CGROUP) -> tuple[int, float]:
    """Cores and bytes of memory available to this process.

    Respects the limits of the scheduler and of the container (cgroup v2, mounted at `cgroup`).
    """
    cores = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    quota, _, period = _limit(cgroup / "cpu.max").partition(" ")
    if quota.isdecimal():
        cores = min(cores, int(quota) / int(period))
    if (limit := _limit(cgroup / "memory.max")).isdecimal():
        memory = min(memory, int(limit))
    return max(1, int(cores)), memory


def _limit(path: Path) -> str:
    return path.read_text().strip() if path.is_file() else ""
