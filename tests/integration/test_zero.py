"""Two real gloo workers: results do not depend on ZeRO stage, reversibility or number of workers."""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.toy_training import join_group, toy_config, train

GOLDEN = Path(__file__).parents[1] / "golden" / "toy_training.json"
DROPOUT = {"model.dropout": 0.1}
"""Stages and reversible blocks must draw the same random numbers too."""
TWO_WORKERS: dict[str, tuple[str, dict[str, Any]]] = {
    "finetune_zero0": ("finetune", {}),
    **{f"zero{stage}": ("finetune", {"zero.stage": stage, **DROPOUT}) for stage in range(4)},
    "irreversible": ("finetune", {"model.reversible": False, **DROPOUT}),
    "irreversible_zero3": ("finetune", {"model.reversible": False, "zero.stage": 3, **DROPOUT}),
    "pretrain_zero0": ("pretrain", {}),
    "pretrain_zero3": ("pretrain", {"zero.stage": 3}),
}
ONE_WORKER: dict[str, tuple[str, dict[str, Any]]] = {
    "finetune": ("finetune", {}),
    "again": ("finetune", {}),
    "pretrain": ("pretrain", {}),
    "one_micro_batch": ("finetune", {"train.micro_batch_size": 8}),
}
UNDETERMINED = ("pooling.score.bias", "pooling.score_norm.bias")
"""They shift all scores of a softmax alike, so their gradient is only rounding, which Adam scales to full
steps."""
NOISE = 2e-4
"""A hundredth of how far training moves a weight."""


def _work(rank: int, world_size: int, store: str, out: str) -> None:
    join_group(rank, world_size, store)
    results = {}
    for name, (task, overrides) in (TWO_WORKERS if world_size == 2 else ONE_WORKER).items():
        outcome, lines = train(
            toy_config(**{"cluster.num_workers": world_size, **overrides}), task, rank, world_size
        )
        results[name] = {
            "losses": [line["train/loss"] for line in lines if "train/loss" in line],
            "final": {
                key: value
                for line in lines
                for key, value in line.items()
                if key.startswith(("val/", "best_val/", "test/"))
            },
            "weights": {key: tensor.flatten().tolist() for key, tensor in outcome.weights.items()},
        }
    if rank == 0:
        Path(out).write_text(json.dumps(results))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The reports and weights of each case."""
    return run_all(tmp_path_factory.mktemp("zero"))


def run_all(folder: Path) -> dict[str, Any]:
    """Run each in a separate process: DeepSpeed supports one process group per process."""
    started = [
        torch.multiprocessing.spawn(
            _work,
            args=(size, str(folder / f"store{size}"), str(folder / f"{size}.json")),
            nprocs=size,
            join=False,
        )
        for size in (1, 2)
    ]
    for context in started:
        while not context.join():
            pass
    return {
        name: result
        for size in (1, 2)
        for name, result in json.loads((folder / f"{size}.json").read_text()).items()
    }


def _assert_same(found: dict[str, Any], reference: dict[str, Any]) -> None:
    np.testing.assert_allclose(found["losses"], reference["losses"], rtol=1e-5)
    for key, value in reference["final"].items():
        assert found["final"][key] == pytest.approx(value, rel=1e-4, abs=1e-6), key
    for key, weights in reference["weights"].items():
        if key not in UNDETERMINED:
            np.testing.assert_allclose(found["weights"][key], weights, rtol=1e-3, atol=NOISE, err_msg=key)


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "irreversible", "irreversible_zero3"])
def test_stages_and_reversibility_learn_the_same(runs: dict[str, Any], name: str) -> None:
    _assert_same(runs[name], runs["zero0"])


def test_stage_3_pretrains_the_same(runs: dict[str, Any]) -> None:
    _assert_same(runs["pretrain_zero3"], runs["pretrain_zero0"])


@pytest.mark.parametrize(
    ("alone", "together"), [("finetune", "finetune_zero0"), ("pretrain", "pretrain_zero0")]
)
def test_one_worker_equals_two(runs: dict[str, Any], alone: str, together: str) -> None:
    _assert_same(runs[alone], runs[together])
    losses = runs[alone]["losses"]
    assert len(losses) == 6
    assert np.mean(losses[3:]) < np.mean(losses[:3]), "it learns"


def test_micro_batches_do_not_change_the_result(runs: dict[str, Any]) -> None:
    _assert_same(runs["one_micro_batch"], runs["finetune"])


def test_a_run_repeats_to_the_bit(runs: dict[str, Any]) -> None:
    assert runs["again"] == runs["finetune"]


def curves(runs: dict[str, Any]) -> dict[str, Any]:
    """Losses of each step, and the scores at the end."""
    return {name: {key: runs[name][key] for key in ("losses", "final")} for name in ("finetune", "pretrain")}


def test_golden_curves(runs: dict[str, Any]) -> None:
    for name, expected in json.loads(GOLDEN.read_text()).items():
        np.testing.assert_allclose(runs[name]["losses"], expected["losses"], rtol=1e-6)
        assert runs[name]["final"] == pytest.approx(expected["final"], rel=1e-6), name


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        GOLDEN.write_text(json.dumps(curves(run_all(Path(scratch))), indent=1) + "\n")
