"""Graceful stop of a training on SIGTERM, Ctrl-C or `ray job stop`, with a checkpoint.

The driver raises a flag that all nodes can see: an empty named actor. A thread of rank 0 checks for it a few
times per second, and rank 0 informs the other ranks after the current step.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

import ray

LOOK_EVERY_S = 0.25


@ray.remote(num_cpus=0)
class _Flag:
    """The flag is raised if this actor exists."""


class StopWatch:
    """Watches, on rank 0, for the stop flag and for the next timed checkpoint.

    Args:
        flag: Name of the flag; empty disables the check.
        every_s: Seconds between timed checkpoints; 0 disables them.
    """

    def __init__(self, flag: str, *, every_s: float) -> None:
        self._every_s = every_s
        self._saved_s = time.monotonic()
        self._asked = threading.Event()
        self._ended = threading.Event()
        if flag:
            threading.Thread(target=self._look, args=(flag,), name="stop-watch", daemon=True).start()

    def stop_asked(self) -> bool:
        """Whether the driver asked training to stop."""
        return self._asked.is_set()

    def checkpoint_due(self) -> bool:
        """Whether the last checkpoint is older than `every_s`."""
        return self._every_s > 0 and time.monotonic() - self._saved_s > self._every_s

    def saved(self) -> None:
        """Record that a checkpoint was saved."""
        self._saved_s = time.monotonic()

    def end(self) -> None:
        """Stop watching."""
        self._ended.set()

    def _look(self, flag: str) -> None:
        while not self._ended.wait(LOOK_EVERY_S):
            with suppress(ValueError, ConnectionError, ray.exceptions.RayError):
                ray.get_actor(flag)
                self._asked.set()
                return


@contextmanager
def stop_on_signals(flag: str) -> Iterator[None]:
    """Make SIGTERM and SIGINT raise the flag; a second signal ends the process as usual.

    Has no effect outside the main thread, because only that thread can handle signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    raised = []

    def ask(number: int, frame: FrameType | None) -> None:
        for each, handler in before.items():
            signal.signal(each, handler)
        print(
            f"{signal.Signals(number).name}: saving a checkpoint, then stopping; repeat to stop at once",
            flush=True,
        )
        raised.append(_Flag.options(name=flag).remote())  # type: ignore[attr-defined]

    for number in before:
        signal.signal(number, ask)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for actor in raised:
            ray.kill(actor)
