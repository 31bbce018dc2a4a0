"""Killed training resumes to the same result, even with other workers or another ZeRO stage."""

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers import toy_training
from helpers.processes import environment, start_python
from helpers.toy_training import toy_config
from screformer.config import ExperimentConfig
from screformer.training_checkpoint import damage, read_position

STEPS = {
    "train.max_steps": 12,
    "train.eval_every_steps": 3,
}  # epochs of 5 steps: checkpoints are inside one and at its end


def _start(
    folder: Path, configs: list[ExperimentConfig], *, resume: Path | None = None, delay_s: float = 0.0
) -> list[subprocess.Popen[str]]:
    """Start runs one after another, each on its number of workers; run k saves checkpoints to `saves-k`."""
    folder.mkdir()
    (folder / "configs.json").write_text(json.dumps([config.to_dict() for config in configs]))
    # With an empty PATH, so no compiler or ninja: DeepSpeed must not need them.
    bare = environment(OMP_NUM_THREADS="1", PATH=str(folder))
    size = configs[0].cluster.num_workers
    return [
        start_python(toy_training.__file__, rank, size, folder, resume or "-", delay_s, env=bare)
        for rank in range(size)
    ]


def _finish(folder: Path, processes: list[subprocess.Popen[str]]) -> list[dict[str, Any]]:
    for process in processes:
        assert process.wait(timeout=300) == 0
    return json.loads((folder / "results.json").read_text())


def _losses(run: dict[str, Any]) -> dict[int, float]:
    return {line["step"]: line["train/loss"] for line in run["reported"] if "train/loss" in line}


def _final(run: dict[str, Any]) -> dict[str, float]:
    return {
        key: value
        for line in run["reported"]
        for key, value in line.items()
        if key.startswith(("best_val/", "test/"))
    }


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """An uninterrupted run on two workers, and the newest checkpoint of a twin run that was killed."""
    root = tmp_path_factory.mktemp("resume")
    config = toy_config(**STEPS, **{"cluster.num_workers": 2})
    twin = _start(root / "twin", [config], delay_s=0.5)
    (whole,) = _finish(root / "whole", _start(root / "whole", [config]))
    first, second = (root / "twin" / "saves-0" / f"step-{step:03d}" for step in (3, 6))
    deadline = time.monotonic() + 240
    while damage(second):
        assert time.monotonic() < deadline and all(process.poll() is None for process in twin)
        time.sleep(0.02)
    for process in twin:
        process.send_signal(signal.SIGKILL)
    assert [process.wait() for process in twin] == [-signal.SIGKILL] * 2
    assert not (root / "twin" / "results.json").exists(), "it was killed before its end"
    assert not damage(first)
    position = read_position(second)
    assert (
        position["global_step"],
        position["epoch"],
        position["step_in_epoch"],
        position["cells_consumed"],
    ) == (6, 1, 1, 8)
    return whole, second


CASES: dict[str, tuple[int, dict[str, Any], bool]] = {
    # workers, other settings, whether bit-identical
    "same layout, from DeepSpeed's shards": (2, {}, True),
    "one worker, from the consolidated state": (1, {}, False),
    "another ZeRO stage": (2, {"zero.stage": 3}, False),
}


@pytest.fixture(scope="module")
def resumed(
    killed: tuple[dict[str, Any], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    root, (_, checkpoint) = tmp_path_factory.mktemp("resumed"), killed
    started = {}
    for world_size in (1, 2):
        cases = {name: overrides for name, (size, overrides, _) in CASES.items() if size == world_size}
        configs = [
            toy_config(**STEPS, **{"cluster.num_workers": world_size}, **overrides)
            for overrides in cases.values()
        ]
        folder = root / str(world_size)
        started[folder] = list(cases), _start(folder, configs, resume=checkpoint)
    return {
        name: result
        for folder, (names, processes) in started.items()
        for name, result in zip(names, _finish(folder, processes), strict=True)
    }


@pytest.mark.parametrize("case", CASES)
def test_resumed_equals_uninterrupted(
    killed: tuple[dict[str, Any], Path], resumed: dict[str, dict[str, Any]], case: str
) -> None:
    (whole, _), found, exact = killed, resumed[case], CASES[case][2]
    losses = _losses(found)
    assert list(losses) == [7, 8, 9, 10, 11, 12]
    expected = {step: loss for step, loss in _losses(whole).items() if step > 6}
    if exact:
        assert losses == expected
        assert found["weights"] == whole["weights"]
        assert _final(found) == _final(whole)
        return
    np.testing.assert_allclose(list(losses.values()), list(expected.values()), rtol=1e-5)
    for name, weights in whole["weights"].items():
        if name not in ("pooling.score.bias", "pooling.score_norm.bias"):  # see test_zero.py
            np.testing.assert_allclose(found["weights"][name], weights, rtol=1e-3, atol=5e-4, err_msg=name)
    for name, value in _final(whole).items():
        assert _final(found)[name] == pytest.approx(value, rel=1e-4)
