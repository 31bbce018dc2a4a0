import numpy as np
import pytest
import torch
from torch import nn

from screformer.config import ExperimentConfig, ModelConfig, TokensConfig, TrainConfig
from screformer.engine import deepspeed_config, learning_rate, parameter_groups
from screformer.model import ScReformer
from screformer.objective import class_weights, freeze_parameters, hidden_slots


def _config(**overrides: object) -> ExperimentConfig:
    return ExperimentConfig().merge({"train.global_batch_size": 64, "train.micro_batch_size": 4, **overrides})


def test_the_global_batch_does_not_depend_on_the_world_size() -> None:
    for world_size in (1, 2, 4, 8):
        settings = deepspeed_config(_config(), world_size, device_type="cpu")
        product = (
            settings["train_micro_batch_size_per_gpu"] * settings["gradient_accumulation_steps"] * world_size
        )
        assert product == settings["train_batch_size"] == 64
    with pytest.raises(
        ValueError, match=r"train.global_batch_size=64 is not a multiple .* \(4 x 3 = 12\); try 60 or 72"
    ):
        deepspeed_config(_config(), 3, device_type="cpu")


def test_nothing_needs_a_compiler() -> None:
    settings = deepspeed_config(
        _config(**{"zero.stage": 2, "zero.offload_optimizer": "cpu"}), 1, device_type="cpu"
    )
    assert settings["optimizer"]["params"]["torch_adam"] is True
    assert settings["zero_force_ds_cpu_optimizer"] is False
    assert settings["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": False}


@pytest.mark.parametrize(
    ("stage", "precision", "expected"), [(0, "fp32", 0), (3, "fp32", 3), (0, "bf16", 1), (2, "bf16", 2)]
)
def test_bf16_keeps_fp32_masters(stage: int, precision: str, expected: int) -> None:
    settings = deepspeed_config(
        _config(**{"zero.stage": stage, "train.precision": precision}), 2, device_type="cpu"
    )
    assert settings["zero_optimization"]["stage"] == expected
    assert settings.get("bf16", {}).get("enabled", False) is (precision == "bf16")


def test_precision_auto_is_fp32_on_cpu() -> None:
    assert "bf16" not in deepspeed_config(_config(), 1, device_type="cpu")


def test_learning_rate_warms_up_and_decays() -> None:
    train = TrainConfig(max_steps=100, warmup_steps=10, lr=1e-3)
    rates = [learning_rate(step, train) for step in range(100)]
    assert rates[0] == pytest.approx(1e-3 / 11)
    assert np.all(np.diff(rates[:11]) > 0)
    assert rates[10] == pytest.approx(1e-3)
    assert np.all(np.diff(rates[10:]) < 0)
    assert rates[99] == pytest.approx(0.05e-3)
    assert learning_rate(0, TrainConfig(max_steps=1, warmup_steps=0, lr=1e-3)) == 1e-3


def test_only_matrices_decay() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.LayerNorm(4))
    decayed, others = parameter_groups(model, 0.1)
    assert [id(p) for p in decayed["params"]] == [id(model[1].weight)]
    assert decayed["weight_decay"] == 0.1 and others["weight_decay"] == 0.0
    assert len(others["params"]) == 4
    model.requires_grad_(False)
    assert parameter_groups(model, 0.1) == []


@pytest.mark.parametrize(("weighting", "ratio"), [("none", 1), ("sqrt", 5**0.5), ("balanced", 5)])
def test_class_weights_have_mean_one_over_cells(weighting: str, ratio: float) -> None:
    counts = np.array([50, 10, 0])
    weights = class_weights(counts, weighting)
    assert (weights * counts).sum() / counts.sum() == pytest.approx(1)
    assert weights[1] / weights[0] == pytest.approx(ratio)
    assert weights[2] == 0


def _batch(num_cells: int, num_slots: int, first_joinid: int = 0) -> dict[str, torch.Tensor]:
    token_ids = torch.arange(2, num_slots + 1).repeat(num_cells, 1)
    token_ids = torch.cat([torch.ones(num_cells, 1, dtype=torch.int64), token_ids], dim=1)
    values = torch.where(token_ids >= 2, 1.0, 0.0)
    bins = (token_ids >= 2).long()
    return {
        "token_ids": token_ids,
        "values": values,
        "bin_ids": bins,
        "joinids": torch.arange(num_cells) + first_joinid,
    }


def test_hidden_slots_depend_only_on_cell_gene_and_step() -> None:
    batch = _batch(200, 101)
    hidden = hidden_slots(batch, 0.3, seed=1, step=5)
    assert not hidden[:, 0].any(), "[CLS] is never hidden"
    assert hidden[:, 1:].float().mean() == pytest.approx(0.3, abs=0.01)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    shuffled = {name: tensor[order] for name, tensor in batch.items()}
    assert torch.equal(hidden_slots(shuffled, 0.3, seed=1, step=5), hidden[order])
    for seed, step in ((1, 6), (2, 5), (1, -1)):
        assert (hidden_slots(batch, 0.3, seed=seed, step=step) & hidden).float().mean() == pytest.approx(
            0.09, abs=0.02
        )
    batch["values"][:, 50:] = 0  # genes of the input mode `all` that were not detected
    assert not hidden_slots(batch, 0.3, seed=1, step=5)[:, 50:].any()


def test_frozen_parameters() -> None:
    model = ScReformer(
        ModelConfig(dim=8, depth=1, heads=2, attention="lsh", bucket_size=4),
        TokensConfig(),
        num_genes=9,
        num_classes=2,
        seed=0,
    )
    freeze_parameters(model, "finetune", freeze_encoder=False, freeze_linear=False)
    frozen = {name for name, param in model.named_parameters() if not param.requires_grad}
    assert {name.split(".")[0] for name in frozen} == {"expression_head", "expression_embedding"}
    freeze_parameters(model, "finetune", freeze_encoder=True, freeze_linear=False)
    trained = {name.split(".")[0] for name, param in model.named_parameters() if param.requires_grad}
    assert trained == {"pooling", "classification_head", "linear_skip"}
    freeze_parameters(model, "finetune", freeze_encoder=False, freeze_linear=True)
    assert not any(
        param.requires_grad for name, param in model.named_parameters() if name.startswith("linear_skip")
    )
    assert model.gene_embedding.weight.requires_grad
