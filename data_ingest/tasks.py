"""Run many calls of one function in a bounded pool of Ray tasks, or in this process."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from tqdm import tqdm

logger = logging.getLogger(__name__)

_MOST_READ_TASKS = 8
"""Read tasks at a time for one rank; more than any model here can take cells from."""
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

    The function travels once; bind what all calls share to it with `functools.partial`. When a call fails, no
    further one starts, and the running ones end before its error is raised: nothing writes in the background
    once the caller has given up.

    Args:
        function: What to run; picklable.
        calls: Arguments of each call. A Ray reference among them arrives as its value.
        what: What is being done, for the progress bar and the log; empty shows neither.
        unit: What `sizes` count.
        sizes: How far each call brings the progress; 1 each by default.
        done_before: What an interrupted run had finished of the whole, in `unit`.
        note: Called with the index of each call that is done.
        num_cpus: CPUs that Ray reserves for each task.
        at_once: Most tasks in flight; twice the cluster's CPUs by default, so that none is idle.
        in_process: Do not use Ray.

    Returns:
        The results, in the order of the calls.

    Raises:
        Exception: The error of the call that failed first, as the function raised it.
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
            # A log file, as of a submitted job, shows no bar.
            if what and progress.disable and time.monotonic() - reported > _PROGRESS_EVERY_S:
                reported = time.monotonic()
                logger.info("%s: %d of %d %ss done", what, num_done, total, unit)
            if note:
                note(index)

        ray = sys.modules.get("ray")  # a process that never imported it is not connected to it
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
    """Read tasks at a time, CPUs that Ray reserves for each.

    And object store bytes, for one of `world_size` ranks.

    A read task that waits for its consumer keeps what it has reserved. Were that a whole CPU, the paused
    training stream could starve the validation stream, and one rank another, for ever. So tasks reserve next
    to nothing (nothing at all where nothing is free) and their number is bounded instead.
    """
    import ray

    free = ray.available_resources().get("CPU", 0.0)
    tasks = max(1, min(_MOST_READ_TASKS, int(free / (world_size * read_cpus))))
    store_bytes = ray.cluster_resources().get("object_store_memory", 2**30)
    return tasks, 0.001 if free >= 0.1 else 0, 0.4 * store_bytes / world_size
