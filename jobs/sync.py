"""Send what a run could not log while its tracking server was unreachable, including its model.

The last line on stdout is one JSON object. The exit status is 1 if anything could not
be sent.
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
        help="folder or URI printed when the run started",
    )


def work(args: argparse.Namespace) -> Result:
    """Send everything that was kept."""
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
            f"{left} entries of run {run.run_id} are still in {run.outbox}; {run.tracking_uri} did not"
            f" accept them; try again later"
        )
    return {"run_id": run.run_id, "sent": sent}


main = Command(name="sync", doc=__doc__, arguments=arguments, work=work, extra="train")

if __name__ == "__main__":
    sys.exit(main())
