"""Progress lines of a training: one per report, at most 100 columns, with the time left."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

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


class ProgressLines:
    """Formats the progress lines of one training."""

    def __init__(
        self, max_steps: int, *, done_steps: int = 0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Start the clock.

        Args:
            max_steps: Number of steps of the training.
            done_steps: Steps done before this process started.
            clock: Returns seconds from an arbitrary origin.
        """
        self._max_steps, self._done, self._clock = max_steps, done_steps, clock
        self._start = clock()

    def line(self, metrics: Mapping[str, float], step: int) -> str:
        """Format one report."""
        shown = [text.format(metrics[name]) for name, text in _SHOWN.items() if name in metrics]
        if "best_step" not in metrics:
            shown.insert(0, f"step {step:>{len(str(self._max_steps))}}/{self._max_steps}")
            if self._done < step < self._max_steps:
                seconds = (self._clock() - self._start) / (step - self._done) * (self._max_steps - step)
                shown.append(f"{duration(seconds)} left")
        return "  ".join(shown)


def duration(seconds: float) -> str:
    """Format a duration, for example `40 s`, `12 min` or `3.4 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
