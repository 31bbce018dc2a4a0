"""Check an installation or a cluster, and show how to fix what is wrong.

All nodes have the same versions, see their GPUs, can write to `cluster.storage_path` and reach the tracking
store, and a short training runs. Give the settings of your trainings: `cluster.num_workers=2
cluster.storage_path=s3://...`. The exit status is 2 if something is wrong.
"""

from __future__ import annotations

import argparse
import sys

from jobs.arguments import Command, Parser, Result, add_tiledb, add_tracking


def arguments(parser: Parser) -> None:
    """The arguments of the command."""
    add_tracking(parser)
    add_tiledb(parser)
    parser.add_argument("--no-training", action="store_true", help="leave out the short training")


def work(args: argparse.Namespace) -> Result:
    """Run the checks."""
    from jobs.checkup.run import examine

    faults = examine(args.settings, train=not args.no_training)
    if faults:
        raise ValueError(f"{len(faults)} things are wrong, the first: {faults[0]}")
    return "all is well"


main = Command(name="doctor", doc=__doc__, arguments=arguments, work=work, extra="train", recipe="")

if __name__ == "__main__":
    sys.exit(main())
