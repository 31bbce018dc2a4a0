"""Vary one thing at a time over the same folds, and say what each part of the model is worth.

The reference is the recipe; a variant is the recipe with some settings changed. Baselines are left out (`jobs.crossval` has them), and
variants that pre-train alike share their pre-training. A variant that changes the cells, their labels or the folds runs on folds of its
own, and is set beside the reference without a paired difference.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import yaml

from data_ingest.folds import FILE
from jobs.comparison import difference_text, mean_interval, scores, spread_text, write_report
from jobs.crossval import add_arguments, describe_study, log_report, opened, run_command
from jobs.report import Report
from jobs.study import FoldResult, Study, StudyConfig, open_study, results_of, settings_key
from jobs.tune import run_trials
from screformer.config import ExperimentConfig
from screformer.model import ScReformer, classification_loss
from screformer.tokenizer import NUM_SPECIAL

REFERENCE = "reference"
_OWN_FOLDS = (
    "atlas.", "query.obs_filter", "query.var_filter", "query.is_primary_data", "query.file", "labels.column", "crossval.split",
    "crossval.num_folds", "crossval.val_fraction", "crossval.max_cells",
)  # fmt: skip
"""Settings that change cells, labels or folds."""
_CHUNKS = 4
"""Feed-forward slices of the check that they change nothing."""


class Variant(NamedTuple):
    """One row of an ablation."""

    axis: str
    name: str
    """Its settings as on the command line, or `reference`."""
    settings: dict[str, Any]

    def with_seed(self, seed: int) -> dict[str, Any]:
        """Overrides of one of its runs."""
        return {"train.seed": seed} | self.settings

    @property
    def of_the_study(self) -> dict[str, Any]:
        """Its settings that call for folds of its own."""
        return {name: value for name, value in self.settings.items() if name.startswith(_OWN_FOLDS)}


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
        exact = exactness(study.config.experiment, num_genes=len(study.query.feature_ids), num_classes=len(study.label_names))
        print("\n".join(exact_lines(exact)), flush=True)
        seeds = range(study.config.train.seed, study.config.train.seed + study.config.ablation.num_seeds)
        found: dict[str, dict[str, Any]] = {}
        for changed, group in _by_folds(listed):
            part = _beside(study, changed) if changed else study
            run_trials(part, {"settings": tune.grid_search([variant.with_seed(seed) for variant in group for seed in seeds])})
            found |= {variant.name: _row(part, variant, None if changed else listed[0], seeds) for variant in group}
        rows = [found[variant.name] | {"axis": variant.axis} for variant in listed]
        tree = {"variants": rows, "exact": exact, "notes": study.notes(), "config": study.config.to_dict()}
        write_report(_report(study, rows, exact, len(seeds)), study.run_dir, tree)
        log_report(study, {})
        assert study.run is not None
        study.run.log_metrics({f"ablation/{row['variant']}/macro_f1": row["mean"] for row in rows}, step=0)
        print("\n".join(conclusions(rows)), flush=True)
        print(_text_table(rows), flush=True)
        return {
            "run_id": study.run.run_id,
            "run_dir": str(study.run_dir),
            "report": str(study.run_dir / "report.html"),
            "variants": {row["variant"]: {"macro_f1": row["mean"], "difference": row["difference"]} for row in rows},
        }


def without_extras(config: StudyConfig) -> StudyConfig:
    """The recipe without baselines and search, which an ablation does not run."""
    return config.merge(
        {"crossval.baselines": [], "crossval.register": False, "search.space": {}, "search.algorithm": "grid", "search.scheduler": "none"}
    )


def exactness(config: ExperimentConfig, *, num_genes: int, num_classes: int) -> dict[str, Any]:
    """Whether what must not change a result leaves it alone, on the reference's network and random cells of different lengths.

    Returns:
        `ff_chunks_bit_equal`: feed-forward in slices gives the same bits; `reversible_gradient_error`: largest difference, over all
        parameters, between their gradients with and without recomputation, over the norm of the latter.
    """
    longest = config.tokens.most_slots(num_genes) - 1
    generator, slots = torch.Generator().manual_seed(config.train.seed), torch.arange(longest)
    lengths_n = torch.tensor([longest, max(1, longest // 2), max(1, longest // 3)])
    token_ids = torch.stack([torch.randperm(num_genes, generator=generator)[:longest].sort().values for _ in lengths_n]) + NUM_SPECIAL
    real_nl = slots < lengths_n[:, None]
    batch = {
        "token_ids": token_ids * real_nl,
        "values": torch.rand(token_ids.shape, generator=generator) * 4 * real_nl,
        "bin_ids": torch.ones_like(token_ids) * real_nl,
        "labels": torch.arange(len(lengths_n)) % num_classes,
    }

    def network(**changes: Any) -> ScReformer:
        model = dataclasses.replace(config.model, dropout=0.0, **changes)
        return ScReformer(model, config.tokens, num_genes=num_genes, num_classes=num_classes, seed=config.train.seed)

    def gradients(model: ScReformer) -> list[torch.Tensor]:
        logits_nk = model.train()(batch, task="finetune", hash_seed=0).logits_nk
        classification_loss(logits_nk, batch["labels"], None)[0].backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    with torch.no_grad():
        whole, sliced = (network(ff_chunks=chunks).eval()(batch, task="finetune").logits_nk for chunks in (1, _CHUNKS))
    ours, theirs = (gradients(network(reversible=reversible)) for reversible in (True, False))
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(ours, theirs, strict=True) if b.norm() > 0]
    return {"ff_chunks_bit_equal": bool(torch.equal(whole, sliced)), "reversible_gradient_error": max(errors)}


def exact_lines(exact: Mapping[str, Any]) -> list[str]:
    """`exactness` in words."""
    same = "the same bits" if exact["ff_chunks_bit_equal"] else "**other bits**"
    return [
        f"Feed-forward in {_CHUNKS} slices gives {same} as in one.",
        f"Gradients with recomputation (reversible) differ from those without it by at most {exact['reversible_gradient_error']:.1e}"
        " of their norm.",
    ]


def conclusions(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What the table says of each axis, plainly: what helps, what harms, what the folds do not tell."""
    said = []
    for row in rows[1:]:
        difference = row["difference"]
        if difference is None:
            said.append(f"{row['variant']}: {spread_text(row)} on folds of its own, the reference has {spread_text(rows[0])}; not paired.")
        elif row["identical"]:
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


