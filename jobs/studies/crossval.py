"""Run a cross-validation: trials and baselines over the same folds."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import ray
import yaml

from jobs.studies.baseline_folds import run_baselines
from jobs.studies.baselines import BASELINES, check_names
from jobs.studies.curve import curve_settings, run_curve
from jobs.studies.estimate import describe_study
from jobs.studies.fold import register_final
from jobs.studies.layout import count_trials, fold_bundle, search_space
from jobs.studies.opening import opened
from jobs.studies.report import log_report, verdict, write_crossval_report
from jobs.studies.results import FoldResult, results_of
from jobs.studies.scores import fold_scores, scores
from jobs.studies.study import Study, open_study
from jobs.studies.trials import run_trials
from screformer.config import ExperimentConfig
from screformer.metrics import OURS


def run_crossval(
    config: ExperimentConfig,
    *,
    folds_from: str | None = None,
    resume: str | None = None,
    folder: str | None = None,
) -> dict[str, Any]:
    """Run all folds of all configurations and baselines, and write the report.

    Connects to Ray unless already connected.

    Args:
        config: The recipe with its overrides; when resuming, that of the interrupted study.
        folds_from: Where to take folds from, as in `open_study`.
        resume: Folder of an interrupted study; finished folds are not run again.
        folder: As in `opened`.

    Returns:
        With `crossval.cells_per_type`, the result of `run_curve`. Else
        `run_id`, `run_dir`, `report` (its path), `scores` (mean of each of our metrics), `baselines`
        (macro-F1 by name), `skipped`, `model_version` (with `crossval.register`, else None).

    Raises:
        ValueError: The settings, cells, folds or cluster do not allow it.
        RuntimeError: A fold or a baseline failed; the others' results are kept.
    """
    with opened(config, "crossval", folds_from=folds_from, resume=resume, folder=folder) as study:
        assert study.run is not None
        config = study.config
        skipped = study.missing_baselines()
        notes = study.notes()
        seeds = config.crossval.num_seeds
        if seeds > 1:
            notes.append(f"the scores of {OURS} are means of {seeds} seeds in each fold")
        notes += [
            f"{BASELINES[name].title} was skipped: it needs {', '.join(missing)}; pip install"
            f" 'screformer[baselines]'"
            for name, missing in skipped.items()
        ]
        for note in notes:
            print(f"note: {note}", flush=True)
        wanted = [name for name in check_names(config.crossval.baselines) if name not in skipped]
        if config.crossval.cells_per_type:
            return run_curve(study, wanted, notes)
        found = _run_all(study, wanted)
        trials = [_trial_row(study, setting, results) for setting, results in found if results]
        whole = [(setting, results) for setting, results in found if len(results) == len(study.folds)]
        best, ours = max(whole, key=lambda pair: _mean_macro_f1(study, pair[1]))
        if len(trials) > 1:
            notes.append(
                f"{OURS} is the best of {len(trials)} configurations, chosen on these test folds,"
                f" so its score is optimistic ({best})"
            )
        methods = {OURS: [*ours, *_other_seeds(study, best)]} | {
            name: results_of(study.baseline_folder(name), len(study.folds)) for name in wanted
        }
        tree = write_crossval_report(study, methods, trials, notes)
        log_report(study, tree["methods"])
        print(verdict(tree["methods"]), flush=True)
        version = _register(study, best, ours) if config.crossval.register else None
        macro_f1 = {name: entry["metrics"]["macro_f1"]["mean"] for name, entry in tree["methods"].items()}
        return {
            "run_id": study.run.run_id,
            "run_dir": str(study.run_dir),
            "report": str(study.run_dir / "report.html"),
            "scores": {name: entry["mean"] for name, entry in tree["methods"][OURS]["metrics"].items()},
            "baselines": {name: value for name, value in macro_f1.items() if name != OURS},
            "skipped": sorted(skipped),
            "model_version": version,
        }


def describe_crossval(config: ExperimentConfig, *, folds_from: str | None = None) -> str:
    """What `run_crossval` would do, as YAML: its settings, then folds, notes and minutes."""
    study = open_study(config, folds_from=folds_from)
    num_trials = count_trials(config) + config.crossval.num_seeds - 1
    described = describe_study(study, [config] * (num_trials * len(curve_settings(config) or [{}])))
    parts = (config.to_dict("crossval"), described)
    return "\n".join(yaml.safe_dump(part, sort_keys=False).rstrip() for part in parts)


def _run_all(study: Study, baselines: Sequence[str]) -> list[tuple[dict[str, Any], list[FoldResult]]]:
    """Run the configurations, with the baselines alongside.

    Returns:
        Settings of each configuration, in the order they were started, with its finished folds.
    """
    search = study.config.search
    background = _InBackground(lambda: run_baselines(study, baselines))
    drawn = search.algorithm != "grid" and bool(search.space)
    space = search_space(study.config)
    settings = run_trials(study, space, num_samples=search.num_samples if drawn else 1)
    background.join()
    return [(setting, results_of(study.trial_folder(setting), len(study.folds))) for setting in settings]


def _other_seeds(study: Study, settings: dict[str, Any]) -> list[FoldResult]:
    """Run a configuration with its further seeds."""
    from ray import tune

    first = study.config.merge(settings).train.seed
    others = [
        {**settings, "train.seed": first + further} for further in range(1, study.config.crossval.num_seeds)
    ]
    if not others:
        return []
    ran = run_trials(study, {"settings": tune.grid_search(others)})
    return [result for setting in ran for result in results_of(study.trial_folder(setting), len(study.folds))]


def _trial_row(study: Study, setting: dict[str, Any], results: Sequence[FoldResult]) -> dict[str, Any]:
    """One configuration in the report's table of a search."""
    return {
        "settings": ", ".join(f"{name}={value}" for name, value in setting.items()) or "the recipe's",
        "folds": len(results),
        "macro-F1": _mean_macro_f1(study, results),
    }


def _mean_macro_f1(study: Study, results: Sequence[FoldResult]) -> float:
    return float(np.mean([scores(result, study)["macro_f1"] for result in results]))


def _register(study: Study, settings: dict[str, Any], results: Sequence[FoldResult]) -> int | None:
    """Run `register_final` in a process with the resources of a fold."""
    bundle = fold_bundle(study.config)
    task = ray.remote(register_final).options(num_cpus=bundle.get("CPU", 0), num_gpus=bundle.get("GPU", 0))
    version: int | None = ray.get(task.remote(study, settings, fold_scores(study, results)))
    return version


class _InBackground:
    """A function running in a thread alongside the trials; `join` raises its exception."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._error: BaseException | None = None

        def run() -> None:
            try:
                work()
            except BaseException as error:  # noqa: BLE001 - raised again by join
                self._error = error

        self._thread = threading.Thread(target=run, name="baselines", daemon=True)
        self._thread.start()

    def join(self) -> None:
        self._thread.join()
        if self._error is not None:
            raise self._error
