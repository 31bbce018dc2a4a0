"""Collect training metrics between log lines."""

from __future__ import annotations

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
        self.wait_s = 0.0
        self.num_cells = 0
        self.num_steps = 0
        self.start = time.perf_counter()

    def add(self, loss: torch.Tensor, wait_s: float, num_cells: int) -> None:
        """Add a step: this rank's part of the loss, seconds waited for cells, and number of cells."""
        self.loss += loss
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
        loss, wait_s, num_cells = sum_over_ranks(self.device, self.loss.item(), self.wait_s, self.num_cells)
        wait_s /= torch.distributed.get_world_size()
        metrics = {
            "train/loss": loss / self.num_steps,
            "train/cells_per_s": num_cells / elapsed_s,
            "data/wait_s": wait_s,
            "data/wait_share": wait_s / elapsed_s,
            "mem/peak_gb": peak_memory_gb(self.device),
        }
        self.reset()
        return metrics
