"""The one training loop, for pre-training and fine-tuning, on any number of ranks.

The mathematics of a step does not depend on how its cells are spread over ranks and micro-batches: losses are
sums over the whole global batch, divided once; what is hidden from a cell follows from (seed, step, cell,
gene); hashes follow from (seed, step).

Axes: n cells, l token slots, k classes.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from screformer.calibration import CellOutputs, OutputSample
from screformer.config import ExperimentConfig, Task
from screformer.engine import gather_weights, learning_rate, load_weights, set_learning_rate
from screformer.metrics import LabelCounts
from screformer.model import HASH_SEED, classification_loss, expression_loss
from screformer.tokenizer import NUM_SPECIAL, PAD

Batch = dict[str, torch.Tensor]
"""token_ids int64 (n, l), values float32 (n, l), bin_ids int64 (n, l), labels int64 (n,), joinids int64 (n,);
see `data_ingest.dataset`."""
Weights = dict[str, torch.Tensor]

EVALUATION_STEP = -1
"""Stands for the step where masks are drawn for an evaluation, so that every evaluation hides the same."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Where a rank's micro-batches come from. All ranks get equally many."""

    steps_per_epoch: int
    train: Callable[[int, int], Iterator[Batch]]
    """From (epoch, first step in it) the micro-batches of the steps that are left."""
    val: Callable[[], Iterator[Batch]] | None = None
    """The part that chooses the best step; None takes the last one."""
    test: Callable[[], Iterator[Batch]] | None = None
    """The part that is looked at once, in the end."""


