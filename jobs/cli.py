"""The `screformer` command, which runs all others by name.

`screformer NAME ...` is the same as `python -m jobs.NAME ...`; use the latter after
`ray job submit --working-dir . --`.
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
    "ingest": "Build an atlas from .h5ad files, or add files to one.",
    "query": "Count the cells of a query, and save the query for other commands.",
    "shard": "Write a query's cells to a shard cache, for training of many epochs.",
    "pretrain": "Pre-train a network on unlabelled cells.",
    "finetune": "Train a cell-type classifier, test it on held-out groups and register it.",
    "crossval": "Cross-validate the model and baselines on the same folds, or search for settings.",
    "ablate": "Vary one setting at a time over the same folds.",
    "shift": "Measure how far cells are from a model's training cells.",
    "annotate": "Label the cells of .h5ad files or of an atlas query.",
    "explain": "Show which genes drive each label.",
    "promote": "Promote the candidate to champion if it is better.",
    "report": "Write the report of a run.",
    "train_bundled": "Train the blood-cell model that comes with screformer.",
    "doctor": "Check an installation or a cluster, and show how to fix what is wrong.",
    "sync": "Send what an unreachable tracking server missed.",
    "settings": "List the settings with their values and meanings, or the recipes.",
    "benchmark": "Compare our attention, training step, stream or labelling with peers.",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the installed command."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["--version"]:
        print(f"screformer {__version__}")
        return DONE
    return dispatch("", COMMANDS, words)


def dispatch(group: str, table: Mapping[str, str], words: Sequence[str]) -> int:
    """Run the command named by the first word, or print the names.

    Args:
        group: The command group: empty, or `benchmark`.
        table: Names, each with a one-line description.
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
