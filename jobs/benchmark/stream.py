"""Compare the stream from an atlas into the training loop with other readers of the same cells.

    screformer benchmark stream                                # on a synthetic atlas, deleted afterwards
    screformer benchmark stream --atlas ./atlas --rounds 5

Prints a table, then one line of JSON.
"""

from __future__ import annotations

import argparse

from jobs.arguments import Command, Parser, Result, add_filter, add_tiledb, count
from screformer.config import TokensConfig


def arguments(parser: Parser) -> None:
    """The arguments of the command."""
    parser.add_argument(
        "--atlas",
        dest="atlas.uri",
        metavar="URI",
        help="read this atlas (default: a synthetic one, deleted afterwards)",
    )
    add_filter(parser)
    add_tiledb(parser)
    for option, default, meaning in (
        ("cells", 65_536, "cells of the synthetic atlas"),
        ("genes", 20_000, "genes of the synthetic atlas"),
        ("batch", 64, "cells per batch of our stream"),
        ("max-genes", TokensConfig().max_genes, "tokens per cell"),
        ("rounds", 3, "epochs per reader"),
    ):
        parser.add_argument(
            f"--{option}", type=count, default=default, metavar="N", help=f"{meaning} (default %(default)s)"
        )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of data and order (default 0)")


def work(args: argparse.Namespace) -> Result:
    """Measure."""
    from jobs.benchmark.measure_stream import measure

    return measure(args)


main = Command(name="benchmark stream", doc=__doc__, arguments=arguments, work=work, extra="train,baselines")
