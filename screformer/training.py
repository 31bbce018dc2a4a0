"""Training loop for pre-training and fine-tuning, on any number of ranks.

A step does not depend on how its cells are spread over ranks and micro-batches: losses are summed over the
whole global batch and divided once, hidden genes depend on (seed, step, cell, gene), and hashes depend on
(seed, step).

Axes: n cells, l token slots, k classes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

from screformer.config import ExperimentConfig, Task
from screformer.engine import learning_rate, set_learning_rate
from screformer.engine_state import gather_weights, load_weights, weights_norm
from screformer.metrics import LabelCounts, OutputSample, sum_over_ranks
from screformer.model import HASH_SEED, classification_loss, expression_loss
from screformer.not_finite import non_finite
from screformer.objective import EVALUATION_STEP, Batch, Objective
from screformer.progress import Outcome, Parts, Progress, Stopped
from screformer.tokenizer import NUM_SPECIAL
from screformer.weight_average import WeightAverage, Weights
from screformer.window import Window


def fit(
    config: ExperimentConfig,
    engine: Any,
    parts: Parts,
    *,
    task: Task,
    class_counts_k: np.ndarray | None = None,
    prior_shift_k: np.ndarray | None = None,
    report: Callable[[dict[str, float], int], None],
    save_checkpoint: Callable[[Progress, Weights, Weights, dict[str, float]], None],
    resume: tuple[Progress, Weights, Weights] | None = None,
    checkpoint_due: Callable[[], bool] = lambda: False,
    stop_asked: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Train, keep the best step, and evaluate it. Every rank calls it.

    Args:
        config: The run's settings.
        engine: A DeepSpeed engine around a `ScReformer`, with its state restored when resuming.
        parts: This rank's cells.
        task: `pretrain` learns hidden expression, `finetune` learns labels.
        class_counts_k: For `finetune`, number of training cells of each label, for `train.class_weighting`.
        prior_shift_k: Added to the logits after training; see `screformer.objective.prior_shift`.
        report: Called with metrics and the step, on every rank.
        save_checkpoint: Called on every rank after every evaluation with the progress, the best weights (on
            rank 0; the current ones before the first evaluation), the average of the weights (empty if none)
            and the metrics.
        resume: Progress, best weights and average (rank 0) of the checkpoint from which the engine was
            restored.
        checkpoint_due: Called after each step; if true on any rank, a checkpoint is saved.
        stop_asked: Called after each step; if true on any rank, a checkpoint is saved and training ends.

    Raises:
        NonFiniteError: The loss, or a weight after the step, is not finite. Nothing more is saved.
        Stopped: `stop_asked` was true.
    """
    train, world_size = config.train, torch.distributed.get_world_size()
    accumulation = config.grad_accum_steps(world_size)
    objective = Objective(config, engine, task, class_counts_k)
    progress, best_weights, average_weights = resume or (Progress(seed=train.seed), {}, None)
    average = (
        WeightAverage(engine, train.weight_average, average_weights) if train.weight_average > 0 else None
    )
    window = Window(engine.device)
    engine.module.train()

    steps = _steps(parts, progress, accumulation)
    while (
        progress.global_step < train.max_steps and not 0 < train.patience_evals <= progress.evals_without_gain
    ):
        micro_batches, wait_s = next(steps)
        step, own_s = progress.global_step, wait_s
        prepared = [objective.prepare(batch, step) for batch in micro_batches]
        (total_weight,) = sum_over_ranks(engine.device, sum(weight for _, _, weight in prepared))
        set_learning_rate(engine, learning_rate(step, train))
        step_loss = torch.zeros((), device=engine.device)
        for index, (batch, hidden, _) in enumerate(prepared):
            began_s = time.perf_counter()
            loss = objective.loss(batch, hidden, objective.hash_seed(step, index, accumulation)) / max(
                total_weight, 1e-12
            )
            own_s += time.perf_counter() - began_s
            # DeepSpeed averages over ranks, but our loss is a sum over all cells of the global batch.
            engine.backward(loss * world_size, scale_wrt_gas=False)
            engine.step()
            step_loss += loss.detach()
        if average is not None:
            average.add(step)
        progress.global_step += 1
        progress.step_in_epoch += 1
        progress.cells_consumed += train.global_batch_size
        num_cells = sum(int((batch["joinids"] >= 0).sum()) for batch in micro_batches)
        window.add(step_loss, wait_s, own_s, num_cells)
        # Checking weights also covers gradients: AdamW makes a weight NaN if its gradient is not finite.
        healthy = math.isfinite(step_loss.item()) and math.isfinite(weights_norm(engine))
        # Summed over ranks, so all ranks act alike.
        sick, due, stops = sum_over_ranks(engine.device, not healthy, checkpoint_due(), stop_asked())
        if sick:
            what = "the weights" if math.isfinite(step_loss.item()) else "the loss"
            raise non_finite(what, micro_batches, progress.global_step, train)

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
            with average.in_use() if average is not None else nullcontext():
                metrics |= _choose(config, engine, parts, objective, progress)
            if not math.isfinite(metrics.get("val/loss", 0.0)):
                raise non_finite("the validation loss", micro_batches, progress.global_step, train)
            if progress.best_step == progress.global_step:
                best_weights = average.gather() if average is not None else gather_weights(engine)
        if metrics:
            report(metrics, progress.global_step)
        if evaluates or due or stops:
            with window.left_out():
                known = progress.best_step > 0
                save_checkpoint(
                    progress,
                    best_weights if known else gather_weights(engine),
                    average.state() if average is not None else {},
                    metrics,
                )
        if evaluates:
            window.reset()
        if stops:
            steps.close()
            raise Stopped(progress.global_step)
    steps.close()

    if prior_shift_k is not None and best_weights:
        best_weights["classification_head.bias"] += torch.tensor(prior_shift_k, dtype=torch.float32)
    if progress.best_step != progress.global_step or average is not None or prior_shift_k is not None:
        load_weights(engine, best_weights)
    val_sample, test_sample = OutputSample(objective.num_classes), OutputSample(objective.num_classes)
    val = evaluate(engine, parts.val(), objective, val_sample) if parts.val else None
    test = evaluate(engine, parts.test(), objective, test_sample) if parts.test else None
    varied_outputs = None
    if parts.varied:
        varied_sample = OutputSample(objective.num_classes)
        evaluate(engine, parts.varied(), objective, varied_sample)
        varied_outputs = varied_sample.gather()
    val_outputs, test_outputs = (
        sample.gather() if task == "finetune" else None for sample in (val_sample, test_sample)
    )
    outcome = Outcome(
        weights=best_weights,
        progress=progress,
        val=val,
        test=test,
        val_outputs=val_outputs,
        varied_outputs=varied_outputs,
        test_outputs=test_outputs,
    )
    report({**outcome.scores(), "best_step": float(progress.best_step)}, progress.global_step)
    return outcome


