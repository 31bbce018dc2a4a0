"""Run an ablation: the reference and its variants over the same folds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import yaml

from data_ingest.folds import FILE
from jobs.reports.artifacts import write_study
from jobs.studies.ablation_report import ablation_report, conclusions, text_table
from jobs.studies.estimate import describe_study
from jobs.studies.exactness import exact_lines, exactness
from jobs.studies.opening import opened
from jobs.studies.report import log_report
from jobs.studies.results import FoldResult, results_of
from jobs.studies.scores import mean_interval, scores
from jobs.studies.study import Study, open_study, settings_key
from jobs.studies.trials import run_trials
from jobs.studies.variants import REFERENCE, Variant, by_folds, variants
from screformer.config import ExperimentConfig


def run_ablation(
    config: ExperimentConfig,
    *,
    folds_from: str | None = None,
    resume: str | None = None,
    folder: str | None = None,
    axes: Sequence[str] = (),
) -> dict[str, Any]:
    """Run the reference and each variant over the folds, once per seed, and write the table.

    Connects to Ray unless already connected.

    Args:
        config: The recipe with its overrides; when resuming, that of the interrupted study.
        folds_from: Where to take folds from, as in `open_study`.
        resume: Folder of an interrupted ablation.
        folder: As in `opened`.
        axes: As in `variants`.

    Returns:
        `run_id`, `run_dir`, `report` (its path) and `variants`: macro-F1, difference and interval of each.

    Raises:
        ValueError: The settings, cells, folds or cluster do not allow it.
        RuntimeError: A fold failed; the others' results are kept.
    """
    from ray import tune

    listed = variants(config, axes) if not resume else []
    with opened(
        without_extras(config), "ablate", folds_from=folds_from, resume=resume, folder=folder, axes=axes
    ) as study:
        listed = listed or variants(study.config, axes)
        for note in study.notes():
            print(f"note: {note}", flush=True)
        exact = exactness(
            study.config,
            num_genes=len(study.query.feature_ids),
            num_classes=len(study.label_names),
        )
        print("\n".join(exact_lines(exact)), flush=True)
        seeds = range(study.config.train.seed, study.config.train.seed + study.config.ablation.num_seeds)
        found: dict[str, dict[str, Any]] = {}
        for changed, group in by_folds(listed):
            part = _own_study(study, changed) if changed else study
            run_trials(
                part,
                {
                    "settings": tune.grid_search(
                        [variant.with_seed(seed) for variant in group for seed in seeds]
                    )
                },
            )
            found |= {
                variant.name: _row(part, variant, None if changed else listed[0], seeds) for variant in group
            }
        rows = [found[variant.name] | {"axis": variant.axis} for variant in listed]
        tree = {"variants": rows, "exact": exact, "notes": study.notes(), "config": study.config.to_dict()}
        write_study(ablation_report(study, rows, exact, len(seeds)), tree, study.run_dir)
        log_report(study, {})
        assert study.run is not None
        study.run.log_metrics({f"ablation/{row['variant']}/macro_f1": row["mean"] for row in rows}, step=0)
        print("\n".join(conclusions(rows)), flush=True)
        print(text_table(rows), flush=True)
        return {
            "run_id": study.run.run_id,
            "run_dir": str(study.run_dir),
            "report": str(study.run_dir / "report.html"),
            "variants": {
                row["variant"]: {"macro_f1": row["mean"], "difference": row["difference"]} for row in rows
            },
        }


def describe_ablation(
    config: ExperimentConfig, axes: Sequence[str] = (), *, folds_from: str | None = None
) -> str:
    """What `run_ablation` would do, as YAML: its settings, then folds, notes, variants and minutes."""
    listed = variants(config, axes)
    described = []
    for changed, group in by_folds(listed):
        study = open_study(without_extras(config).merge(changed), folds_from=None if changed else folds_from)
        configs = [study.config.merge(variant.settings) for variant in group]
        described.append(describe_study(study, configs, repeats=config.ablation.num_seeds))
    minutes = round(sum(part["minutes"]["ours"] for part in described), 1)
    whole = described[0] | {"variants": [variant.name for variant in listed], "minutes": minutes}
    parts = (config.to_dict("ablate"), whole)
    return "\n".join(yaml.safe_dump(part, sort_keys=False).rstrip() for part in parts)


def without_extras(config: ExperimentConfig) -> ExperimentConfig:
    """The recipe without baselines: an ablation does not run them."""
    return config.merge({"crossval.baselines": []})


def _own_study(study: Study, changed: Mapping[str, Any]) -> Study:
    """A study on different cells, labels or folds, in its own folder; new or resumed."""
    folder = study.run_dir / "folds" / settings_key(changed)
    begun = (folder / FILE).is_file()
    part = dataclasses.replace(
        open_study(study.config.merge(changed), run_dir=folder, resume=begun), run=study.run
    )
    if not begun:
        folder.mkdir(parents=True, exist_ok=True)
        part.folds.save(folder / FILE, part.query.obs_joinids)
    return part


def _row(
    study: Study, variant: Variant, reference: Variant | None, seeds: Sequence[int] | range
) -> dict[str, Any]:
    ours = _by_seed(study, variant, seeds)
    # Seeds of one fold share its cells, so their mean is one observation: the interval is over folds.
    by_fold = {
        fold: float(np.mean([values[fold] for values in ours.values()])) for fold in range(len(study.folds))
    }
    results = [result for seed in seeds for result in _results(study, variant, seed)]
    difference, same = None, False
    if reference is not None:
        theirs = _by_seed(study, reference, seeds)
        mean, low, high = mean_interval(
            [by_fold[fold] - float(np.mean([values[fold] for values in theirs.values()])) for fold in by_fold]
        )
        difference = {"mean": mean, "low": low, "high": high, "folds": len(by_fold)}
        others = [result for seed in seeds for result in _results(study, reference, seed)]
        same = variant.name != REFERENCE and all(
            a.probabilities_nk is not None
            and b.probabilities_nk is not None
            and np.array_equal(a.probabilities_nk, b.probabilities_nk)
            for a, b in zip(results, others, strict=True)
        )
    speeds = [result.account["cells_per_s"] for result in results if result.account.get("cells_per_s")]
    values = [value for scored in ours.values() for value in scored.values()]
    return {
        "axis": variant.axis,
        "variant": variant.name,
        "mean": float(np.mean(values)),
        "sd": float(np.std(list(by_fold.values()), ddof=1)) if len(by_fold) > 1 else None,
        "seed_sd": float(
            np.mean([np.std([scored[fold] for scored in ours.values()], ddof=1) for fold in by_fold])
        )
        if len(ours) > 1
        else None,
        "difference": difference,
        "identical": same,
        "seconds_per_1000_cells": 1000 / float(np.median(speeds)) if speeds else None,
        "peak_memory_gb": max(result.account["peak_memory_gb"] for result in results),
        "parameters": results[0].account["parameters"],
    }


def _results(study: Study, variant: Variant, seed: int) -> list[FoldResult]:
    return results_of(study.trial_folder(variant.with_seed(seed)), len(study.folds))


def _by_seed(study: Study, variant: Variant, seeds: Sequence[int] | range) -> dict[int, dict[int, float]]:
    """Macro-F1 by seed and fold."""
    return {
        seed: {result.fold: scores(result, study)["macro_f1"] for result in _results(study, variant, seed)}
        for seed in seeds
    }
