"""The encoder alone on two gloo workers: reversible and not, ZeRO 0 to 3 with really partitioned parameters, all learn the same."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from screformer.config import ModelConfig
from screformer.engine import _import_deepspeed
from screformer.reversible import ReversibleEncoder

CASES = [(stage, reversible) for stage in range(4) for reversible in (True, False)]
LENGTH, WIDTH = 45, 16


class Regression(nn.Module):
    """The encoder between two linear layers; its loss is that of all cells, so that two workers can be compared with one."""

    def __init__(self, reversible: bool) -> None:
        super().__init__()
        self.encoder = ReversibleEncoder(
            ModelConfig(dim=WIDTH, depth=2, heads=2, bucket_size=4, n_hashes=2, dropout=0.1, reversible=reversible)
        )
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: torch.Tensor, mask: torch.Tensor, step: int) -> torch.Tensor:
        hidden = self.encoder(x, mask, hash_seed=step)
        return ((self.head(hidden)[..., 0] - x.sum(-1)) ** 2 * mask).sum() / mask.sum()


def train(stage: int, reversible: bool, rank: int, world_size: int) -> list[float]:
    deepspeed = _import_deepspeed("cpu")
    torch.manual_seed(0)
    config = {
        "train_batch_size": world_size * 2,
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 10**6},
    }
    module = Regression(reversible)
    engine, *_ = deepspeed.initialize(model=module, model_parameters=module.parameters(), config=config, dist_init_required=False)
    losses = []
    for step in range(4):
        generator = torch.Generator().manual_seed(10 * step + rank)
        x = torch.randn(2, LENGTH, WIDTH, generator=generator)
        mask = torch.arange(LENGTH) < torch.tensor([LENGTH, 20 + rank])[:, None]
        loss = engine(x, mask, step)
        engine.backward(loss)
        engine.step()
        total = loss.detach() / world_size
        torch.distributed.all_reduce(total)
        losses.append(float(total))
    engine.destroy()
    return losses


def work(rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(LOCAL_RANK=str(rank), GLOO_SOCKET_IFNAME="lo")
    store = torch.distributed.FileStore(f"{folder}/store", world_size)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    losses = {f"{stage} {reversible}": train(stage, reversible, rank, world_size) for stage, reversible in CASES}
    if rank == 0:
        Path(folder, "losses.json").write_text(json.dumps(losses))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("reversible_zero")
    torch.multiprocessing.spawn(work, args=(2, str(folder)), nprocs=2)
    return json.loads((folder / "losses.json").read_text())


@pytest.mark.parametrize(("stage", "reversible"), CASES)
def test_stages_and_reversibility_give_the_same_losses(losses: dict[str, Any], stage: int, reversible: bool) -> None:
    reference = losses["0 False"]
    assert reference[-1] < reference[0]
    np.testing.assert_allclose(losses[f"{stage} {reversible}"], reference, rtol=1e-5)
