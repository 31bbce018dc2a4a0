"""Make the report of a run: one HTML file with everything in it, which any browser opens."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; the last line on stdout is one JSON object."""
    from jobs.reports.run_report import write_report
    from jobs.tracking.logged import logged_run
    from screformer.config import TrackingConfig

    parser = argparse.ArgumentParser(
        prog="python -m jobs.report", description="Make the report of a run: one HTML file to look at."
    )
    parser.add_argument(
        "--run",
        required=True,
        nargs="+",
        help="run id or runs:/ID; the artifacts of further runs (explain) are added",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help=".html file (default report-RUN.html, RUN being eight characters)",
    )
    parser.add_argument(
        "--tracking-uri",
        default="",
        help="where runs are kept (default MLFLOW_TRACKING_URI, else ./mlflow.db)",
    )
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        run, *others = (logged_run(run_id, TrackingConfig(uri=args.tracking_uri)) for run_id in args.run)
        out = args.out or Path(f"report-{run.run_id[:8]}.html")
        if out.suffix != ".html":
            raise ValueError(f"--out {out} must end in .html")
        write_report(run, others, out)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(json.dumps({"run_id": run.run_id, "report": str(out)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
