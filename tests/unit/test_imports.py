"""What may be imported from where."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import screformer

ROOT = Path(screformer.__file__).parents[1]
MODULES = sorted(path.stem for path in (ROOT / "screformer").glob("*.py") if path.stem != "__init__")


def test_the_model_library_needs_no_cluster_tracking_or_atlas() -> None:
    script = "; ".join(
        [
            *(f"import screformer.{name}" for name in MODULES),
            "import sys",
            "heavy = ('ray', 'mlflow', 'tiledbsoma', 'deepspeed', 'anndata', 'data_ingest', 'jobs', 'cluster')",
            "print([name for name in heavy if name in sys.modules])",
        ]
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
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
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            for name in names:
                assert name.split(".")[0] not in forbidden, f"{path.relative_to(ROOT)} imports {name}"
