"""Vary one thing at a time over the same folds, and say what each part of the model is worth.

The reference is the recipe; a variant is the recipe with some settings changed. Baselines are left out
(`jobs.crossval` has them), and variants that pre-train alike share their pre-training. A variant that changes
the cells, their labels or the folds runs on folds of its own, and is set beside the reference without a
paired difference.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from jobs.arguments import add_study_arguments, run_study_command
from jobs.studies.ablation import run_ablation, without_extras
from jobs.studies.estimate import describe_study
from jobs.studies.study import open_study
from jobs.studies.variants import by_folds, variants
from screformer.config import ExperimentConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; the last line on stdout is one JSON object."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.ablate", description=(__doc__ or "").partition("\n")[0]
    )
    add_study_arguments(parser)
    parser.add_argument(
        "--axes",
        nargs="+",
        default=[],
        metavar="NAME",
        help="groups of variants to run; default: all of the recipe's",
    )
    arguments = parser.parse_intermixed_args(argv)

    def dry_run(config: ExperimentConfig) -> dict[str, Any]:
        listed = variants(config, arguments.axes)
        described = []
        for changed, group in by_folds(listed):
            study = open_study(
                without_extras(config).merge(changed), folds_from=None if changed else arguments.folds
            )
            configs = [study.config.merge(variant.settings) for variant in group]
            described.append(describe_study(study, configs, repeats=config.ablation.num_seeds))
        minutes = round(sum(part["minutes"]["ours"] for part in described), 1)
        return described[0] | {"variants": [variant.name for variant in listed], "minutes": minutes}

    def run(config: ExperimentConfig, *, folds_from: str | None, resume: str | None) -> dict[str, Any]:
        return run_ablation(config, folds_from=folds_from, resume=resume, axes=arguments.axes)

    return run_study_command("ablate", parser, arguments, [], dry_run, run)


if __name__ == "__main__":
    sys.exit(main())
