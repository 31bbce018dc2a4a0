"""Training objectives (hidden expression or labels) and the parameters they train.

Axes: n cells, l token slots, k classes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from screformer.config import ExperimentConfig, Task
from screformer.model import classification_loss, expression_loss
from screformer.splitmix import mix, uniform24
from screformer.tokenizer import NUM_SPECIAL

Batch = dict[str, torch.Tensor]
"""token_ids int64 (n, l), values float32 (n, l), bin_ids int64 (n, l), labels int64 (n,), joinids int64 (n,);
see `data_ingest.stream`. An optional `weights` float32 (n,) weights each cell in the loss."""

EVALUATION_STEP = -1
"""Step number for drawing masks in evaluations, so every evaluation hides the same genes."""


def freeze_parameters(model: nn.Module, task: Task, *, freeze_encoder: bool, freeze_linear: bool) -> None:
    """Freeze parameters that the task does not use or that should stay fixed.

    Args:
        model: The network.
        task: `pretrain` trains everything.
        freeze_encoder: Train only pooling, classifier and linear skip.
        freeze_linear: Keep the linear skip's weights fixed.
    """
    heads = ("pooling.", "classification_head.", "linear_skip.")
    left = ("expression_head.", "expression_embedding.hidden.", *(("linear_skip.",) if freeze_linear else ()))
    for name, param in model.named_parameters():
        if task == "finetune":
            param.requires_grad_(not name.startswith(left) and (not freeze_encoder or name.startswith(heads)))


def class_weights(counts_k: np.ndarray, weighting: str) -> np.ndarray:
    """Loss weight of a cell of each label, by label frequency, float32 (k,).

    Its mean over the training cells is 1; it is 0 for labels without cells.
    """
    frequency_k = counts_k / max(counts_k.sum(), 1)
    power = {"none": 0.0, "sqrt": -0.5, "sqrt_dataset": -0.5, "balanced": -1.0}[weighting]
    weights_k = np.power(frequency_k, power, out=np.zeros(len(counts_k)), where=counts_k > 0)
    return (weights_k / max((weights_k * frequency_k).sum(), 1e-12)).astype(np.float32)


def label_prior(counts_k: np.ndarray, weighting: str) -> np.ndarray:
    """Share of each label in the loss, (k,), which is the prior that a network learns."""
    shares_k = counts_k * class_weights(counts_k, weighting)
    return shares_k / max(shares_k.sum(), 1e-12)


def dataset_weights(labels_n: np.ndarray, datasets_n: np.ndarray) -> np.ndarray:
    """Weight of each cell, frequency^-1/2 of its label in its data set, float32 (n,), with mean 1."""
    _, which_n, counts = np.unique(
        np.stack([labels_n, datasets_n]), axis=1, return_inverse=True, return_counts=True
    )
    weights_n = counts[which_n.reshape(-1)] ** -0.5
    return (weights_n / weights_n.mean()).astype(np.float32)


def prior_shift(shares_k: np.ndarray, counts_k: np.ndarray, strength: float) -> np.ndarray:
    """Logit shift for a network trained with label shares `shares_k`, float64 (k,).

    Args:
        shares_k: Share of each label in the loss.
        counts_k: Number of training cells of each label, before leaving any out.
        strength: 0 leaves the logits unchanged; 1 shifts them fully to the frequencies of the training cells.
    """
    known_k = (shares_k > 0) & (counts_k > 0)
    natural_k = counts_k / max(counts_k.sum(), 1)
    return strength * np.log(np.divide(natural_k, shares_k, out=np.ones(len(shares_k)), where=known_k))


def hidden_slots(batch: Batch, rate: float, seed: int, step: int) -> torch.Tensor:
    """Detected genes to hide in pre-training, bool (n, l); a pure function of seed, step, cell and gene."""
    detected_nl = (batch["token_ids"] >= NUM_SPECIAL) & (batch["values"] > 0)
    return detected_nl & (uniform24(batch["joinids"], batch["token_ids"], seed, step) < round(rate * 2**24))


class Objective:
    """A training objective: prepares a batch and computes its summed loss."""

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

        Computed on the CPU, where batches arrive.
        """
        train, hidden_nl = self.config.train, None
        if self.task == "pretrain":
            hidden_nl = hidden_slots(batch, train.mask_rate, train.seed, step)
            weight = float(hidden_nl.sum())
            hidden_nl = hidden_nl.to(self.engine.device)
        else:
            labelled_n = batch["labels"] >= 0
            weights_n = (
                batch["weights"][labelled_n]
                if "weights" in batch
                else self.class_weights_k.cpu()[batch["labels"][labelled_n]]
            )
            weight = float(weights_n.double().sum())
        return (
            {name: tensor.to(self.engine.device, non_blocking=True) for name, tensor in batch.items()},
            hidden_nl,
            weight,
        )

    def loss(self, batch: Batch, hidden_nl: torch.Tensor | None, hash_seed: int) -> torch.Tensor:
        """Loss of a prepared batch, summed over its cells or hidden slots."""
        output = self.engine(batch, task=self.task, hidden=hidden_nl, hash_seed=hash_seed)
        if hidden_nl is not None:
            return expression_loss(output, batch, hidden_nl)[0]
        if "weights" in batch:
            losses_n = F.cross_entropy(
                output.logits_nk.float(), batch["labels"], ignore_index=-1, reduction="none"
            )
            return (losses_n * batch["weights"]).sum()
        return classification_loss(output.logits_nk, batch["labels"], self.class_weights_k)[0]

    def hash_seed(self, step: int, micro_step: int, accumulation: int) -> int:
        """Seed of the hashes, new in each step and the same on all ranks.

        With dropout, whose masks use the same seed, each micro-batch has its own.
        """
        if self.config.model.dropout == 0:
            return mix(self.config.train.seed, step)
        return mix(self.config.train.seed, step, torch.distributed.get_rank() * accumulation + micro_step)
