"""The `screformer` command: one name for all jobs.

`screformer NAME ...` is `python -m jobs.NAME ...`, which is also what goes after `ray job submit
--working-dir . --`.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import pkgutil
import sys
from collections.abc import Sequence
from pathlib import Path

JOBS = Path(__file__).parent


def commands(package: Path = JOBS) -> dict[str, str]:
    """What can be run in a folder of modules.

    Those with a `main(argv)`, by name, with the first line of their docstring.

    The files are parsed and not imported: help must not wait for torch and Ray.
    """
    found = {}
    for module in pkgutil.iter_modules([str(package)]):
        path = package / module.name / "__main__.py" if module.ispkg else package / f"{module.name}.py"
        if path.exists() and path != JOBS / "cli.py":
            tree = ast.parse(path.read_text())
            mains = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main"]
            if any(node.args.args and node.args.args[0].arg == "argv" for node in mains):
                found[module.name] = (ast.get_docstring(tree) or "").partition("\n")[0]
    return found


def dispatch(program: str, package: Path, prefix: str, argv: Sequence[str]) -> int:
    """Run `PREFIX.NAME` for `NAME ...`, or print the names.

    Returns:
        The exit status: that of the job, 0 for `--help`, 2 for no or an unknown name.
    """
    known = commands(package)
    name, *rest = argv or [""]
    if name not in known:
        wants_help = name in ("-h", "--help")
        out = sys.stdout if wants_help else sys.stderr
        if name and not wants_help:
            near = difflib.get_close_matches(name, known, n=1)
            print(
                f"{program}: no command {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""), file=out
            )
        width = max(map(len, known), default=0)
        print(f"usage: {program} COMMAND ...   (COMMAND --help says more)\n", file=out)
        print("\n".join(f"  {command:<{width}}  {line}" for command, line in known.items()), file=out)
        return 0 if wants_help else 2
    is_package = (package / name).is_dir()
    module = importlib.import_module(f"{prefix}.{name}.__main__" if is_package else f"{prefix}.{name}")
    sys.argv[0] = f"{program} {name}"  # argparse names the program by it
    return module.main(rest) or 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the installed command."""
    return dispatch("screformer", JOBS, "jobs", sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
