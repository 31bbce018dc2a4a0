"""Train a cell-type classifier.

From a pre-trained network or from scratch, test it on held-out groups and register it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jobs.arguments import train_command


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; the last line on stdout is one JSON object."""
    return train_command("finetune", __doc__ or "", argv)


if __name__ == "__main__":
    sys.exit(main())
