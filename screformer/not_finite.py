"""The error that ends training when a loss or weight becomes NaN or infinite."""

from __future__ import annotations

import torch

from screformer.config import TrainConfig
from screformer.engine import learning_rate
from screformer.objective import Batch


class NonFiniteError(ValueError):
    """A loss or weight is NaN or infinite; raised on every rank after the same step."""

    def __init__(self, message: str, joinids: list[int]) -> None:
        super().__init__(message)
        self.joinids = joinids
        """Cells of the step, over all ranks."""


def non_finite(what: str, micro_batches: list[Batch], step: int, train: TrainConfig) -> NonFiniteError:
    """Build the error, with the cells of all ranks; every rank calls it.

    Args:
        what: Description of the value that is not finite.
        micro_batches: This rank's part of the step.
        step: Steps taken so far, including this one.
        train: The run's settings.
    """
    own = torch.cat([batch["joinids"] for batch in micro_batches]).tolist()
    parts: list[list[int]] = [[]] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, own)
    return NonFiniteError(
        f"{what} became NaN or infinite at step {step} with a learning rate of"
        f" {learning_rate(step - 1, train):.3g}; lower train.lr={train.lr}, or raise"
        f" train.warmup_steps={train.warmup_steps}",
        sorted(joinid for part in parts for joinid in part if joinid >= 0),
    )
