"""Read and write weights and optimizer state of a DeepSpeed engine, consolidated or as shards.

Every rank must call every function except `weights_norm`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from screformer.engine import quiet

MOMENTS = ("exp_avg", "exp_avg_sq")
SHARDS_TAG = "state"


def gather_weights(engine: Any) -> dict[str, torch.Tensor]:
    """Full parameters (fp32 masters) and buffers by name, on rank 0's CPU; empty on other ranks.

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
    """Load rank 0's weights, as returned by `gather_weights`, into the network and its fp32 masters.

    Every rank calls it.
    """
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    for name, param in engine.module.named_parameters():
        full = broadcast(weights.get(name), engine.device, tuple(getattr(param, "ds_shape", param.shape)))
        with GatheredParameters([param], modifier_rank=0, enabled=_is_partitioned(param)), torch.no_grad():
            param.copy_(full)
        if _is_partitioned(param) and param.requires_grad:
            safe_set_local_fp32_param(param, _own_part(full, param))
        elif param.requires_grad:
            safe_set_full_fp32_param(param, full)
    for name, buffer in engine.module.named_buffers():
        dtype = buffer.dtype
        buffer.copy_(broadcast(weights.get(name), engine.device, tuple(buffer.shape), dtype))


def weights_norm(engine: Any) -> float:
    """Norm of this rank's weights; not finite if any weight is not."""
    held = [_held(param) if _is_partitioned(param) else param for param in engine.module.parameters()]
    return float(nn.utils.get_total_norm([part.detach() for part in held]))


def gather_moments(engine: Any) -> tuple[dict[str, torch.Tensor], int]:
    """AdamW's full state and the number of steps.

    The state is `exp_avg/NAME` and `exp_avg_sq/NAME` in fp32 on rank 0, and empty on other ranks. Every rank
    calls it, after at least one optimizer step.
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
    """Restore AdamW's state from rank 0's `gather_moments`, for any ZeRO stage and world size.

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
            full = broadcast(moments.get(f"{moment}/{name}"), engine.device, shape)
            if _is_plain(engine):
                base.state[param][moment].copy_(full)
            elif _is_partitioned(param):
                safe_set_local_optimizer_state(param, _own_part(full, param), moment)
            else:
                safe_set_full_optimizer_state(param, full, moment)


def shard_layout(engine: Any) -> dict[str, Any]:
    """Properties that must match for an engine to read another's shards."""
    return {
        "world_size": torch.distributed.get_world_size(),
        "stage": engine.zero_optimization_stage(),
        "offload": bool(engine.zero_offload_optimizer()),
        "dtype": str(engine.get_data_types()[0]),
    }


def save_shards(engine: Any, directory: Path) -> None:
    """Save each rank's part of DeepSpeed's state to a folder, which may be local to the rank's node.

    Every rank calls it.
    """
    (directory / SHARDS_TAG).mkdir(parents=True, exist_ok=True)
    engine.save_checkpoint(str(directory), tag=SHARDS_TAG, save_latest=False)


def load_shards(engine: Any, directory: Path) -> None:
    """Load the files of `save_shards` into an engine with the same `shard_layout`. Every rank calls it."""
    # DeepSpeed would unpickle anything; PyTorch's restricted reader accepts only tensors and the types
    # listed here.
    previous = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        with torch.serialization.safe_globals(_shard_types()), quiet():
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


def broadcast(
    value: torch.Tensor | None, device: Any, shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Broadcast rank 0's tensor; the other ranks pass None. Every rank calls it."""
    if torch.distributed.get_rank() == 0:
        assert value is not None and tuple(value.shape) == shape
        full = value.to(device=device, dtype=dtype, copy=True)
    else:
        full = torch.empty(shape, dtype=dtype, device=device)
    torch.distributed.broadcast(full, 0)
    return full


def _is_partitioned(param: nn.Parameter) -> bool:
    return hasattr(param, "ds_id")


def _held(param: Any) -> torch.Tensor:
    # Cut off the padding of the last part: DeepSpeed leaves it uninitialised, so it may be NaN.
    size, rank = param.ds_tensor.numel(), torch.distributed.get_rank()
    return param.ds_tensor[: min(size, max(0, param.ds_numel - rank * size))]


def _own_part(full: torch.Tensor, param: Any) -> torch.Tensor:
    # `safe_set_full_*` of DeepSpeed 0.19 fails at stage 3 if the elements do not divide evenly over the
    # ranks; the last part is padded.
    size, rank = param.ds_tensor.numel(), torch.distributed.get_rank()
    part = full.flatten()[rank * size : (rank + 1) * size]
    return nn.functional.pad(part, (0, size - part.numel()))


def _is_plain(engine: Any) -> bool:
    """Whether PyTorch's optimizer works on the parameters themselves: stage 0 in fp32."""
    return isinstance(engine.optimizer, torch.optim.Optimizer)


def _base_optimizer(engine: Any) -> torch.optim.Optimizer:
    return engine.optimizer if _is_plain(engine) else engine.optimizer.optimizer


def _optimized_tensors(engine: Any) -> list[torch.Tensor]:
    # At stage 3, the groups' `params` are empty between steps.
    flat = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None)
    return (
        list(flat)
        if flat is not None
        else [p for group in _base_optimizer(engine).param_groups for p in group["params"]]
    )


def _link_moments(engine: Any) -> None:
    # DeepSpeed 0.19 links parameters to their state after the first group's first step, before the other
    # groups have state.
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def _trained(engine: Any) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, param) for name, param in engine.module.named_parameters() if param.requires_grad)
