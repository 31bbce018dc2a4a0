"""Say which genes make a model give its labels, for cells of an .h5ad file or of an atlas query.

For a stratified sample of cells, expected gradients (`screformer.explain`) of the logits of the predicted and
the true label are computed in parallel Ray tasks and written to Parquet shards; nothing else is kept in
memory, and an interrupted run goes on with the shards that are missing. Then come the checks of whether to
believe them: additivity, deletion and insertion curves against random genes, markers, a logistic regression's
coefficients, other hash seeds, random weights. The last line on stdout is one JSON object.

Axes: n cells, m pairs of cell and class, g genes, k classes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from cluster.connect import connect
from data_ingest.atlas_cells import query_cells
from data_ingest.cells import H5adCells
from jobs.explaining.checks import summary_lines
from jobs.explaining.explanations import explain
from jobs.explaining.shards import PLAN
from jobs.reports.artifacts import log_explanations
from jobs.tracking.models import pinned_model, resolve_model
from jobs.tracking.runs import start_run
from screformer.cells import CellSource
from screformer.config import AtlasConfig, TrackingConfig
from screformer.explain import NUM_NODES
from screformer.genes import MIN_GENE_OVERLAP
from screformer.predictor import Predictor


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; the last line on stdout is one JSON object."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.explain", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument(
        "--model",
        required=True,
        help="models:/NAME@ALIAS, models:/NAME/VERSION, runs:/RUN_ID or a model directory",
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--h5ad", type=Path, metavar="FILE", help=".h5ad file of raw counts")
    where.add_argument("--atlas", metavar="URI", help="atlas whose cells are explained")
    parser.add_argument("--obs-filter", default="", metavar="FILTER", help="which cells of the atlas")
    parser.add_argument("--layer", help="take the counts of the .h5ad from this layer instead of X")
    parser.add_argument("--out", required=True, type=Path, help="folder for values, tables and pictures")
    parser.add_argument(
        "--cells", type=int, default=200, metavar="N", help="cells to explain (default %(default)s)"
    )
    parser.add_argument(
        "--background", type=int, default=8, metavar="N", help="background cells (default %(default)s)"
    )
    parser.add_argument(
        "--nodes", type=int, default=NUM_NODES, metavar="N", help="points of each path (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the choice of cells")
    parser.add_argument(
        "--min-gene-overlap", type=float, default=MIN_GENE_OVERLAP, metavar="SHARE", help="as of annotate"
    )
    parser.add_argument(
        "--tracking-uri",
        default="",
        help="where models and runs are kept (default MLFLOW_TRACKING_URI, else ./mlflow.db)",
    )
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        for name in ("cells", "background", "nodes"):
            if getattr(args, name) < 1:
                raise ValueError(f"--{name} {getattr(args, name)} must be at least 1")
        tracking = TrackingConfig(uri=args.tracking_uri)
        model = pinned_model(args.model, tracking)
        model_dir = resolve_model(model, tracking)
        predictor = Predictor.load(model_dir)
        source: CellSource
        if args.h5ad:
            source = H5adCells.open(
                predictor,
                args.h5ad,
                min_gene_overlap=args.min_gene_overlap,
                layer=args.layer,
                label_column=predictor.label_column,
            )
        else:
            resumed = args.out / PLAN
            source = query_cells(
                predictor,
                AtlasConfig(uri=args.atlas),
                args.obs_filter,
                min_gene_overlap=args.min_gene_overlap,
                resumed=resumed,
            )
        connect()
        config = predictor.config.merge({"tracking.uri": args.tracking_uri})
        run = start_run(
            dataclasses.replace(config, tracking=dataclasses.replace(config.tracking, run_name="")), "explain"
        )
        with run:
            run.log_identity({"model": model, "source": source.identity()})
            out = args.out.resolve()
            summary = explain(
                predictor,
                model_dir,
                source,
                out,
                num_cells=args.cells,
                num_background=args.background,
                num_nodes=args.nodes,
                seed=args.seed,
            )
            numbers = {
                "explain/additivity_error": summary["additivity_error"]["median"],
                "explain/deletion_area": summary["curves"]["deletion"],
                "explain/deletion_area_random": summary["curves"]["deletion, random"],
                "explain/insertion_area": summary["curves"]["insertion"],
                "explain/correlation_other_hash_seed": summary["correlation_other_hash_seed"],
                "explain/correlation_random_weights": summary["correlation_random_weights"],
            }
            run.log_metrics(numbers, step=0)
            log_explanations(run, out)
    except (ValueError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    print("\n".join(summary_lines(summary)))
    print(
        json.dumps(
            {
                "out": str(out),
                "run": run.run_id,
                **{key: value for key, value in summary.items() if key != "classes"},
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
