"""What the pre-flight says of a training, next to the training itself."""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from mlflow import MlflowClient

from helpers.local_ray import ONE_READER
from helpers.processes import REPO_ROOT, run_here
from jobs import finetune
from jobs.training.preflight import preflight, train_seconds_per_cell
from jobs.training.prepare import prepare_cells
from screformer.config import ExperimentConfig

pytestmark = pytest.mark.slow  # the training takes minutes of CPU

SETTINGS = {
    # The network is large enough for its own memory to matter next to that of an idle process.
    "model.dim": 384,
    "model.depth": 3,
    "model.heads": 6,
    "model.attention": "full",
    "model.ff_mult": 4,
    "tokens.max_genes": 512,
    "train.micro_batch_size": 16,
    "train.global_batch_size": 16,
    "train.max_steps": 4,
    "train.eval_every_steps": 4,
    "query.obs_filter": "dataset_id == 'sim_blood'",
}


class Compared(NamedTuple):
    """A pre-flight, and what the training took."""

    needs: dict[str, Any]
    num_train: int
    seconds_per_cell: float
    metrics: dict[str, float]
    folder: Path


@pytest.fixture(scope="module")
def compared(small_atlas: str, ray_local: None, tmp_path_factory: pytest.TempPathFactory) -> Compared:
    folder = tmp_path_factory.mktemp("preflight") / "run"
    smoke = REPO_ROOT / "jobs" / "recipes" / "smoke.yaml"
    config = ExperimentConfig.from_file(smoke).merge({**SETTINGS, "atlas.uri": small_atlas})
    cells = prepare_cells(config, "finetune")
    needs = preflight(cells)
    per_cell_s = train_seconds_per_cell(cells.config, len(cells.genes), len(cells.labels["names"]))
    words = ["--config", smoke, f"atlas.uri={small_atlas}", *ONE_READER, "cluster.cpus_per_worker=1"]
    words += [f"{name}={value}" for name, value in SETTINGS.items()]
    result, _ = run_here(finetune.main, *words, "--run-dir", folder, cwd=folder.parent)
    metrics = MlflowClient(os.environ["MLFLOW_TRACKING_URI"]).get_run(result["run_id"]).data.metrics
    return Compared(needs, len(cells.parts["train"]), per_cell_s, metrics, folder)


def _checkpoints(folder: Path) -> list[tuple[dict[str, Any], Path]]:
    found = sorted(folder.glob("attempt-*/checkpoint_*/position.json"))
    return [(json.loads(path.read_text()), path.parent) for path in found]


def test_memory_of_a_worker(compared: Compared) -> None:
    memory = compared.needs["memory_gb_per_worker"]
    own = memory["weights_and_optimizer"] + memory["activations"]
    assert own > 0.4 * memory["process"]
    assert compared.metrics["mem/peak_gb"] == pytest.approx(memory["total"], rel=0.3)


def test_steps_and_epochs(compared: Compared) -> None:
    steps = compared.needs["steps"]
    position, _ = _checkpoints(compared.folder)[-1]
    assert position["global_step"] == steps["max"] == 4 <= steps["per_epoch"]
    assert position["cells_consumed"] / compared.num_train == pytest.approx(steps["epochs"], abs=0.005)


def test_disk_of_the_checkpoints(compared: Compared) -> None:
    """Three are planned for: two that are kept, and one that is being written."""
    sizes = [
        sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        for position, folder in _checkpoints(compared.folder)
        if not position["finished"]
    ]
    assert 3 * sizes[0] / 1e9 == pytest.approx(compared.needs["disk_gb"], rel=0.1)


def test_time_of_an_epoch(compared: Compared) -> None:
    """On a quiet machine."""
    assert 1 / compared.metrics["train/cells_per_s"] == pytest.approx(compared.seconds_per_cell, rel=0.3)
