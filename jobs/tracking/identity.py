"""Identify the code, packages and machine of a run."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import screformer

_PACKAGES = (
    "torch",
    "deepspeed",
    "ray",
    "tiledbsoma",
    "cellxgene-census",
    "mlflow",
    "numpy",
    "scipy",
    "pandas",
    "pyarrow",
    "safetensors",
)


def code_identity() -> dict[str, Any]:
    """Version, git revision, package versions and host facts of this process, as plain values."""
    root = Path(screformer.__file__).resolve().parents[1]
    gpus: list[str] = []
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "screformer": package_version("screformer"),
        "git": git_revision(root),
        "python": platform.python_version(),
        "packages": {name: package_version(name) for name in _PACKAGES},
        "host": {
            "platform": platform.platform(),
            "cpus": os.cpu_count(),
            "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            "gpus": gpus,
        },
    }


def package_version(package: str) -> str:
    """Version of an installed package, or `not installed`."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def git_revision(root: Path) -> str:
    """Commit of the source tree, with `+changes` if tracked files differ from it."""
    try:
        ask = [
            ["git", "-C", str(root), *words]
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
        revision, status = (
            subprocess.run(words, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
            for words in ask
        )
    except (OSError, subprocess.SubprocessError):
        return "not a git checkout"
    return revision + ("+changes" if status else "")
