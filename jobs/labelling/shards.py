"""Label any number of cells into Parquet shards.

In parallel where they are many, and going on where an interrupted run stopped.
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
"""From how many cells on they are labelled in parallel Ray tasks, by encoder. One process labels fewer cells
sooner than Ray starts."""


PLAN = "_plan.json"  # readers of Parquet folders leave out names that begin with _


@dataclass(frozen=True)
class LabelledCells:
    """A finished folder of labels."""

    folder: Path
    table: pd.DataFrame
    """One row per answer: `label`, `cl_id`, `cells`, `share`, `mean_confidence`; most frequent first."""
    num_empty: int
    """Cells with too few counts to say anything of them."""

    def shards(self) -> Iterator[pd.DataFrame]:
        """The cells in their order, some thousands at a time."""
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
    """Label cells into a folder of Parquet files, which pandas and pyarrow read as one table.

    Args:
        predictor: The model; Ray tasks load it from its directory.
        source: The cells.
        folder: Where the shards go. Those that are there already, from an interrupted run, are kept.
        model: URI of the model with its version.
        probabilities: Also a column `probability: LABEL` per label.
        embedding: Also columns `embedding_0`, ...
        overwrite: Begin anew where the folder is there already.
        scratch: The folder is the caller's own and goes when he is done: labels of other cells there, or of
            another model, are replaced instead of refused, and nothing stays behind where cells cannot be
            labelled.

    Returns:
        The folder and what is in it.

    Raises:
        ValueError: The folder holds labels of other cells or of another model, or something else; or cells
            that cannot be labelled.
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
            f"--out {folder} is there already and was not made by this command; name another folder"
        )
    text = json.dumps(plan, indent=2)
    if folder.exists() and (overwrite or (scratch and (folder / PLAN).read_text() != text)):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / PLAN).exists() and (folder / PLAN).read_text() != text:
        raise ValueError(
            f"--out {folder} holds labels of other cells, another model or other columns; name another, or"
            f" add --overwrite"
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
        from cluster.connect import connect  # needs Ray, which few cells do without

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
    """The Parquet files of a folder of labels, in order."""
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
