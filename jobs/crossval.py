"""Cross-validate scReformer-BERT and its baselines on the same folds, or search for settings.

A parent run in MLflow has the folds (`folds.parquet`) and the report; each fold of each configuration is a
child run. A test fold is used only at the end: validation cells from the other folds choose the step and the
baselines' settings. The last line on stdout is one JSON object.

`--from` starts each fold's training from a model, for example one of another tissue.
`crossval.cells_per_type=[1, 5, 20, 100]` shows how many labelled cells of each type that takes.
"""

from __future__ import annotations

import argparse
import sys

from jobs.arguments import Command, Parser, Result, add_query, add_study, check_study


def arguments(parser: Parser) -> None:
    """The arguments of the command."""
    add_study(parser)
    add_query(parser)
    parser.add_argument(
        "--from",
        dest="crossval.start",
        metavar="MODEL",
        help="same as crossval.start=...: the model that training starts from, as in `screformer finetune`",
    )
    parser.add_argument(
        "--group-by",
        dest="crossval.group_by",
        metavar="COLUMN",
        help="same as crossval.group_by=...: cells to keep together, e.g. donor_id, dataset_id, study",
    )


def work(args: argparse.Namespace) -> Result:
    """Run the folds, or describe them."""
    from jobs.studies.crossval import describe_crossval, run_crossval

    if args.dry_run:
        return describe_crossval(args.settings, folds_from=args.folds)
    given = {"folds_from": args.folds, "resume": args.resume, "folder": args.run_dir}
    return run_crossval(args.settings, **given)


main = Command(
    name="crossval",
    doc=__doc__,
    arguments=arguments,
    work=work,
    extra="train",
    check=check_study,
    recipe="",
)

if __name__ == "__main__":
    sys.exit(main())
