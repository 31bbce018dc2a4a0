"""A training as one value: made once by the driver, read by every rank.

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
    """Everything that a training needs. Picklable; what is large travels by reference."""

    task: Task
    config: ExperimentConfig
    """Its attention is named."""
    streams: Mapping[str, CellStream]
    """Part to its cells; `train` at least."""
    labels: Mapping[str, Any]
    """As `LoadedModel.labels`."""
    lineage: Lineage
    """Terms above the labels, for calibrated answers."""
    class_counts_k: np.ndarray
    """Training cells of each class, int64."""
    prior_k: np.ndarray
    """What the finished network takes for granted: the share of each class, float64 (k,)."""
    prior_shift_k: np.ndarray | None
    """Added to the logits of the trained network; None adds nothing."""
    start: ray.ObjectRef
    """A `Start`: what the network starts from."""
    meta: Mapping[str, Any]
    """What is kept with the model: cells, code and run. The ending adds scores and the best step."""
    run: TrackedRun
    """Where rank 0 logs."""
    checkpoint: ray.train.Checkpoint | None = None
    """Of this run, from which it resumes."""

    @property
    def vocabulary(self) -> GeneVocabulary:
        """The model's genes, with their mean expression."""
        return self.streams["train"].vocabulary


def training_task(
    task: Task,
    cells: TrainingCells,
    run: TrackedRun,
    *,
    model: LoadedModel | None = None,
    checkpoint: ray.train.Checkpoint | None = None,
) -> TrainingTask:
    """Read what the network starts from, and put all together. Ray must be running.

    Args:
        task: What is learned.
        cells: As `prepare_cells` gives them for the same task and model.
        run: The MLflow run.
        model: A given model to start from.
        checkpoint: Of this run, to resume from.

    Raises:
        ValueError: The checkpoint knows other labels.
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
