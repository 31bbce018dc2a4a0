"""Count the cells of a query, and save the query for other commands.

Give an atlas and filters, or a saved query: `screformer query --atlas A --obs-filter "..." --out blood.json`.
`--compare census:2025-11-08` shows how another release changes it.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys

from jobs.arguments import Command, Parser, Result, add_atlas, add_filter, add_tiledb


def arguments(parser: Parser) -> None:
    """The arguments of the command."""
    add_atlas(parser)
    add_filter(parser)
    parser.add_argument(
        "--var-filter",
        dest="query.var_filter",
        metavar="FILTER",
        help="genes to use, for example \"feature_name in ['CD3D', 'MS4A1']\"",
    )
    parser.add_argument(
        "--copies",
        dest="query.is_primary_data",
        action="store_false",
        default=None,
        help="keep copies of cells from other datasets (is_primary_data false)",
    )
    parser.add_argument(
        "--query",
        dest="query.file",
        metavar="FILE",
        help="a saved query instead of filters; its hash is checked",
    )
    parser.add_argument(
        "--label-column",
        dest="labels.column",
        metavar="COLUMN",
        help="obs column of labels (default cell_type_major)",
    )
    parser.add_argument(
        "--compare",
        metavar="URI",
        help="also list the cells that another release or atlas adds, lacks or labels otherwise",
    )
    add_tiledb(parser)
    parser.add_argument("--out", metavar="FILE", help="save the query as JSON")


def work(args: argparse.Namespace) -> Result:
    """Run the query, print what it found, and save it."""
    from data_ingest.atlas import pinned
    from data_ingest.query import find_cells, resolve_query
    from data_ingest.query_compare import CELL_NAMES, changes
    from data_ingest.query_counts import REPORTED
    from data_ingest.query_summary import report, seconds_to_read

    atlas, query, expected_hash = resolve_query(args.settings)
    column = args.settings.labels.column
    columns = REPORTED + (CELL_NAMES if args.compare else ())
    result = find_cells(atlas, query, column, optional_columns=columns, expected_hash=expected_hash)
    words = report(result, seconds=seconds_to_read(result))
    if args.compare:
        other = pinned(dataclasses.replace(atlas, uri=args.compare, timestamp_ms=0))
        found = changes(result, find_cells(other, query, column, optional_columns=CELL_NAMES))
        words += f"\ncompared with {other.uri}:\n{found.words()}"
    if args.out:
        result.save(args.out)
        words += f"\nsaved to {args.out}; use it with query.file={args.out}"
    return words


main = Command(name="query", doc=__doc__, arguments=arguments, work=work, extra="train")

if __name__ == "__main__":
    sys.exit(main())
