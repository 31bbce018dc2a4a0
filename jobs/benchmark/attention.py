"""Compare LSH attention with reformer-pytorch's and with PyTorch's fused full attention.

    screformer benchmark attention
    screformer benchmark attention --device cuda --dtype bfloat16 --lengths 2048 4096 8192 16384

Prints tables of time, memory and utilisation, then one line of JSON.
"""

from __future__ import annotations

import argparse

from jobs.arguments import Command, Parser, Result, add_device, count


def arguments(parser: Parser) -> None:
    """The arguments of the command."""
    parser.add_argument(
        "--lengths",
        type=count,
        nargs="+",
        default=[1024, 2048, 4096, 8192, 16384],
        help="tokens of a cell (default %(default)s)",
    )
    for option, default in (
        ("cells", 1),
        ("heads", 4),
        ("head-width", 32),
        ("n-hashes", 4),
        ("bucket-size", 64),
    ):
        parser.add_argument(f"--{option}", type=count, default=default, help="(default %(default)s)")
    parser.add_argument(
        "--memory-length",
        type=int,
        default=8192,
        help="tokens for comparing depths; 0 skips this (default %(default)s)",
    )
    add_device(parser, rounds=5)


def work(args: argparse.Namespace) -> Result:
    """Measure."""
    from jobs.benchmark.measure_attention import measure

    return measure(args)


main = Command(name="benchmark attention", doc=__doc__, arguments=arguments, work=work, extra="baselines")
