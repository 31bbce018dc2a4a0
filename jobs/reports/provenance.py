"""The last section of every report: data, code version and settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import pandas as pd

from jobs.reports.artifacts import read_config, read_identity
from jobs.reports.page import Report
from jobs.tracking.logged import LoggedRun
from jobs.tracking.naming import flat
from screformer.config import ExperimentConfig


def add_provenance(report: Report, run: LoggedRun) -> None:
    """Add the section: atlas, query, split, code, settings, packages."""
    identity = read_identity(run)
    query, split, code = identity.get("query", {}), split_of(identity), identity.get("code", {})
    atlas = query.get("atlas", {})
    report.section("Provenance")
    rows = {"job": run.tags.get("job"), "run": run.run_id, "tracking store": run.store}
    rows["model"] = identity.get("model")
    source = identity.get("source")
    if isinstance(source, Mapping):
        rows |= {f"cells: {name}": value for name, value in flat(source).items()}
    if query:
        filters = query.get("obs_filter") or "every cell"
        if query.get("is_primary_data"):
            filters += ", primary data only"
        version = atlas.get("timestamp_ms")
        rows |= {
            "atlas": atlas.get("uri"),
            "atlas version": datetime.fromtimestamp(version / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
            if version
            else None,
            "cells": filters,
            "genes": query.get("var_filter") or "every gene",
            "query hash": query.get("hash"),
        }
    for part, number in split.get("cells", {}).items():
        rows[f"{part} cells"] = f"{number:,} ({split['group_by']}: {listed(split['groups'].get(part, []))})"
    if code:
        rows |= {
            "screformer": f"{code['screformer']} ({code['git']})",
            "Python": code["python"],
            "machine": _machine(code["host"]),
        }
    named = [(name, str(value)) for name, value in rows.items() if value not in (None, "")]
    report.table("", pd.DataFrame(named, columns=["what", "value"]))
    changed = changed_settings(read_config(run))
    if len(changed):
        report.table("Settings that differ from the defaults", changed)
    if code.get("packages"):
        report.table(
            "Packages", pd.DataFrame(sorted(code["packages"].items()), columns=["package", "version"])
        )


def split_of(identity: Mapping[str, Any]) -> dict[str, Any]:
    """The split in a run's identity; None for a study, which records the kind of its folds there."""
    split = identity.get("split")
    return split if isinstance(split, dict) else {}


def listed(names: Sequence[object], most: int = 8) -> str:
    """The first few names, separated by commas."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(str(name) for name in names[:most]) + more


def changed_settings(config: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """Settings of a plain configuration that differ from today's defaults: `setting`, `value`, `default`."""
    defaults = ExperimentConfig().to_dict()
    rows = [
        (f"{section}.{name}", str(value), str(defaults.get(section, {}).get(name, "no longer a setting")))
        for section, fields in config.items()
        for name, value in fields.items()
        if value != defaults.get(section, {}).get(name)
    ]
    return pd.DataFrame(rows, columns=["setting", "value", "default"])


def _machine(host: Mapping[str, Any]) -> str:
    gpus = f", {len(host['gpus'])} x {host['gpus'][0]}" if host.get("gpus") else ""
    return f"{host['platform']}, {host['cpus']} CPUs, {host['memory_gb']} GB{gpus}"
