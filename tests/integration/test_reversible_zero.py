"""With equal hashes, the encoder learns what reformer_pytorch's network learns.

On two gloo workers, reversible and not, with whole and with partitioned parameters (ZeRO 3).
"""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from helpers.library_twin import LibraryEncoder, give_equal_hashes
from screformer.config import ModelConfig
from screformer.engine import import_deepspeed
from screformer.reversible import ReversibleEncoder

CASES = [(stage, reversible) for stage in (0, 3) for reversible in (True, False)]
LENGTH, WIDTH, STEPS = 45, 16, 3
CONFIG = ModelConfig(dim=WIDTH, depth=2, heads=2, attention="lsh", bucket_size=4, n_hashes=2)


class Regression(nn.Module):
    """An encoder and a linear layer; its loss is over all cells, so two workers can be compared with one."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: torch.Tensor, mask: torch.Tensor, step: int) -> torch.Tensor:
        hidden = self.encoder(x, mask, hash_seed=step)
        return ((self.head(hidden)[..., 0] - x.sum(-1)) ** 2 * mask).sum() / mask.sum()


def our_network(config: ModelConfig) -> Regression:
    torch.manual_seed(0)
    return Regression(ReversibleEncoder(config))


def draw_cells(step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(10 * step + rank))
    return x, torch.ones(2, LENGTH, dtype=torch.bool)


def train(stage: int, config: ModelConfig, rank: int, world_size: int) -> dict[str, Any]:
    """The loss over all ranks in each step, and the encoder's gradients in the first step by name."""
    deepspeed = import_deepspeed("cpu")
    from deepspeed.utils import safe_get_full_grad

    settings = {
        "train_batch_size": world_size * 2,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,  # otherwise DeepSpeed clips at 1
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 0,
            "reduce_bucket_size": 10**6,
        },
    }
    module = our_network(config)
    engine, *_ = deepspeed.initialize(
        model=module, model_parameters=module.parameters(), config=settings, dist_init_required=False
    )
    losses, gradients = [], {}
    for step in range(STEPS):
        loss = engine(*draw_cells(step, rank), step)
        engine.backward(loss)
        if step == 0:
            gradients = {
                name: safe_get_full_grad(param).flatten().tolist()
                for name, param in module.encoder.named_parameters()
            }
        engine.step()
        total = loss.detach() / world_size
        torch.distributed.all_reduce(total)
        losses.append(float(total))
    engine.destroy()
    return {"losses": losses, "gradients": gradients}


def train_library(world_size: int) -> dict[str, Any]:
    """The same with the library's network and the same weights, in one process without DeepSpeed."""
    ours, library = our_network(CONFIG), Regression(LibraryEncoder(CONFIG))
    assert isinstance(ours.encoder, ReversibleEncoder) and isinstance(library.encoder, LibraryEncoder)
    library.encoder.copy_weights(ours.encoder)
    library.head.load_state_dict(ours.head.state_dict())
    optimizer = torch.optim.AdamW(library.parameters(), lr=1e-2)
    losses, gradients = [], {}
    for step in range(STEPS):
        x, mask = map(torch.cat, zip(*(draw_cells(step, rank) for rank in range(world_size)), strict=True))
        loss = library(x.requires_grad_(), mask, step)  # else the library's reversible blocks do not learn
        loss.backward()
        if step == 0:
            names = {id(module): name for name, module in ours.encoder.named_modules()}
            gradients = {
                f"{names[id(own)]}.{name}": param.grad.flatten().tolist()
                for theirs, own in library.encoder.pairs(ours.encoder)
                for name, param in theirs.named_parameters()
            }
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return {"losses": losses, "gradients": gradients}


def work(rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(LOCAL_RANK=str(rank), GLOO_SOCKET_IFNAME="lo")
    store = torch.distributed.FileStore(f"{folder}/store", world_size)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    found = {}
    give_equal_hashes(setattr, LENGTH, CONFIG)
    for stage, reversible in CASES:
        config = replace(CONFIG, reversible=reversible)
        found[f"{stage} {reversible}"] = train(stage, config, rank, world_size)
    found["library"] = train_library(world_size)
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("reversible_zero")
    torch.multiprocessing.spawn(work, args=(2, str(folder)), nprocs=2)
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize(("stage", "reversible"), CASES)
def test_two_workers_learn_what_the_library_learns_from_equal_hashes(
    found: dict[str, Any], stage: int, reversible: bool
) -> None:
    ours, library = found[f"{stage} {reversible}"], found["library"]
    assert ours["gradients"].keys() == library["gradients"].keys()
    for name, gradient in library["gradients"].items():
        difference = np.subtract(ours["gradients"][name], gradient)
        assert np.linalg.norm(difference) <= 1e-5 * np.linalg.norm(gradient), name
    np.testing.assert_allclose(ours["losses"], library["losses"], rtol=1e-5)
