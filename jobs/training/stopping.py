"""Ask a running training to save a checkpoint and end: SIGTERM, Ctrl-C, `ray job stop`.

The driver raises a flag that all nodes see: a named actor, which holds nothing. Rank 0 looks for it a few
times a second, beside its steps, and tells the others after the step that it is in.
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
    """Its existence is the message."""


class StopWatch:
    """On rank 0: whether the driver asked to stop, and whether a checkpoint by time is due.

    Args:
        flag: Name of the flag; empty looks for none.
        every_s: Seconds between checkpoints; 0 saves none by time.
    """

    def __init__(self, flag: str, *, every_s: float) -> None:
        self._every_s = every_s
        self._saved_s = time.monotonic()
        self._asked = threading.Event()
        self._ended = threading.Event()
        if flag:
            threading.Thread(target=self._look, args=(flag,), name="stop-watch", daemon=True).start()

    def stop_asked(self) -> bool:
        """Whether the driver wants training to end."""
        return self._asked.is_set()

    def checkpoint_due(self) -> bool:
        """Whether the last checkpoint is too old."""
        return self._every_s > 0 and time.monotonic() - self._saved_s > self._every_s

    def saved(self) -> None:
        """A checkpoint was saved."""
        self._saved_s = time.monotonic()

    def end(self) -> None:
        """Look no longer."""
        self._ended.set()

    def _look(self, flag: str) -> None:
        while not self._ended.wait(LOOK_EVERY_S):
            with suppress(ValueError, ConnectionError, ray.exceptions.RayError):
                ray.get_actor(flag)
                self._asked.set()
                return


@contextmanager
def stop_on_signals(flag: str) -> Iterator[None]:
    """Within it, SIGTERM and SIGINT raise the flag; a second one ends the process as usual.

    Only in the main thread, which alone may handle signals.
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
            f"{signal.Signals(number).name}: saving a checkpoint, then stopping; a second one stops at once",
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
