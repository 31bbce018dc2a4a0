"""Names of runs, datasets and tags in MLflow."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from screformer.config import ExperimentConfig

_DIGEST = 36
"""MLflow's limit on the length of a dataset digest."""


def run_name(job: str, what: str) -> str:
    """Job, input and start time: `finetune blood, tissue_general == 'lung', 2026-11-26 17:40`."""
    return f"{job} {what}".strip() + f", {datetime.now().astimezone():%Y-%m-%d %H:%M}"


def cells_of(config: ExperimentConfig) -> str:
    """Describe the cells of a configuration briefly: the name of the atlas and the query."""
    atlas, query = config.atlas.uri.rstrip("/"), config.query.file or config.query.obs_filter
    shown = query.rpartition("/")[2] if config.query.file else query
    parts = [atlas.rpartition("/")[2], textwrap.shorten(shown, 60, placeholder=" ...")]
    return ", ".join(part for part in parts if part)


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings; names are joined by dots."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            found.update(flat(value, f"{prefix}{name}."))
        else:
            found[f"{prefix}{name}"] = value
    return found


def dataset(query: Mapping[str, Any]) -> dict[str, Any]:
    """Describe the run's dataset for MLflow: the atlas and its version, with the query's hash as digest."""
    atlas = query.get("atlas", {})
    uri = str(atlas.get("uri", ""))
    version = f"@{atlas['timestamp_ms']}" if atlas.get("timestamp_ms") else ""
    return {
        "name": f"{uri.rstrip('/').rpartition('/')[2] or 'atlas'}{version}",
        "digest": str(query["hash"])[:_DIGEST],
        "source": {
            "uri": uri,
            **{name: query[name] for name in ("obs_filter", "var_filter") if name in query},
        },
        "profile": {"cells": query.get("num_cells"), "timestamp_ms": atlas.get("timestamp_ms")},
    }
