"""Labelling an AnnData with the library alone."""

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
    """As in a registered model, which includes neither `jobs` nor an atlas reader."""
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


def test_a_registry_address_is_rejected_with_a_remedy() -> None:
    with pytest.raises(ValueError, match=r"is in a registry.*resolve_model\('models:/blood@champion'\)"):
        screformer.annotate(toy_adata(), model="models:/blood@champion")


def test_columns_that_we_did_not_write_are_kept(model_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    adata = toy_adata()
    adata.obs["cell_type_ontology_term_id"] = "CL:0000084"
    once = screformer.annotate(adata, model=model_dir)
    assert "is kept as 'cell_type_ontology_term_id_original'" in caplog.text
    assert (once.obs["cell_type_ontology_term_id_original"] == "CL:0000084").all()
    assert adata.obs.columns.tolist() == ["cell_type_ontology_term_id"], "the input is not changed"
    twice = screformer.annotate(once, model=model_dir)
    assert sorted(twice.obs) == sorted(once.obs), "what we wrote is replaced"
    twice.obs["predicted_labels"] = "checked by hand"
    thrice = screformer.annotate(twice, model=model_dir)
    assert (thrice.obs["predicted_labels_original"] == "checked by hand").all()
    assert set(thrice.uns["screformer"]["columns"]) == set(ANSWER_COLUMNS)


def test_every_kind_of_anndata_gives_the_same(model_dir: Path, tmp_path: Path) -> None:
    adata = toy_adata()
    expected = screformer.annotate(adata, model=model_dir, probabilities=True)
    adata.write_h5ad(tmp_path / "a.h5ad")
    layered = anndata.AnnData(None, obs=adata.obs, var=adata.var, layers={"counts": adata.X})
    dense = anndata.AnnData(adata.X.toarray().astype("int16"), obs=adata.obs, var=adata.var)
    normal = adata.copy()
    normal.raw, normal.X = adata, adata.X * 0.5
    for other, options in (
        (anndata.read_h5ad(tmp_path / "a.h5ad", backed="r"), {}),
        (layered, {"layer": "counts"}),
        (dense, {}),
        (normal, {"raw": True}),
        (adata[:, ::-1], {}),
    ):
        found = screformer.annotate(other, model=model_dir, probabilities=True, **options)
        pd.testing.assert_frame_equal(found.obs[list(ANSWER_COLUMNS)], expected.obs, atol=1e-5)
    assert expected.obsm["screformer_probabilities"].shape == (30, 4)
    assert screformer.annotate(adata[:0].copy(), model=model_dir).n_obs == 0
    with pytest.raises(
        ValueError, match=r"adata has no X; choose the layer with raw counts \(it has counts\)"
    ):
        screformer.annotate(layered, model=model_dir)
    with pytest.raises(
        ValueError, match=r"adata has \d\.5 at cell 'cell0', gene 'ENSG\d+': it is not a whole"
    ):
        screformer.annotate(anndata.AnnData(dense.X * 0.5, obs=adata.obs, var=adata.var), model=model_dir)


def test_columns_of_any_pandas_type_are_read(model_dir: Path) -> None:
    adata = toy_adata()
    adata.obs["leiden"] = pd.array(["0", None] * 15, dtype="string")
    adata.obs = adata.obs.convert_dtypes(dtype_backend="pyarrow")
    labelled = screformer.annotate(adata, model=model_dir, majority_vote="leiden")
    own = labelled.obs["best_label"].astype(str)[1::2]
    assert labelled.obs["majority_label"].astype(str)[1::2].tolist() == own.tolist()
    assert labelled.obs["majority_label"][::2].nunique() == 1
