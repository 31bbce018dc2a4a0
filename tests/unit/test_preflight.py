"""What cannot fit is refused with the arithmetic and the setting to change."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from helpers.processes import REPO_ROOT
from jobs.training.preflight import preflight_line, refuse_what_cannot_fit
from jobs.training.scaling import stream_needs
from screformer.config import ExperimentConfig

CONFIG = ExperimentConfig().merge({"cluster.num_workers": 2, "train.micro_batch_size": 16})
NEEDS: dict[str, Any] = {
    "steps": {"max": 100, "per_epoch": 40, "epochs": 2.5},
    "parameters": 1_000_000_000,
    "memory_gb_per_worker": {
        "process": 0.7,
        "weights_and_optimizer": 16.0,
        "activations": 4.0,
        "total": 20.7,
    },
    "disk_gb": 84.0,
}


def test_a_network_larger_than_the_nodes() -> None:
    message = (
        r"2 workers with 16.0 GB of weights and optimizer and 4.0 GB of activations each = 40.0 GB, but the"
        r" nodes have 31.5 GB; lower train.micro_batch_size=16, .* raise zero.stage=0, or add nodes"
    )
    with pytest.raises(ValueError, match=message):
        refuse_what_cannot_fit(CONFIG, NEEDS, "s3://bucket/runs", [16e9, 15.5e9])
    for fits in (CONFIG.merge({"cluster.num_workers": 1}), CONFIG.merge({"cluster.use_gpu": True})):
        refuse_what_cannot_fit(fits, NEEDS, "s3://bucket/runs", [16e9, 15.5e9])


def test_checkpoints_larger_than_the_disk(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free / 1e9
    refuse_what_cannot_fit(CONFIG, {**NEEDS, "disk_gb": free / 2}, str(tmp_path / "new"), [])
    message = r"3 checkpoints of 1000000000 parameters x 28 bytes = .* GB free; free some space, or set"
    with pytest.raises(ValueError, match=message):
        refuse_what_cannot_fit(CONFIG, {**NEEDS, "disk_gb": free + 1}, str(tmp_path / "new"), [])


def test_the_line_of_a_run() -> None:
    nodes = [
        {"Alive": True, "Resources": {"object_store_memory": 2e9}},
        {"Alive": False, "Resources": {"object_store_memory": 9e9}},
    ]
    assert preflight_line(NEEDS, nodes) == (
        "needs about 20.7 GB of memory per worker and 84.0 GB of disk for checkpoints; object store 2.0 GB;"
        " 100 steps, 2.5 epochs"
    )


def test_what_a_stream_needs() -> None:
    plan = {"num_cells": 3_600_000, "counts_per_cell": 1000, "cells_per_s": 1000, "num_workers": 2}
    needs = stream_needs(**plan, source="atlas")
    assert needs["hours_per_epoch"] == 1 and needs["cache_gb"] == pytest.approx(10.944)
    assert needs["reader_cores"] == pytest.approx(0.064) and needs["read_tasks_per_worker"] == 1
    faster = stream_needs(**{**plan, "cells_per_s": 40_000}, source="atlas")
    assert faster["read_tasks_per_worker"] == 2 and faster["most_cells_per_s"] == pytest.approx(50_000)
    cached = stream_needs(**plan, source="cache")
    assert cached["reader_cores"] < needs["reader_cores"] / 4
    assert cached["requests_per_s"] < needs["requests_per_s"] / 10


def test_the_page_on_large_trainings_has_its_numbers() -> None:
    page = (REPO_ROOT / "docs" / "scaling.md").read_text()
    names = ("hours_per_epoch", "reader_cores", "read_tasks_per_worker", "requests_per_s")
    names += ("reader_memory_gb", "object_store_gb")
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if re.match(r"\| \d+ \|", line)]
    assert len(rows) == 16
    for workers, speed, source, *shown in rows:
        total = int(workers) * float(speed.replace(",", ""))
        needs = stream_needs(
            num_cells=10**8,
            counts_per_cell=1100,
            cells_per_s=total,
            num_workers=int(workers),
            source=source,
        )
        for name, text in zip(names, shown, strict=True):
            assert float(text.replace(",", "")) == pytest.approx(needs[name], rel=0.01, abs=0.06), name
