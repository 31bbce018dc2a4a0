"""Time whole processes that label a file: `screformer annotate` and CellTypist.

CellTypist's published models would have to be downloaded, so one with about as many genes is trained here on
the file's own cells. The peer's process normalises the counts, as CellTypist's documentation advises, and
labels without majority voting, like ours.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import anndata
import numpy as np
from scipy import sparse

from jobs.benchmark.timing import Times
from screformer.labelling import annotate

OURS, PEER = "screformer annotate", "CellTypist"

_TRAINING_CELLS, _GENES_PER_TYPE = 2_000, 500

_PEER = """
import sys
import anndata, celltypist, scanpy
source, model, target = sys.argv[1:]
cells = anndata.read_h5ad(source)
scanpy.pp.normalize_total(cells, target_sum=1e4)
scanpy.pp.log1p(cells)
celltypist.annotate(cells, model=model).to_adata().write_h5ad(target)
"""


def measure(path: Path, *, num_cells: int | None, rounds: int) -> dict[str, object]:
    """Run both in turn, print a table, and return the numbers.

    Args:
        path: A .h5ad file with raw counts in X.
        num_cells: Cells to label, repeating the file's if needed; None labels those of the file.
        rounds: Runs of each.

    Raises:
        RuntimeError: A process failed; the message includes the end of its output.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        cells = anndata.read_h5ad(path)
        _train_peer(cells, folder / "peer.pkl")
        num_cells = _write(cells, num_cells or cells.n_obs, folder / "in.h5ad")
        del cells
        commands = {
            OURS: ["-m", "jobs.annotate", "--h5ad", "in.h5ad", "--out", "ours.h5ad", "--overwrite"],
            PEER: ["-c", _PEER, "in.h5ad", "./peer.pkl", "peer.h5ad"],
        }
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        peak_mib = dict.fromkeys(commands, 0.0)
        for _ in range(rounds):
            for name, command in commands.items():
                taken, peak = _run(command, folder)
                seconds[name].append(taken)
                peak_mib[name] = max(peak_mib[name], peak)
    return _result(Times(seconds), peak_mib, num_cells)


def _result(times: Times, peak_mib: Mapping[str, float], num_cells: int) -> dict[str, object]:
    for name in times.rounds:
        print(
            f"{name:<20} {times.seconds(name):7.1f} s  {num_cells / times.seconds(name):9,.0f} cells/s"
            f"  {peak_mib[name]:8,.0f} MiB"
        )
    return {
        "benchmark": "annotate",
        "cells": num_cells,
        "cores": len(os.sched_getaffinity(0)),
        "seconds": {name: [round(s, 2) for s in values] for name, values in times.rounds.items()},
        "cells_per_s": {name: round(num_cells / times.seconds(name)) for name in times.rounds},
        "peak_mib": {name: round(value) for name, value in peak_mib.items()},
        "over_celltypist": round(times.ratio(PEER, OURS), 2),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "celltypist", "anndata")},
    }


def _train_peer(cells: anndata.AnnData, target: Path) -> None:
    """Train a CellTypist model on some of the cells, with the labels that our model gives them."""
    import celltypist
    import scanpy

    some = cells[:_TRAINING_CELLS].copy()
    labels = annotate(some).obs["best_label"].astype(str).to_numpy()
    scanpy.pp.normalize_total(some, target_sum=1e4)
    scanpy.pp.log1p(some)
    model = celltypist.train(
        some,
        labels=labels,
        use_SGD=True,  # the other solver needs an older scikit-learn
        feature_selection=True,
        top_genes=_GENES_PER_TYPE,
        check_expression=False,
        n_jobs=1,
        max_iter=100,
    )
    model.write(str(target))


def _write(cells: anndata.AnnData, num_cells: int, target: Path) -> int:
    """Write the first cells, repeated if there are too few."""
    rows = np.arange(num_cells) % cells.n_obs
    counts = sparse.csr_matrix(cells.X)[rows]
    copy = anndata.AnnData(counts, var=cells.var)
    copy.obs_names = [f"cell{row}" for row in range(num_cells)]
    copy.write_h5ad(target)
    return num_cells


def _run(command: Sequence[str], folder: Path) -> tuple[float, float]:
    """Seconds and peak memory in MiB of a Python process."""
    peak_kib = 0
    with (folder / "output").open("w+") as output:
        start = time.perf_counter()
        process = subprocess.Popen([sys.executable, *command], cwd=folder, stdout=output, stderr=output)
        while process.poll() is None:
            # Not getrusage: its peak includes the parent's memory.
            found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())
            peak_kib = max(peak_kib, int(found[1]) if found else 0)
            time.sleep(0.05)
        taken = time.perf_counter() - start
        if process.returncode:
            output.seek(0)
            raise RuntimeError(f"{' '.join(command[:2])} failed: {output.read()[-2000:]}")
    return taken, peak_kib / 1024
