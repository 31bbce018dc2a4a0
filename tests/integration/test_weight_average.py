"""The average of the weights is validated and saved, and survives a resume."""

from pathlib import Path

import pytest
import torch

from helpers.toy_training import join_group, toy_config, train
from screformer.weight_average import WeightAverage

AVERAGED = {"train.weight_average": 0.9, "train.max_steps": 6, "train.eval_every_steps": 3}


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A group of one, never closed: DeepSpeed supports one process group per process."""
    if not torch.distributed.is_initialized():
        join_group(0, 1, str(tmp_path_factory.mktemp("group") / "store"))


def test_average_follows_its_formula() -> None:
    class Engine:
        module = torch.nn.Linear(1, 1, bias=False)
        device = "cpu"

    weight = Engine.module.weight
    with torch.no_grad():
        weight.fill_(1.0)
    average, expected = WeightAverage(Engine(), 0.5), 1.0
    for step, value in enumerate((2.0, 4.0, -3.0, 5.0, 6.0, 1.0, 1.0, 9.0, 2.0, 7.0)):
        with torch.no_grad():
            weight.fill_(value)
        average.add(step)
        decay = min(0.5, (step + 1) / (step + 10))
        expected = decay * expected + (1 - decay) * value
    assert average.state()["weight"].item() == pytest.approx(expected)
    with average.in_use():
        assert weight.item() == pytest.approx(expected)
    assert weight.item() == 7.0


def test_resumed_run_keeps_the_average(tmp_path: Path) -> None:
    config = toy_config(**AVERAGED)
    whole, lines = train(config, "finetune", 0, 1, save_in=tmp_path)
    resumed, _ = train(config, "finetune", 0, 1, resume=tmp_path / "step-003")
    for name, weight in whole.weights.items():
        assert torch.equal(resumed.weights[name], weight), name
    plain, plain_lines = train(config.merge({"train.weight_average": 0.0}), "finetune", 0, 1)
    losses, plain_losses = (
        [line["train/loss"] for line in run if "train/loss" in line] for run in (lines, plain_lines)
    )
    assert losses == plain_losses, "the average does not change the steps"
    assert any(not torch.equal(plain.weights[name], weight) for name, weight in whole.weights.items())


def test_additive_encoder_trains() -> None:
    overrides = {"model.encoder": "additive", "model.linear_skip": False, "model.attention": "none"}
    outcome, lines = train(toy_config(**{**AVERAGED, **overrides, "train.max_steps": 30}), "finetune", 0, 1)
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert losses[-1] < losses[0]
    assert outcome.val is not None and outcome.val.macro_f1 > 0.5
