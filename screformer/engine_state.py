"""Weights and optimizer state of a DeepSpeed engine: whole out of any ZeRO stage and back, or as shards.

Every rank calls each function but `weights_norm`.
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
    """Norm of the weights that this rank holds: not finite as soon as one of them is not."""
    held = [param.ds_tensor if _is_partitioned(param) else param for param in engine.module.parameters()]
    return float(nn.utils.get_total_norm([part.detach() for part in held]))


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
            full = broadcast(moments.get(f"{moment}/{name}"), engine.device, shape)
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
    """Rank 0's tensor on every rank; the others give None. Every rank calls it."""
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
