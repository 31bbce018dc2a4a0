"""scReformer-BERT: tokens, model, training, metrics and prediction, free of Ray, MLflow and SOMA.

`screformer.annotate(adata, model=...)` labels cells in memory; see `jobs.annotate.annotate_adata`.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__all__ = ["annotate"]


def __getattr__(name: str) -> Any:
    """Give `annotate` on first use.

    It needs the registry, which a process that only predicts does without.
    """
    if name == "annotate":
        return import_module("jobs.annotate").annotate_adata
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
