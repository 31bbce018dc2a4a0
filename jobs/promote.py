"""Let `champion` name the candidate.

If it is better than the champion on the same cells that neither was trained on.

Two models that carry the scores of a cross-validation on the same folds (`crossval.register`) are compared by
these: the mean difference of macro-F1 over the folds, with its interval by Student's t. Otherwise the cells
are those that the candidate's training held out, less those of groups (such as donors) that the champion was
trained on. Both models label each cell, and the difference of their balanced accuracies is taken with its
interval, from bootstrap samples of the cells within each type. The last line on stdout is one JSON object;
the exit status is 1 where the champion stays.

Axes: n cells.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence

from jobs.tracking.promotion import promote
from screformer.config import TrackingConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; the last line on stdout is one JSON object."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.promote", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--model", required=True, metavar="NAME", help="registered model")
    parser.add_argument(
        "--margin",
        type=float,
        default=0.0,
        help="by how much the interval must lie above 0 (default %(default)s)",
    )
    parser.add_argument(
        "--force", action="store_true", help="promote anyway; that it was forced is kept with the version"
    )
    parser.add_argument(
        "--tracking-uri",
        default="",
        help="where models are kept (default MLFLOW_TRACKING_URI, else ./mlflow.db)",
    )
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        name = args.model.removeprefix("models:/").partition("@")[0]
        found = promote(name, TrackingConfig(uri=args.tracking_uri), margin=args.margin, force=args.force)
    except (ValueError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    if found["promoted"]:
        print(
            f"{found['model']}: version {found['candidate']} is the champion"
            f" now{' (forced)' if args.force else ''}: {found['reason']}"
        )
    else:
        print(f"{found['model']}: the champion stays version {found['champion_before']}: {found['reason']}")
    print(json.dumps(found, default=str))
    return 0 if found["promoted"] else 1


if __name__ == "__main__":
    sys.exit(main())
