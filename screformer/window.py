"""Collect training metrics between log lines."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from screformer.cost import peak_memory_gb
from screformer.metrics import sum_over_ranks


class Window:
    """Collects metrics since the last log line; tensors are read only when it closes."""

    def __init__(self, device: Any) -> None:
        self.device = device
        self.reset()

    def reset(self) -> None:
        """Start over."""
        self.loss = torch.zeros((), device=self.device)
        self.wait_s = self.own_s = 0.0
        self.num_cells = 0
        self.num_steps = 0
        self.start = time.perf_counter()

    def add(self, loss: torch.Tensor, wait_s: float, own_s: float, num_cells: int) -> None:
        """Add a step.

        Args:
            loss: This rank's part of the loss.
            wait_s: Seconds waited for cells.
            own_s: Seconds in which this rank waited for no other: for cells, and in the forward pass.
            num_cells: Number of cells.
        """
        self.loss += loss
        self.own_s += own_s
        self.wait_s += wait_s
        self.num_cells += num_cells
        self.num_steps += 1

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """Exclude the time spent inside from the window."""
        began_s = time.perf_counter()
        yield
        self.start += time.perf_counter() - began_s

    def close(self) -> dict[str, float]:
        """Metrics of the steps since the last log line, over all ranks; every rank calls it."""
        elapsed_s = time.perf_counter() - self.start
        world_size = torch.distributed.get_world_size()
        own_s = [0.0] * world_size
        own_s[torch.distributed.get_rank()] = self.own_s / self.num_steps
        loss, wait_s, num_cells, *own_s = sum_over_ranks(
            self.device, self.loss.item(), self.wait_s, self.num_cells, *own_s
        )
        wait_s /= world_size
        metrics = {
            "train/loss": loss / self.num_steps,
            "train/cells_per_s": num_cells / elapsed_s,
            "data/wait_s": wait_s,
            "data/wait_share": wait_s / elapsed_s,
            "mem/peak_gb": peak_memory_gb(self.device),
        }
        if world_size > 1:
            slowest = max(range(world_size), key=own_s.__getitem__)
            metrics |= {
                "ranks/slowest": float(slowest),
                "ranks/slowest_s": own_s.pop(slowest),
                "ranks/others_s": statistics.median(own_s),
            }
        self.reset()
        return metrics
