"""The one door to DeepSpeed.

Its configuration, the engine, and whole weights and optimizer state out of any ZeRO stage.

DeepSpeed is imported when an engine is built, never before: its import takes seconds and picks an accelerator
for good.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from screformer.config import ExperimentConfig, TrainConfig

MOMENTS = ("exp_avg", "exp_avg_sq")
SHARDS_TAG = "state"
BUCKET_ELEMENTS = 20_000_000
"""Elements that ZeRO reduces or gathers together. DeepSpeed's own 5e8 would hold 2 GB of buffers per rank for
networks of a few MB."""


def learning_rate(step: int, train: TrainConfig) -> float:
    """Linear warm-up, then a cosine down to `min_lr_ratio` of the peak at the last step.

    Pure, so that a resumed run has it exactly.
    """
    if step < train.warmup_steps:
        return train.lr * (step + 1) / (train.warmup_steps + 1)
    progress = min(1.0, (step - train.warmup_steps) / max(1, train.max_steps - 1 - train.warmup_steps))
    return train.lr * (
        train.min_lr_ratio + (1 - train.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
    )


def uses_bf16(config: ExperimentConfig, device_type: str) -> bool:
    """Whether the network computes in bfloat16: `train.precision`, or with `auto` whether a GPU has it."""
    if config.train.precision == "auto":
        return device_type == "cuda" and torch.cuda.is_bf16_supported()
    return config.train.precision == "bf16"


def deepspeed_config(config: ExperimentConfig, world_size: int, *, device_type: str) -> dict[str, Any]:
    """DeepSpeed's own configuration.

    Args:
        config: The run's settings.
        world_size: Ranks; the global batch stays the same.
        device_type: "cpu" or "cuda".

    Raises:
        ValueError: The global batch is not a multiple of micro-batch x world size.
    """
    zero, bf16 = config.zero, uses_bf16(config, device_type)
    zero_config: dict[str, Any] = {
        # fp32 masters of bf16 weights, which AdamW's small updates need, are kept from stage 1 on.
        "stage": max(zero.stage, 1) if bf16 else zero.stage,
        # Streams that overlap with the backward pass exist on GPUs only.
        "overlap_comm": device_type == "cuda",
        "reduce_bucket_size": BUCKET_ELEMENTS,
        "allgather_bucket_size": BUCKET_ELEMENTS,
    }
    if zero.stage == 3:
        zero_config["stage3_param_persistence_threshold"] = zero.stage3_param_persistence_threshold
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
        # PyTorch's own AdamW: DeepSpeed's are compiled at first use, which needs a compiler that a user's
        # machine may lack.
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
        At most two groups, without empty ones, in the order of `model.named_parameters()`.
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


def build_engine(config: ExperimentConfig, model: nn.Module, world_size: int) -> Any:
    """Wrap a network in a DeepSpeed engine.

    Torch.distributed must be initialised; every rank calls it with the same weights.

    Args:
        config: The run's settings; `cluster.use_gpu` chooses the device.
        model: The network; parameters with `requires_grad=False` stay as they are.
        world_size: Ranks.

    Returns:
        A `deepspeed.DeepSpeedEngine`.

    Raises:
        ValueError: The global batch does not divide over the ranks, or nothing is trainable.
    """
    groups = parameter_groups(model, config.train.weight_decay)
    if not groups:
        raise ValueError("the network has no trainable parameter; check train.freeze_encoder")
    device_type = "cuda" if config.cluster.use_gpu else "cpu"
    deepspeed = _import_deepspeed(device_type)
    with _quiet():
        engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=groups,
            config=deepspeed_config(config, world_size, device_type=device_type),
            dist_init_required=False,
        )
    return engine


def set_learning_rate(engine: Any, lr: float) -> None:
    """The rate of the next optimizer step."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr


def gather_weights(engine: Any) -> dict[str, torch.Tensor]:
    """Whole parameters (fp32 masters) and buffers by name on rank 0, on the CPU; empty elsewhere.

    Every rank calls it.
    """
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param

    keep, weights = torch.distributed.get_rank() == 0, {}
    for name, param in engine.module.named_parameters():
        with GatheredParameters([param], enabled=_is_partitioned(param) and not param.requires_grad):
            full = safe_get_full_fp32_param(param) if param.requires_grad else None
            if keep:
                weights[name] = (param if full is None else full).detach().to("cpu", copy=True).contiguous()
    for name, buffer in engine.module.named_buffers():
        if keep:
            weights[name] = buffer.detach().to("cpu", copy=True).contiguous()
    return weights


def load_weights(engine: Any, weights: dict[str, torch.Tensor]) -> None:
    """Put rank 0's weights, as `gather_weights` gave them, into the network and its fp32 masters.

    Every rank calls it.
    """
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    for name, param in engine.module.named_parameters():
        full = _broadcast(weights.get(name), engine.device, tuple(getattr(param, "ds_shape", param.shape)))
        with GatheredParameters([param], modifier_rank=0, enabled=_is_partitioned(param)), torch.no_grad():
            param.copy_(full)
        if _is_partitioned(param) and param.requires_grad:
            safe_set_local_fp32_param(param, _own_part(full, param))
        elif param.requires_grad:
            safe_set_full_fp32_param(param, full)
    for name, buffer in engine.module.named_buffers():
        dtype = buffer.dtype
        buffer.copy_(_broadcast(weights.get(name), engine.device, tuple(buffer.shape), dtype))


