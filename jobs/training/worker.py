"""Training on one rank: build the network and engine, read the rank's cells, run the loop.

A rank is a Ray Train worker or, in Ray Train's local mode, the calling process.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch

from cluster.quiet import quiet_data
from jobs.training.cells import VARIED
from jobs.training.ending import finish
from jobs.training.progress import ProgressLines, SlowRank
from jobs.training.run_folder import newest_checkpoint, require_seen, resumable
from jobs.training.stopping import StopWatch
from jobs.training.task import TrainingTask
from screformer.checkpoint import read_weights, save_model
from screformer.engine import build_engine
from screformer.metrics import sum_over_ranks
from screformer.model import ScReformer
from screformer.not_finite import NonFiniteError
from screformer.objective import Batch, freeze_parameters
from screformer.progress import Parts, Progress, Stopped
from screformer.storage import filesystem
from screformer.training import fit
from screformer.training_checkpoint import (
    POSITION,
    load_training,
    read_average,
    read_position,
    save_training,
    seal,
)
from screformer.weight_average import Weights

REPLAY_BYTES = 512 * 2**20
"""If a rank's validation batches are no larger than this, they stay in memory and are read only once."""


@dataclass(frozen=True, kw_only=True)
class Account:
    """How a training ended, with its speed and memory."""

    best_step: int = 0
    cells_per_s: float = 0.0
    """Median of the logged values."""
    peak_memory_gb: float = 0.0
    stopped_after: int | None = None
    """Step of the last checkpoint if training was asked to stop; else None."""
    not_finite: str = ""
    """What became NaN or infinite and ended training, or empty; the last checkpoint is older."""
    joinids: tuple[int, ...] = ()
    """Cells of the step with the NaN or infinity."""


def train_loop_per_worker(*, task: TrainingTask, folder: str, model_dir: str, flag: str) -> dict[str, Any]:
    """Train on this rank's share of the cells; called on every rank.

    Errors that would only recur are returned, not raised, because Ray Train would retry the training.

    Args:
        task: The training.
        folder: The run's folder.
        model_dir: Where a single rank writes its model, without checkpoints; "" writes model and training
            state as Ray Train checkpoints.
        flag: Name of the stop flag.

    Returns:
        The fields of an `Account` as plain values, which Ray Train's controller can read without our code.

    Raises:
        StorageError: The run folder, or a temporary one, cannot be written.
    """
    try:
        with nullcontext() if model_dir else resumable(folder):
            if not model_dir:  # with one, this process is the driver, which creates the folder
                require_seen(folder)
            return dataclasses.asdict(_train(task, folder, model_dir, flag))
    finally:
        task.run.settle()


def _train(task: TrainingTask, run_dir: str, model_dir: str, flag: str) -> Account:
    _prepare_process(task)
    rank = torch.distributed.get_rank()
    engine = _engine(task)
    resume = None
    checkpoint = latest_checkpoint(run_dir) if ray.train.get_checkpoint() else task.checkpoint
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            if read_position(folder)["finished"]:
                return Account()
            resume = _restore(Path(folder), engine, task.config.cluster.num_workers)
    done_steps = resume[0].global_step if resume else 0
    lines = ProgressLines(
        task.config.train.max_steps,
        done_steps=done_steps,
        steps_per_epoch=task.streams["train"].steps_per_epoch,
    )
    slow = SlowRank(_nodes())
    watch = StopWatch(flag, every_s=60 * task.config.train.checkpoint_every_minutes)
    speeds: list[float] = []
    peaks: list[float] = []

    def report(metrics: dict[str, float], step: int) -> None:
        (num_cut,) = sum_over_ranks(engine.device, sum(stream.num_cut for stream in task.streams.values()))
        if "train/cells_per_s" in metrics:
            speeds.append(metrics["train/cells_per_s"])
            peaks.append(metrics["mem/peak_gb"])
        if rank == 0:
            task.run.log_metrics({**metrics, "data/cells_cut": num_cut}, step=step)
            if not model_dir:
                print(lines.line(metrics, step), flush=True)
                if text := slow.line(metrics):
                    print(text, flush=True)

    def save(progress: Progress, weights: Weights, average: Weights, metrics: dict[str, float]) -> None:
        if model_dir:
            return
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            save_training(folder, engine, {**progress.to_dict(), "finished": False}, average)
            if rank == 0:
                meta = {**task.meta, "best_step": progress.best_step, "metrics": metrics}
                save_model(folder / "model", weights, task.config, task.vocabulary, task.labels, meta)
            _hand_over(folder, metrics)
        watch.saved()

    try:
        outcome = fit(
            task.config,
            engine,
            _parts(task),
            task=task.task,
            class_counts_k=task.class_counts_k,
            prior_shift_k=task.prior_shift_k,
            report=report,
            save_checkpoint=save,
            resume=resume,
            checkpoint_due=lambda: rank == 0 and watch.checkpoint_due(),
            stop_asked=lambda: rank == 0 and watch.stop_asked(),
        )
    except Stopped as ended:
        return Account(stopped_after=ended.step)
    except NonFiniteError as error:
        return Account(not_finite=str(error), joinids=tuple(error.joinids))
    finally:
        watch.end()
    if model_dir:
        ray.train.report(finish(task, outcome, Path(model_dir)))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            position = {**outcome.progress.to_dict(), "finished": True}
            (folder / POSITION).write_text(json.dumps(position, indent=2))
            _hand_over(folder, finish(task, outcome, folder / "model") if rank == 0 else {})
    return Account(
        best_step=outcome.progress.best_step,
        cells_per_s=statistics.median(speeds) if speeds else 0.0,
        peak_memory_gb=max(peaks, default=0.0),
    )


