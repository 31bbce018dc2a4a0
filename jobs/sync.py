"""Send what a run could not log while its tracking server was away, its model included.

The last line on stdout is one JSON object; the command fails while something is left.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence

from jobs.reports.artifacts import log_curves
from jobs.tracking.runs import TrackedRun
from jobs.training.run_folder import read_run


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.sync", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument(
        "--run-dir",
        required=True,
        metavar="RUN_DIR",
        help="folder or URI that the run printed when it started",
    )
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("jobs.tracking").setLevel(logging.INFO)  # says which version was registered
    try:
        run = TrackedRun(**read_run(args.run_dir, option="--run-dir")["run"]).kept_in(args.run_dir)
        sent, left = run.send_kept()
        if left:
            raise ConnectionError(
                f"{left} entries of run {run.run_id} are left in {run.outbox}; {run.tracking_uri} does not"
                f" take them yet"
            )
        if sent:
            log_curves(run)
    except (ValueError, ConnectionError) as error:
        print(f"{parser.prog}: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(json.dumps({"run_id": run.run_id, "sent": sent}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
