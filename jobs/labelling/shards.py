"""Label any number of cells into Parquet shards.

Large inputs are labelled in parallel. An interrupted run resumes where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from data_ingest.tasks import map_tasks
from screformer.calibration import FEW_COUNTS
from screformer.cells import CellSource
from screformer.files import write_whole
from screformer.predictor import Predictor, loaded_predictor

CELLS_FOR_RAY = {"additive": 100_000, "reformer": 20_000}
"""Minimum number of cells for parallel Ray tasks, by encoder. One process labels fewer cells faster than Ray
starts."""


PLAN = "_plan.json"  # readers of Parquet folders skip names that begin with _


@dataclass(frozen=True)
class LabelledCells:
    """A finished folder of labels."""

    folder: Path
    table: pd.DataFrame
    """One row per label: `label`, `cl_id`, `cells`, `share`, `mean_confidence`; most frequent first."""
    num_empty: int
    """Number of cells with too few counts to be labelled."""

    def shards(self) -> Iterator[pd.DataFrame]:
        """The labels in cell order, a few thousand cells at a time."""
        for path in shard_files(self.folder):
            yield pd.read_parquet(path)

    def discard(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder)


def label_cells(
    predictor: Predictor,
    source: CellSource,
    folder: Path,
    *,
    model: str,
    probabilities: bool = False,
    embedding: bool = False,
    overwrite: bool = False,
    scratch: bool = False,
) -> LabelledCells:
    """Label cells into a folder of Parquet files that pandas and pyarrow read as one table.

    Args:
        predictor: The model; Ray tasks load it from its directory.
        source: The cells.
        folder: Output folder. Shards from an interrupted run are kept.
        model: Model URI with version number.
        probabilities: Also write a column `probability: LABEL` per label.
        embedding: Also write columns `embedding_0`, ...
        overwrite: Start over if the folder already exists.
        scratch: The folder is temporary, and the caller deletes it afterwards. Labels of other cells or of
            another model are replaced, not rejected, and the folder is deleted if cells cannot be labelled.

    Returns:
        The folder and a summary of its labels.

    Raises:
        ValueError: The folder has labels of other cells or of another model, or other content; or the cells
            cannot be labelled.
    """
    weights = hashlib.sha256((predictor.directory / "weights.safetensors").read_bytes()).hexdigest()
    plan = {
        "model": model,
        "weights": weights,
        "source": source.identity(),
        "probabilities": probabilities,
        "embedding": embedding,
    }
    if folder.exists() and not (folder / PLAN).exists():
        raise ValueError(
            f"--out {folder} already exists and was not written by this command; give another folder"
        )
    text = json.dumps(plan, indent=2)
    if folder.exists() and (overwrite or (scratch and (folder / PLAN).read_text() != text)):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / PLAN).exists() and (folder / PLAN).read_text() != text:
        raise ValueError(
            f"--out {folder} has labels of other cells, another model or other columns; give another folder"
            f" or add --overwrite"
        )
    (folder / PLAN).write_text(text)
    size = source.cells_per_read
    ends = [(start, min(start + size, source.num_cells)) for start in range(0, source.num_cells, size)]
    shards = [pair for pair in ends if not _path(folder, pair[0]).exists()]
    label = partial(_label_shard, source, folder, probabilities, embedding)
    in_process = source.num_cells < CELLS_FOR_RAY[predictor.config.model.encoder]
    if in_process:
        label = partial(label, predictor)
    else:
        from cluster.connect import connect  # needs Ray, which few cells do not

        connect()
        label = partial(_label_task, label, str(predictor.directory))
    try:
        map_tasks(
            label,
            [(shard,) for shard in shards],
            "annotate",
            unit="cell",
            sizes=[stop - start for start, stop in shards],
            done_before=source.num_cells - sum(stop - start for start, stop in shards),
            in_process=in_process,
        )
    except ValueError:
        if scratch:
            shutil.rmtree(folder)
        raise
    return _summary(predictor, folder)


def _label_task(label: Callable[..., None], model_dir: str, shard: tuple[int, int]) -> None:
    label(loaded_predictor(model_dir), shard)


def _label_shard(
    source: CellSource,
    folder: Path,
    probabilities: bool,
    embedding: bool,
    predictor: Predictor,
    shard: tuple[int, int],
) -> None:
    cells = np.arange(*shard)
    counts = source.read(cells)
    found = predictor.predict(counts)
    parts = [
        pd.DataFrame({"cell": source.names(cells).astype(str)}),
        found.table(),
    ]
    if probabilities:
        parts.append(
            pd.DataFrame(
                found.probabilities_nk, columns=[f"probability: {name}" for name in predictor.label_names]
            )
        )
    if embedding:
        parts.append(
            pd.DataFrame(
                found.embedding_nd, columns=[f"embedding_{i}" for i in range(found.embedding_nd.shape[1])]
            )
        )
    write_whole(_path(folder, shard[0]), pd.concat(parts, axis=1).to_parquet(index=False))


def _path(folder: Path, start: int) -> Path:
    return folder / f"{start:012d}.parquet"


def shard_files(folder: Path) -> list[Path]:
    """The Parquet files of a folder of labels, in cell order."""
    return sorted(folder.glob("[0-9]*.parquet"))


def _summary(predictor: Predictor, folder: Path) -> LabelledCells:
    cells: dict[str, int] = {}
    confidence: dict[str, float] = {}
    num_empty = 0
    for path in shard_files(folder):
        shard = pd.read_parquet(path, columns=["predicted_labels", "conf_score", "unknown_reason"])
        num_empty += int((shard["unknown_reason"] == FEW_COUNTS).sum())
        part = shard.groupby(shard["predicted_labels"].astype(str))["conf_score"]
        for label, count in part.size().items():
            cells[label] = cells.get(label, 0) + int(count)
            confidence[label] = confidence.get(label, 0.0) + float(part.sum()[label])
    cl_id_of = dict(zip(predictor.names.answers, predictor.names.cl_ids, strict=True))
    rows = [
        {
            "label": label,
            "cl_id": cl_id_of[label],
            "cells": n,
            "share": n / sum(cells.values()),
            "mean_confidence": confidence[label] / n,
        }
        for label, n in sorted(cells.items(), key=lambda item: -item[1])
    ]
    return LabelledCells(folder, pd.DataFrame(rows), num_empty)
