"""Run the parts of an ingest in Ray tasks, or in this process."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from tqdm import tqdm

logger = logging.getLogger(__name__)

_PROGRESS_EVERY_S = 10.0


def map_tasks(
    function: Callable[..., Any],
    calls: Sequence[tuple[Any, ...]],
    what: str,
    note: Callable[[int], None] | None = None,
) -> list[Any]:
    """Call the function with each tuple, in Ray tasks if there is a Ray.

    Results in order, `note(index)` as each is done.
    """
    import ray

    results: list[Any] = [None] * len(calls)
    num_done, said = 0, time.monotonic()
    logger.info("%s: %d parts", what, len(calls))
    with tqdm(total=len(calls), desc=what, unit="part", disable=None) as bar:

        def done(index: int, result: Any) -> None:
            nonlocal num_done, said
            results[index] = result
            num_done += 1
            bar.update()
            # A log file, as of a submitted job, shows no bar.
            if bar.disable and time.monotonic() - said > _PROGRESS_EVERY_S:
                said = time.monotonic()
                logger.info("%s: %d of %d parts done", what, num_done, len(calls))
            if note:
                note(index)

        if not ray.is_initialized():
            for index, call in enumerate(calls):
                done(index, function(*call))
            return results
        task = ray.remote(num_cpus=1, max_retries=3)(_call)
        shared = ray.put(function)
        limit = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
        waiting = list(range(len(calls)))[::-1]
        running: dict[Any, int] = {}
        while waiting or running:
            while waiting and len(running) < limit:
                index = waiting.pop()
                running[task.remote(shared, *calls[index])] = index
            ready, _ = ray.wait(list(running))
            for reference in ready:
                try:
                    result = ray.get(reference)
                except ray.exceptions.RayTaskError as e:
                    raise e.cause from e
                done(running.pop(reference), result)
    return results


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)
