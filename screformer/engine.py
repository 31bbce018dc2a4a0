"""Configure DeepSpeed and build its engine; `engine_state` reads and writes the engine's state.

DeepSpeed is imported only when an engine is built, because the import takes seconds and fixes the
accelerator.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import warnings
from typing import Any

import torch
from torch import nn

from screformer.config import ExperimentConfig, TrainConfig

BUCKET_ELEMENTS = 20_000_000
"""Number of elements that ZeRO reduces or gathers at a time. DeepSpeed's default of 5e8 would take 2 GB of
buffers per rank for networks of a few MB."""
PERSISTENCE_THRESHOLD = 100_000
"""Parameters with fewer elements stay whole on every rank at stage 3."""
MIN_LR_RATIO = 0.05
"""Final learning rate as a share of the peak."""


def learning_rate(step: int, train: TrainConfig) -> float:
    """Linear warm-up, then a cosine down to `MIN_LR_RATIO` of the peak at the last step.

    A pure function, so a resumed run follows it exactly.
    """
    if step < train.warmup_steps:
        return train.lr * (step + 1) / (train.warmup_steps + 1)
    progress = min(1.0, (step - train.warmup_steps) / max(1, train.max_steps - 1 - train.warmup_steps))
    return train.lr * (MIN_LR_RATIO + (1 - MIN_LR_RATIO) * 0.5 * (1 + math.cos(math.pi * progress)))


def uses_bf16(config: ExperimentConfig, device_type: str) -> bool:
    """Whether the network uses bfloat16, as set by `train.precision`; for `auto`, if the GPU supports it."""
    if config.train.precision == "auto":
        return device_type == "cuda" and torch.cuda.is_bf16_supported()
    return config.train.precision == "bf16"


def deepspeed_config(
    config: ExperimentConfig,
    world_size: int,
    *,
    device_type: str,
    persistence_threshold: int = PERSISTENCE_THRESHOLD,
) -> dict[str, Any]:
    """DeepSpeed's own configuration.

    Args:
        config: The run's settings.
        world_size: Number of ranks; does not change the global batch.
        device_type: "cpu" or "cuda".
        persistence_threshold: Lowered in tests, because stage 3 would not partition a tiny network.

    Raises:
        ValueError: The global batch is not a multiple of micro-batch x world size.
    """
    zero, bf16 = config.zero, uses_bf16(config, device_type)
    zero_config: dict[str, Any] = {
        # AdamW's small updates need fp32 masters of bf16 weights, which DeepSpeed keeps from stage 1 on.
        "stage": max(zero.stage, 1) if bf16 else zero.stage,
        # Communication can overlap with the backward pass only on GPUs.
        "overlap_comm": device_type == "cuda",
        "reduce_bucket_size": BUCKET_ELEMENTS,
        "allgather_bucket_size": BUCKET_ELEMENTS,
    }
    if zero.stage == 3:
        zero_config["stage3_param_persistence_threshold"] = persistence_threshold
        zero_config["stage3_prefetch_bucket_size"] = BUCKET_ELEMENTS
    if zero.offload_optimizer != "none":
        zero_config["offload_optimizer"] = {
            "device": zero.offload_optimizer,
            "pin_memory": device_type == "cuda",
        }
    settings: dict[str, Any] = {
        "train_batch_size": config.train.global_batch_size,
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": config.grad_accum_steps(world_size),
        "gradient_clipping": config.train.gradient_clipping,
        # Use PyTorch's AdamW: DeepSpeed compiles its versions at first use, and there may be no compiler.
        "optimizer": {
            "type": "AdamW",
            "params": {"torch_adam": True, "lr": config.train.lr, "weight_decay": config.train.weight_decay},
        },
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero_config,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }
    if bf16:
        settings["bf16"] = {"enabled": True}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two AdamW groups: matrices decay; biases, norms and embeddings do not.

    Returns:
        One or two non-empty groups, in the order of `model.named_parameters()`.
    """
    embeddings = {
        id(p)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for p in module.parameters(recurse=False)
    }
    trainable = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trainable if p.ndim >= 2 and id(p) not in embeddings]
    others = [p for p in trainable if p.ndim < 2 or id(p) in embeddings]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_engine(
    config: ExperimentConfig,
    model: nn.Module,
    world_size: int,
    *,
    persistence_threshold: int = PERSISTENCE_THRESHOLD,
) -> Any:
    """Wrap a network in a DeepSpeed engine.

    `torch.distributed` must be initialised, and every rank must call this with the same weights.

    Args:
        config: The run's settings; `cluster.use_gpu` selects the device.
        model: The network; parameters with `requires_grad=False` are not trained.
        world_size: Number of ranks.
        persistence_threshold: As in `deepspeed_config`.

    Returns:
        A `deepspeed.DeepSpeedEngine`.

    Raises:
        ValueError: The global batch cannot be divided evenly among ranks, or nothing is trainable.
    """
    groups = parameter_groups(model, config.train.weight_decay)
    if not groups:
        raise ValueError("the network has no trainable parameters; check train.freeze_encoder")
    device_type = "cuda" if config.cluster.use_gpu else "cpu"
    deepspeed = import_deepspeed(device_type)
    with quiet():
        engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=groups,
            config=deepspeed_config(
                config,
                world_size,
                device_type=device_type,
                persistence_threshold=persistence_threshold,
            ),
            dist_init_required=False,
        )
    return engine


def set_learning_rate(engine: Any, lr: float) -> None:
    """Set the learning rate of the next optimizer step."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr


def import_deepspeed(device_type: str) -> Any:
    """The DeepSpeed module, set up only for the device type `cpu` or `cuda`."""
    # Otherwise DeepSpeed guesses, and uses a GPU even if the run should not.
    os.environ["DS_ACCELERATOR"] = device_type
    import deepspeed

    # Triggered by DeepSpeed's own calls.
    warnings.filterwarnings(
        "ignore", message=r"`torch\.distributed\..* is deprecated", category=FutureWarning
    )
    if device_type == "cpu":
        # The shared-memory collective is compiled at first use, which takes a minute with a compiler and
        # fails without one. gloo does the same job.
        deepspeed.ops.__compatible_ops__ = {}
    return deepspeed


def quiet() -> contextlib.redirect_stdout[io.StringIO]:
    """Suppress what DeepSpeed prints: memory use and function names."""
    return contextlib.redirect_stdout(io.StringIO())
