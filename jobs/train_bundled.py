"""Train the blood-cell model that comes with screformer, from public labelled data sets.

`screformer train_bundled --data FOLDER --work SCRATCH` builds an atlas from the data sets, trains with the
recipe `blood`, and writes `screformer/pretrained/blood/` with its model card. The data are not copied.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from jobs.arguments import Command, Parser, Result, recipe_path
from screformer.bundled import FOLDER
from screformer.config import ExperimentConfig


def arguments(parser: Parser) -> None:
    """The arguments of the command."""
    parser.add_argument(
        "--data",
        required=True,
        type=Path,
        metavar="FOLDER",
        help="folder with the .h5ad files and label_map.tsv",
    )
    parser.add_argument(
        "--work", required=True, type=Path, metavar="FOLDER", help="folder for atlas, checkpoints and runs"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=FOLDER / "blood",
        metavar="FOLDER",
        help="model directory (default: that of the installed package)",
    )


def work(args: argparse.Namespace) -> Result:
    """Train and write the model."""
    from jobs.training.bundled import train_bundled

    recipe = ExperimentConfig.from_file(recipe_path("blood"), command="finetune")
    return train_bundled(recipe, args.data, args.work, args.out)


main = Command(name="train_bundled", doc=__doc__, arguments=arguments, work=work)

if __name__ == "__main__":
    sys.exit(main())
