"""Compare our parts with their peers, in one run on one machine."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jobs.cli import dispatch

PARTS = {
    "annotate": "Labelling a file with the bundled model, next to CellTypist.",
    "attention": "LSH attention, next to reformer-pytorch's and to full attention.",
    "step": "A training step, next to scBERT's and with LSH and full attention.",
    "stream": "The stream of cells from an atlas, next to tiledbsoma-ml and a plain scan.",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `jobs.benchmark.NAME`."""
    return dispatch("benchmark", PARTS, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
