"""Progress lines of a training: one per report, at most 100 columns, with the time left."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

_SHOWN = {
    "train/loss": "loss {:.3g}",
    "train/cells_per_s": "{:,.0f} cells/s",
    "val/loss": "validation {:.3g}",
    "val/macro_f1": "macro-F1 {:.3f}",
    "best_step": "best step {:.0f}",
    "best_val/loss": "validation {:.3g}",
    "best_val/macro_f1": "macro-F1 {:.3f}",
    "test/macro_f1": "test macro-F1 {:.3f}",
    "test/accuracy": "accuracy {:.3f}",
}
"""Metrics to print, in this order; MLflow has all metrics."""

_SLOW_RATIO, _SLOW_S, _SLOW_LINES = 2.0, 0.05, 3
"""A rank is slow if its own part of a step takes twice as long as that of the others, and 50 ms longer, in
three lines in a row."""


class ProgressLines:
    """Formats the progress lines of one training."""

    def __init__(
        self,
        max_steps: int,
        *,
        done_steps: int = 0,
        steps_per_epoch: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start the clock.

        Args:
            max_steps: Number of steps of the training.
            done_steps: Steps done before this process started.
            steps_per_epoch: For the time of an epoch, which the second line shows; 0 leaves it out.
            clock: Returns seconds from an arbitrary origin.
        """
        self._max_steps, self._done, self._clock = max_steps, done_steps, clock
        self._steps_per_epoch, self._first = steps_per_epoch, (0, 0.0)
        self._start = clock()

    def line(self, metrics: Mapping[str, float], step: int) -> str:
        """Format one report."""
        shown = [text.format(metrics[name]) for name, text in _SHOWN.items() if name in metrics]
        if "best_step" not in metrics:
            shown.insert(0, f"step {step:>{len(str(self._max_steps))}}/{self._max_steps}")
            if self._done < step < self._max_steps:
                now = self._clock()
                seconds = (now - self._start) / (step - self._done) * (self._max_steps - step)
                shown.append(f"{duration(seconds)} left")
                first, then = self._first
                if self._steps_per_epoch and first and step > first:
                    epoch_s = (now - then) / (step - first) * self._steps_per_epoch
                    shown.append(f"({duration(epoch_s)} an epoch)")
                    self._steps_per_epoch = 0
                self._first = (step, now)
        return "  ".join(shown)


class SlowRank:
    """Reports a rank that keeps the others waiting, once it has done so in several lines."""

    def __init__(self, nodes: Sequence[str]) -> None:
        """Set the node of each rank."""
        self._nodes = nodes
        self._slow, self._lines = -1, 0

    def line(self, metrics: Mapping[str, float]) -> str:
        """What to report now; empty for nothing."""
        if "ranks/slowest_s" not in metrics:
            return ""
        slowest_s, others_s = metrics["ranks/slowest_s"], metrics["ranks/others_s"]
        rank = int(metrics["ranks/slowest"])
        if slowest_s < _SLOW_RATIO * others_s or slowest_s - others_s < _SLOW_S:
            rank = -1
        self._lines = self._lines + 1 if rank == self._slow else 1
        self._slow = rank
        if rank < 0 or self._lines != _SLOW_LINES:
            return ""
        return (
            f"rank {rank} on node {self._nodes[rank]} is slow: {slowest_s:.2g} s a step to read cells and"
            f" apply the network, the others {others_s:.2g} s, who wait for it; is that node busy or smaller?"
        )


def duration(seconds: float) -> str:
    """Format a duration, for example `40 s`, `12 min` or `3.4 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
