"""Write and read checkpoints of a training run, without pickles.

A checkpoint contains the best model so far in `model/`, each rank's part of DeepSpeed's state in
`deepspeed/`, the same state consolidated by parameter name in `training_state.safetensors` (to resume with a
different world size or ZeRO stage), `position.json`, and `manifest.json`. The manifest is written last and
marks the checkpoint as complete.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from screformer import engine_state as engines
from screformer.checkpoint import FORMAT, read_json, read_tensors, sha256
from screformer.files import write_whole

TRAINING_STATE, POSITION, MANIFEST = "training_state.safetensors", "position.json", "manifest.json"


_AVERAGE = "average/"


def save_training(
    directory: str | Path,
    engine: Any,
    position: Mapping[str, Any],
    average: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write the state of a training run, after at least one step.

    Every rank calls it, possibly with different directories. The checkpoint is complete only after `seal`.

    Args:
        directory: Target; rank 0's gets the consolidated files.
        engine: The DeepSpeed engine.
        position: Plain values with the progress of training.
        average: State of the `WeightAverage`, if there is one.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    engines.save_shards(engine, directory / "deepspeed")
    weights = engines.gather_weights(engine)
    moments, num_steps = engines.gather_moments(engine)
    if torch.distributed.get_rank() == 0:
        tensors = {**{f"weights/{name}": tensor for name, tensor in weights.items()}, **moments}
        tensors |= {f"{_AVERAGE}{name}": tensor for name, tensor in (average or {}).items()}
        save_file(
            tensors, directory / TRAINING_STATE, metadata={"format": FORMAT, "num_steps": str(num_steps)}
        )
        layout = engines.shard_layout(engine)
        (directory / POSITION).write_text(json.dumps({**position, "shards": layout}, indent=2))


def load_training(directory: str | Path, engine: Any) -> None:
    """Load a training checkpoint into a new engine. Every rank calls it.

    With the same world size, ZeRO stage and precision, each rank reads its own DeepSpeed shards. Otherwise
    the consolidated file is read.
    """
    directory = Path(directory)
    if read_json(directory / POSITION)["shards"] == engines.shard_layout(engine):
        engines.load_shards(engine, directory / "deepspeed")
        return
    tensors, metadata = (
        read_tensors(directory / TRAINING_STATE) if torch.distributed.get_rank() == 0 else ({}, {})
    )
    weights = {
        name.removeprefix("weights/"): tensor
        for name, tensor in tensors.items()
        if name.startswith("weights/")
    }
    num_steps = [metadata.get("num_steps")]
    torch.distributed.broadcast_object_list(num_steps)
    engines.load_weights(engine, weights)
    engines.load_moments(engine, tensors, int(num_steps[0] or 0))


def read_average(directory: str | Path) -> dict[str, torch.Tensor]:
    """State of the `WeightAverage` in a training checkpoint; empty if there was none."""
    tensors = read_tensors(Path(directory) / TRAINING_STATE)[0]
    return {
        name.removeprefix(_AVERAGE): tensor for name, tensor in tensors.items() if name.startswith(_AVERAGE)
    }


def read_position(directory: str | Path) -> dict[str, Any]:
    """Progress of the training run at a checkpoint."""
    return read_json(Path(directory) / POSITION)


def seal(directory: str | Path) -> None:
    """Mark a checkpoint as complete: rank 0 lists all ranks' files with their SHA-256.

    Every rank calls it after writing its files.
    """
    directory = Path(directory)
    own = {
        str(path.relative_to(directory)): {"size": path.stat().st_size, "sha256": sha256(path)}
        for path in directory.rglob("*")
        if path.is_file()
    }
    parts: list[dict[str, Any]] = [{}] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, own)
    if torch.distributed.get_rank() == 0:
        files = {name: entry for part in parts for name, entry in part.items()}
        write_whole(directory / MANIFEST, json.dumps({"format": FORMAT, "files": files}, indent=2).encode())


def damage(directory: str | Path) -> str:
    """Describe what is wrong with a checkpoint, naming the file; empty if it is complete.

    A run killed while writing leaves a checkpoint without a manifest. Manifests of earlier versions list only
    sizes.
    """
    directory = Path(directory)
    try:
        files = json.loads((directory / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"it has no complete {MANIFEST}"
    for name, entry in files.items():
        path = directory / name
        size = entry["size"] if isinstance(entry, dict) else entry
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, not {size}"
        if isinstance(entry, dict) and sha256(path) != entry["sha256"]:
            return f"{name} was changed: its SHA-256 differs"
    return ""