def evaluate(
    engine: Any, batches: Iterator[Batch], objective: Objective, sample: OutputSample | None = None
) -> LabelCounts:
    """Loss and label counts over all ranks' batches, without class weights; adds logits to `sample`.

    Equal weights and cells give bit-identical results.
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
                    detected_n = (batch["token_ids"] >= NUM_SPECIAL).sum(1)
                    sample.add(batch["joinids"], batch["labels"], output.logits_nk, detected_n)
            counts.add_loss(loss.item(), weight.item())
    engine.module.train()
    counts.all_reduce(engine.device)
    return counts


def _steps(
    parts: Parts, progress: Progress, accumulation: int
) -> Generator[tuple[list[Batch], float], None, None]:
    """Yield the micro-batches of each step and the seconds spent waiting for them.

    Runs epoch after epoch, starting at `progress`.
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
    config: ExperimentConfig, engine: Any, parts: Parts, objective: Objective, progress: Progress
) -> dict[str, float]:
    """Validate, and record in `progress` whether this step is the best so far."""
    if parts.val is None:
        progress.best_step, progress.evals_without_gain = progress.global_step, 0
        return {}
    counts = evaluate(engine, parts.val(), objective)
    # With few validation cells, macro-F1 is often tied, and the loss decides.
    score = (counts.macro_f1, -counts.loss) if objective.task == "finetune" else (-counts.loss, 0.0)
    if score > progress.best_score:
        progress.best_step, progress.best_score, progress.evals_without_gain = progress.global_step, score, 0
    else:
        progress.evals_without_gain += 1
    return counts.scores("val")
