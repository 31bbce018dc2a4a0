"""What a training will need: memory, object store, disk and time; and the refusal of what cannot fit.

Estimates are rough, within about 30 %. Only what could not fit by far is refused.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from cluster.connect import machine, object_store_bytes
from data_ingest.atlas import counts_per_cell
from jobs.training.cells import TrainingCells
from jobs.training.progress import duration
from jobs.training.scaling import stream_needs
from screformer.config import ExperimentConfig
from screformer.cost import activation_bytes, count_parameters, state_bytes
from screformer.model import ScReformer, classification_loss
from screformer.tokenizer import NUM_SPECIAL

_PROCESS = 0.72e9
"""Bytes of a worker that has done nothing yet: Python, PyTorch, DeepSpeed, Ray, TileDB."""
_GATHERED = 16
"""Bytes per parameter that rank 0 gathers for a checkpoint: weights, two moments and the best weights."""
_SAVED = 28
"""Bytes per parameter of a checkpoint: weights and moments twice, and the best model."""
_CHECKPOINTS = 3
"""Two are kept while a third is written."""


def describe(cells: TrainingCells) -> dict[str, Any]:
    """Size of a run: cells, steps, parameters, memory, disk, time of an epoch, and needs of its stream."""
    speed = cells_per_second(cells)
    return {
        "cells": {part: len(positions) for part, positions in cells.parts.items()},
        "groups": {part: len(cells.groups(part)) for part in cells.parts},
        "genes": len(cells.genes),
        "labels": dict(zip(cells.labels["names"], cells.class_counts_k.tolist(), strict=True)),
        **preflight(cells),
        "object_store_gb": _gb(object_store_bytes(machine()[1])),
        "time_per_epoch": epoch_time(cells, speed),
        "stream": _stream(cells, speed),
        "notes": list(cells.notes),
    }


def preflight(cells: TrainingCells) -> dict[str, Any]:
    """What a run will need, as plain values in GB; nothing is measured."""
    config, train = cells.config, cells.config.train
    num_parameters = count_parameters(
        config.model, config.tokens, num_genes=len(cells.genes), num_classes=len(cells.labels["names"])
    )
    slots = config.tokens.most_slots(len(cells.genes))
    state, activations = state_bytes(config, num_parameters), activation_bytes(config, slots)
    on_gpu, gathered = config.cluster.use_gpu, _GATHERED * num_parameters
    memory = {
        "process": _PROCESS + gathered,
        "weights_and_optimizer": state,
        "activations": activations,
        "total": _PROCESS + gathered + (0 if on_gpu else state + activations),
    }
    num_train = max(len(cells.parts["train"]), 1)
    return {
        "steps": {
            "max": train.max_steps,
            "per_epoch": -(-num_train // train.global_batch_size),
            "epochs": round(train.max_steps * train.global_batch_size / num_train, 2),
        },
        "most_tokens_per_cell": slots,
        "parameters": num_parameters,
        "memory_gb_per_worker": {name: _gb(size) for name, size in memory.items()},
        "disk_gb": _gb(_CHECKPOINTS * _SAVED * num_parameters),
    }


def preflight_line(needs: Mapping[str, Any], nodes: Sequence[Mapping[str, Any]]) -> str:
    """The needs in one line, with the object store that Ray has.

    Args:
        needs: As `preflight` returns them.
        nodes: As `ray.nodes()` returns them.
    """
    store = sum(node["Resources"].get("object_store_memory", 0) for node in nodes if node["Alive"])
    return (
        f"needs about {needs['memory_gb_per_worker']['total']} GB of memory per worker and"
        f" {needs['disk_gb']} GB of disk for checkpoints; object store {_gb(store)} GB;"
        f" {needs['steps']['max']} steps, {needs['steps']['epochs']} epochs"
    )


def refuse_what_cannot_fit(
    config: ExperimentConfig, needs: Mapping[str, Any], storage: str, node_bytes: Sequence[float]
) -> None:
    """Refuse a training whose network is larger than its nodes, or its checkpoints than the disk.

    Args:
        config: The run's settings.
        needs: As `preflight` returns them.
        storage: Folder or URI of checkpoints.
        node_bytes: Memory of each node, without Ray's object store.

    Raises:
        ValueError: It cannot fit; the message has the arithmetic and the setting to change.
    """
    memory, cluster = needs["memory_gb_per_worker"], config.cluster
    each = memory["process"] if cluster.use_gpu else memory["weights_and_optimizer"] + memory["activations"]
    there = sum(node_bytes) / 1e9
    if node_bytes and each * cluster.num_workers > there:
        raise ValueError(
            f"{cluster.num_workers} workers with {memory['weights_and_optimizer']} GB of weights and"
            f" optimizer and {memory['activations']} GB of activations each ="
            f" {each * cluster.num_workers:.1f} GB, but the nodes have {there:.1f} GB;"
            f" lower train.micro_batch_size={config.train.micro_batch_size},"
            f" tokens.max_genes={config.tokens.max_genes} or model.dim={config.model.dim}, raise zero.stage="
            f"{config.zero.stage}, or add nodes"
        )
    if "://" in storage:
        return
    path = Path(storage or "runs").absolute()
    free = shutil.disk_usage(next(each for each in (path, *path.parents) if each.exists())).free / 1e9
    if needs["disk_gb"] > free:
        raise ValueError(
            f"{_CHECKPOINTS} checkpoints of {needs['parameters']} parameters x {_SAVED} bytes ="
            f" {needs['disk_gb']} GB, but {path} has {free:.1f} GB free; free some space, or set"
            f" cluster.storage_path to another disk"
        )


def local_memory() -> list[float]:
    """Memory of this machine without the object store that a local Ray takes; one value, in bytes."""
    _, memory = machine()
    return [memory - object_store_bytes(memory)]


def cells_per_second(cells: TrainingCells) -> float | None:
    """Speed of the training steps of all workers, from a short measurement on this machine; None for GPUs."""
    config = cells.config
    if config.cluster.use_gpu:
        return None
    per_cell_s = train_seconds_per_cell(config, len(cells.genes), max(2, len(cells.labels["names"])))
    return config.cluster.num_workers / per_cell_s


def epoch_time(cells: TrainingCells, speed: float | None) -> str:
    """How long an epoch takes at a speed, such as `about 12 min`."""
    if speed is None:
        return "not measured: on a GPU, see the first lines of the run"
    return f"about {duration(len(cells.parts['train']) / speed)}"


def _stream(cells: TrainingCells, speed: float | None) -> dict[str, float] | str:
    """What reading the training cells needs, rounded."""
    if speed is None:
        return "depends on the speed of the steps, which is not measured on a GPU; see docs/scaling.md"
    needs = stream_needs(
        num_cells=len(cells.parts["train"]),
        counts_per_cell=counts_per_cell(cells.query.atlas),
        cells_per_s=speed,
        num_workers=cells.config.cluster.num_workers,
        source="cache" if cells.config.stream.cache else "atlas",
    )
    return {name: float(f"{value:.3g}") for name, value in needs.items()}


def train_seconds_per_cell(config: ExperimentConfig, num_genes: int, num_classes: int) -> float:
    """Seconds per cell of a training step on this machine.

    The fastest of three steps, of one micro-batch of the longest cells each.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, int(config.cluster.cpus_per_worker)))
    model = ScReformer(config.model, config.tokens, num_genes=num_genes, num_classes=num_classes, seed=0)
    slots, size = config.tokens.most_slots(num_genes) - 1, config.train.micro_batch_size
    generator = torch.Generator().manual_seed(0)
    genes = torch.rand(size, num_genes, generator=generator).argsort(1)[:, :slots].sort(1).values
    batch = {
        "token_ids": genes + NUM_SPECIAL,
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
    torch.set_num_threads(before)
    return min(seconds) / size


def _gb(size: float) -> float:
    return round(size / 1e9, 3)
