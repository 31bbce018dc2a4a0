"""Ray Tune: each configuration is a trial that trains its folds in reused workers.

A trial is a driver that needs almost no resources. Its folds are trained by actors that it owns. They keep
their imports, process group and data connections from fold to fold and end with the trial, so a stopped trial
frees everything. After each fold the trial reports the mean of the folds so far, so schedulers compare
configurations on the same folds.

A trial's driver does not load the study or the training code, which take seconds and hundreds of megabytes;
both are imported where they are used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import ray
from ray.util.actor_pool import ActorPool
from ray.util.placement_group import get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.quiet import quiet_data

if TYPE_CHECKING:
    from jobs.studies.study import Study
    from screformer.config import ExperimentConfig


class _Work(NamedTuple):
    """What a trial's driver needs of its study."""

    study: ray.ObjectRef
    """Loaded by the workers."""
    num_folds: int
    num_workers: int
    bundle: dict[str, float]
    """Resources of each worker."""


def run_trials(study: Study, space: Mapping[str, Any], *, num_samples: int = 1) -> list[dict[str, Any]]:
    """Run configurations over the folds, and return the settings of each in the order they were started.

    Args:
        study: A study with a parent run.
        space: Setting to values, in Ray Tune's terms; `{"settings": tune.grid_search([...])}` lists whole
            configurations.
        num_samples: Number of configurations to draw if the space is sampled.

    Raises:
        RuntimeError: A trial failed; the first one's error.
    """
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler

    from jobs.studies.layout import DRIVER_CPUS, fold_bundle

    search = study.config.search
    scheduler = None
    if search.scheduler == "asha":
        scheduler = ASHAScheduler(
            time_attr="folds", max_t=len(study.folds), grace_period=1, reduction_factor=2
        )
    algorithm: Any
    if search.algorithm == "optuna" and search.space:
        algorithm = _optuna(study.config)
    else:
        from ray.tune.search.basic_variant import BasicVariantGenerator

        algorithm = BasicVariantGenerator(
            random_state=study.config.train.seed, max_concurrent=study.config.crossval.concurrent_trials
        )
    bundle = fold_bundle(study.config)
    bundles = [{"CPU": DRIVER_CPUS}] + [bundle] * (study.config.crossval.concurrent_folds if bundle else 0)
    num_workers = min(study.config.crossval.concurrent_folds, len(study.folds))
    work = _Work(ray.put(study), len(study.folds), num_workers, bundle)
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(_trial, work=work), tune.PlacementGroupFactory(bundles)),
        param_space=dict(space),
        tune_config=tune.TuneConfig(
            metric="macro_f1",
            mode="max",
            search_alg=algorithm,
            scheduler=scheduler,
            num_samples=num_samples,
            max_concurrent_trials=study.config.crossval.concurrent_trials
            if search.algorithm == "optuna" and search.space
            else None,
        ),
        run_config=tune.RunConfig(name="tune", storage_path=str(study.run_dir), verbose=0),
    )
    results = tuner.fit()
    if results.errors:
        raise RuntimeError(
            f"a trial failed; finished folds are kept: {str(results.errors[0]).strip().splitlines()[-1]}"
        )
    return [settings_of(result.config) for result in results]


def settings_of(trial_config: Mapping[str, Any]) -> dict[str, Any]:
    """The overrides of a trial."""
    return dict(trial_config["settings"]) if "settings" in trial_config else dict(trial_config)


def _trial(trial_config: dict[str, Any], work: _Work) -> None:
    from ray import tune

    settings = settings_of(trial_config)
    # Uses the trial's reservation; whatever the workers start (read tasks, Ray Train's workers) is outside
    # it.
    inside = PlacementGroupSchedulingStrategy(
        get_current_placement_group(), placement_group_capture_child_tasks=False
    )
    worker = _FoldWorker.options(  # type: ignore[attr-defined]
        num_cpus=work.bundle.get("CPU", 0),
        num_gpus=work.bundle.get("GPU", 0),
        scheduling_strategy=inside,
    )
    workers = [worker.remote(work.study) for _ in range(work.num_workers)]
    # Folds are reported in order: each report covers the same folds in every trial.
    values: list[float] = []
    for macro_f1 in ActorPool(workers).map(
        lambda actor, fold: actor.run.remote(settings, fold), range(work.num_folds)
    ):
        values.append(macro_f1)
        tune.report(
            {
                "folds": len(values),
                "macro_f1": float(np.mean(values)),
                "macro_f1_sd": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0,
            }
        )


@ray.remote(max_restarts=0)
class _FoldWorker:
    """Trains folds one after another in one process."""

    def __init__(self, study: Study) -> None:
        quiet_data()
        self._study = study

    def run(self, settings: dict[str, Any], fold: int) -> float:
        """Macro-F1 of a fold's test cells."""
        from jobs.studies.fold import run_fold
        from jobs.studies.scores import scores

        return scores(run_fold(self._study, settings, fold), self._study)["macro_f1"]


def _optuna(config: ExperimentConfig) -> Any:
    try:
        import optuna  # noqa: F401
        from ray.tune.search.optuna import OptunaSearch
    except ImportError as error:
        raise ValueError(
            "search.algorithm=optuna needs the package optuna; pip install 'screformer[search]', or use"
            " random"
        ) from error
    return OptunaSearch(metric="macro_f1", mode="max", seed=config.train.seed)
