"""Measure our parts beside their peers, in one run on one machine: `benchmark NAME ...`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from jobs.cli import dispatch


def main(argv: Sequence[str] | None = None) -> int:
    """Run `jobs.benchmark.NAME`."""
    return dispatch(
        "python -m jobs.benchmark",
        Path(__file__).parent,
        "jobs.benchmark",
        sys.argv[1:] if argv is None else argv,
    )


if __name__ == "__main__":
    sys.exit(main())
