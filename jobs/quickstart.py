"""Run the whole chain in one command: ingest, train, test, register, annotate, report.

Without --h5ad, it first simulates datasets. The result is compared with a logistic regression on the same
cells, and everything is written to one folder. The last line on stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from jobs.arguments import Command, Parser, Result


def arguments(parser: Parser) -> None:
    """The arguments of the command."""
    parser.add_argument(
        "--h5ad",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="your .h5ad files with raw counts (default: simulated ones)",
    )
    parser.add_argument(
        "--labels",
        type=Path,
        metavar="TABLE",
        help="tab-separated dataset, cell_type, cl_id: Cell Ontology terms for labels without one",
    )
    parser.add_argument(
        "--test-donors",
        nargs="+",
        default=[],
        metavar="DONOR",
        help="donors to hold out (default: a fifth of the cells)",
    )
    parser.add_argument(
        "--annotate",
        type=Path,
        metavar="FILE",
        help=".h5ad file to label at the end (default: held-out cells of one dataset)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("quickstart"),
        metavar="FOLDER",
        help="output folder (default ./quickstart)",
    )
    parser.add_argument(
        "--pretrain-steps",
        type=int,
        default=100,
        metavar="N",
        help="pre-training steps; 0 skips pre-training (default %(default)s)",
    )
    parser.add_argument(
        "--cells", type=int, default=2400, metavar="N", help="cells to simulate (default %(default)s)"
    )


def check(args: argparse.Namespace) -> None:
    """Refuse missing files, and direct all output to the folder."""
    for path in (*args.h5ad, args.annotate, args.labels):
        if path is not None and not path.exists():
            raise ValueError(f"{path}: no such file")
    out = args.out.resolve()
    places = {
        "atlas.uri": str(out / "atlas"),
        "tracking.uri": f"sqlite:///{out / 'mlflow.db'}",
        "tracking.experiment": "quickstart",
        "cluster.storage_path": str(out / "runs"),
    }
    if args.test_donors:
        places |= {"split.group_by": "donor_id", "split.test_groups": args.test_donors}
    args.settings = args.settings.merge(places).merge(args.overrides)


def work(args: argparse.Namespace) -> Result:
    """Run all stages."""
    from jobs.chain.run import run_chain

    return run_chain(
        args.settings,
        args.out,
        files=args.h5ad,
        labels=args.labels,
        unseen=args.annotate,
        pretrain_steps=args.pretrain_steps,
        simulated_cells=args.cells,
    )


main = Command(
    name="quickstart", doc=__doc__, arguments=arguments, work=work, check=check, recipe="quickstart"
)

if __name__ == "__main__":
    sys.exit(main())
