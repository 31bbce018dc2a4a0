"""List the settings with their values and meanings, or the recipes.

screformer settings                     # every setting, one per line
screformer settings model train.lr      # a section or a setting in full
screformer settings --config blood      # what a recipe changes
screformer settings --recipes           # the recipes that --config accepts by name
"""

from __future__ import annotations

import argparse
import difflib
import re
import shutil
import sys
import textwrap

from jobs.arguments import Command, Parser, Result, recipe_path, recipes
from screformer.config import ExperimentConfig
from screformer.setting_docs import Setting, described, listed, written


def arguments(parser: Parser) -> None:
    """The arguments of the command."""
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="sections or settings, for example model train.lr"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--config", metavar="RECIPE", help="show only what this recipe changes")
    what.add_argument("--recipes", action="store_true", help="list the recipes instead")


def check(args: argparse.Namespace) -> None:
    """Read the recipe and look up the names."""
    if args.config:
        args.settings = ExperimentConfig.from_file(recipe_path(args.config))
    sections = described()
    known = {section.name: section.settings for section in sections}
    known |= {setting.name: (setting,) for section in sections for setting in section.settings}
    for name in args.names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ValueError(
                f"no section or setting {name!r}" + (f"; did you mean {near[0]}?" if near else "")
            )
    args.chosen = [setting for name in args.names for setting in known[name]]
    args.listed = args.chosen or [setting for section in sections for setting in section.settings]


def work(args: argparse.Namespace) -> Result:
    """Print the settings."""
    if args.recipes:
        return "\n".join(f"{name:<12} {_first_line(name)}" for name in recipes())
    width = min(shutil.get_terminal_size().columns, 110)
    if args.config:
        changed = args.settings.differences(ExperimentConfig())
        rows = [
            f"{setting.name} = {written(changed[setting.name])}   (default {setting.default})"
            for setting in args.listed
            if setting.name in changed
        ]
        return "\n".join(rows) or f"{args.config} changes none of these settings"
    if args.chosen:
        return "\n\n".join(_in_full(setting, width) for setting in args.chosen)
    return "\n".join(_in_brief(setting, width) for setting in args.listed)


def _in_brief(setting: Setting, width: int) -> str:
    start = f"{f'{setting.name} = {setting.default}':<36}  "
    return start + textwrap.shorten(setting.meaning, max(20, width - len(start)), placeholder=" ...")


def _in_full(setting: Setting, width: int) -> str:
    refused = f" Refused by {listed(setting.refused_by)}." if setting.refused_by else ""
    values = ", ".join(setting.values) or setting.kind
    return "\n".join(
        [
            f"{setting.name} = {setting.default}   ({values})",
            *textwrap.wrap(setting.meaning + refused, width, initial_indent="    ", subsequent_indent="    "),
        ]
    )


def _first_line(recipe: str) -> str:
    """What a recipe is for: its first comment, up to the first full stop or colon."""
    comment = ""
    for line in recipe_path(recipe).read_text().splitlines():
        if not line.startswith("#"):
            break
        comment += line.removeprefix("#")
    return re.split(r"[.:] ", comment.strip())[0].rstrip(".") + "."


main = Command(name="settings", doc=__doc__, arguments=arguments, work=work, check=check)

if __name__ == "__main__":
    sys.exit(main())
