"""`python -m jobs.query --atlas A --obs-filter "..."`.

Count the cells of a query, and save it for other jobs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from data_ingest.query import MAJOR, QueryResult, find_cells, resolve_query
from jobs.arguments import parse_pairs
from screformer.config import AtlasConfig, ExperimentConfig, QueryConfig

_MOST_ROWS = 30


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 0, or 2 for something that the user can fix."""
    arguments = _parser().parse_args(argv)
    try:
        config = ExperimentConfig(
            atlas=AtlasConfig(
                uri=arguments.atlas or "",
                tiledb_config=parse_pairs("--tiledb", arguments.tiledb),
            ),
            query=QueryConfig(
                obs_filter=arguments.obs_filter,
                var_filter=arguments.var_filter,
                is_primary_data=not arguments.copies,
                file=arguments.query or "",
            ),
        )
        atlas, query, expected_hash = resolve_query(config)
        result = find_cells(atlas, query, arguments.label_column, expected_hash=expected_hash)
    except ValueError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    print(report(result))
    if arguments.out:
        result.save(arguments.out)
        print(f"saved to {arguments.out}; use it with query.file={arguments.out}")
    return 0


def report(result: QueryResult) -> str:
    """The summary of a result in words."""
    summary = result.summary()
    lines = [
        f"atlas     {result.atlas.uri} at timestamp_ms={result.atlas.timestamp_ms}",
        *(f"{name:<9} {summary[name]:,}" for name in ("cells", "genes", "donors", "datasets")),
        f"{result.label_column}, cells:",
        *_rows(summary["labels"]),
    ]
    if summary["unmapped_cells"]:
        lines += [
            f"without a label {summary['unmapped_cells']:,} cells, by cell_type:",
            *_rows(summary["unmapped_cell_types"]),
        ]
    return "\n".join([*lines, f"hash      {result.hash}"])


def _rows(counts: dict[str, int]) -> list[str]:
    rows = [f"  {count:>11,}  {name}" for name, count in list(counts.items())[:_MOST_ROWS]]
    return [*rows, f"  and {len(counts) - _MOST_ROWS} more"] if len(counts) > _MOST_ROWS else rows


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m jobs.query", description=__doc__)
    parser.add_argument(
        "--atlas", metavar="URI", help="a path, s3://bucket/prefix, census or census:YYYY-MM-DD"
    )
    parser.add_argument(
        "--obs-filter",
        default="",
        metavar="FILTER",
        help="such as \"tissue_general == 'blood' and sex != 'unknown'\"",
    )
    parser.add_argument(
        "--var-filter", default="", metavar="FILTER", help="such as \"feature_name in ['CD3D', 'MS4A1']\""
    )
    parser.add_argument(
        "--copies",
        action="store_true",
        help="keep cells that are copies of cells in another data set (is_primary_data false)",
    )
    parser.add_argument(
        "--query", metavar="FILE", help="a saved query instead of filters; its hash is checked"
    )
    parser.add_argument(
        "--label-column", default=MAJOR, metavar="COLUMN", help=f"obs column of labels; {MAJOR} by default"
    )
    parser.add_argument(
        "--tiledb",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help="TileDB settings: vfs.s3.region=eu-west-1",
    )
    parser.add_argument("--out", metavar="FILE", help="save the query as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
