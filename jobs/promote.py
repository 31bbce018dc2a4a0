"""Promote the candidate to champion if it is better on cells that neither model was trained on.

If both models have cross-validation scores on the same folds (`crossval.register=true`), these are compared:
the mean difference of macro-F1 over the folds, with its interval by Student's t. Otherwise both models label
the cells held out by the candidate's training, except those of groups (usually donors) that the champion was
trained on. Their balanced accuracies are compared, with an interval from bootstrap samples of the cells
within each type.

A model that was moved to another query (`finetune --from`) must be better on cells of the new query, and may
lose at most 0.01 of macro-F1 and of balanced accuracy on cells of the query that its start model was trained
on.

If there is no champion yet, the candidate must be better than giving every cell the most frequent label.
`--force` promotes it in any case.

The exit status is 0 whether or not the candidate is promoted; `promoted` in the JSON object on the last line
of stdout says which.
"""

from __future__ import annotations

import argparse
import sys

from jobs.arguments import Command, Parser, Result, add_tracking


def arguments(parser: Parser) -> None:
    """The arguments of the command."""
    parser.add_argument("--model", required=True, metavar="NAME", help="registered model")
    add_tracking(parser)
    parser.add_argument(
        "--margin",
        type=float,
        default=0.0,
        metavar="X",
        help="the whole interval of the difference must be above this (default %(default)s)",
    )
    parser.add_argument(
        "--force", action="store_true", help="promote in any case; the version records that it was forced"
    )


def work(args: argparse.Namespace) -> Result:
    """Compare and promote."""
    from jobs.tracking.promotion import promote

    name = args.model.removeprefix("models:/").partition("@")[0]
    found = promote(name, args.settings.tracking, margin=args.margin, force=args.force)
    if found["promoted"]:
        forced = " (forced)" if args.force else ""
        print(f"{name}: version {found['candidate']} is now the champion{forced}: {found['reason']}")
    else:
        before = found["champion_before"]
        kept = f"version {before} stays the champion" if before else "there is still no champion"
        print(f"{name}: {kept}: {found['reason']}")
    return found


main = Command(name="promote", doc=__doc__, arguments=arguments, work=work, extra="train")

if __name__ == "__main__":
    sys.exit(main())