def _by_folds(listed: Sequence[Variant]) -> list[tuple[dict[str, Any], list[Variant]]]:
    """The variants by the settings that call for folds of their own; none first, which is the reference's folds."""
    groups: dict[str, tuple[dict[str, Any], list[Variant]]] = {}
    for variant in listed:
        groups.setdefault(json.dumps(variant.of_the_study, sort_keys=True), (variant.of_the_study, []))[1].append(variant)
    return list(groups.values())


def _beside(study: Study, changed: Mapping[str, Any]) -> Study:
    """The study on other cells, labels or folds, in a folder of its own; begun, or taken up again."""
    folder = study.run_dir / "folds" / settings_key(changed)
    begun = (folder / FILE).is_file()
    part = dataclasses.replace(open_study(study.config.merge(changed), run_dir=folder, resume=begun), run=study.run)
    if not begun:
        folder.mkdir(parents=True, exist_ok=True)
        part.folds.save(folder / FILE, part.query.obs_joinids)
    return part


def _row(study: Study, variant: Variant, reference: Variant | None, seeds: Sequence[int] | range) -> dict[str, Any]:
    ours = _by_seed(study, variant, seeds)
    # Seeds of one fold share its cells, so their mean is one observation: the interval is over folds.
    by_fold = {fold: float(np.mean([values[fold] for values in ours.values()])) for fold in range(len(study.folds))}
    results = [result for seed in seeds for result in _results(study, variant, seed)]
    difference, same = None, False
    if reference is not None:
        theirs = _by_seed(study, reference, seeds)
        mean, low, high = mean_interval([by_fold[fold] - float(np.mean([values[fold] for values in theirs.values()])) for fold in by_fold])
        difference = {"mean": mean, "low": low, "high": high, "folds": len(by_fold)}
        others = [result for seed in seeds for result in _results(study, reference, seed)]
        same = variant.name != REFERENCE and all(
            a.probabilities_nk is not None and b.probabilities_nk is not None and np.array_equal(a.probabilities_nk, b.probabilities_nk)
            for a, b in zip(results, others, strict=True)
        )
    speeds = [result.account["cells_per_s"] for result in results if result.account.get("cells_per_s")]
    values = [value for scored in ours.values() for value in scored.values()]
    return {
        "axis": variant.axis,
        "variant": variant.name,
        "mean": float(np.mean(values)),
        "sd": float(np.std(list(by_fold.values()), ddof=1)) if len(by_fold) > 1 else None,
        "seed_sd": float(np.mean([np.std([scored[fold] for scored in ours.values()], ddof=1) for fold in by_fold]))
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
    return {seed: {result.fold: scores(result, study)["macro_f1"] for result in _results(study, variant, seed)} for seed in seeds}


def _table(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "axis": row["axis"],
                "variant": row["variant"],
                "macro-F1": spread_text(row),
                "minus reference": "" if row["variant"] == REFERENCE else difference_text(row["difference"]) or "other folds",
                "s per 1,000 cells": row["seconds_per_1000_cells"],
                "peak GB": row["peak_memory_gb"],
                "parameters": row["parameters"],
            }
            for row in rows
        ]
    )