def latest_checkpoint(run_dir: str) -> ray.train.Checkpoint | None:
    """The checkpoint from which all ranks resume after one was lost.

    Ray Train offers its newest checkpoint without checking it. Rank 0 checks it and, if it is damaged, uses
    the one before.
    """
    found: list[Any] = [None]
    if torch.distributed.get_rank() == 0:
        newest = newest_checkpoint(run_dir)
        found = [newest[0].path if newest else None]
    torch.distributed.broadcast_object_list(found)
    return ray.train.Checkpoint(found[0], filesystem=filesystem(run_dir)[0]) if found[0] else None


def _nodes() -> list[str]:
    """The node of each rank."""
    nodes = [""] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(nodes, platform.node())
    return nodes


def _hand_over(folder: Path, metrics: dict[str, float]) -> None:
    """Seal a checkpoint once every rank has written its part, and report it to Ray Train."""
    seal(folder)
    ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))


def _restore(folder: Path, engine: Any, num_workers: int) -> tuple[Progress, Weights, Weights]:
    """Load a checkpoint into the engine, and say so, also if there are fewer ranks than `num_workers`.

    Returns:
        The progress of the run and, on rank 0, its best weights and its average weights.
    """
    load_training(folder, engine)
    progress = Progress.from_dict(read_position(folder))
    if torch.distributed.get_rank() != 0:
        return progress, {}, {}
    ranks = torch.distributed.get_world_size()
    fewer = f", with {ranks} of {num_workers} workers" if ranks < num_workers else ""
    print(
        f"resumed after step {progress.global_step} (epoch {progress.epoch}, {progress.cells_consumed} of its"
        f" cells done){fewer}",
        flush=True,
    )
    return progress, read_weights(folder / "model"), read_average(folder)


def _prepare_process(task: TrainingTask) -> None:
    """Set threads and log levels; in local mode, create a process group of one."""
    quiet_data()
    cluster = task.config.cluster
    if not cluster.use_gpu:
        torch.set_num_threads(max(1, int(cluster.cpus_per_worker)))
    if not torch.distributed.is_initialized():
        os.environ.setdefault("LOCAL_RANK", "0")  # required by DeepSpeed
        torch.distributed.init_process_group(
            "nccl" if cluster.use_gpu else "gloo",
            store=torch.distributed.HashStore(),
            rank=0,
            world_size=1,
        )


def _engine(task: TrainingTask) -> Any:
    config = task.config
    model = ScReformer(
        config.model,
        config.tokens,
        num_genes=len(task.vocabulary),
        num_classes=len(task.labels["names"]),
        seed=config.train.seed,
    )
    ray.get(task.start).put_into(model)
    freeze_parameters(
        model,
        task.task,
        freeze_encoder=config.train.freeze_encoder,
        freeze_linear=config.model.linear_start_cells > 0,
    )
    return build_engine(config, model, torch.distributed.get_world_size())


def _parts(task: TrainingTask) -> Parts:
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    streams, size = task.streams, task.config.train.micro_batch_size

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
        varied=epoch_of(VARIED),
        test=epoch_of("test"),
    )


class _Replay:
    """Batches that stay in memory after the first pass, up to `REPLAY_BYTES`."""

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
