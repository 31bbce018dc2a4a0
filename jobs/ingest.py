"""`python -m jobs.ingest --h5ad FILE... --atlas URI`: make an atlas from .h5ad files, or append to one."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from data_ingest.ingest import IngestReport, ingest
from data_ingest.ingest_files import IngestOptions
from data_ingest.verify import verify_atlas
from jobs.arguments import parse_pairs


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 0, or 2 for something that the user can fix."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"
    )
    try:
        options = IngestOptions(
            obs_map=parse_pairs("--obs-map", arguments.obs_map),
            constants=parse_pairs("--set", arguments.set),
            layer=arguments.layer,
            use_raw=arguments.use == "raw",
            feature_id_column=arguments.feature_id_column,
            symbol_table=arguments.symbol_table,
            duplicate_genes=arguments.duplicate_genes,
            labels=arguments.labels,
            major_types=arguments.major_types,
            tiledb_config=parse_pairs("--tiledb", arguments.tiledb),
            dry_run=arguments.dry_run,
        )
        from cluster.connect import connect

        connect(arguments.address)
        if arguments.h5ad or not arguments.verify:
            print(summary(ingest(arguments.h5ad, arguments.atlas, options)))
        if arguments.verify:
            num_cells = verify_atlas(arguments.atlas, options.tiledb_config)
            print(f"{arguments.atlas}: the counts of all {num_cells} cells are as ingested")
    except ValueError as e:
        print(f"{type(e).__name__}: {e}", file=sys.stderr)
        return 2
    return 0


def summary(report: IngestReport) -> str:
    """The report in words, file by file, the totals last."""
    lines = [line for file in report.files for line in file.lines()]
    if report.took_back:
        lines.append(
            "an unfinished ingest of other files was taken back first"
            if not report.dry_run
            else "an unfinished ingest would be taken back"
        )
    if report.resumed:
        lines.append(
            "this completed an unfinished ingest"
            if not report.dry_run
            else "this would complete an unfinished ingest"
        )
    verb = "would add" if report.dry_run else "added"
    lines.append(
        f"{verb} {report.cells_added} cells and {report.genes_added} genes; {report.atlas_uri}"
        f" {'would have' if report.dry_run else 'has'} "
        f"{report.cells_total} cells and {report.genes_total} genes ({report.seconds:.1f} s)"
    )
    if report.dry_run:
        lines.append("dry run: all checks passed, nothing was written")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m jobs.ingest", description=__doc__)
    parser.add_argument(
        "--h5ad",
        nargs="+",
        default=[],
        metavar="FILE",
        help=".h5ad files; cells that the atlas already has are left as they are",
    )
    parser.add_argument(
        "--atlas", required=True, metavar="URI", help="a path or s3://bucket/prefix; made if there is none"
    )
    parser.add_argument(
        "--labels",
        type=Path,
        metavar="TABLE",
        help="tab-separated dataset, cell_type, cl_id: Cell Ontology terms for labels without one",
    )
    parser.add_argument(
        "--obs-map",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=COLUMN",
        help="obs columns under other names: donor_id=patient",
    )
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help="values for files that lack a column: tissue_general=blood",
    )
    counts = parser.add_mutually_exclusive_group()
    counts.add_argument("--layer", metavar="NAME", help="take counts from this layer instead of X")
    counts.add_argument("--use", choices=("X", "raw"), default="X", help="take counts from X or from raw.X")
    parser.add_argument(
        "--feature-id-column",
        metavar="COLUMN",
        help="var column of Ensembl gene ids; found by its usual names by default",
    )
    parser.add_argument(
        "--symbol-table",
        type=Path,
        metavar="TABLE",
        help="tab-separated symbol, feature_id: for genes without an Ensembl id",
    )
    parser.add_argument(
        "--duplicate-genes",
        choices=("error", "sum", "drop"),
        default="error",
        help="several genes of one id in a file: refuse, add up, leave out",
    )
    parser.add_argument(
        "--major-types",
        type=Path,
        metavar="TABLE",
        help="tab-separated name, cl_id, also, before: replaces the default major cell types",
    )
    parser.add_argument(
        "--tiledb",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help="TileDB settings: vfs.s3.region=eu-west-1",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read all counts of the atlas and compare each cell's sum with obs, after the ingest or, without"
        " --h5ad, alone",
    )
    parser.add_argument("--address", metavar="HOST:PORT", help="Ray cluster; a local one by default")
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, print the plan, write nothing"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
