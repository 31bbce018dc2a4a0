"""Estimate how long a study will take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jobs.studies.baselines import BASELINES, check_names
from jobs.studies.study import Study
from jobs.training.preflight import train_seconds_per_cell
from screformer.config import ExperimentConfig


def describe_study(study: Study, configs: Sequence[ExperimentConfig], *, repeats: int = 1) -> dict[str, Any]:
    """What a study will take: folds, notes, and minutes.

    Minutes come from a measured training step and the baselines' known speed. The step is measured with the
    most tokens a cell can have; cells with fewer detected genes take less time.

    Args:
        study: Opened but not started.
        configs: Its configurations; each distinct network is measured once.
        repeats: How often each runs, for example once per seed.
    """
    crossval, folds = study.config.crossval, len(study.folds)
    sizes = [{part: len(positions) for part, positions in study.split(fold).items()} for fold in range(folds)]
    num_genes, k = len(study.query.feature_ids), len(study.label_names)
    measured: dict[Any, float] = {}
    seconds = 0.0
    for config in configs:
        network = (config.model, config.tokens, config.train.micro_batch_size)
        if network not in measured:
            named = study.cells(config, "finetune", 0).config  # its attention is
            measured[network] = train_seconds_per_cell(named, num_genes, k)
        num_cells = sum(_cells_per_fold(config, size) for size in sizes)
        seconds += repeats * num_cells * measured[network] / config.cluster.num_workers
    parallel = crossval.concurrent_trials * crossval.concurrent_folds
    names = [name for name in check_names(crossval.baselines) if not BASELINES[name].missing]
    baselines_s = sum(
        BASELINES[name].seconds_per_1000_cells * size["train"] / 1000 for name in names for size in sizes
    )
    return {
        "cells": len(study.labels_n),
        "genes": num_genes,
        "labels": {name: int((study.labels_n == code).sum()) for code, name in enumerate(study.label_names)},
        "folds": [{"name": name, **size} for name, size in zip(study.folds.names, sizes, strict=True)],
        "notes": study.notes(),
        "configurations": len(configs) * repeats,
        "minutes": {
            "ours": round(seconds / parallel / 60, 1),
            "baselines, in parallel": round(baselines_s / 60, 1),
        },
    }


def _cells_per_fold(config: ExperimentConfig, size: Mapping[str, int]) -> float:
    """Cells that go through a training step in one fold; a forward pass alone counts as about a third."""
    crossval, train = config.crossval, config.train
    steps = train.max_steps + (crossval.pretrain_steps if crossval.pretrain != "none" else 0)
    evaluations = train.max_steps // train.eval_every_steps + 2
    return steps * train.global_batch_size + (evaluations * size["val"] + size["test"]) / 3
