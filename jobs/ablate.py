"""Vary one setting at a time over the same folds, to measure what each part of the model is worth.

The reference is the recipe; a variant is the recipe with some settings changed. Variants with the same
pre-training share it. A variant that changes the cells, labels or folds gets separate folds and is reported
without a paired difference. Baselines are not run (use `crossval`). The last line on stdout is one JSON
object.
"""

from __future__ import annotations

import argparse
import sys

from jobs.arguments import Command, Parser, Result, add_study, check_study


def arguments(parser: Parser) -> None:
    """The arguments of the command."""
    add_study(parser)
    parser.add_argument(
        "--axes",
        nargs="+",
        default=[],
        metavar="NAME",
        help="groups of variants to run (default: all groups in the recipe)",
    )


def work(args: argparse.Namespace) -> Result:
    """Run the variants, or describe them."""
    from jobs.studies.ablation import describe_ablation, run_ablation

    if args.dry_run:
        return describe_ablation(args.settings, args.axes, folds_from=args.folds)
    given = {"folds_from": args.folds, "resume": args.resume, "folder": args.run_dir}
    return run_ablation(args.settings, axes=args.axes, **given)


main = Command(
    name="ablate",
    doc=__doc__,
    arguments=arguments,
    work=work,
    extra="train",
    check=check_study,
    recipe="",
)

if __name__ == "__main__":
    sys.exit(main())
