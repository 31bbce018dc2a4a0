"""Vary one thing at a time over the same folds, and say what each part of the model is worth.

The reference is the recipe; a variant is the recipe with some settings changed. Baselines are left out (`jobs.crossval` has them), and
variants that pre-train alike share their pre-training.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import yaml

from jobs.comparison import difference_text, mean_interval, scores, write_report
from jobs.crossval import add_arguments, describe_study, log_report, opened, run_command
from jobs.report import Report
from jobs.study import FoldResult, Study, StudyConfig, open_study, results_of
from jobs.tune import run_trials

REFERENCE = "reference"


class Variant(NamedTuple):
    """One row of an ablation."""

    axis: str
    name: str
    """Its settings as on the command line, or `reference`."""
    settings: dict[str, Any]

    def with_seed(self, seed: int) -> dict[str, Any]:
        """Overrides of one of its runs."""
        return {"train.seed": seed} | self.settings


def variants(config: StudyConfig, axes: Sequence[str] = ()) -> list[Variant]:
    """The reference, then the variants of the recipe's axes, each checked.

    Args:
        config: The recipe.
        axes: Those to take; empty takes all.

    Raises:
        ValueError: An unknown axis, or settings that the configuration does not take.
    """
    known = config.ablation.axes
    if not known:
        raise ValueError("ablation.axes is empty; give a recipe with axes, such as jobs/recipes/ablation.yaml")
    for axis in axes:
        if axis not in known:
            raise ValueError(f"--axes: there is no axis {axis!r}; there is {', '.join(known)}")
    found = [Variant(REFERENCE, REFERENCE, {})]
    for axis in axes or known:
        listed = yaml.safe_load(known[axis])
        if not isinstance(listed, list) or not listed:
            raise ValueError(f"ablation.axes.{axis}={known[axis]} must be a list such as [model.attention=none, model.attention=full]")
        for text in listed:
            settings = {name: yaml.safe_load(value) for name, _, value in (part.partition("=") for part in str(text).split())}
            try:
                config.merge(str(text).split())
            except ValueError as error:
                raise ValueError(f"ablation.axes.{axis}: {text!r}: {error}") from error
            found.append(Variant(axis, str(text), settings))
    return found


def run_ablation(
    config: StudyConfig, *, folds_from: str | None = None, resume: str | None = None, axes: Sequence[str] = ()
) -> dict[str, Any]:
    """Run the reference and each variant over the folds, once per seed, and write the table; connects to Ray where no connection is.

    Args:
        config: The recipe with its overrides; when resuming, that of the interrupted study.
        folds_from: Where to take folds from, as `open_study`.
        resume: Folder of an ablation that was interrupted.
        axes: As `variants`.

    Returns:
        `run_id`, `run_dir`, `report` (its path) and `variants`: macro-F1, difference and interval of each.

    Raises:
        ValueError: Settings, cells, folds or cluster do not allow it.
        RuntimeError: A fold failed; the others' results are kept.
    """
    from ray import tune

    listed = variants(config, axes) if not resume else []
    with opened(without_extras(config), "ablate", folds_from=folds_from, resume=resume) as study:
        listed = listed or variants(study.config, axes)
        for note in study.notes():
            print(f"note: {note}", flush=True)
        seeds = range(study.config.train.seed, study.config.train.seed + study.config.ablation.num_seeds)
        runs = [variant.with_seed(seed) for variant in listed for seed in seeds]
        run_trials(study, {"settings": tune.grid_search(runs)})
        rows = [_row(study, variant, listed[0], seeds) for variant in listed]
        tree = {"variants": rows, "notes": study.notes(), "config": study.config.to_dict()}
        write_report(_report(study, rows, len(seeds)), study.run_dir, tree)
        log_report(study, {})
        assert study.run is not None
        study.run.log_metrics({f"ablation/{row['variant']}/macro_f1": row["macro_f1"] for row in rows}, step=0)
        print("\n".join(conclusions(rows)), flush=True)
        print(_text_table(rows), flush=True)
        return {
            "run_id": study.run.run_id,
            "run_dir": str(study.run_dir),
            "report": str(study.run_dir / "report.html"),
            "variants": {row["variant"]: {"macro_f1": row["macro_f1"], "difference": row["difference"]} for row in rows},
        }


def without_extras(config: StudyConfig) -> StudyConfig:
    """The recipe without baselines and search, which an ablation does not run."""
    return config.merge({"crossval.baselines": [], "search.space": {}, "search.algorithm": "grid", "search.scheduler": "none"})


def conclusions(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What the table says of each axis, plainly: what helps, what harms, what the folds do not tell."""
    said = []
    for row in rows[1:]:
        difference = row["difference"]
        if row["identical"]:
            said.append(f"{row['variant']}: gives the very same predictions as the reference.")
        elif difference["low"] > 0:
            said.append(
                f"{row['variant']}: better than the reference ({difference_text(difference)}): **what the latter does here harms.**"
            )
        elif difference["high"] < 0:
            said.append(f"{row['variant']}: the reference is better ({difference_text(difference)}): what it does here helps.")
        else:
            said.append(f"{row['variant']}: not told apart from the reference ({difference_text(difference)}): no sign here that it helps.")
    return said


