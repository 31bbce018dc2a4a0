"""Label the cells of .h5ad files, or of an atlas query, with a registered model.

The output of a file is a copy of it with new obs columns (X and everything else stay as they are, byte by
byte), or a folder of Parquet; that of an atlas query is a folder of Parquet, or new obs columns of the atlas.
Cells are labelled into shards of Parquet first (`jobs.labelling`), so memory does not grow with their number,
many are labelled in parallel, and an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from data_ingest.atlas_cells import AtlasCells, query_cells
from data_ingest.cells import H5adCells
from jobs.labelling.h5ad_copy import annotate, empty_cells_text
from jobs.labelling.shards import OBS_PREFIX, PLAN, label_cells, write_to_atlas
from jobs.tracking.models import pinned_model, resolve_model
from screformer.cells import CellSource
from screformer.config import AtlasConfig, TrackingConfig
from screformer.genes import MIN_GENE_OVERLAP
from screformer.predictor import ANSWER_COLUMNS, Predictor


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.annotate", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument(
        "--model",
        required=True,
        help="models:/NAME@ALIAS, models:/NAME/VERSION, runs:/RUN_ID or a model directory",
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--h5ad", nargs="+", type=Path, metavar="IN", help=".h5ad files of raw counts")
    where.add_argument("--atlas", metavar="URI", help="atlas whose cells are labelled")
    parser.add_argument("--obs-filter", default="", metavar="FILTER", help="which cells of the atlas")
    parser.add_argument(
        "--out",
        type=Path,
        help="the annotated copy; NAME.parquet for a folder of Parquet files;"
        " for several files, or with --parquet, a folder for them",
    )
    parser.add_argument("--parquet", action="store_true", help="write Parquet instead of .h5ad copies")
    parser.add_argument(
        "--write-obs",
        action="store_true",
        help="also write the labels into obs of the atlas, as screformer_...",
    )
    parser.add_argument(
        "--majority-vote", default="", metavar="COLUMN", help="obs column of clusters; adds majority_label"
    )
    parser.add_argument(
        "--drop-absent",
        action="store_true",
        help="adds present_label: the best label among those that the file as a whole holds",
    )
    counts = parser.add_mutually_exclusive_group()
    counts.add_argument("--layer", help="take counts from this layer instead of X")
    counts.add_argument(
        "--use", choices=("X", "raw"), default="X", help="take counts from X (default) or raw.X"
    )
    parser.add_argument(
        "--min-gene-overlap",
        type=float,
        default=MIN_GENE_OVERLAP,
        metavar="SHARE",
        help="least share of the model's expected expression that a file's genes must carry"
        " (default %(default)s)",
    )
    parser.add_argument(
        "--probabilities", action="store_true", help="also write obsm['screformer_probabilities']"
    )
    parser.add_argument("--embedding", action="store_true", help="also write obsm['X_screformer']")
    parser.add_argument("--overwrite", action="store_true", help="replace existing output")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="keep the .h5ad copies that an interrupted run finished (labels always are)",
    )
    parser.add_argument(
        "--tracking-uri",
        default="",
        help="where models are kept (default MLFLOW_TRACKING_URI, else ./mlflow.db)",
    )
    parser.add_argument("--device", help="such as cpu or cuda:0 (default: a GPU where there is one)")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        tracking = TrackingConfig(uri=args.tracking_uri)
        targets = _targets(args)
        model = pinned_model(args.model, tracking)
        model_dir = resolve_model(model, tracking)
        predictor = Predictor.load(model_dir, device=args.device)
        print(f"model {model}: {len(predictor.label_names)} labels, {len(predictor.vocabulary):,} genes")
        for source, target in targets:
            if target.suffix == ".parquet":
                _to_parquet(predictor, source, target, model, args)
                continue
            if args.resume and target.exists():
                print(f"{target} is there already, as an earlier run made it")
                continue
            cells = H5adCells.open(
                predictor,
                source,
                min_gene_overlap=args.min_gene_overlap,
                layer=args.layer,
                raw=args.use == "raw",
            )
            done = annotate(
                predictor,
                cells,
                target,
                model=model,
                probabilities=args.probabilities,
                embedding=args.embedding,
                majority_vote=args.majority_vote,
                drop_absent=args.drop_absent,
                overwrite=args.overwrite,
            )
            print(done)
    except (ValueError, OSError) as error:
        print(f"annotate: {error}", file=sys.stderr)
        return 1
    return 0


def _to_parquet(predictor: Predictor, path: Path, target: Path, model: str, args: argparse.Namespace) -> None:
    """Label one file, or the atlas query, into a folder of Parquet files, and print the summary."""
    started = time.perf_counter()
    source: CellSource
    if args.atlas:
        resumed = None if args.overwrite else target / PLAN
        source = query_cells(
            predictor,
            AtlasConfig(uri=args.atlas),
            args.obs_filter,
            min_gene_overlap=args.min_gene_overlap,
            resumed=resumed,
        )
    else:
        source = H5adCells.open(
            predictor, path, min_gene_overlap=args.min_gene_overlap, layer=args.layer, raw=args.use == "raw"
        )
    labelled = label_cells(
        predictor,
        source,
        target,
        model=model,
        probabilities=args.probabilities,
        embedding=args.embedding,
        overwrite=args.overwrite,
    )
    seconds = time.perf_counter() - started
    print(
        f"{target}: {source.num_cells:,} cells in {seconds:.1f} s ({source.num_cells / seconds:,.0f} cells/s)"
    )
    if labelled.num_empty:
        print(empty_cells_text(labelled.num_empty))
    print(labelled.table.to_string(index=False))
    if args.write_obs:
        assert isinstance(source, AtlasCells)
        write_to_atlas(source, target)
        print(
            f"obs of {args.atlas} has the columns {', '.join(OBS_PREFIX + name for name in ANSWER_COLUMNS)}"
        )


def _targets(args: argparse.Namespace) -> list[tuple[Path, Path]]:
    """Each input and where its output goes: the file itself for one input, a folder for several."""
    sources, out = args.h5ad or [], args.out
    if out is None:
        raise ValueError("--out is missing; name the annotated copy, or NAME.parquet")
    if args.atlas:
        if args.majority_vote:
            raise ValueError(
                "--majority-vote works on .h5ad files, whose clusters stand in obs; drop it or --atlas"
            )
        if args.drop_absent:
            raise ValueError("--drop-absent writes into .h5ad copies; drop it or --atlas")
        return [(Path(), out if out.suffix == ".parquet" else out.with_name(out.name + ".parquet"))]
    if args.write_obs:
        raise ValueError("--write-obs writes into an atlas; give --atlas instead of --h5ad")
    if args.parquet or out.suffix == ".parquet":
        for flag, given in (("--majority-vote", args.majority_vote), ("--drop-absent", args.drop_absent)):
            if given:
                raise ValueError(f"{flag} writes into .h5ad copies; drop it or --parquet")
        if len(sources) == 1 and out.suffix == ".parquet":
            return [(sources[0], out)]
        return [(source, out / f"{source.stem}.parquet") for source in sources]
    if len(sources) == 1:
        return [(sources[0], out / sources[0].name if out.is_dir() else out)]
    if out.suffix == ".h5ad" or out.is_file():
        raise ValueError(f"--out {out} is one file, but there are {len(sources)} inputs; name a folder")
    names = [source.name for source in sources]
    doubled = next((name for name in names if names.count(name) > 1), None)
    if doubled:
        raise ValueError(
            f"two inputs are called {doubled}, and both would go to {out / doubled}; annotate them one by one"
        )
    return [(source, out / source.name) for source in sources]


if __name__ == "__main__":
    sys.exit(main())
