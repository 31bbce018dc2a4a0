"""The real parsers accept every command line in the documentation and manifests.

Except in `docs/log/`, whose dated pages keep the commands of their time.
"""

import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.arguments import Command
from jobs.benchmark.__main__ import PARTS
from jobs.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
FILES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "Makefile",
    *sorted(path for path in (ROOT / "docs").rglob("*.md") if path.parent.name != "log"),
    *sorted((ROOT / "cluster").glob("*.md")),
    *sorted((ROOT / "cluster").glob("*.yaml")),
    *sorted((ROOT / "jobs" / "recipes").glob("*.yaml")),
]
_LINE = re.compile(r"(?:screformer|python -m jobs\.|RUN\) -m jobs\.|make )[^`\n]*")
_NAMES = "|".join(COMMANDS)
_COMMAND = re.compile(rf"(?:screformer +|-m jobs\.)({_NAMES})(?=\s|$)(.*)")
_MAKE = re.compile(r"make quickstart ARGS='([^']*)'")


def command_lines(text: str) -> Iterator[str]:
    """`NAME arguments` of each command in a text; a backslash or deeper indentation continues a command."""
    text = re.sub(r"\\\n\s*", " ", text)
    text = re.sub(r"`[^`\n]*\n[^`\n]*`", lambda found: found[0].replace("\n", " "), text)
    text = re.sub(r"(entrypoint: >-(?:\n {4}\S.*)+)", lambda found: found[1].replace("\n", " "), text)
    for line in _LINE.findall(text):
        if made := _MAKE.search(line):
            yield f"quickstart {made[1]}"
        elif (found := _COMMAND.search(line)) and found[2].strip(" ."):  # otherwise just a mention
            yield f"{found[1]} {found[2]}"


LINES = [(path, line) for path in FILES for line in command_lines(path.read_text())]


def test_the_lines_are_found() -> None:
    text = """
        screformer query --atlas a \\
            --obs-filter "sex == 'male'"   # counts
        `python -m jobs.finetune --config base atlas.uri=a`, and `screformer` alone
        the report of `screformer explain`
        make quickstart ARGS='--h5ad a.h5ad'
        ray job submit -- python -m jobs.pretrain train.seed=1
    """
    assert [re.sub(" +", " ", line) for line in command_lines(text)] == [
        "query --atlas a --obs-filter \"sex == 'male'\" # counts",
        "finetune --config base atlas.uri=a",
        "quickstart --h5ad a.h5ad",
        "pretrain train.seed=1",
    ]
    assert {"README.md", "training.md", "labelling.md", "rayjob.yaml"} <= {path.name for path, _ in LINES}
    assert len(LINES) > 25


@pytest.mark.parametrize(
    ("path", "line"),
    LINES,
    ids=[f"{path.name}-{line.split()[0]}-{number}" for number, (path, line) in enumerate(LINES)],
)
def test_the_line_is_taken(path: Path, line: str) -> None:
    name, *words = shlex.split(line, comments=True)
    words = [word for word in words if word not in ("...", "$(ARGS)", ".", ";", "|")]
    if name == "benchmark":
        part, *words = words
        assert part in PARTS
        name = f"benchmark.{part}"
    command = importlib.import_module(f"jobs.{name}").main
    assert isinstance(command, Command)
    if name == "quickstart":  # looks at its files
        words = [str(ROOT / "README.md") if re.search(r"\.(h5ad|tsv)$", word) else word for word in words]
    args = command.parse([word.replace("/opt/screformer/", f"{ROOT}/") for word in words])
    assert args.settings is not None
