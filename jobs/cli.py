"""The `screformer` command: one name for all commands.

`screformer NAME ...` is `python -m jobs.NAME ...`, which is also what follows `ray job submit
--working-dir . --`.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Mapping, Sequence

from jobs.arguments import DONE, USER, program
from screformer import __version__

COMMANDS = {
    "quickstart": "Run the whole chain in one command: ingest, train, test, register, annotate, report.",
    "ingest": "Make an atlas from .h5ad files, or add files to one.",
    "query": "Count the cells of a query, and save it for other commands.",
    "pretrain": "Pre-train a network on unlabelled cells.",
    "finetune": "Train a cell-type classifier, test it on held-out groups and register it.",
    "crossval": "Cross-validate next to baselines on the same folds, or search for settings.",
    "ablate": "Vary one thing at a time over the same folds.",
    "annotate": "Label the cells of .h5ad files or of an atlas query.",
    "explain": "Show which genes drive each label.",
    "promote": "Make the candidate the champion if it is better.",
    "report": "Make the report of a run.",
    "train_bundled": "Train the model of blood cells that comes with screformer.",
    "sync": "Send what an unreachable tracking server missed.",
    "settings": "List the settings with their values and meanings, and the recipes.",
    "benchmark": "Measure attention, training steps or the stream next to their peers.",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the installed command."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["--version"]:
        print(f"screformer {__version__}")
        return DONE
    return dispatch("", COMMANDS, words)


def dispatch(group: str, table: Mapping[str, str], words: Sequence[str]) -> int:
    """Run the command that the first word names, or print the names.

    Args:
        group: What the names belong to: nothing, or `benchmark`.
        table: Names, and a line on each.
        words: The name and its arguments.

    Returns:
        The command's exit status; 0 for `--help`, 2 for no name or an unknown one.
    """
    name, *rest = words or [""]
    if name in table:
        module = ".".join(filter(None, ["jobs", group, name]))
        spec = importlib.util.find_spec(module)
        is_group = spec is not None and spec.submodule_search_locations is not None
        return importlib.import_module(f"{module}.__main__" if is_group else module).main(rest)
    called = program(group).strip()
    wants_help = name in ("-h", "--help")
    out = sys.stdout if wants_help else sys.stderr
    if name and not wants_help:
        near = difflib.get_close_matches(name, table, n=1)
        print(f"{called}: no command {name!r}" + (f"; did you mean {near[0]}?" if near else ""), file=out)
    width = max(map(len, table))
    print(f"usage: {called} COMMAND ...   (COMMAND --help lists its arguments)\n", file=out)
    print("\n".join(f"  {command:<{width}}  {line}" for command, line in table.items()), file=out)
    return DONE if wants_help else USER


if __name__ == "__main__":
    sys.exit(main())
