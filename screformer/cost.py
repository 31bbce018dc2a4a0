"""Cost of training: estimated and measured memory, and FLOPs.

The estimates are deliberately rough. They are printed before a run starts and checked against real runs.
"""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from screformer.config import ExperimentConfig, ModelConfig, TokensConfig
from screformer.model import ScReformer

_FP32_BYTES = 4


def count_parameters(model: ModelConfig, tokens: TokensConfig, *, num_genes: int, num_classes: int) -> int:
    """Number of parameters of a network, which is not built: a large one would take memory and minutes."""
    with torch.device("meta"), _Undrawn():
        network = ScReformer(model, tokens, num_genes=num_genes, num_classes=num_classes, seed=0)
    return sum(param.numel() for param in network.parameters())


class _Undrawn(TorchFunctionMode):
    """Leaves out drawing the weights: for tensors without memory, PyTorch loads sympy, for seconds."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in ("normal_", "uniform_", "kaiming_uniform_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def state_bytes(config: ExperimentConfig, num_parameters: int) -> float:
    """Size of weights, gradients and optimizer state on each worker, in bytes; fp32."""
    # Per parameter: weights 4, gradients 4, moments 8. ZeRO partitions moments first, then gradients, then
    # weights.
    spread = {0: 0, 1: 8, 2: 12, 3: 16}[config.zero.stage]
    return num_parameters * (16 - spread + spread / config.cluster.num_workers)


def activation_bytes(config: ExperimentConfig, most_slots: int) -> float:
    """Peak memory of one forward and backward pass of a micro-batch, in bytes; fp32.

    Args:
        config: The run's settings.
        most_slots: Number of tokens of the longest cell.
    """
    model, tokens = config.model, config.train.micro_batch_size * most_slots
    # A block needs about 14 + 2 ff_mult vectors per token, plus some per hash round with LSH. Reversible
    # blocks are in memory one at a time.
    hashes = model.attention in ("lsh", "random")
    per_block = 14 + 2 * model.ff_mult + (6 * model.n_hashes if hashes else 0)
    numbers = tokens * model.dim * (6 + per_block * (1 if model.reversible else model.depth))
    if hashes:
        numbers += tokens * model.heads * model.n_hashes * 2 * model.bucket_size
    return numbers * _FP32_BYTES


def step_flops(model: ModelConfig, length: int) -> float:
    """FLOPs of the matrix products in one training step for a cell of `length` tokens.

    Recomputation is not counted.

    Forward pass, per block and token: 2 x (p + 2 x ff_mult) x dim^2 for the linear layers, with p = 3
    projections (shared queries and keys, values, output) or 4 with full attention; plus 4 x dim per key, with
    2 x bucket_size keys in every round, or `length` keys with full attention. The backward pass takes twice
    as much.
    """
    projections = 4 if model.attention == "full" else 3
    keys = length if model.attention == "full" else 2 * model.bucket_size * model.n_hashes
    return (
        3
        * model.depth
        * length
        * (2 * (projections + 2 * model.ff_mult) * model.dim**2 + 4 * model.dim * keys)
    )


def attention_flops(length: int, *, heads: int, head_width: int, n_hashes: int, bucket_size: int) -> float:
    """FLOPs of one forward and backward pass of LSH attention over a cell.

    Two products forward and four backward, each with 2 x head_width operations for every query and its 2 x
    bucket_size keys in every round. Scores recomputed in the backward pass are not counted, as is usual for
    model FLOPs.
    """
    return 6 * 2 * head_width * heads * length * n_hashes * 2 * bucket_size


def peak_memory_gb(device: torch.device | str = "cpu") -> float:
    """Peak memory of this process so far, in GB: tensors on a GPU, else resident memory."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e9 if sys.platform == "darwin" else 1e6)


def reset_peak_memory() -> None:
    """Reset the peak of resident memory, so a reused process does not report an earlier one.

    Linux only; does nothing elsewhere.
    """
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
