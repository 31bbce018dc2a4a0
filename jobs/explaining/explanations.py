"""Compute gene attributions of a sample of cells in Ray tasks and write Parquet shards.

Axes: n cells, m pairs of cell and class, g genes, k classes.
"""

from __future__ import annotations

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from data_ingest.tasks import map_tasks
from jobs.explaining.checks import summarise
from jobs.explaining.shards import BACKGROUND, GENES, PLAN, SHARDS, tokens_of
from jobs.reports.artifacts import EXPLAINED
from screformer.cell_tokens import CellTokens
from screformer.cells import CellSource
from screformer.cost import peak_memory_gb
from screformer.counts import Panels
from screformer.explain import Explainer
from screformer.files import write_whole
from screformer.predictor import Predictor, loaded_predictor

CELLS_PER_SHARD = 32


CANDIDATES = 2_000


def explain(
    predictor: Predictor,
    model_dir: Path,
    source: CellSource,
    out: Path,
    *,
    num_cells: int,
    num_background: int,
    num_nodes: int,
    seed: int,
) -> dict[str, Any]:
    """Explain a sample of cells and check the explanations.

    Args:
        predictor: The model.
        model_dir: The model's directory, from which Ray tasks load it.
        source: The cells.
        out: Output folder; an interrupted run with the same cells and settings resumes there.
        num_cells: Number of cells to explain, spread evenly over the predicted labels.
        num_background: Number of background cells, spread evenly over the predicted labels; none of them is
            explained.
        num_nodes: Points on each integration path.
        seed: Seeds the choice of cells.

    Returns:
        The summary, also written to `summary.json`.

    Raises:
        ValueError: `out` holds explanations of other cells or settings.
    """
    plan = _plan(
        predictor, source, num_cells=num_cells, num_background=num_background, num_nodes=num_nodes, seed=seed
    )
    chosen, background = np.array(plan["cells"]), np.array(plan["background"])
    panels = source.panels(chosen)
    _prepare(out, plan, predictor, panels)
    background_tokens = tokens_of(predictor, source, background)
    pq.write_table(
        pa.table(
            {
                "cell": source.names(background).astype(str),
                "position": background,
                "token_ids": [cell.token_ids for cell in background_tokens],
                "values": [cell.values for cell in background_tokens],
                "bin_ids": [cell.bin_ids for cell in background_tokens],
                "measured": [cell.measured_g for cell in background_tokens],
            }
        ),
        out / BACKGROUND,
    )
    peaks = _run_tasks(model_dir, source, chosen, panels.panels_n, background_tokens, num_nodes, out)
    summary = summarise(predictor, source, out, background_tokens, plan, num_nodes)
    summary["memory_gb"] = {"task_peak": max(peaks, default=0.0), "driver_peak": peak_memory_gb()}
    write_whole(out / EXPLAINED, json.dumps(summary, indent=2))
    return summary


def _plan(
    predictor: Predictor,
    source: CellSource,
    *,
    num_cells: int,
    num_background: int,
    num_nodes: int,
    seed: int,
) -> dict[str, Any]:
    """Choose the background and explained cells, taking the predicted labels in turn.

    The model first labels a random sample of at most 2,000 cells (more if more are needed); both sets come
    from that sample.
    """
    rng = np.random.default_rng(seed)
    most = max(CANDIDATES, num_cells + num_background)
    candidates = np.arange(source.num_cells)
    if source.num_cells > most:
        candidates = np.sort(rng.choice(source.num_cells, most, replace=False))
    codes = []
    for start in range(0, len(candidates), 512):
        codes.append(predictor.predict(source.read(candidates[start : start + 512])).label_codes)
    order = _in_turn(np.concatenate(codes), rng)
    background, cells = (
        np.sort(candidates[order[:num_background]]),
        np.sort(candidates[order[num_background : num_background + num_cells]]),
    )
    if not len(cells):
        raise ValueError(
            f"{source.num_cells} cells are too few for a background of {num_background}; lower --background"
        )
    settings = {
        "num_nodes": num_nodes,
        "seed": seed,
        "background": background.tolist(),
        "cells": cells.tolist(),
    }
    weights = hashlib.sha256(
        b"".join(value.cpu().numpy().tobytes() for value in predictor.model.state_dict().values())
    ).hexdigest()
    return {**settings, "candidates": candidates.tolist(), "model": weights, "source": source.identity()}


def _in_turn(codes_n: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random order that takes one cell of each class in turn until the class is used up."""
    shuffled = rng.permutation(len(codes_n))
    turn = pd.Series(codes_n[shuffled]).groupby(codes_n[shuffled]).cumcount().to_numpy()
    return shuffled[np.lexsort((codes_n[shuffled], turn))]


def _prepare(out: Path, plan: dict[str, Any], predictor: Predictor, panels: Panels) -> None:
    (out / SHARDS).mkdir(parents=True, exist_ok=True)
    text = json.dumps(plan)
    if (out / PLAN).exists() and (out / PLAN).read_text() != text:
        raise ValueError(
            f"--out {out} holds explanations of other cells, another model or other settings; choose another"
            f" folder"
        )
    (out / PLAN).write_text(text)
    vocabulary = predictor.vocabulary
    genes = {"feature_id": list(vocabulary.feature_ids), "feature_name": vocabulary.readable_names}
    genes |= {f"panel_{index}": measured_g for index, measured_g in enumerate(panels.measured_pg)}
    pd.DataFrame(genes).to_parquet(out / GENES)


def _run_tasks(
    model_dir: Path,
    source: CellSource,
    chosen: np.ndarray,
    panels_n: np.ndarray,
    background: list[CellTokens],
    num_nodes: int,
    out: Path,
) -> list[float]:
    """Explain the cells of each missing shard; return the peak memory of each task in GB."""
    shards = {
        start: out / SHARDS / f"{start:08d}.parquet" for start in range(0, len(chosen), CELLS_PER_SHARD)
    }
    calls = []
    for start, path in shards.items():
        if not path.exists():
            rows = slice(start, start + CELLS_PER_SHARD)
            calls.append((chosen[rows], panels_n[rows], str(path)))
    sizes = [len(cells) for cells, _, _ in calls]
    return map_tasks(
        partial(_explain_shard, str(model_dir), source, background, num_nodes),
        calls,
        "explain",
        unit="cell",
        sizes=sizes,
        done_before=len(chosen) - sum(sizes),
    )


def _explain_shard(
    model_dir: str,
    source: CellSource,
    background: list[CellTokens],
    num_nodes: int,
    cells: np.ndarray,
    panels: np.ndarray,
    path: str,
) -> float:
    predictor = loaded_predictor(model_dir)
    explainer = Explainer(predictor.model, background, num_nodes=num_nodes)
    names, known = predictor.label_names.tolist(), source.labels(cells)
    rows: list[dict[str, Any]] = []
    items = zip(cells, panels, source.names(cells), known, tokens_of(predictor, source, cells), strict=True)
    for position, panel, name, label, tokens in items:
        predicted = int(explainer.logits([tokens])[0].argmax())
        wanted = dict.fromkeys([predicted] + ([names.index(label)] if label in names else []))
        for found in explainer.attribute(tokens, list(wanted)):
            rows.append(
                {
                    "cell": str(name),
                    "position": int(position),
                    "class": names[found.label],
                    "predicted": names[predicted],
                    "true": label,
                    "output": found.output,
                    "base": found.base,
                    "additivity_error": found.additivity_error,
                    "panel": int(panel),
                    "genes": found.genes,
                    "values": found.values,
                }
            )
    write_whole(path, pd.DataFrame(rows).to_parquet())
    return peak_memory_gb()