def gather_moments(engine: Any) -> tuple[dict[str, torch.Tensor], int]:
    """AdamW's state, whole.

    `exp_avg/NAME` and `exp_avg_sq/NAME` in fp32 on rank 0 (empty elsewhere), and its count of steps.

    Every rank calls it, after at least one optimizer step.
    """
    from deepspeed.utils import safe_get_full_optimizer_state

    keep, moments = torch.distributed.get_rank() == 0, {}
    _link_moments(engine)
    for name, param in _trained(engine):
        for moment in MOMENTS:
            full = (
                engine.optimizer.state[param][moment]
                if _is_plain(engine)
                else safe_get_full_optimizer_state(param, moment)
            )
            if keep:
                moments[f"{moment}/{name}"] = full.detach().to("cpu", copy=True).float().contiguous()
    steps = {int(state["step"]) for state in _base_optimizer(engine).state.values()}
    assert len(steps) == 1, f"parameters took different numbers of optimizer steps: {sorted(steps)}"
    return moments, steps.pop()


def load_moments(engine: Any, moments: dict[str, torch.Tensor], num_steps: int) -> None:
    """Restore AdamW's state from rank 0's `gather_moments`, also into another ZeRO stage or world size.

    Every rank calls it.
    """
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    base = _base_optimizer(engine)
    for flat in _optimized_tensors(engine):
        base.state[flat] = {
            "step": torch.tensor(float(num_steps)),
            **{moment: torch.zeros_like(flat) for moment in MOMENTS},
        }
    _link_moments(engine)
    for name, param in _trained(engine):
        shape = tuple(getattr(param, "ds_shape", param.shape))
        for moment in MOMENTS:
            full = _broadcast(moments.get(f"{moment}/{name}"), engine.device, shape)
            if _is_plain(engine):
                base.state[param][moment].copy_(full)
            elif _is_partitioned(param):
                safe_set_local_optimizer_state(param, _own_part(full, param), moment)
            else:
                safe_set_full_optimizer_state(param, full, moment)


def shard_layout(engine: Any) -> dict[str, Any]:
    """What two engines must share for one to read the other's shards."""
    return {
        "world_size": torch.distributed.get_world_size(),
        "stage": engine.zero_optimization_stage(),
        "offload": bool(engine.zero_offload_optimizer()),
        "dtype": str(engine.get_data_types()[0]),
    }


def save_shards(engine: Any, directory: Path) -> None:
    """Each rank's part of DeepSpeed's own state, into a folder that only this rank's node may see.

    Every rank calls it.
    """
    (directory / SHARDS_TAG).mkdir(parents=True, exist_ok=True)
    engine.save_checkpoint(str(directory), tag=SHARDS_TAG, save_latest=False)


def load_shards(engine: Any, directory: Path) -> None:
    """Read what `save_shards` wrote into an engine of the same `shard_layout`. Every rank calls it."""
    # DeepSpeed would unpickle anything it finds there; PyTorch's restricted reader takes tensors and the
    # types named here only.
    previous = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        with torch.serialization.safe_globals(_shard_types()), _quiet():
            engine.load_checkpoint(str(directory), tag=SHARDS_TAG)
    finally:
        if previous is None:
            del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
        else:
            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = previous


def _shard_types() -> list[Any]:
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, ZeroStageEnum, fragment_address]


def _import_deepspeed(device_type: str) -> Any:
    # Without it DeepSpeed guesses, and takes a GPU that the run was told to leave alone.
    os.environ["DS_ACCELERATOR"] = device_type
    import deepspeed

    # About DeepSpeed's own calls.
    warnings.filterwarnings(
        "ignore", message=r"`torch\.distributed\..* is deprecated", category=FutureWarning
    )
    if device_type == "cpu":
        # The shared-memory collective is compiled at first use: a minute with a compiler, an exception
        # without. gloo does the same.
        deepspeed.ops.__compatible_ops__ = {}
    return deepspeed


def _quiet() -> contextlib.redirect_stdout[io.StringIO]:
    # DeepSpeed prints memory use and names of functions.
    return contextlib.redirect_stdout(io.StringIO())


def _broadcast(
    value: torch.Tensor | None, device: Any, shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    if torch.distributed.get_rank() == 0:
        assert value is not None and tuple(value.shape) == shape
        full = value.to(device=device, dtype=dtype, copy=True)
    else:
        full = torch.empty(shape, dtype=dtype, device=device)
    torch.distributed.broadcast(full, 0)
    return full


def _is_partitioned(param: nn.Parameter) -> bool:
    return hasattr(param, "ds_id")


def _own_part(full: torch.Tensor, param: Any) -> torch.Tensor:
    # `safe_set_full_*` of DeepSpeed 0.19 fails at stage 3 where the elements do not divide over the ranks;
    # the last part is padded.
    size, rank = param.ds_tensor.numel(), torch.distributed.get_rank()
    part = full.flatten()[rank * size : (rank + 1) * size]
    return nn.functional.pad(part, (0, size - part.numel()))


def _is_plain(engine: Any) -> bool:
    """Stage 0 in fp32: PyTorch's optimizer works on the parameters themselves."""
    return isinstance(engine.optimizer, torch.optim.Optimizer)


def _base_optimizer(engine: Any) -> torch.optim.Optimizer:
    return engine.optimizer if _is_plain(engine) else engine.optimizer.optimizer


def _optimized_tensors(engine: Any) -> list[torch.Tensor]:
    # Stage 3 keeps its groups' `params` empty between steps.
    flat = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None)
    return (
        list(flat)
        if flat is not None
        else [p for group in _base_optimizer(engine).param_groups for p in group["params"]]
    )


def _link_moments(engine: Any) -> None:
    # DeepSpeed 0.19 links parameters to their state after the first group's first step, when the other groups
    # have no state yet.
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def _trained(engine: Any) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, param) for name, param in engine.module.named_parameters() if param.requires_grad)
