"""Show which genes drive each label, for cells of an .h5ad file or of an atlas query.

For a stratified sample of cells, computes expected gradients of the logits of the predicted and the true
label, in parallel, and writes them to Parquet shards; an interrupted run resumes with the missing shards.
Then checks whether they can be trusted: additivity, deletion and insertion curves against random genes, known
markers, a logistic regression's coefficients, other hash seeds, random weights. The last line on stdout is
one JSON object.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from jobs.arguments import Command, Parser, Result, add_cells, add_gene_overlap, add_model, count


def arguments(parser: Parser) -> None:
    """The arguments of the command."""
    add_model(parser)
    add_cells(parser, many=False)
    parser.add_argument("--out", required=True, type=Path, help="folder for values, tables and pictures")
    parser.add_argument(
        "--cells", type=count, default=200, metavar="N", help="cells to explain (default %(default)s)"
    )
    parser.add_argument(
        "--background", type=count, default=8, metavar="N", help="background cells (default %(default)s)"
    )
    parser.add_argument("--nodes", type=count, metavar="N", help="points per path; more are more exact")
    parser.add_argument("--seed", type=int, default=0, help="seed for choosing cells (default %(default)s)")
    add_gene_overlap(parser)


def work(args: argparse.Namespace) -> Result:
    """Explain the cells and log the result as a run."""
    from data_ingest.formats import as_h5ad
    from jobs.explaining.checks import summary_lines
    from jobs.explaining.run import explain_run

    with as_h5ad([args.h5ad] if args.h5ad else []) as files:
        summary = explain_run(
            args.model,
            args.settings,
            args.out,
            h5ad=files[0] if files else None,
            layer=args.layer,
            raw=args.use == "raw",
            min_gene_overlap=args.min_gene_overlap,
            num_cells=args.cells,
            num_background=args.background,
            num_nodes=args.nodes,
            seed=args.seed,
        )
    print("\n".join(summary_lines(summary)))
    return {key: value for key, value in summary.items() if key != "classes"}


main = Command(name="explain", doc=__doc__, arguments=arguments, work=work, extra="explain")

if __name__ == "__main__":
    sys.exit(main())
