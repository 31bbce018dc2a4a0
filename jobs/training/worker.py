"""What runs inside each Ray Train worker.

The network, its engine, this rank's cells, and the training loop.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import ray
import ray.train
import torch

from cluster.quiet import quiet_data
from data_ingest.stream import CellStream
from jobs.reports.artifacts import log_confusion, log_per_class, log_reliability
from jobs.training.start import start_from
from screformer.calibration import (
    Calibration,
    CellOutputs,
    Lineage,
    expected_calibration_error,
    fit_calibration,
    reliability,
)
from screformer.checkpoint import read_weights, save_model
from screformer.config import ExperimentConfig, Task
from screformer.engine import build_engine
from screformer.metrics import sum_over_ranks
from screformer.model import ScReformer
from screformer.objective import Batch, freeze_parameters, label_prior
from screformer.training import Outcome, Parts, Progress, Weights, fit
from screformer.training_checkpoint import POSITION, load_training, read_position, save_training, seal

REPLAY_BYTES = 512 * 2**20
"""Validation batches of a rank up to this size are kept in memory, so that each validation after the first
reads nothing."""


def train_loop_per_worker(loop_config: dict[str, Any]) -> None:
    """Train on this rank's share of the cells; the same on every rank.

    Args:
        loop_config: Made by `jobs.train`: `config` (plain), `task`, `streams` (part to `CellStream`),
            `labels`, `lineage` (plain),
            `class_counts`, `start` (an ObjectRef of arrays to start from), `meta`, `run`
            (`jobs.tracking.TrackedRun`), `resume` (a Checkpoint or None).
    """
    config = ExperimentConfig.from_dict(loop_config["config"])
    task, streams, labels = loop_config["task"], loop_config["streams"], loop_config["labels"]
    vocabulary = streams["train"].vocabulary
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    quiet_data()
    if not config.cluster.use_gpu:
        torch.set_num_threads(max(1, int(config.cluster.cpus_per_worker)))

    engine = _engine(
        config, task, streams["train"], len(labels["names"]), ray.get(loop_config["start"]), world_size
    )

    # After a lost worker Ray gives the newest checkpoint of this attempt; a job that was killed as a whole
    # names one itself.
    checkpoint, resume = ray.train.get_checkpoint() or loop_config["resume"], None
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            position = read_position(folder)
            if position["finished"]:
                return
            load_training(folder, engine)
            resume = (Progress.from_dict(position), read_weights(Path(folder) / "model") if rank == 0 else {})
            _say(
                rank,
                f"resumed after step {resume[0].global_step} (epoch {resume[0].epoch},"
                f" {resume[0].cells_consumed} cells into it)",
            )

    def write(
        scores: dict[str, float],
        weights: Weights,
        progress: Progress,
        *,
        finished: bool,
        calibration: Calibration | None = None,
    ) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            position = {**progress.to_dict(), "finished": finished}
            if finished:
                (folder / POSITION).write_text(json.dumps(position, indent=2))
            else:
                save_training(folder, engine, position)
            if rank == 0:
                meta = {**loop_config["meta"], "best_step": progress.best_step, "metrics": scores}
                save_model(folder / "model", weights, config, vocabulary, labels, meta, calibration)
            seal(folder)
            ray.train.report(scores, checkpoint=ray.train.Checkpoint.from_directory(folder))

    def report(metrics: dict[str, float], step: int) -> None:
        (num_cut,) = sum_over_ranks(engine.device, sum(stream.num_cut for stream in streams.values()))
        metrics = {
            **metrics,
            "data/cells_cut": num_cut,
        }
        if rank == 0:
            loop_config["run"].log_metrics(metrics, step=step)
            print(_line(metrics, step, config.train.max_steps), flush=True)

    outcome = fit(
        config,
        engine,
        _parts(streams, config, rank, world_size),
        task=task,
        class_counts_k=np.asarray(loop_config["class_counts"]),
        report=report,
        save_checkpoint=lambda progress, weights, metrics: write(metrics, weights, progress, finished=False),
        resume=resume,
    )
    scores = {
        **(outcome.val.scores("best_val") if outcome.val else {}),
        **(outcome.test.scores("test") if outcome.test else {}),
    }
    calibration = None
    if outcome.val_outputs is not None and len(outcome.val_outputs):
        prior_k = label_prior(np.asarray(loop_config["class_counts"]), config.train.class_weighting)
        calibration = fit_calibration(
            outcome.val_outputs, Lineage.from_json(loop_config["lineage"]), prior_k=prior_k
        )
        scores |= calibration_scores(calibration, outcome.val_outputs, outcome.test_outputs)
        if rank == 0:
            loop_config["run"].log_metrics(
                {name: value for name, value in scores.items() if "/ece" in name or "unknown" in name},
                step=config.train.max_steps,
            )
            table = _reliability(calibration, outcome.val_outputs, outcome.test_outputs)
            log_reliability(loop_config["run"], table)
    if rank == 0 and task == "finetune":
        for part, counts in (("val", outcome.val), ("test", outcome.test)):
            if counts is not None:
                log_confusion(loop_config["run"], counts.confusion_kk, labels["names"], part)
                log_per_class(loop_config["run"], counts.table(labels["names"]), part)
    write(scores, outcome.weights, outcome.progress, finished=True, calibration=calibration)


def calibration_scores(
    calibration: Calibration, val: CellOutputs, test: CellOutputs | None
) -> dict[str, float]:
    """Metrics of a calibration.

    `PART/ece_uncalibrated`, `PART/ece` and `PART/unknown_share` of known types, for `best_val` and `test`.
    """
    scores: dict[str, float] = {}
    for part, outputs in (("best_val", val), ("test", test)):
        if outputs is None or not len(outputs):
            continue
        unknown = calibration.unknown_scores(outputs.logits_nk) > calibration.unknown_threshold
        scores |= {
            f"{part}/ece_uncalibrated": expected_calibration_error(
                Calibration().probabilities(outputs.logits_nk), outputs.labels_n
            ),
            f"{part}/ece": expected_calibration_error(
                calibration.probabilities(outputs.logits_nk), outputs.labels_n
            ),
            f"{part}/unknown_share": float(unknown.mean()),
        }
    return scores


def _reliability(calibration: Calibration, val: CellOutputs, test: CellOutputs | None) -> pd.DataFrame:
    """Confidence against accuracy before and after calibration, of validation and test cells."""
    tables = []
    for part, outputs in (("validation", val), ("test", test)):
        for state, used in (("before", Calibration()), ("after", calibration)):
            if outputs is not None and len(outputs):
                rows = pd.DataFrame(reliability(used.probabilities(outputs.logits_nk), outputs.labels_n))
                tables.append(rows.assign(part=part, calibration=state))
    return pd.concat(tables, ignore_index=True)


def train_alone(
    config: ExperimentConfig,
    task: Task,
    streams: dict[str, CellStream],
    labels: dict[str, Any],
    class_counts_k: np.ndarray,
    start: dict[str, Any],
    report: Callable[[dict[str, float], int], None],
) -> Outcome:
    """Train in this process, the only rank, and keep no checkpoints.

    For trainings shorter than Ray Train's start of workers.

    Args:
        config: The run's settings; one worker.
        task: As `jobs.train.prepare_cells`.
        streams: Part to its cells; `train` at least.
        labels: As `LoadedModel.labels`.
        class_counts_k: Training cells of each label.
        start: As `start_from` takes it.
        report: Takes metrics and the step.
    """
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it
    if not torch.distributed.is_initialized():
        backend = "nccl" if config.cluster.use_gpu else "gloo"
        torch.distributed.init_process_group(
            backend, store=torch.distributed.HashStore(), rank=0, world_size=1
        )
    if not config.cluster.use_gpu:
        torch.set_num_threads(max(1, int(config.cluster.cpus_per_worker)))
    engine = _engine(config, task, streams["train"], len(labels["names"]), start, 1)
    return fit(
        config,
        engine,
        _parts(streams, config, 0, 1),
        task=task,
        class_counts_k=class_counts_k,
        report=report,
        save_checkpoint=lambda progress, weights, metrics: None,
    )


def _engine(
    config: ExperimentConfig,
    task: Task,
    stream: CellStream,
    num_classes: int,
    start: dict[str, Any],
    world_size: int,
) -> Any:
    model = ScReformer(
        config.model,
        config.tokens,
        num_genes=len(stream.vocabulary),
        num_classes=num_classes,
        seed=config.train.seed,
    )
    start_from(model, start)
    freeze_parameters(
        model,
        task,
        freeze_encoder=config.train.freeze_encoder,
        freeze_linear=config.model.linear_start_cells > 0,
    )
    return build_engine(config, model, world_size)


def _parts(streams: dict[str, CellStream], config: ExperimentConfig, rank: int, world_size: int) -> Parts:
    size = config.train.micro_batch_size

    def epoch_of(part: str) -> Callable[[], Iterator[Batch]] | None:
        if part not in streams:
            return None
        return lambda: streams[part].batches(0, rank=rank, world_size=world_size, micro_batch_size=size)

    val = epoch_of("val")
    return Parts(
        steps_per_epoch=streams["train"].steps_per_epoch,
        train=lambda epoch, start: streams["train"].batches(
            epoch, rank=rank, world_size=world_size, micro_batch_size=size, start_step=start
        ),
        val=_Replay(val) if val else None,
        test=epoch_of("test"),
    )


class _Replay:
    """Batches that are kept after the first pass, where memory allows."""

    def __init__(self, source: Callable[[], Iterator[Batch]]) -> None:
        self._source = source
        self._kept: list[Batch] | None = None

    def __call__(self) -> Iterator[Batch]:
        if self._kept is not None:
            yield from self._kept
            return
        kept, num_bytes = [], 0
        for batch in self._source():
            num_bytes += sum(tensor.nbytes for tensor in batch.values())
            if num_bytes <= REPLAY_BYTES:
                kept.append(batch)
            yield batch
        if num_bytes <= REPLAY_BYTES:
            self._kept = kept


def _say(rank: int, text: str) -> None:
    if rank == 0:
        print(text, flush=True)


def _line(metrics: dict[str, float], step: int, max_steps: int) -> str:
    shown = {
        name: value
        for name, value in metrics.items()
        if name not in ("train/epoch", "data/wait_s", "data/cells_cut")
    }
    return f"step {step}/{max_steps}  " + "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
