"""Write a query's cells to a shard cache, from which training reads them faster than from the atlas.

    screformer shard    --query blood.json --out ./blood-cache
    screformer pretrain --query blood.json stream.cache=./blood-cache

The cache has raw counts in shuffled order. It pays off for a training of several epochs. A complete cache of
the same query is left unchanged.
"""

from __future__ import annotations

import argparse
import sys

from jobs.arguments import Command, Parser, Result, add_atlas, add_filter, add_query, add_tiledb


def arguments(parser: Parser) -> None:
    """The arguments of the command."""
    add_atlas(parser)
    add_filter(parser)
    add_query(parser)
    add_tiledb(parser)
    parser.add_argument("--out", required=True, metavar="URI", help="folder or s3://bucket/prefix to write")
    parser.add_argument(
        "--verify", action="store_true", help="then compare the SHA-256 of every file with the manifest"
    )


def work(args: argparse.Namespace) -> Result:
    """Write the cache."""
    from cluster.connect import connect
    from cluster.quiet import quiet_data
    from data_ingest.query import find_cells, resolve_query
    from data_ingest.shard_write import write_cache

    settings = args.settings
    atlas, filters, expected_hash = resolve_query(settings)
    query = find_cells(atlas, filters, "cell_type", expected_hash=expected_hash)
    connect()
    quiet_data()
    cache = write_cache(query, args.out, seed=settings.train.seed, run_length=settings.stream.run_length)
    if args.verify:
        cache.verify()
    num_bytes = sum(file["bytes"] for file in cache.manifest["files"].values())
    return {
        "cache": cache.reader.place,
        "cells": len(cache.joinids),
        "genes": len(cache.manifest["feature_ids"]),
        "files": len(cache.manifest["files"]),
        "gb": round(num_bytes / 1e9, 3),
        "query_hash": cache.manifest["hash"],
    }


main = Command(name="shard", doc=__doc__, arguments=arguments, work=work, extra="train", recipe="")

if __name__ == "__main__":
    sys.exit(main())
