"""Resources a study reserves on a cluster, and the search space in Ray Tune's terms."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from jobs.training.launch import check_layout
from screformer.config import ExperimentConfig, setting_name, touching

DRIVER_CPUS = 0.01
"""CPUs a trial's driver reserves; Ray Tune rejects a trial that reserves nothing."""


BASELINE_CPUS = 1
"""CPUs of the task that fits a baseline; one runs at a time."""


_DRAWN = re.compile(r"(uniform|loguniform|randint)\(\s*([^,]+)\s*,\s*([^,]+)\s*\)")


def num_cpus(config: ExperimentConfig) -> float:
    """Most CPUs a study reserves at any time."""
    cluster, trials = config.cluster, config.crossval.concurrent_trials
    return (
        trials
        * (DRIVER_CPUS + config.crossval.concurrent_folds * cluster.num_workers * cluster.cpus_per_worker)
        + cluster.cpus_per_read_task
        + (BASELINE_CPUS if config.crossval.baselines else 0)
    )


def check_study_layout(config: ExperimentConfig, nodes: Sequence[dict[str, Any]]) -> None:
    """Refuse a study that can never fit on the cluster, before anything starts.

    A study's peak reservation must fit all at once; this rules out deadlock.

    Args:
        config: The recipe.
        nodes: As returned by `ray.nodes()`.

    Raises:
        ValueError: Too few CPUs or GPUs, with the sum.
    """
    cluster, trials, folds = (
        config.cluster,
        config.crossval.concurrent_trials,
        config.crossval.concurrent_folds,
    )
    check_layout(config, nodes)
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    cpus, gpus = (sum(float(node.get(kind, 0)) for node in alive) for kind in ("CPU", "GPU"))
    needed, workers = num_cpus(config), trials * folds * cluster.num_workers
    if needed > cpus + 1e-9:
        baselines = f" + {BASELINE_CPUS} for a baseline" if config.crossval.baselines else ""
        raise ValueError(
            f"crossval.concurrent_trials={trials} x (driver {DRIVER_CPUS} + crossval.concurrent_folds={folds}"
            f" x cluster.num_workers={cluster.num_workers} x"
            f" cpus_per_worker={cluster.cpus_per_worker:g}) + one read task of"
            f" {cluster.cpus_per_read_task:g}{baselines} = {needed:g} CPUs, but Ray has {cpus:g};"
            f" lower one of them or add nodes"
        )
    if cluster.use_gpu and workers > gpus:
        raise ValueError(
            f"crossval.concurrent_trials={trials} x crossval.concurrent_folds={folds} x"
            f" cluster.num_workers={cluster.num_workers} need"
            f" {workers} GPUs, but Ray has {gpus:g}; lower one of them, or set cluster.use_gpu=false"
        )


def search_space(config: ExperimentConfig) -> dict[str, Any]:
    """The search space of a recipe in Ray Tune's terms, by setting.

    Raises:
        ValueError: An unknown setting, a setting that all configurations of a search share, an invalid
            value, or a range where `grid` needs a list.
    """
    from ray import tune

    space: dict[str, Any] = {}
    for name, values in config.search.space.items():
        if setting_name(name) in touching("cells"):
            raise ValueError(
                f"search.space.{name} changes cells, labels or folds, which all configurations of a search"
                f" share; vary it in an ablation, or run one cross-validation per value"
            )
        drawn = _DRAWN.fullmatch(values.strip()) if isinstance(values, str) else None
        if drawn:
            if config.search.algorithm == "grid":
                raise ValueError(
                    f"search.space.{name}={values} is a range, which search.algorithm=grid cannot list; use"
                    f" random or optuna"
                )
            kind, low, high = drawn[1], float(drawn[2]), float(drawn[3])
            probes: list[Any] = [int(low)] if kind == "randint" else [low, high]
            space[name] = (
                tune.randint(int(low), int(high)) if kind == "randint" else getattr(tune, kind)(low, high)
            )
        elif isinstance(values, list) and values:
            probes = values
            space[name] = (
                tune.grid_search(values) if config.search.algorithm == "grid" else tune.choice(values)
            )
        else:
            raise ValueError(
                f"search.space.{name}={values} must be a list, for example [2, 4], or uniform(a, b),"
                f" loguniform(a, b), randint(a, b)"
            )
        for value in probes:
            config.merge({name: value})
    return space


def fold_bundle(config: ExperimentConfig) -> dict[str, float]:
    """Resources the process of a fold reserves; none if Ray Train's workers reserve their own."""
    cluster = config.cluster
    if cluster.num_workers > 1:
        return {}
    return {"CPU": cluster.cpus_per_worker} | ({"GPU": 1} if cluster.use_gpu else {})


def count_trials(config: ExperimentConfig) -> int:
    """Number of configurations a search tries; raises like `search_space`."""
    space = search_space(config)
    if config.search.algorithm != "grid" and space:
        return config.search.num_samples
    return math.prod(len(values["grid_search"]) for values in space.values())
