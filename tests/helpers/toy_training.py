"""A tiny in-memory training problem: real network, real engine, real gloo workers, but no atlas.

Cells of three types with a few genes each. Each rank owns lanes of the global batch, as in the stream.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from screformer.checkpoint import NO_LABELS, read_weights, save_model
from screformer.config import ExperimentConfig
from screformer.engine import build_engine
from screformer.model import ScReformer
from screformer.objective import Batch, freeze_parameters
from screformer.progress import Outcome, Parts, Progress
from screformer.tokenizer import CLS, NUM_SPECIAL, GeneVocabulary
from screformer.training import fit
from screformer.training_checkpoint import load_training, read_average, read_position, save_training, seal
from screformer.weight_average import Weights

NUM_GENES, NUM_CLASSES, NUM_CELLS = 40, 3, 37
LABELS = {"column": "cell_type", "names": ["a", "b", "c"], "cl_ids": ["", "", ""]}


def toy_config(**overrides: Any) -> ExperimentConfig:
    """Settings small enough for a run to take a second; 37 cells in global batches of 8 need padding rows."""
    values = {
        "model.dim": 16,
        "model.depth": 2,
        "model.heads": 2,
        "model.attention": "lsh",
        "model.bucket_size": 4,
        "model.n_hashes": 2,
        "model.gene_embedding": "random",
        "tokens.max_genes": 30,
        "train.global_batch_size": 8,
        "train.micro_batch_size": 2,
        "train.lr": 3e-3,
        "train.warmup_steps": 2,
        "train.max_steps": 6,
        "train.eval_every_steps": 3,
        "train.log_every_steps": 1,
    }
    return ExperimentConfig().merge({**values, **overrides})


def vocabulary() -> GeneVocabulary:
    """A vocabulary without mean expressions."""
    names = tuple(f"G{i}" for i in range(NUM_GENES))
    return GeneVocabulary(names, names, np.zeros(NUM_GENES, dtype=np.float32))


def _cell(joinid: int) -> tuple[np.ndarray, np.ndarray, int]:
    rng, label = np.random.default_rng(joinid), joinid % NUM_CLASSES
    genes = np.sort(rng.choice(NUM_GENES, size=rng.integers(3, 25), replace=False))
    values = rng.uniform(0.5, 3, size=len(genes)) * np.where(genes % NUM_CLASSES == label, 1.5, 1.0)
    return genes + NUM_SPECIAL, values.astype(np.float32), label


def toy_batch(joinids: list[int]) -> Batch:
    """Tokens of the given cells; -1 is a padding row."""
    cells = [_cell(j) if j >= 0 else None for j in joinids]
    width = max([1, *(len(cell[0]) + 1 for cell in cells if cell)])
    batch = {
        "token_ids": torch.zeros(len(cells), width, dtype=torch.int64),
        "values": torch.zeros(len(cells), width),
        "bin_ids": torch.zeros(len(cells), width, dtype=torch.int64),
        "labels": torch.full((len(cells),), -1),
        "joinids": torch.tensor(joinids),
    }
    for row, cell in enumerate(cells):
        if cell is not None:
            tokens, values, label = cell
            batch["token_ids"][row, : len(tokens) + 1] = torch.tensor([CLS, *tokens])
            batch["values"][row, 1 : len(tokens) + 1] = torch.from_numpy(values)
            batch["bin_ids"][row, 1 : len(tokens) + 1] = torch.from_numpy(values).long() + 1
            batch["labels"][row] = label
    return batch


def toy_parts(config: ExperimentConfig, rank: int, world_size: int, wait_s: float = 0.0) -> Parts:
    """This rank's lanes, with a pause before each micro-batch: cells 0 to 36 for training, in a new order
    each epoch; 100 to 110 for validation; 200 to 208 for testing."""
    size, micro = config.train.global_batch_size, config.train.micro_batch_size

    def batches(cells: np.ndarray, start: int = 0) -> Any:
        steps = -(-len(cells) // size)
        lanes = np.concatenate([cells, np.full(steps * size - len(cells), -1)]).reshape(steps, size)
        own = lanes[start:, rank * size // world_size : (rank + 1) * size // world_size]
        for step in own:
            for at in range(0, len(step), micro):
                time.sleep(wait_s)
                yield toy_batch(step[at : at + micro].tolist())

    return Parts(
        steps_per_epoch=-(-NUM_CELLS // size),
        train=lambda epoch, start: batches(
            np.random.default_rng([config.train.seed, epoch]).permutation(NUM_CELLS), start
        ),
        val=lambda: batches(np.arange(100, 111)),
        test=lambda: batches(np.arange(200, 209)),
    )


def train(
    config: ExperimentConfig,
    task: str,
    rank: int,
    world_size: int,
    *,
    save_in: Path | None = None,
    resume: Path | None = None,
    delay_s: float = 0.0,
    wait_s: float = 0.0,
    **wishes: Any,
) -> tuple[Outcome, list[dict[str, float]]]:
    """Run the real training loop; every evaluation saves a checkpoint in `save_in`. `wishes` are passed to
    `fit`. Also returns the reported metrics."""
    labels = LABELS if task == "finetune" else NO_LABELS
    model = ScReformer(
        config.model,
        config.tokens,
        num_genes=NUM_GENES,
        num_classes=len(labels["names"]),
        seed=config.train.seed,
    )
    freeze_parameters(model, task, freeze_encoder=config.train.freeze_encoder, freeze_linear=False)
    engine = build_engine(config, model, world_size, persistence_threshold=0)
    start = None
    if resume is not None:
        load_training(resume, engine)
        start = (
            Progress.from_dict(read_position(resume)),
            read_weights(resume / "model") if rank == 0 else {},
            read_average(resume) if rank == 0 else {},
        )
    lines: list[dict[str, float]] = []

    def report(metrics: dict[str, float], step: int) -> None:
        lines.append({"step": step, **metrics})
        time.sleep(delay_s)

    def save(progress: Progress, weights: Weights, average: Weights, metrics: dict[str, float]) -> None:
        if save_in is None:
            return
        folder = save_in / f"step-{progress.global_step:03d}"
        save_training(folder, engine, progress.to_dict(), average)
        if rank == 0:
            save_model(folder / "model", weights, config, vocabulary(), labels, metrics)
        seal(folder)

    outcome = fit(
        config,
        engine,
        toy_parts(config, rank, world_size, wait_s),
        task=task,
        class_counts_k=np.array([20, 12, 5]),
        report=report,
        save_checkpoint=save,
        resume=start,
        **wishes,
    )
    return outcome, lines


def join_group(rank: int, world_size: int, store: str) -> None:
    """Join the gloo workers of a test."""
    torch.set_num_threads(1)
    os.environ.update(LOCAL_RANK=str(rank), GLOO_SOCKET_IFNAME="lo")
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(store, world_size), rank=rank, world_size=world_size
    )


if __name__ == "__main__":
    # Started and killed by test_resume: RANK WORLD_SIZE FOLDER RESUME|- DELAY_S. The folder's configs.json
    # lists the configurations of consecutive runs.
    my_rank, size, folder, resume_path, delay = sys.argv[1:]
    join_group(int(my_rank), int(size), f"{folder}/store")
    results = []
    for number, tree in enumerate(json.loads(Path(folder, "configs.json").read_text())):
        done, reported = train(
            ExperimentConfig.from_dict(tree),
            "finetune",
            int(my_rank),
            int(size),
            save_in=Path(folder, f"saves-{number}"),
            resume=None if resume_path == "-" else Path(resume_path),
            delay_s=float(delay),
        )
        weights = {name: tensor.double().flatten().tolist() for name, tensor in done.weights.items()}
        results.append({"reported": reported, "weights": weights})
    if my_rank == "0":
        Path(folder, "results.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()