def _text_table(rows: Sequence[dict[str, Any]]) -> str:
    return _table(rows).to_string(index=False, float_format=lambda value: f"{value:.2f}")


def _report(study: Study, rows: Sequence[dict[str, Any]], exact: Mapping[str, Any], num_seeds: int) -> Report:
    from matplotlib.figure import Figure

    folds = study.folds
    report = Report("Ablation", f"{len(folds)} folds ({folds.kind}), {num_seeds} seeds, {len(study.labels_n):,} cells")
    report.text("\n".join(f"- {line}" for line in [*conclusions(rows), *exact_lines(exact)]))
    for note in study.notes():
        report.warning(note)
    caption = (
        "macro-F1: mean and standard deviation over folds. Minus reference: mean of the differences over the same folds, each the mean over"
        " its seeds, with its 95 % interval by Student's t; below zero, the reference is better. A variant with other cells, labels or"
        " folds has none. Seconds are those of training; memory is that of the whole process."
    )
    report.table("Variants", _table(rows), caption)
    drawn = [row for row in rows if row["difference"] is not None]
    figure = Figure(figsize=(7.5, 1 + 0.3 * len(drawn)), layout="constrained")
    axes = figure.add_subplot()
    for place, row in enumerate(reversed(drawn)):
        difference = row["difference"]
        finite = np.isfinite(difference["low"]) and row["variant"] != REFERENCE
        error = [[difference["mean"] - difference["low"]], [difference["high"] - difference["mean"]]] if finite else None
        axes.errorbar(difference["mean"], place, xerr=error, fmt="o", color="#4878a8", capsize=3)
    axes.axvline(0, color="gray", linewidth=1)
    axes.set_yticks(range(len(drawn)), [row["variant"] for row in reversed(drawn)])
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
        described = []
        for changed, group in _by_folds(listed):
            study = open_study(without_extras(config).merge(changed), folds_from=None if changed else arguments.folds)
            configs = [study.config.merge(variant.settings).experiment for variant in group]
            described.append(describe_study(study, configs, repeats=config.ablation.num_seeds))
        minutes = round(sum(part["minutes"]["ours"] for part in described), 1)
        return described[0] | {"variants": [variant.name for variant in listed], "minutes": minutes}

    def run(config: StudyConfig, *, folds_from: str | None, resume: str | None) -> dict[str, Any]:
        return run_ablation(config, folds_from=folds_from, resume=resume, axes=arguments.axes)

    return run_command(parser, arguments, [], dry_run, run)


if __name__ == "__main__":
    sys.exit(main())
