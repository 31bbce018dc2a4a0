"""Which packages may be imported from where."""

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest

import screformer
from helpers.processes import run_python
from helpers.tiny_model import tiny_vocabulary, write_tiny_model

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
    """Names that a file imports anywhere, including by `import_module("...")` and `__import__("...")`."""
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
    """Our modules that a file imports."""
    found = set()
    for name in imported(path):
        known = name if name in MODULES else name.rpartition(".")[0]
        if known in MODULES:
            found.add(known)
    return found


HEAVY = {"ray", "mlflow", "tiledbsoma"}
OTHERS = HEAVY | {"deepspeed", "anndata", "reformer_pytorch"}
STEPS = {
    # The steps, run in this order in one process, and the packages that each must not load.
    "parse every command line": (
        "from helpers.commands import parse_everything; parse_everything()",
        OTHERS | {"torch", "pandas", "pyarrow", "scipy", "sklearn", "matplotlib"},
    ),
    "import the model library": (
        "; ".join(f"import {name}" for name in MODULES if name.split(".")[0] == "screformer"),
        OTHERS | {"data_ingest", "jobs", "cluster"},
    ),
    "load a model": (
        "from screformer.predictor import Predictor; Predictor.load(sys.argv[1], device='cpu')",
        OTHERS | {"data_ingest", "jobs", "cluster"},
    ),
    "label a file with a model directory": (
        "from jobs.annotate import main; assert main(['-q', '--model', sys.argv[1], '--device', 'cpu',"
        " '--h5ad', sys.argv[1] + '.h5ad', '--out', sys.argv[1] + '.labelled.h5ad']) == 0",
        (OTHERS | {"sklearn", "matplotlib", "requests", "cellxgene_ontology_guide"}) - {"anndata"},
    ),
    "measure attention and step": (
        "import jobs.benchmark.measure_attention, jobs.benchmark.measure_step",
        HEAVY,
    ),
    "ingest a small file": (
        "from jobs.ingest import main; assert main(['-q', '--h5ad', sys.argv[1] + '.h5ad', '--atlas',"
        " sys.argv[1] + '-atlas', '--set', 'donor_id=d', 'cell_type=B cell']) == 0",
        {"ray", "mlflow"},
    ),
}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """Packages that each step added to a fresh process."""
    model_dir = write_tiny_model(tmp_path_factory.mktemp("model") / "model")
    genes = list(tiny_vocabulary().feature_ids)
    cells = anndata.AnnData(np.full((5, len(genes)), 3, np.float32), var=pd.DataFrame(index=genes))
    cells.write_h5ad(f"{model_dir}.h5ad")
    program = """if True:
        import json, sys
        for name, code in json.loads(sys.argv[2]).items():
            before = set(sys.modules)
            exec(code)
            added = sorted({module.split(".")[0] for module in set(sys.modules) - before})
            print(json.dumps([name, added]), file=sys.stderr)
    """
    steps = json.dumps({name: code for name, (code, _) in STEPS.items()})
    done = run_python("-c", program, model_dir, steps)
    return {name: set(added) for name, added in map(json.loads, done.stderr.splitlines())}


@pytest.mark.parametrize("step", STEPS)
def test_what_a_step_does_not_load(loaded: dict[str, set[str]], step: str) -> None:
    assert not loaded[step] & STEPS[step][1]


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


def test_only_the_dispatcher_imports_commands() -> None:
    commands = {name for name in MODULES if name.count(".") == 1 and name.startswith("jobs.")} - {
        "jobs.arguments",
        "jobs.cli",
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
