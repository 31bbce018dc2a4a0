"""Labels for an AnnData, from the library alone."""

import shutil
from pathlib import Path

import anndata
import pandas as pd
import pytest
from scipy import sparse

import screformer
from helpers.processes import run_python
from helpers.tiny_model import tiny_vocabulary, write_tiny_model
from screformer.predictor import ANSWER_COLUMNS


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "model")


def toy_adata(num_cells: int = 30) -> anndata.AnnData:
    """Counts over the tiny model's genes."""
    counts = sparse.random(num_cells, 40, density=0.4, format="csr", random_state=0)
    counts.data = (counts.data * 9 + 1).astype(int).astype("float32")
    names = [f"cell{i}" for i in range(num_cells)]
    return anndata.AnnData(
        counts.astype("float32"),
        obs=pd.DataFrame(index=names),
        var=pd.DataFrame(index=list(tiny_vocabulary().feature_ids)),
    )


def test_a_copy_of_the_package_alone_labels_an_anndata(model_dir: Path, tmp_path: Path) -> None:
    """As in a registered model, which ships neither `jobs` nor an atlas reader."""
    adata = toy_adata()
    adata.write_h5ad(tmp_path / "cells.h5ad")
    shutil.copytree(Path(screformer.__file__).parent, tmp_path / "code" / "screformer")
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import anndata, screformer\n"
        "assert screformer.__file__.startswith(sys.argv[1]), screformer.__file__\n"
        "done = screformer.annotate(anndata.read_h5ad(sys.argv[2]), model=sys.argv[3])\n"
        "done.obs.to_csv(sys.argv[4])\n"
        "print(sorted({'jobs', 'data_ingest', 'mlflow', 'ray', 'tiledbsoma'} & set(sys.modules)))\n"
    )
    places = [str(tmp_path / name) for name in ("code", "cells.h5ad", "labels.csv")]
    done = run_python("-I", "-c", script, *places[:2], model_dir, places[2], cwd=tmp_path)
    assert done.stdout.strip() == "[]"
    found = pd.read_csv(tmp_path / "labels.csv", index_col=0)
    expected = screformer.annotate(adata, model=model_dir).obs
    assert found.columns.tolist() == list(ANSWER_COLUMNS)
    assert found["predicted_labels"].tolist() == expected["predicted_labels"].tolist()


def test_an_address_in_a_registry_is_refused_with_the_way_to_use_it() -> None:
    with pytest.raises(ValueError, match=r"address in a registry.*resolve_model\('models:/blood@champion'\)"):
        screformer.annotate(toy_adata(), model="models:/blood@champion")
