"""Time labelling a file with the bundled model and with CellTypist, from command to output file.

    screformer benchmark annotate --h5ad my.h5ad
    screformer benchmark annotate --h5ad my.h5ad --cells 100000       # cells of the file, repeated

Prints a table, then one line of JSON.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from jobs.arguments import Command, Parser, Result, count


def arguments(parser: Parser) -> None:
    """The arguments of the command."""
    parser.add_argument("--h5ad", type=Path, required=True, metavar="FILE", help="cells with raw counts")
    parser.add_argument(
        "--cells", type=count, metavar="N", help="repeat the cells to get this many (default: as in the file)"
    )
    parser.add_argument(
        "--rounds", type=count, default=3, metavar="N", help="runs of each (default %(default)s)"
    )


def work(args: argparse.Namespace) -> Result:
    """Measure."""
    from jobs.benchmark.measure_annotate import measure

    return measure(args.h5ad, num_cells=args.cells, rounds=args.rounds)


main = Command(name="benchmark annotate", doc=__doc__, arguments=arguments, work=work, extra="baselines")
