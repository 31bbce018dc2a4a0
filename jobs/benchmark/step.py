"""Compare a training step of our network with one of scBERT's, and LSH with full attention.

    screformer benchmark step
    screformer benchmark step --profile 1024             # profile a step of the base recipe
    screformer benchmark step --device cuda --dtype bfloat16 --cells 8 --base-tokens 131072

Prints tables, then one line of JSON.
"""

from __future__ import annotations

import argparse

from jobs.arguments import Command, Parser, Result, add_device, count


def arguments(parser: Parser) -> None:
    """The arguments of the command."""
    parser.add_argument(
        "--genes",
        type=count,
        default=16906,
        help="genes of the vocabulary; with the [CLS], scBERT's 16,907 tokens (default %(default)s)",
    )
    parser.add_argument(
        "--detected", type=count, default=1500, help="detected genes of a cell (default %(default)s)"
    )
    parser.add_argument(
        "--cells", type=count, default=1, help="cells per step next to scBERT (default %(default)s)"
    )
    for option, default in (("dim", 200), ("depth", 6), ("heads", 10), ("n-hashes", 4), ("bucket-size", 64)):
        parser.add_argument(f"--{option}", type=count, default=default, help="(default %(default)s)")
    parser.add_argument(
        "--base-lengths",
        type=count,
        nargs="+",
        default=[512, 1024, 2048, 4096],
        help="tokens of a cell, base recipe (default %(default)s)",
    )
    parser.add_argument(
        "--base-tokens",
        type=count,
        default=8192,
        help="tokens of a step of the base recipe, over all cells (default %(default)s)",
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=["scbert", "base"],
        default=["scbert", "base"],
        help="what to measure (default: both)",
    )
    parser.add_argument(
        "--profile",
        type=count,
        metavar="LENGTH",
        help="only profile a step of the base recipe with cells of this length",
    )
    add_device(parser, rounds=3)


def work(args: argparse.Namespace) -> Result:
    """Measure, or profile."""
    from jobs.benchmark.measure_step import measure

    return measure(args)


main = Command(name="benchmark step", doc=__doc__, arguments=arguments, work=work, extra="baselines")
