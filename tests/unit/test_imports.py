"""What may be imported from where."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import screformer

ROOT = Path(screformer.__file__).parents[1]
DYNAMIC = ("import_module", "__import__")
DISPATCHER = ROOT / "jobs" / "cli.py"
PACKAGES = ("screformer", "data_ingest", "jobs", "cluster")
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}


def imported(path: Path) -> Iterator[str]:
    """Names that a file imports anywhere, also through `import_module("...")` and `__import__("...")`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in DYNAMIC:
            if path != DISPATCHER:
                assert isinstance(node.args[0], ast.Constant), f"{path}: an import that cannot be read"
                yield str(node.args[0].value)


def modules_of(path: Path) -> set[str]:
    """Modules of ours that a file imports."""
    found = set()
    for name in imported(path):
        known = name if name in MODULES else name.rpartition(".")[0]
        if known in MODULES:
            found.add(known)
    return found


def test_the_model_library_needs_no_cluster_tracking_or_atlas() -> None:
    script = "; ".join(
        [
            *(f"import {name}" for name in MODULES if name.startswith("screformer.")),
            "import sys",
            "heavy = ('ray', 'mlflow', 'tiledbsoma', 'deepspeed', 'anndata',"
            " 'data_ingest', 'jobs', 'cluster')",
            "print([name for name in heavy if name in sys.modules])",
        ]
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("screformer", {"data_ingest", "jobs", "cluster"}),
        ("data_ingest", {"jobs", "cluster"}),
        ("cluster", {"screformer", "data_ingest", "jobs"}),
    ],
)
def test_imports_go_one_way(package: str, forbidden: set[str]) -> None:
    for path in (ROOT / package).rglob("*.py"):
        for name in imported(path):
            assert name.split(".")[0] not in forbidden, f"{path.relative_to(ROOT)} imports {name}"


def test_commands_are_imported_by_nobody_but_the_dispatcher() -> None:
    commands = {name for name in MODULES if name.count(".") == 1 and name.startswith("jobs.")} - {
        "jobs.arguments"
    }
    for name, path in MODULES.items():
        if name != "jobs.cli":
            assert not (
                found := {
                    used
                    for used in modules_of(path)
                    if used in commands and MODULES[used].name != "__init__.py"
                }
            ), f"{name} imports the commands {found}"


def test_no_module_imports_itself_in_a_circle() -> None:
    uses = {name: modules_of(path) - {name} for name, path in MODULES.items()}
    left = dict(uses)
    while leaves := [name for name, used in left.items() if not (used & left.keys())]:
        for name in leaves:
            del left[name]
    assert not left, f"import circles among {sorted(left)}"
