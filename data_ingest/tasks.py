"""Run many calls of a function in a limited pool of Ray tasks, or in this process."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from tqdm import tqdm

logger = logging.getLogger(__name__)

MOST_READ_TASKS = 8
"""Maximum number of concurrent read tasks per rank; more than any of our models can keep busy."""
_PROGRESS_EVERY_S = 10.0


def map_tasks(
    function: Callable[..., Any],
    calls: Sequence[tuple[Any, ...]],
    what: str = "",
    *,
    unit: str = "part",
    sizes: Sequence[int] | None = None,
    done_before: int = 0,
    note: Callable[[int], None] | None = None,
    num_cpus: float = 1,
    at_once: int | None = None,
    in_process: bool = False,
) -> list[Any]:
    """Call a function with each tuple of arguments, in Ray tasks if this process is connected to Ray.

    The function is sent once; use `functools.partial` to bind arguments that all calls share. After a call
    fails, no new call starts, and running calls finish before the error is raised, so nothing keeps writing
    in the background.

    Args:
        function: Function to call; picklable.
        calls: Arguments of each call. Ray references are passed as their values.
        what: Description for the progress bar and the log; empty for neither.
        unit: Unit of `sizes`.
        sizes: Progress made by each call; 1 by default.
        done_before: Progress already made by an interrupted run, in `unit`.
        note: Called with the index of each finished call.
        num_cpus: CPUs that Ray reserves for each task.
        at_once: Maximum number of tasks in flight; by default twice the cluster's CPUs, to keep all busy.
        in_process: Do not use Ray.

    Returns:
        The results, in the order of the calls.

    Raises:
        Exception: The error of the first call that failed, as raised by the function.
    """
    sizes = sizes or [1] * len(calls)
    results: list[Any] = [None] * len(calls)
    num_done, total = done_before, done_before + sum(sizes)
    reported = time.monotonic()
    if what:
        logger.info("%s: %d %ss", what, total, unit)
    with tqdm(
        total=total, initial=done_before, desc=what, unit=unit, disable=None if what else True
    ) as progress:

        def finish(index: int, result: Any) -> None:
            nonlocal num_done, reported
            results[index] = result
            num_done += sizes[index]
            progress.update(sizes[index])
            # Log files, for example of submitted jobs, show no progress bar.
            if what and progress.disable and time.monotonic() - reported > _PROGRESS_EVERY_S:
                reported = time.monotonic()
                logger.info("%s: %d of %d %ss done", what, num_done, total, unit)
            if note:
                note(index)

        ray = sys.modules.get("ray")  # a process that never imported Ray is not connected
        if in_process or ray is None or not ray.is_initialized():
            for index, call in enumerate(calls):
                finish(index, function(*call))
            return results
        task = ray.remote(num_cpus=num_cpus, max_retries=3)(_call)
        shared = ray.put(function)
        at_once = at_once or 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
        waiting = list(range(len(calls)))[::-1]
        running: dict[Any, int] = {}
        while waiting or running:
            while waiting and len(running) < at_once:
                index = waiting.pop()
                running[task.remote(shared, *calls[index])] = index
            (reference,), _ = ray.wait(list(running))
            try:
                result = ray.get(reference)
            except ray.exceptions.RayError as error:
                ray.wait(list(running), num_returns=len(running))
                if isinstance(error, ray.exceptions.RayTaskError):
                    raise error.cause from error
                raise
            finish(running.pop(reference), result)
    return results


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


def share_of_cluster(world_size: int, read_cpus: float) -> tuple[int, float, float]:
    """Concurrent read tasks, CPUs reserved per task, and object store bytes for one of `world_size` ranks.

    A read task keeps its reservation while it waits for its consumer. With a whole CPU each, a paused
    training stream could starve the validation stream forever, or one rank another. So tasks reserve almost
    nothing (nothing at all if no CPU is free), and their number is limited instead. Ray Train's workers leave
    room for that (`jobs.training.elastic`), so that there is some even if nodes are lost later.
    """
    import ray

    free = ray.available_resources().get("CPU", 0.0)
    tasks = max(1, min(MOST_READ_TASKS, int(free / (world_size * read_cpus))))
    store_bytes = ray.cluster_resources().get("object_store_memory", 2**30)
    return tasks, 0.001 if free >= 0.01 else 0, 0.4 * store_bytes / world_size
