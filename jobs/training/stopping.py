"""Graceful stop of a training on SIGTERM, Ctrl-C or `ray job stop`, with a checkpoint.

The driver raises a flag that all nodes can see: an empty named actor. A thread of rank 0 checks for it a few
times per second, and rank 0 informs the other ranks after the current step. If the checkpoint does not arrive
in time, for example because no workers are running, the driver ends without it.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import ray

LOOK_EVERY_S = 0.25
STOP_WITHIN_S = 45
"""How long the driver waits for the checkpoint. Its manager should wait longer before it kills the driver."""


@ray.remote(num_cpus=0)
class _Flag:
    """The flag is raised if this actor exists."""


def save_flag(flag: str) -> str:
    """Name of the flag that asks for a checkpoint without a stop, for the run with this stop flag."""
    return f"{flag}-save"


def raise_flag(name: str) -> Any:
    """Raise a flag; it stays up until `lower_flag`, or until this process ends."""
    return _Flag.options(name=name).remote()  # type: ignore[attr-defined]


def lower_flag(flag: Any) -> None:
    """Lower a flag that `raise_flag` returned, if any."""
    if flag is not None:
        ray.kill(flag)


class StopWatch:
    """Watches, on rank 0, for the flags and for the next timed checkpoint.

    Args:
        flag: Name of the stop flag; empty disables the checks for flags.
        every_s: Seconds between timed checkpoints; 0 disables them.
    """

    def __init__(self, flag: str, *, every_s: float) -> None:
        self._every_s = every_s
        self._saved_s = time.monotonic()
        self._asked = threading.Event()
        self._save_asked = threading.Event()
        self._ended = threading.Event()
        if flag:
            threading.Thread(target=self._look, args=(flag,), name="stop-watch", daemon=True).start()

    def stop_asked(self) -> bool:
        """Whether the driver asked training to stop."""
        return self._asked.is_set()

    def checkpoint_due(self) -> bool:
        """Whether the last checkpoint is older than `every_s`, or somebody asked for one."""
        late = self._every_s > 0 and time.monotonic() - self._saved_s > self._every_s
        return late or self._save_asked.is_set()

    def saved(self) -> None:
        """Record that a checkpoint was saved."""
        self._saved_s = time.monotonic()
        self._save_asked.clear()

    def end(self) -> None:
        """Stop watching."""
        self._ended.set()

    def _look(self, flag: str) -> None:
        may_ask = True  # once: the workers start again after it
        while not self._ended.wait(LOOK_EVERY_S):
            if _is_up(flag):
                self._asked.set()
                return
            if may_ask and _is_up(save_flag(flag)):
                may_ask = False
                self._save_asked.set()


def _is_up(flag: str) -> bool:
    with suppress(ValueError, ConnectionError, ray.exceptions.RayError):
        ray.get_actor(flag)
        return True
    return False


@contextmanager
def stop_on_signals(flag: str) -> Iterator[None]:
    """Make SIGTERM and SIGINT raise the flag; a second signal ends the process as usual.

    Has no effect outside the main thread, because only that thread can handle signals.

    Raises:
        KeyboardInterrupt: The block did not end within `STOP_WITHIN_S` of the signal.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)}
    raised, late = [], threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, before[each])
        print(
            f"{signal.Signals(number).name}: saving a checkpoint, then stopping; repeat to stop at once",
            flush=True,
        )
        raised.append(raise_flag(flag))
        signal.alarm(STOP_WITHIN_S)

    def end(number: int, frame: FrameType | None) -> None:
        late.set()
        raise KeyboardInterrupt  # Ray, waiting for a result, raises another one in its place

    signal.signal(signal.SIGTERM, ask)
    signal.signal(signal.SIGINT, ask)
    signal.signal(signal.SIGALRM, end)
    try:
        yield
    except KeyboardInterrupt as stop:
        if late.is_set():
            stop.add_note(f"no checkpoint could be saved within {STOP_WITHIN_S} s, so the last one counts")
        raise
    finally:
        signal.alarm(0)
        for number, handler in before.items():
            signal.signal(number, handler)
        for actor in raised:
            lower_flag(actor)
