"""Train a cell-type classifier, test it on held-out groups and register it.

Starts from a pre-trained network (`--from`) or from scratch. The last line on stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys

from jobs.arguments import Command, Parser, Result, add_training


def arguments(parser: Parser) -> None:
    """The arguments of the command."""
    parser.add_argument(
        "--from",
        dest="init_from",
        metavar="MODEL",
        help="starting point: a run id, runs:/ID, models:/NAME@ALIAS, a model directory or bundled:blood",
    )
    add_training(parser)


def work(args: argparse.Namespace) -> Result:
    """Train, or describe the training."""
    from jobs.training.run import describe_training, run_training

    given = {"init_from": args.init_from, "resume": args.resume, "overrides": args.overrides}
    if args.dry_run:
        return describe_training(args.settings, "finetune", **given)
    return dataclasses.asdict(run_training(args.settings, "finetune", folder=args.run_dir, **given))


main = Command(name="finetune", doc=__doc__, arguments=arguments, work=work, extra="train", recipe="")

if __name__ == "__main__":
    sys.exit(main())