def _row(study: Study, variant: Variant, reference: Variant, seeds: Sequence[int] | range) -> dict[str, Any]:
    ours, theirs = _by_seed(study, variant, seeds), _by_seed(study, reference, seeds)
    # Seeds of one fold share its cells, so their mean is one observation: the interval is over folds.
    by_fold = {fold: float(np.mean([values[fold] for values in ours.values()])) for fold in range(len(study.folds))}
    reference_by_fold = {fold: float(np.mean([values[fold] for values in theirs.values()])) for fold in by_fold}
    mean, low, high = mean_interval([by_fold[fold] - reference_by_fold[fold] for fold in by_fold])
    results = [result for seed in seeds for result in _results(study, variant, seed)]
    others = [result for seed in seeds for result in _results(study, reference, seed)]
    speeds = [result.account["cells_per_s"] for result in results if result.account.get("cells_per_s")]
    same = variant.name != REFERENCE and all(
        a.probabilities_nk is not None and b.probabilities_nk is not None and np.array_equal(a.probabilities_nk, b.probabilities_nk)
        for a, b in zip(results, others, strict=True)
    )
    values = [value for scored in ours.values() for value in scored.values()]
    return {
        "axis": variant.axis,
        "variant": variant.name,
        "macro_f1": float(np.mean(values)),
        "sd": float(np.std(list(by_fold.values()), ddof=1)) if len(by_fold) > 1 else None,
        "seed_sd": float(np.mean([np.std([scored[fold] for scored in ours.values()], ddof=1) for fold in by_fold]))
        if len(ours) > 1
        else None,
        "difference": {"mean": mean, "low": low, "high": high, "folds": len(by_fold)},
        "identical": same,
        "seconds_per_1000_cells": 1000 / float(np.median(speeds)) if speeds else None,
        "peak_memory_gb": max(result.account["peak_memory_gb"] for result in results),
        "parameters": results[0].account["parameters"],
    }


def _results(study: Study, variant: Variant, seed: int) -> list[FoldResult]:
    return results_of(study.trial_folder(variant.with_seed(seed)), len(study.folds))


def _by_seed(study: Study, variant: Variant, seeds: Sequence[int] | range) -> dict[int, dict[int, float]]:
    """Macro-F1 by seed and fold."""
    return {seed: {result.fold: scores(result, study)["macro_f1"] for result in _results(study, variant, seed)} for seed in seeds}


def _table(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "axis": row["axis"],
                "variant": row["variant"],
                "macro-F1": f"{row['macro_f1']:.3f}" + (f" ± {row['sd']:.3f}" if row["sd"] is not None else ""),
                "minus reference": "" if row["variant"] == REFERENCE else difference_text(row["difference"]),
                "s per 1,000 cells": row["seconds_per_1000_cells"],
                "peak GB": row["peak_memory_gb"],
                "parameters": row["parameters"],
            }
            for row in rows
        ]
    )


def _text_table(rows: Sequence[dict[str, Any]]) -> str:
    return _table(rows).to_string(index=False, float_format=lambda value: f"{value:.2f}")


def _report(study: Study, rows: Sequence[dict[str, Any]], num_seeds: int) -> Report:
    from matplotlib.figure import Figure

    folds = study.folds
    report = Report("Ablation", f"{len(folds)} folds ({folds.kind}), {num_seeds} seeds, {len(study.labels_n):,} cells")
    report.text("\n".join(f"- {line}" for line in conclusions(rows)))
    for note in study.notes():
        report.warning(note)
    caption = (
        "macro-F1: mean and standard deviation over folds. Minus reference: mean of the differences over the same folds, each the mean over"
        " its seeds, with its 95 % interval by Student's t; below zero, the reference is better. Seconds are those of training; memory is"
        " that of the whole process."
    )
    report.table("Variants", _table(rows), caption)
    figure = Figure(figsize=(7.5, 1 + 0.3 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    for place, row in enumerate(reversed(rows)):
        difference = row["difference"]
        finite = np.isfinite(difference["low"]) and row["variant"] != REFERENCE
        error = [[difference["mean"] - difference["low"]], [difference["high"] - difference["mean"]]] if finite else None
        axes.errorbar(difference["mean"], place, xerr=error, fmt="o", color="#4878a8", capsize=3)
    axes.axvline(0, color="gray", linewidth=1)
    axes.set_yticks(range(len(rows)), [row["variant"] for row in reversed(rows)])
    axes.set_xlabel("macro-F1 minus reference")
    axes.grid(axis="x", alpha=0.3)
    report.figure("", figure, "Differences to the reference with their 95 % intervals.", "Macro-F1 of each variant minus the reference.")
    return report


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; the last line on stdout is one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m jobs.ablate", description=(__doc__ or "").partition("\n")[0])
    add_arguments(parser)
    parser.add_argument("--axes", nargs="+", default=[], metavar="NAME", help="groups of variants to run; default: all of the recipe's")
    arguments = parser.parse_intermixed_args(argv)

    def dry_run(config: StudyConfig) -> dict[str, Any]:
        listed = variants(config, arguments.axes)
        study = open_study(without_extras(config), folds_from=arguments.folds)
        configs = [study.config.merge(variant.settings).experiment for variant in listed]
        return describe_study(study, configs, repeats=config.ablation.num_seeds) | {"variants": [variant.name for variant in listed]}

    def run(config: StudyConfig, *, folds_from: str | None, resume: str | None) -> dict[str, Any]:
        return run_ablation(config, folds_from=folds_from, resume=resume, axes=arguments.axes)

    return run_command(parser, arguments, [], dry_run, run)


if __name__ == "__main__":
    sys.exit(main())
