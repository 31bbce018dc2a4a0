"""Cross-validate scReformer-BERT beside its baselines on the same folds, or search for its settings.

One parent run in MLflow holds the folds (`folds.parquet`) and the report; each fold of each configuration is
a child run. A test fold is never seen before its end: validation cells out of the other folds choose the step
and the settings of baselines.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from jobs.arguments import add_study_arguments, run_study_command
from jobs.studies.crossval import run_crossval
from jobs.studies.estimate import describe_study
from jobs.studies.layout import count_trials
from jobs.studies.study import open_study
from screformer.config import ExperimentConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; the last line on stdout is one JSON object."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.crossval", description=(__doc__ or "").partition("\n")[0]
    )
    add_study_arguments(parser)
    parser.add_argument(
        "--group-by",
        choices=["donor_id", "dataset_id", "none"],
        help="same as crossval.group_by=...: what a fold keeps together",
    )
    arguments = parser.parse_intermixed_args(argv)

    def dry_run(config: ExperimentConfig) -> dict[str, Any]:
        study = open_study(config, folds_from=arguments.folds)
        return describe_study(study, [config] * count_trials(config))

    overrides = [f"crossval.group_by={arguments.group_by}"] if arguments.group_by else []
    return run_study_command("crossval", parser, arguments, overrides, dry_run, run_crossval)


if __name__ == "__main__":
    sys.exit(main())
