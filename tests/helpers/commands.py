"""The commands by name, with their required arguments. Imports nothing heavy."""

import contextlib
import importlib
import io
import runpy
import sys

from jobs.arguments import Command
from jobs.benchmark.__main__ import PARTS
from jobs.cli import COMMANDS, main

MODULES = {name: f"jobs.{name}" for name in COMMANDS if name != "benchmark"} | {
    f"benchmark {name}": f"jobs.benchmark.{name}" for name in PARTS
}
NEEDED = {
    "ingest": ["--atlas", "a", "--h5ad", "a.h5ad"],
    "annotate": ["--out", "b.h5ad", "--h5ad", "a.h5ad"],
    "explain": ["--out", "b", "--h5ad", "a.h5ad"],
    "promote": ["--model", "m"],
    "train_bundled": ["--data", "sets", "--work", "scratch"],
    "report": ["--run", "r"],
    "shift": ["--h5ad", "a.h5ad"],
    "shard": ["--out", "cache"],
    "sync": ["--run-dir", "r"],
    "benchmark annotate": ["--h5ad", "a.h5ad"],
}


def command(name: str) -> Command:
    """The command with a name such as `benchmark step`."""
    found = importlib.import_module(MODULES[name]).main
    assert isinstance(found, Command)
    return found


def parse_everything() -> None:
    """Parse each command's help, its required arguments, a mistyped option and a mistyped setting."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(["--help"]) == 0 and main(["benchmark", "--help"]) == 0
        for name in MODULES:
            needed = NEEDED.get(name, [])
            with contextlib.suppress(SystemExit):
                main([*name.split(), "--help"])
            assert f"usage: screformer {name}" in out.getvalue(), name
            command(name).parse(needed)
            for words in (["--mistyped"], ["mistyped.setting=1"]):
                try:
                    command(name).parse([*words, *needed])
                except ValueError:
                    continue
                raise AssertionError(f"{name} takes {words}")
        del sys.modules["jobs.query"]
        words, sys.argv = sys.argv, ["query.py", "--help"]
        with contextlib.suppress(SystemExit):
            runpy.run_module("jobs.query", run_name="__main__", alter_sys=True)
        sys.argv = words
        assert "usage: python -m jobs.query" in out.getvalue()
