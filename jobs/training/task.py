"""A training as one value, built by the driver and read by every rank.

Axes: k classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import ray.train

from data_ingest.ontology import lineage
from data_ingest.stream import CellStream
from jobs.tracking.identity import code_identity
from jobs.tracking.runs import TrackedRun
from jobs.training.cells import TrainingCells
from jobs.training.start import starting_point
from screformer.checkpoint import LoadedModel
from screformer.config import ExperimentConfig, Task
from screformer.lineage import Lineage
from screformer.tokenizer import GeneVocabulary


@dataclass(frozen=True, eq=False, kw_only=True)
class TrainingTask:
    """Everything that a training needs. Picklable; large parts are passed by reference."""

    task: Task
    config: ExperimentConfig
    """Settings, with `model.attention` resolved."""
    streams: Mapping[str, CellStream]
    """Cells of each part; always includes `train`."""
    labels: Mapping[str, Any]
    """As `LoadedModel.labels`."""
    lineage: Lineage
    """Cell Ontology terms above the labels, for calibrated answers."""
    class_counts_k: np.ndarray
    """Number of training cells per class, int64 (k,)."""
    prior_k: np.ndarray
    """Class prior of the finished network, float64 (k,)."""
    prior_shift_k: np.ndarray | None
    """Shift to add to the logits of the trained network, or None."""
    start: ray.ObjectRef
    """A `Start`: the network's starting point."""
    meta: Mapping[str, Any]
    """Cells, code and run, stored with the model. `finish` adds scores and the best step."""
    run: TrackedRun
    """Run that rank 0 logs to."""
    checkpoint: ray.train.Checkpoint | None = None
    """Checkpoint of this run to resume from."""

    @property
    def vocabulary(self) -> GeneVocabulary:
        """The model's genes with their mean expression."""
        return self.streams["train"].vocabulary


def training_task(
    task: Task,
    cells: TrainingCells,
    run: TrackedRun,
    *,
    model: LoadedModel | None = None,
    checkpoint: ray.train.Checkpoint | None = None,
) -> TrainingTask:
    """Read the network's starting point and assemble the task. Ray must be running.

    Args:
        task: `pretrain` or `finetune`.
        cells: Result of `prepare_cells` for the same task and model.
        run: The MLflow run.
        model: Model to start from.
        checkpoint: Checkpoint of this run to resume from.

    Raises:
        ValueError: The checkpoint has different labels.
    """
    vocabulary, start = starting_point(cells, model, checkpoint)
    return TrainingTask(
        task=task,
        config=cells.config,
        streams=cells.streams(vocabulary),
        labels=cells.labels,
        lineage=lineage(cells.labels["cl_ids"]),
        class_counts_k=cells.class_counts_k,
        prior_k=cells.prior_k,
        prior_shift_k=cells.prior_shift_k,
        start=ray.put(start),
        meta={"task": task, **cells.identity(), "code": code_identity(), "run_id": run.run_id},
        run=run,
        checkpoint=checkpoint,
    )
