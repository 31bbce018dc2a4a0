"""Moving average of the weights, validated and saved in their place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from screformer.engine_state import broadcast, gather_weights

Weights = dict[str, torch.Tensor]


class WeightAverage:
    """The average of the trained parameters over the steps so far; the same on every rank.

    For each parameter, in fp32: after step t (from 0), the average moves towards the parameter by
    1 - min(decay, (t + 1) / (t + 10)), so the first steps are quickly forgotten.

    Args:
        engine: A DeepSpeed engine whose ranks have whole parameters (ZeRO stages 0 to 2).
        decay: Decay per step, in (0, 1).
        resumed: An average to continue from, on rank 0; None starts with the weights.
    """

    def __init__(self, engine: Any, decay: float, resumed: Weights | None = None):
        self._engine, self._decay = engine, decay
        self._parameters = {
            name: parameter for name, parameter in engine.module.named_parameters() if parameter.requires_grad
        }
        self._average = {
            name: parameter.detach().float().clone()
            if resumed is None
            else broadcast(resumed.get(name), engine.device, tuple(parameter.shape))
            for name, parameter in self._parameters.items()
        }

    @torch.no_grad()
    def add(self, step: int) -> None:
        """Update with the weights after an optimizer step (from 0)."""
        decay = min(self._decay, (step + 1) / (step + 10))
        for name, parameter in self._parameters.items():
            self._average[name].lerp_(parameter.float(), 1 - decay)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Use the average in the network; its own weights are restored afterwards."""
        with torch.no_grad():
            own = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
            for name, parameter in self._parameters.items():
                parameter.copy_(self._average[name])
            yield
            for name, parameter in self._parameters.items():
                parameter.copy_(own[name])

    def gather(self) -> Weights:
        """Weights and buffers as from `gather_weights`, with trained weights replaced by their average."""
        weights = gather_weights(self._engine)
        return weights and weights | self.state()

    def state(self) -> Weights:
        """The average by name, on the CPU; pass it as `resumed`."""
        return {name: average.to("cpu", copy=True) for name, average in self._average.items()}
