"""Timing, memory and utilisation for the benchmarks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from screformer.config import ModelConfig
from screformer.reversible import ReversibleEncoder


@dataclass(frozen=True)
class Times:
    """Seconds of peers run in turn: one value per round for each peer."""

    rounds: Mapping[str, Sequence[float]]

    def seconds(self, name: str) -> float:
        """Median over the rounds."""
        return statistics.median(self.rounds[name])

    def ratio(self, slow: str, fast: str) -> float:
        """Median over the rounds of `slow` / `fast`.

        Other load affects both halves of a round, so it cancels out.
        """
        return statistics.median(
            one / other for one, other in zip(self.rounds[slow], self.rounds[fast], strict=True)
        )


def alternate(steps: Mapping[str, Callable[[], None]], *, rounds: int, device: torch.device) -> Times:
    """Run each step once to warm up, then all in turn."""

    def seconds(step: Callable[[], None]) -> float:
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    for step in steps.values():
        seconds(step)
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            taken[name].append(seconds(step))
    return Times(taken)


def peak_memory_mb(step: Callable[[], None], device: torch.device) -> float:
    """Peak memory of tensors created by `step`, in MiB.

    Counted by the allocator, so other load does not matter.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    results = profiler.profiler.kineto_results if profiler.profiler is not None else None
    assert results is not None
    changes = sorted(
        (event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]"
    )
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak / 2**20


def peak_activation_mb(
    *, depth: int, length: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> float:
    """Peak memory of one forward and backward pass of a reversible encoder (width 128, 4 heads).

    Excludes the gradients of its weights.
    """
    device = torch.device(device)
    encoder = ReversibleEncoder(ModelConfig(depth=depth, attention="lsh")).to(device, dtype)
    x = torch.randn(1, length, 128, device=device, dtype=dtype)
    mask = torch.ones(1, length, dtype=torch.bool, device=device)

    def step() -> None:
        encoder(x, mask, hash_seed=0).sum().backward()

    # The first step allocates the weights' gradients, which stay and are not activations.
    step()
    return peak_memory_mb(step, device)


PEAK_BF16_TFLOPS = {
    "A100": 312,
    "H100 PCIe": 756,
    "H100": 989,
    "H200": 989,
    "GH200": 989,
    "B200": 2250,
    "L40S": 362,
    "L4": 121,
    "A10G": 70,
    "A10": 125,
    "RTX 4090": 165,
}
"""Dense bfloat16 TFLOP/s from NVIDIA's data sheets, looked up by part of the card's name."""


def peak_flops(device: torch.device, dtype: torch.dtype, given_tflops: float | None) -> float | None:
    """Peak FLOP/s of the device: as given, or by the name of the card, in bfloat16.

    None if unknown.
    """
    if given_tflops is not None:
        return given_tflops * 1e12
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    words = torch.cuda.get_device_name(device).replace("-", " ").split()
    found = [name for name in PEAK_BF16_TFLOPS if all(word in words for word in name.split())]
    return PEAK_BF16_TFLOPS[max(found, key=len)] * 1e12 if found else None


def utilisation(flops: float, seconds: float, peak: float | None) -> float | None:
    """Model FLOPs utilisation, in [0, 1]: necessary FLOPs over time x peak.

    None if unknown.
    """
    return None if peak is None else round(flops / seconds / peak, 4)
