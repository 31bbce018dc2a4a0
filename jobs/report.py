"""Write the report of a run as one self-contained HTML file.

The last line on stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from jobs.arguments import Command, Parser, Result, add_tracking


def arguments(parser: Parser) -> None:
    """The arguments of the command."""
    parser.add_argument(
        "--run",
        required=True,
        nargs="+",
        metavar="RUN",
        help="run id or runs:/ID; explanations and tables of further runs are added",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help=".html file (default report-RUN.html, with the first eight characters of the run id)",
    )
    add_tracking(parser)


def check(args: argparse.Namespace) -> None:
    """Refuse formats other than HTML."""
    if args.out is not None and args.out.suffix != ".html":
        raise ValueError(f"--out {args.out} must end in .html")


def work(args: argparse.Namespace) -> Result:
    """Write the report, and log it to the run."""
    from jobs.reports.run_report import write_report
    from jobs.tracking.logged import logged_run

    run, *others = (logged_run(run_id, args.settings.tracking) for run_id in args.run)
    out = args.out or Path(f"report-{run.run_id[:8]}.html")
    write_report(run, others, out)
    return {"run_id": run.run_id, "report": str(out)}


main = Command(name="report", doc=__doc__, arguments=arguments, work=work, extra="report", check=check)

if __name__ == "__main__":
    sys.exit(main())
