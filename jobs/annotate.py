"""Label the cells of files, or of an atlas query, with a registered model.

Input files are .h5ad, 10x Cell Ranger output (.h5, or a folder with matrix.mtx), Zarr stores or .loom, also
given by URL (https://, s3://). Counts must be raw.

For a file, the output is a copy with new obs columns (X and everything else stay byte-identical) or a folder
of Parquet files. For an atlas query, it is a folder of Parquet files, optionally with new obs columns in the
atlas. Memory use does not grow with the number of cells, large inputs are labelled in parallel, and an
interrupted run resumes where it stopped.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from jobs.arguments import Command, Parser, Result, add_cells, add_gene_overlap, add_model


def arguments(parser: Parser) -> None:
    """The arguments of the command."""
    add_model(parser)
    add_cells(parser, many=True)
    parser.add_argument(
        "--out",
        required=True,
        type=Path,
        help="the labelled copy, or NAME.parquet for a folder of Parquet files;"
        " for several files, or with --parquet, the folder to write them to",
    )
    parser.add_argument("--parquet", action="store_true", help="write Parquet instead of .h5ad copies")
    parser.add_argument(
        "--write-obs",
        action="store_true",
        help="also write the labels into the atlas's obs, as screformer_...",
    )
    parser.add_argument(
        "--majority-vote", default="", metavar="COLUMN", help="obs column with clusters; adds majority_label"
    )
    parser.add_argument(
        "--drop-absent",
        action="store_true",
        help="add present_label: the best label among the types estimated to be in the file",
    )
    add_gene_overlap(parser)
    parser.add_argument(
        "--probabilities", action="store_true", help="also write obsm['screformer_probabilities']"
    )
    parser.add_argument("--embedding", action="store_true", help="also write obsm['X_screformer']")
    parser.add_argument(
        "--report",
        type=Path,
        metavar="FILE.html",
        help="also write a report of one file: types, confidence, map of the cells, marker genes",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing output")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="skip .h5ad copies that an interrupted run finished (labels are always reused)",
    )
    parser.add_argument("--device", help="for example cpu or cuda:0 (default: a GPU if available)")


def check(args: argparse.Namespace) -> None:
    """Choose the output paths, and refuse options that do not apply to them."""
    if args.report is not None:
        if args.report.suffix != ".html":
            raise ValueError(f"--report {args.report} must end in .html")
        if args.h5ad is None or len(args.h5ad) > 1:
            raise ValueError("--report describes one file; give one --h5ad")
    only_copies = {"--majority-vote": bool(args.majority_vote), "--drop-absent": args.drop_absent}
    refused = next((option for option, given in only_copies.items() if given), None)
    if args.h5ad is None:
        if refused:
            raise ValueError(f"{refused} applies to .h5ad copies only; remove it or --atlas")
        target = args.out if args.out.suffix == ".parquet" else args.out.with_name(args.out.name + ".parquet")
        args.targets = [(None, target)]
        return
    if args.write_obs:
        raise ValueError("--write-obs writes into an atlas; use --atlas instead of --h5ad")
    if refused and (args.parquet or args.out.suffix == ".parquet"):
        raise ValueError(f"{refused} applies to .h5ad copies only; remove it or --parquet")
    args.targets = targets(args.h5ad, args.out, parquet=args.parquet)


def targets(sources: list[Path], out: Path, *, parquet: bool) -> list[tuple[Path, Path]]:
    """Pair each input with its output: --out itself for one input, a file in the folder --out for several.

    Raises:
        ValueError: Several inputs but one output file, or two inputs with the same name.
    """
    from data_ingest.foreign_files import h5ad_name

    single = len(sources) == 1
    to_parquet = parquet or out.suffix == ".parquet"
    if to_parquet and single and out.suffix == ".parquet":
        return [(sources[0], out)]
    if not to_parquet and out.suffix not in ("", ".h5ad") and not out.is_dir():
        raise ValueError(
            f"--out {out}: the output is NAME.h5ad (a copy of the file) or NAME.parquet (a table);"
            f" for other formats, write {out.with_suffix('.parquet')} and convert it with pandas"
        )
    if single and not to_parquet:
        return [(sources[0], out / h5ad_name(sources[0].name) if out.is_dir() else out)]
    if out.suffix == ".h5ad" or out.is_file():
        raise ValueError(f"--out {out} is a file, but there are {len(sources)} inputs; give a folder")
    names = [f"{source.stem}.parquet" if to_parquet else h5ad_name(source.name) for source in sources]
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated:
        raise ValueError(f"two inputs would both be written to {out / repeated}; label them separately")
    return [(source, out / name) for source, name in zip(sources, names, strict=True)]


def work(args: argparse.Namespace) -> Result:
    """Label each input."""
    from data_ingest.formats import as_h5ad
    from jobs.labelling.outputs import Labeller

    if args.report is not None:
        import jinja2  # noqa: F401 -- a missing package is reported before the work, not after it

    labeller = Labeller.load(
        args.model,
        args.settings,
        device=args.device,
        layer=args.layer,
        raw=args.use == "raw",
        min_gene_overlap=args.min_gene_overlap,
        probabilities=args.probabilities,
        embedding=args.embedding,
        overwrite=args.overwrite,
    )
    print(labeller)
    for source, target in args.targets:
        if source is None:
            print(labeller.atlas(target, write_obs=args.write_obs))
            continue
        finished = args.resume and target.suffix != ".parquet" and target.exists()
        if finished:
            print(f"{target} already exists, written by an earlier run")
        if finished and args.report is None:
            continue
        with as_h5ad([source]) as (path,):
            if not finished and target.suffix == ".parquet":
                print(labeller.parquet(path, target))
            elif not finished:
                voting = {"majority_vote": args.majority_vote, "drop_absent": args.drop_absent}
                print(labeller.copy(path, target, **voting))
            if args.report is not None:
                print(labeller.report(path, target, args.report))
    return None


main = Command(name="annotate", doc=__doc__, arguments=arguments, work=work, extra="train", check=check)

if __name__ == "__main__":
    sys.exit(main())