@dataclass
class Progress:
    """Where a run stands; saved with every checkpoint."""

    seed: int
    epoch: int = 0
    step_in_epoch: int = 0
    cells_consumed: int = 0
    """Cells of this epoch that were trained on, over all ranks, padding rows included."""
    global_step: int = 0
    best_step: int = 0
    best_score: tuple[float, float] = (-math.inf, -math.inf)
    """Of the best step so far: macro-F1 and minus the loss (fine-tuning), or minus the loss and 0."""
    evals_without_gain: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values; the inverse of `from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> Progress:
        """From a saved position; other keys are left alone."""
        names = cls.__dataclass_fields__
        return cls(
            **{name: value for name, value in tree.items() if name in names}
            | {"best_score": tuple(tree["best_score"])}
        )


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What training gives."""

    weights: Weights
    """Of the best step, on rank 0; empty elsewhere."""
    progress: Progress
    val: LabelCounts | None
    """Of the best weights."""
    test: LabelCounts | None
    val_outputs: CellOutputs | None = None
    """Of the best weights, for calibration; only of fine-tuning."""
    test_outputs: CellOutputs | None = None


def fit(
    config: ExperimentConfig,
    engine: Any,
    parts: Parts,
    *,
    task: Task,
    class_counts_k: np.ndarray | None = None,
    report: Callable[[dict[str, float], int], None],
    save_checkpoint: Callable[[Progress, Weights, dict[str, float]], None],
    resume: tuple[Progress, Weights] | None = None,
) -> Outcome:
    """Train, keep the best step, evaluate it. Every rank calls it.

    Args:
        config: The run's settings.
        engine: A DeepSpeed engine around a `ScReformer`, its state restored when resuming.
        parts: This rank's cells.
        task: `pretrain` learns hidden expression, `finetune` learns labels.
        class_counts_k: For `finetune`, training cells of each label, which `train.class_weighting` weighs.
        report: Takes metrics and the step, on every rank alike.
        save_checkpoint: Called after every evaluation on every rank with the progress, the best weights (rank
            0) and the metrics.
        resume: Progress and best weights (rank 0) of the checkpoint that the engine's state comes from.
    """
    train, world_size = config.train, torch.distributed.get_world_size()
    accumulation = config.grad_accum_steps(world_size)
    objective = _Objective(config, engine, task, class_counts_k)
    progress, best_weights = resume or (Progress(seed=train.seed), {})
    window = _Window(engine.device)
    engine.module.train()

    steps = _steps(parts, progress, accumulation)
    while (
        progress.global_step < train.max_steps and not 0 < train.patience_evals <= progress.evals_without_gain
    ):
        micro_batches, wait_s = next(steps)
        step = progress.global_step
        prepared = [objective.prepare(batch, step) for batch in micro_batches]
        total_weight = _sum_over_ranks(sum(weight for _, _, weight in prepared), engine.device)
        set_learning_rate(engine, learning_rate(step, train))
        step_loss = torch.zeros((), device=engine.device)
        for index, (batch, hidden, _) in enumerate(prepared):
            loss = objective.loss(batch, hidden, objective.hash_seed(step, index, accumulation)) / max(
                total_weight, 1e-12
            )
            # DeepSpeed takes the mean over ranks; ours is a sum over all cells of the global batch.
            engine.backward(loss * world_size, scale_wrt_gas=False)
            engine.step()
            step_loss += loss.detach()
        progress.global_step += 1
        progress.step_in_epoch += 1
        progress.cells_consumed += train.global_batch_size
        num_cells = sum(int((batch["joinids"] >= 0).sum()) for batch in micro_batches)
        window.add(step_loss, wait_s, num_cells)

        evaluates = (
            progress.global_step % train.eval_every_steps == 0 or progress.global_step == train.max_steps
        )
        metrics: dict[str, float] = {}
        if evaluates or progress.global_step % train.log_every_steps == 0:
            metrics = {
                **window.close(),
                "train/lr": learning_rate(step, train),
                "train/epoch": float(progress.epoch),
            }
        if evaluates:
            metrics |= _choose(config, engine, parts, objective, progress)
            if progress.best_step == progress.global_step:
                best_weights = gather_weights(engine)
        if metrics:
            report(metrics, progress.global_step)
        if evaluates:
            save_checkpoint(progress, best_weights, metrics)
            window.reset()
    steps.close()

    if progress.best_step != progress.global_step:
        load_weights(engine, best_weights)
    val_sample, test_sample = OutputSample(objective.num_classes), OutputSample(objective.num_classes)
    val = evaluate(engine, parts.val(), objective, val_sample) if parts.val else None
    test = evaluate(engine, parts.test(), objective, test_sample) if parts.test else None
    val_outputs, test_outputs = (
        sample.gather() if task == "finetune" else None for sample in (val_sample, test_sample)
    )
    final = {**(val.scores("best_val") if val else {}), **(test.scores("test") if test else {})}
    report({**final, "best_step": float(progress.best_step)}, progress.global_step)
    return Outcome(
        weights=best_weights,
        progress=progress,
        val=val,
        test=test,
        val_outputs=val_outputs,
        test_outputs=test_outputs,
    )


def evaluate(
    engine: Any, batches: Iterator[Batch], objective: _Objective, sample: OutputSample | None = None
) -> LabelCounts:
    """Loss and label counts over all ranks' batches, unweighted by class; logits go to `sample`.

    The same weights and cells give the same bits.
    """
    counts = LabelCounts(objective.num_classes)
    engine.module.eval()
    with torch.no_grad():
        for batch in batches:
            batch, hidden, _ = objective.prepare(batch, EVALUATION_STEP)
            output = engine(batch, task=objective.task, hidden=hidden, hash_seed=HASH_SEED)
            if hidden is not None:
                loss, weight = expression_loss(output, batch, hidden)
            else:
                loss, weight = classification_loss(output.logits_nk, batch["labels"], None)
                counts.add(batch["labels"], output.logits_nk.argmax(dim=1))
                if sample is not None:
                    sample.add(batch["joinids"], batch["labels"], output.logits_nk)
            counts.add_loss(loss.item(), weight.item())
    engine.module.train()
    counts.all_reduce(engine.device)
    return counts


def freeze_parameters(model: nn.Module, task: Task, *, freeze_encoder: bool, freeze_linear: bool) -> None:
    """Leave out of training what fine-tuning does not use, and what is to stay as it is.

    Args:
        model: The network.
        task: `pretrain` trains all.
        freeze_encoder: Train pooling, classifier and linear skip only.
        freeze_linear: Leave the linear skip's weights alone.
    """
    heads = ("pooling.", "classification_head.", "linear_skip.")
    left = ("expression_head.", "expression_embedding.hidden.", *(("linear_skip.",) if freeze_linear else ()))
    for name, param in model.named_parameters():
        if task == "finetune":
            param.requires_grad_(not name.startswith(left) and (not freeze_encoder or name.startswith(heads)))


def class_weights(counts_k: np.ndarray, weighting: str) -> np.ndarray:
    """Weight of a cell in the loss by its label's frequency, float32 (k,): mean 1 over the training cells.

    0 for labels without cells.
    """
    frequency_k = counts_k / max(counts_k.sum(), 1)
    power = {"none": 0.0, "sqrt": -0.5, "balanced": -1.0}[weighting]
    weights_k = np.power(frequency_k, power, out=np.zeros(len(counts_k)), where=counts_k > 0)
    return (weights_k / max((weights_k * frequency_k).sum(), 1e-12)).astype(np.float32)


def label_prior(counts_k: np.ndarray, weighting: str) -> np.ndarray:
    """Share of each label in the loss, (k,): what a network takes for granted before it sees a cell."""
    shares_k = counts_k * class_weights(counts_k, weighting)
    return shares_k / max(shares_k.sum(), 1e-12)


def hidden_slots(batch: Batch, rate: float, seed: int, step: int) -> torch.Tensor:
    """Detected genes whose expression pre-training hides, bool (n, l).

    A pure function of seed, step, cell and gene.
    """
    detected_nl = (batch["token_ids"] >= NUM_SPECIAL) & (batch["values"] > 0)
    return detected_nl & (_uniform24(batch, seed, step) < round(rate * 2**24))


def drop_genes(batch: Batch, rate: float, seed: int, step: int) -> Batch:
    """Leave out a random share of each cell's genes.

    The slots that are left close ranks, padding stays last.
    """
    keep_nl = (batch["token_ids"] < NUM_SPECIAL) | (_uniform24(batch, seed, step) >= round(rate * 2**24))
    keep_nl &= batch["token_ids"] != PAD
    order_nl = torch.argsort(~keep_nl, dim=1, stable=True)[:, : max(1, int(keep_nl.sum(dim=1).max()))]
    kept_nl = keep_nl.gather(1, order_nl)
    slots = {name: batch[name].gather(1, order_nl) * kept_nl for name in ("token_ids", "values", "bin_ids")}
    return {**batch, **slots}


class _Objective:
    """What is learned: prepares a batch and gives its summed loss."""

    def __init__(
        self, config: ExperimentConfig, engine: Any, task: Task, class_counts_k: np.ndarray | None
    ) -> None:
        self.config, self.engine, self.task = config, engine, task
        self.num_classes = 0
        if task == "finetune":
            assert class_counts_k is not None
            self.num_classes = len(class_counts_k)
            self.class_weights_k = torch.from_numpy(
                class_weights(class_counts_k, config.train.class_weighting)
            ).to(engine.device)

    def prepare(self, batch: Batch, step: int) -> tuple[Batch, torch.Tensor | None, float]:
        """The batch on the device, its hidden slots, and the weight of its loss.

        Made on the CPU, where batches come from.
        """
        train, hidden_nl = self.config.train, None
        if self.task == "pretrain":
            hidden_nl = hidden_slots(batch, train.mask_rate, train.seed, step)
            weight = float(hidden_nl.sum())
            hidden_nl = hidden_nl.to(self.engine.device)
        else:
            if train.gene_dropout and step != EVALUATION_STEP:
                batch = drop_genes(batch, train.gene_dropout, train.seed, step)
            weight = float(self.class_weights_k.cpu()[batch["labels"][batch["labels"] >= 0]].double().sum())
        return (
            {name: tensor.to(self.engine.device, non_blocking=True) for name, tensor in batch.items()},
            hidden_nl,
            weight,
        )

    def loss(self, batch: Batch, hidden_nl: torch.Tensor | None, hash_seed: int) -> torch.Tensor:
        output = self.engine(batch, task=self.task, hidden=hidden_nl, hash_seed=hash_seed)
        if hidden_nl is not None:
            return expression_loss(output, batch, hidden_nl)[0]
        return classification_loss(output.logits_nk, batch["labels"], self.class_weights_k)[0]

    def hash_seed(self, step: int, micro_step: int, accumulation: int) -> int:
        """New hashes in each step, alike on all ranks.

        With dropout, whose masks have the same seed, each micro-batch has its own.
        """
        if self.config.model.dropout == 0:
            return _mix(self.config.train.seed, step)
        return _mix(self.config.train.seed, step, torch.distributed.get_rank() * accumulation + micro_step)


class _Window:
    """What happened since the last log line; tensors are read only when it closes."""

    def __init__(self, device: Any) -> None:
        self.device = device
        self.reset()

    def reset(self) -> None:
        self.loss, self.wait_s, self.num_cells, self.num_steps = (
            torch.zeros((), device=self.device),
            0.0,
            0,
            0,
        )
        self.start = time.perf_counter()

    def add(self, loss: torch.Tensor, wait_s: float, num_cells: int) -> None:
        self.loss += loss
        self.wait_s += wait_s
        self.num_cells += num_cells
        self.num_steps += 1

    def close(self) -> dict[str, float]:
        elapsed_s = time.perf_counter() - self.start
        sums = torch.tensor(
            [self.loss.item(), self.wait_s, self.num_cells], dtype=torch.float64, device=self.device
        )
        torch.distributed.all_reduce(sums)
        loss, wait_s, num_cells = sums.tolist()
        wait_s /= torch.distributed.get_world_size()
        metrics = {
            "train/loss": loss / self.num_steps,
            "train/cells_per_s": num_cells / elapsed_s,
            "data/wait_s": wait_s,
            "data/wait_share": wait_s / elapsed_s,
            "mem/peak_gb": _peak_memory_gb(self.device),
        }
        self.reset()
        return metrics


def _steps(
    parts: Parts, progress: Progress, accumulation: int
) -> Generator[tuple[list[Batch], float], None, None]:
    """The micro-batches of each step and the seconds they were waited for.

    Epoch after epoch from where `progress` stands.
    """
    while True:
        if progress.step_in_epoch >= parts.steps_per_epoch:
            progress.epoch += 1
            progress.step_in_epoch = progress.cells_consumed = 0
        batches = parts.train(progress.epoch, progress.step_in_epoch)
        while progress.step_in_epoch < parts.steps_per_epoch:
            start = time.perf_counter()
            micro_batches = [next(batches) for _ in range(accumulation)]
            yield micro_batches, time.perf_counter() - start
        assert next(batches, None) is None, "an epoch ended with cells left over"


def _choose(
    config: ExperimentConfig, engine: Any, parts: Parts, objective: _Objective, progress: Progress
) -> dict[str, float]:
    """Validate, and note in `progress` whether this step is the best one so far."""
    if parts.val is None:
        progress.best_step, progress.evals_without_gain = progress.global_step, 0
        return {}
    counts = evaluate(engine, parts.val(), objective)
    # On few validation cells macro-F1 is often equal; then the loss decides.
    score = (counts.macro_f1, -counts.loss) if objective.task == "finetune" else (-counts.loss, 0.0)
    if score > progress.best_score:
        progress.best_step, progress.best_score, progress.evals_without_gain = progress.global_step, score, 0
    else:
        progress.evals_without_gain += 1
    return counts.scores("val")


def _sum_over_ranks(value: float, device: Any) -> float:
    total = torch.tensor(value, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(total)
    return total.item()


def _peak_memory_gb(device: torch.device) -> float:
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e9 if sys.platform == "darwin" else 1e6)


def _mix(*numbers: int) -> int:
    """One well-mixed number in [0, 2^63) of several (the finaliser of SplitMix64 after each)."""
    state = 0
    for number in numbers:
        state = (state + (number + 1) * 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return state >> 1


def _uniform24(batch: Batch, seed: int, step: int) -> torch.Tensor:
    """Integers in [0, 2^24) for each slot, int64 (n.

    L), that depend on seed, step, cell (joinid) and gene (token id) alone.
    """
    state = (
        batch["joinids"].unsqueeze(1) * _signed(0x9E3779B97F4A7C15)
        + batch["token_ids"] * _signed(0xD1B54A32D192ED03)
        + _mix(seed, step)
    )
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        state = (state ^ _shifted(state, shift)) * _signed(factor)
    return _shifted(state ^ _shifted(state, 31), 40)


def _shifted(state: torch.Tensor, bits: int) -> torch.Tensor:
    return (state >> bits) & ((1 << (64 - bits)) - 1)


def _signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number
