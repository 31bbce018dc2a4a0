"""Estimate how long a study will take."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

import torch

from jobs.studies.baselines import BASELINES, check_names
from jobs.studies.study import Study
from screformer.config import ExperimentConfig
from screformer.model import ScReformer, classification_loss
from screformer.tokenizer import NUM_SPECIAL


def train_seconds_per_cell(config: ExperimentConfig, num_genes: int, num_classes: int) -> float:
    """Seconds that a training step takes per cell on this machine.

    Measured on two steps of one micro-batch of full length.
    """
    torch.set_num_threads(max(1, int(config.cluster.cpus_per_worker)))
    model = ScReformer(config.model, config.tokens, num_genes=num_genes, num_classes=num_classes, seed=0)
    slots = num_genes if config.tokens.input_mode == "all" else min(config.tokens.max_genes, num_genes)
    size, generator = config.train.micro_batch_size, torch.Generator().manual_seed(0)
    genes = (
        torch.rand(size, num_genes, generator=generator).argsort(1)[:, :slots].sort(1).values + NUM_SPECIAL
    )
    batch = {
        "token_ids": genes,
        "values": torch.rand(size, slots, generator=generator) * 4,
        "bin_ids": torch.ones(size, slots, dtype=torch.int64),
        "labels": torch.zeros(size, dtype=torch.int64),
    }
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        logits = model(batch, task="finetune", hash_seed=0).logits_nk
        classification_loss(logits, batch["labels"], None)[0].backward()
        seconds.append(time.perf_counter() - start)
    return min(seconds) / size


def describe_study(study: Study, configs: Sequence[ExperimentConfig], *, repeats: int = 1) -> dict[str, Any]:
    """What a study will take.

    Folds, notes, and hours by a measured training step and the baselines' known speed.

    The step is measured with as many tokens as a cell can have, so cells with fewer detected genes take less.

    Args:
        study: Opened, not begun.
        configs: Its configurations; at most three different steps are measured.
        repeats: How often each runs, such as once per seed.
    """
    crossval, folds = study.config.crossval, len(study.folds)
    sizes = [{part: len(positions) for part, positions in study.split(fold).items()} for fold in range(folds)]
    num_genes, k = len(study.query.feature_ids), len(study.label_names)
    measured: dict[str, float] = {}
    seconds = 0.0
    for config in configs:
        key = json.dumps(
            [config.model.__dict__, config.tokens.__dict__, config.train.micro_batch_size], default=str
        )
        if key not in measured:
            named = study.cells(config, "finetune", 0).config  # its attention is
            measured[key] = train_seconds_per_cell(named, num_genes, k)
        steps = config.train.max_steps + (crossval.pretrain_steps if crossval.pretrain != "none" else 0)
        evaluations = config.train.max_steps // config.train.eval_every_steps + 2
        for size in sizes:
            # A forward pass alone is about a third of a step.
            cells = steps * config.train.global_batch_size + (evaluations * size["val"] + size["test"]) / 3
            seconds += repeats * cells * measured[key] / config.cluster.num_workers
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
            "baselines, beside": round(baselines_s / 60, 1),
        },
    }
