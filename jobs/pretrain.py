"""Pre-train a network on unlabelled cells, by predicting the expression of hidden genes.

The last line on stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys

from jobs.arguments import Command, Parser, Result, add_training


def arguments(parser: Parser) -> None:
    """The arguments of the command."""
    add_training(parser)


def work(args: argparse.Namespace) -> Result:
    """Train, or describe the training."""
    from jobs.training.run import describe_training, run_training

    if args.dry_run:
        return describe_training(args.settings, "pretrain", resume=args.resume, overrides=args.overrides)
    result = run_training(
        args.settings, "pretrain", resume=args.resume, overrides=args.overrides, folder=args.run_dir
    )
    return dataclasses.asdict(result)


main = Command(name="pretrain", doc=__doc__, arguments=arguments, work=work, extra="train", recipe="")

if __name__ == "__main__":
    sys.exit(main())
