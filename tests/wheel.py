"""Test the installed wheel: `python tests/wheel.py ENVIRONMENT`, an environment that has it without extras.

A model is created with this interpreter from the checkout. Everything else runs in the environment, away from
the checkout.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from scipy import sparse

from helpers.tiny_model import tiny_vocabulary, write_tiny_model
from jobs.cli import COMMANDS
from screformer import __version__

EXTRAS = ("ray", "mlflow", "tiledbsoma", "deepspeed", "reformer_pytorch", "umap", "cellxgene_census")
TYPED = """import screformer
reveal_type(screformer.__version__)
screformer.annotate(0)
"""


def main(environment: Path) -> None:
    """Run all checks; an AssertionError describes the first failure."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)

        def run(*words: str, status: int = 0) -> str:
            done = subprocess.run(
                [environment / "bin" / words[0], *words[1:]], cwd=folder, capture_output=True, text=True
            )
            said = done.stdout + done.stderr
            assert done.returncode == status, f"{words}: status {done.returncode}\n{said}"
            return said

        assert run("screformer", "--version") == f"screformer {__version__}\n"
        for name in COMMANDS:
            assert f"usage: screformer {name}" in run("screformer", name, "--help")
        assert "blood" in run("screformer", "settings", "--recipes")
        found = "import importlib.util as i, json; print(json.dumps([n for n in {} if i.find_spec(n)]))"
        assert json.loads(run("python", "-c", found.format(EXTRAS))) == []
        said = run("screformer", "finetune", "--config", "smoke", "atlas.uri=none", status=2)
        assert "which is not installed; pip install 'screformer[train]'" in said, said

        write_tiny_model(folder / "model")
        genes = tiny_vocabulary().feature_ids
        counts = np.random.default_rng(0).poisson(3.0, (30, len(genes))).astype(np.float32)
        cells = anndata.AnnData(sparse.csr_matrix(counts), var=pd.DataFrame(index=list(genes)))
        cells.write_h5ad(folder / "in.h5ad")
        run("screformer", "annotate", "--model", "model", "--h5ad", "in.h5ad", "--out", "out.h5ad")
        assert anndata.read_h5ad(folder / "out.h5ad").obs["predicted_labels"].notna().all()
        code = "import screformer, anndata; a = anndata.read_h5ad('in.h5ad')"
        run("python", "-c", f"{code}; print(screformer.annotate(a, model='model'))")

        (folder / "typed.py").write_text(TYPED)
        checked = subprocess.run(
            [sys.executable, "-m", "mypy", "--python-executable", environment / "bin" / "python", "typed.py"],
            cwd=folder,
            capture_output=True,
            text=True,
        ).stdout
        assert 'Revealed type is "str"' in checked.replace("builtins.str", "str"), checked
        assert "[arg-type]" in checked or "[call-arg]" in checked, checked
    print(f"the wheel of screformer {__version__} works")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
