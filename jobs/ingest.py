"""Build an atlas from .h5ad files, or add files to one.

`screformer ingest --h5ad FILE... --atlas URI`. To complete an interrupted ingest, run the
same command again.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.arguments import Command, Pairs, Parser, Result, add_counts, add_tiledb

if TYPE_CHECKING:
    from data_ingest.ingest import IngestReport

RAY_FROM_BYTES = 32 * 2**20
"""Total size of the files from which a local Ray pays off. Starting it, and the imports of its workers, take
longer than writing smaller files in this process."""


def arguments(parser: Parser) -> None:
    """The arguments of the command."""
    parser.add_argument(
        "--h5ad",
        nargs="+",
        default=[],
        metavar="FILE",
        help="files of raw counts (.h5ad, 10x .h5 or matrix.mtx folder, .zarr, .loom, or URLs); cells already"
        " in the atlas are left unchanged",
    )
    parser.add_argument(
        "--atlas",
        dest="atlas.uri",
        required=True,
        metavar="URI",
        help="a path or s3://bucket/prefix; created if missing",
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
        action=Pairs,
        default={},
        metavar="NAME=COLUMN",
        help="names of obs columns in the files, for example donor_id=patient",
    )
    parser.add_argument(
        "--set",
        nargs="+",
        action=Pairs,
        default={},
        metavar="NAME=VALUE",
        help="values for columns that files lack, for example tissue_general=blood",
    )
    add_counts(parser)
    parser.add_argument(
        "--feature-id-column",
        metavar="COLUMN",
        help="var column of Ensembl gene ids (default: found by its usual names)",
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
        help="if several columns of a file have the same gene id: refuse the file, add them up, or drop them",
    )
    parser.add_argument(
        "--major-types",
        type=Path,
        metavar="TABLE",
        help="tab-separated name, cl_id, also, before: replaces the default major cell types",
    )
    add_tiledb(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything and print the plan, but write nothing"
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read all counts of the atlas and compare each cell's sum with obs, after the ingest;"
        " without --h5ad, only verify",
    )


def check(args: argparse.Namespace) -> None:
    """Refuse a command that would do nothing."""
    if not args.h5ad and not args.verify:
        raise ValueError("--h5ad is missing; give at least one .h5ad file, or add --verify")


def work(args: argparse.Namespace) -> Result:
    """Write the atlas, verify it, and report what was added."""
    from data_ingest.ingest import ingest
    from data_ingest.ingest_options import IngestOptions
    from data_ingest.verify import verify_atlas

    options = IngestOptions(
        obs_map=args.obs_map,
        constants=args.set,
        layer=args.layer,
        use_raw=args.use == "raw",
        feature_id_column=args.feature_id_column,
        symbol_table=args.symbol_table,
        duplicate_genes=args.duplicate_genes,
        labels=args.labels,
        major_types=args.major_types,
        tiledb_config=args.settings.atlas.tiledb_config,
        dry_run=args.dry_run,
    )
    if args.verify or _worth_ray(args.h5ad):
        from cluster.connect import connect

        connect()
    uri = args.settings.atlas.uri
    lines = [summary(ingest(args.h5ad, uri, options))] if args.h5ad else []
    if args.verify:
        num_cells = verify_atlas(uri, options.tiledb_config)
        lines.append(f"{uri}: the counts of all {num_cells} cells match obs")
    return "\n".join(lines)


def _worth_ray(files: Sequence[str]) -> bool:
    """Whether to read and write the files in Ray tasks: on a given cluster, or if they are not small."""
    if os.environ.get("RAY_ADDRESS") or not all(os.path.isfile(file) for file in files):
        return True  # folders and URLs may be of any size
    return sum(os.path.getsize(file) for file in files) >= RAY_FROM_BYTES


def summary(report: IngestReport) -> str:
    """The report as text, file by file, with the totals at the end."""
    would = "would " if report.dry_run else ""
    lines = [line for file in report.files for line in file.lines()]
    if report.rolled_back:
        lines.append(f"an unfinished ingest of other files {would + 'be' if would else 'was'} removed first")
    if report.resumed:
        lines.append(f"this {would + 'complete' if would else 'completed'} an unfinished ingest")
    lines += report.notes
    lines.append(
        f"{would + 'add' if would else 'added'} {report.cells_added} cells and {report.genes_added} genes;"
        f" {report.atlas_uri} {would + 'have' if would else 'has'}"
        f" {report.cells_total} cells and {report.genes_total} genes ({report.seconds:.1f} s)"
    )
    if report.dry_run:
        lines.append("dry run: all checks passed, nothing was written")
    return "\n".join(lines)


main = Command(name="ingest", doc=__doc__, arguments=arguments, work=work, extra="train", check=check)

if __name__ == "__main__":
    sys.exit(main())
