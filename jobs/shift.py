"""Measure how far cells are from a model's training cells, and suggest what to do.

Compares genes, depth and embeddings, counts unknown cells and cells of types new to the model, and scores the
model if the cells have labels. Reads at most 5,000 cells, drawn at random. The verdict follows from the
thresholds in the table. The last line on stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from jobs.arguments import (
    FILES,
    Command,
    Parser,
    Result,
    add_atlas,
    add_counts,
    add_filter,
    add_model,
    add_query,
    add_tiledb,
)


def arguments(parser: Parser) -> None:
    """The arguments of the command."""
    add_model(parser)
    where = parser.add_mutually_exclusive_group(required=True)
    add_query(where)
    where.add_argument("--h5ad", type=Path, metavar="FILE", help=f"a file of raw counts: {FILES}")
    add_atlas(where)
    add_filter(parser)
    add_tiledb(parser)
    add_counts(parser)
    parser.add_argument(
        "--label-column",
        metavar="COLUMN",
        help="obs column of known labels in the file (default: the model's, if present)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="write a report (.html), and its numbers next to it (.json)"
    )


def check(args: argparse.Namespace) -> None:
    """Refuse other formats, and options without effect."""
    if args.out is not None and args.out.suffix != ".html":
        raise ValueError(f"--out {args.out} must end in .html")
    if args.label_column and args.h5ad is None:
        raise ValueError("--label-column applies to files only; for an atlas, the model's own column is used")


def work(args: argparse.Namespace) -> Result:
    """Compare, print the tables, write the report."""
    from data_ingest.formats import as_h5ad
    from jobs.shifting.page import shift_words
    from jobs.shifting.run import run_shift

    with as_h5ad([args.h5ad] if args.h5ad else []) as files:
        shift, summary = run_shift(
            args.model,
            args.settings,
            h5ad=files[0] if files else None,
            layer=args.layer,
            raw=args.use == "raw",
            label_column=args.label_column,
            out=args.out,
        )
    print(shift_words(shift))
    return summary


main = Command(name="shift", doc=__doc__, arguments=arguments, work=work, extra="train", check=check)

if __name__ == "__main__":
    sys.exit(main())
