"""A training that needs more memory than its node has left ends with the setting to change."""

import re
from pathlib import Path

import psutil
import pytest

from helpers.processes import REPO_ROOT, environment, run_python

NEEDED, LEFT = 5e9, 2e9
"""Bytes that the activations of a micro-batch take, and that Ray's processes may take before it kills one."""


@pytest.mark.slow  # fills gigabytes, and needs a machine where nothing else does
def test_a_worker_out_of_memory(small_atlas: str, tmp_path: Path) -> None:
    memory = psutil.virtual_memory()
    assert memory.available > LEFT, "this machine has too little memory for the test"
    share = (memory.total - memory.available + LEFT) / memory.total
    words = ["--config", REPO_ROOT / "jobs" / "recipes" / "smoke.yaml", f"atlas.uri={small_atlas}"]
    words += ["model.attention=full", "model.reversible=false", "model.dim=256", "model.depth=4"]
    words += ["tokens.max_genes=512", "train.micro_batch_size=128", "train.global_batch_size=128"]
    words += ["cluster.max_failures=0", f"cluster.storage_path={tmp_path}"]
    done = run_python(
        "-m",
        "jobs.finetune",
        *words,
        cwd=tmp_path,
        env=environment(RAY_memory_usage_threshold=f"{share:.3f}", RAY_memory_monitor_refresh_ms="100"),
        status=1,
    )
    assert re.search(
        r"(rank 0 or a task that reads cells for it|the process that controls the workers)"
        r" was killed because node \S+ ran out of memory"
        rf" \(\S+ of \S+ used\); resume with --resume {tmp_path}/finetune-\S+ train.micro_batch_size=64, or"
        r" spread the workers over more nodes$",
        done.stderr.strip(),
    ), done.stderr
