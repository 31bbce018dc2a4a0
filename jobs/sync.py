"""Send what a run could not log while its tracking server did not answer, its model included.

The last line on stdout is one JSON object. The command fails (status 1) while something is left to send.
"""

from __future__ import annotations

import argparse
import logging
import sys

from jobs.arguments import Command, Parser, Result


def arguments(parser: Parser) -> None:
    """The arguments of the command."""
    parser.add_argument(
        "--run-dir",
        required=True,
        metavar="RUN_DIR",
        help="folder or URI that the run printed when it started",
    )


def work(args: argparse.Namespace) -> Result:
    """Send everything that is kept."""
    from jobs.reports.artifacts import log_curves
    from jobs.tracking.runs import TrackedRun
    from jobs.training.run_folder import read_run

    logging.getLogger("jobs.tracking").setLevel(logging.INFO)  # reports which version was registered
    run = TrackedRun(**read_run(args.run_dir, option="--run-dir")["run"]).kept_in(args.run_dir)
    sent, left = run.send_kept()
    if sent:
        log_curves(run)
    if left:
        raise ConnectionError(
            f"{left} entries of run {run.run_id} are left in {run.outbox}; {run.tracking_uri} does not"
            f" accept them yet; try again later"
        )
    return {"run_id": run.run_id, "sent": sent}


main = Command(name="sync", doc=__doc__, arguments=arguments, work=work, extra="train")

if __name__ == "__main__":
    sys.exit(main())
