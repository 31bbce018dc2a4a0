"""What a training takes, how far it is, and what it returns."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from screformer.metrics import CellOutputs, LabelCounts
from screformer.objective import Batch
from screformer.weight_average import Weights


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Sources of a rank's micro-batches. All ranks get the same number."""

    steps_per_epoch: int
    train: Callable[[int, int], Iterator[Batch]]
    """Maps (epoch, first step) to the micro-batches of the remaining steps."""
    val: Callable[[], Iterator[Batch]] | None = None
    """The part used to choose the best step; None keeps the last step."""
    varied: Callable[[], Iterator[Batch]] | None = None
    """The cells of `val` augmented as in training, for calibration."""
    test: Callable[[], Iterator[Batch]] | None = None
    """The part evaluated once, at the end."""


@dataclass
class Progress:
    """Progress of a run, saved with every checkpoint."""

    seed: int
    epoch: int = 0
    step_in_epoch: int = 0
    cells_consumed: int = 0
    """Number of cells of this epoch trained on so far, over all ranks, including padding rows."""
    global_step: int = 0
    best_step: int = 0
    best_score: tuple[float, float] = (-math.inf, -math.inf)
    """Score of the best step so far: (macro-F1, -loss) in fine-tuning, (-loss, 0) in pre-training."""
    evals_without_gain: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values; the inverse of `from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> Progress:
        """Build from saved values; other keys are ignored."""
        names = cls.__dataclass_fields__
        return cls(
            **{name: value for name, value in tree.items() if name in names}
            | {"best_score": tuple(tree["best_score"])}
        )


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Result of a training run."""

    weights: Weights
    """Weights of the best step, on rank 0; empty elsewhere."""
    progress: Progress
    val: LabelCounts | None
    """Validation scores of the best weights."""
    test: LabelCounts | None
    val_outputs: CellOutputs | None = None
    """Outputs of the best weights, for calibration; only in fine-tuning."""
    varied_outputs: CellOutputs | None = None
    test_outputs: CellOutputs | None = None

    def scores(self) -> dict[str, float]:
        """Scores of the best weights, `best_val/...` and `test/...`, if there are such cells."""
        return {
            **(self.val.scores("best_val") if self.val else {}),
            **(self.test.scores("test") if self.test else {}),
        }


class Stopped(Exception):
    """Training was asked to stop and stopped after saving a checkpoint; raised on every rank."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped after step {step}")
        self.step = step
