import json
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import anndata
import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow import MlflowClient

from data_ingest.cells import H5adCells
from helpers.processes import run_python
from helpers.servers import model_server
from helpers.stores import new_store
from helpers.tiny_model import calibrated_tiny_model, tiny_vocabulary, write_tiny_model
from jobs.labelling.h5ad_copy import annotate
from jobs.tracking.models import move_alias, pinned_model, register_model, resolve_model
from jobs.tracking.runs import TrackedRun, start_run
from screformer.config import ExperimentConfig, TrackingConfig
from screformer.predictor import ANSWER_COLUMNS, Predictor


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calibrated_tiny_model(tmp_path_factory.mktemp("trained") / "checkpoint_7")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TrackingConfig:
    return TrackingConfig(uri=new_store(tmp_path_factory.mktemp("registry")))


@pytest.fixture(scope="module")
def registered(store: TrackingConfig, model_dir: Path) -> TrackedRun:
    """A run that registered version 1 of `blood`."""
    with start_run(ExperimentConfig(tracking=store), "finetune") as run:
        assert register_model(run.tracking_uri, run.run_id, model_dir, "blood") == 1
    return run


@pytest.fixture
def cells() -> pd.DataFrame:
    counts = np.random.default_rng(2).poisson(2.0, size=(12, 41))
    columns = [*tiny_vocabulary().feature_ids[:30], *tiny_vocabulary().feature_names[30:], "ENSG99999999999"]
    return pd.DataFrame(counts, columns=columns, index=[f"cell{i}" for i in range(12)])


@pytest.fixture
def pyfunc(
    registered: TrackedRun, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[mlflow.pyfunc.PyFuncModel]:
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(registered.tracking_uri)
    root = str(tmp_path_factory.getbasetemp())
    yield mlflow.pyfunc.load_model("models:/blood@candidate", model_config={"files_root": root})
    mlflow.set_tracking_uri(before)


def test_a_version_holds_code_weights_and_no_pickle(
    registered: TrackedRun, store: TrackingConfig, model_dir: Path
) -> None:
    directory = resolve_model("models:/blood@candidate", store)
    assert directory.parts[-2:] == ("artifacts", "model")
    assert {path.name for path in model_dir.iterdir()} == {path.name for path in directory.iterdir()}
    root = directory.parents[1]
    files = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    assert not [
        name for name in files if name.endswith((".pkl", ".pickle", ".pt", ".pth", ".bin", ".joblib", ".pyc"))
    ]
    assert {
        "MLmodel",
        "pyfunc.py",
        "code/screformer/predictor.py",
        "input_example.json",
        "requirements.txt",
        "MODEL_CARD.md",
    } <= files
    requirements = (root / "requirements.txt").read_text()
    assert "torch==" in requirements and "+cpu" not in requirements and "ray" not in requirements
    info = mlflow.models.Model.load(str(root))
    assert info.signature.outputs.input_names() == list(ANSWER_COLUMNS)
    assert {param.name for param in info.signature.params} == {
        "probabilities",
        "embedding",
        "min_gene_overlap",
        "layer",
    }
    version = MlflowClient(store.uri).get_model_version("blood", "1")
    assert version.run_id == registered.run_id


def test_models_are_found_by_alias_version_run_and_directory(
    registered: TrackedRun, store: TrackingConfig, model_dir: Path, tmp_path: Path
) -> None:
    weights = (model_dir / "weights.safetensors").read_bytes()
    assert pinned_model("models:/blood@candidate", store) == "models:/blood/1"
    assert pinned_model(str(model_dir), store) == str(model_dir)
    for uri in ("models:/blood/1", f"runs:/{registered.run_id}", registered.run_id, str(model_dir)):
        assert (resolve_model(uri, store) / "weights.safetensors").read_bytes() == weights
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "model").symlink_to(model_dir)
    assert resolve_model(str(checkpoint), store) == checkpoint / "model"
    with start_run(ExperimentConfig(tracking=store), "pretrain") as run:
        run.log_file(checkpoint / "model")
    assert (resolve_model(f"runs:/{run.run_id}", store) / "weights.safetensors").read_bytes() == weights


def test_the_next_version_takes_the_alias(
    registered: TrackedRun, store: TrackingConfig, model_dir: Path
) -> None:
    assert register_model(registered.tracking_uri, registered.run_id, model_dir, "liver") == 1
    assert register_model(registered.tracking_uri, registered.run_id, model_dir, "liver") == 2
    assert register_model(registered.tracking_uri, registered.run_id, model_dir, "liver", alias="") == 3
    assert pinned_model("models:/liver@candidate", store) == "models:/liver/2"
    with pytest.raises(ValueError, match=r"liver has versions 1, 2, 3 and aliases candidate -> 2"):
        pinned_model("models:/liver@champion", store)


def test_the_registered_model_predicts_as_the_predictor(
    pyfunc: mlflow.pyfunc.PyFuncModel, cells: pd.DataFrame, model_dir: Path
) -> None:
    found = pyfunc.predict(cells)
    assert found.columns.tolist() == list(ANSWER_COLUMNS) and found.index.tolist() == cells.index.tolist()
    predictor = Predictor.load(model_dir, device="cpu")
    match = predictor.genes.match(cells.columns.tolist())
    assert (match.num_by_id, match.num_by_name) == (30, 10)
    direct = predictor.predict(match.select(cells.to_numpy()))
    assert found["predicted_labels"].tolist() == direct.labels.tolist()
    assert found["cell_type_ontology_term_id"].tolist() == direct.cl_ids.tolist()
    np.testing.assert_allclose(found["conf_score"], direct.confidence, atol=1e-6)
    rich = pyfunc.predict(cells.astype("float32"), params={"probabilities": True, "embedding": True})
    np.testing.assert_allclose(
        rich[[f"probability: {name}" for name in predictor.label_names]], direct.probabilities_nk, atol=1e-6
    )
    np.testing.assert_allclose(rich[[f"embedding_{i}" for i in range(16)]], direct.embedding_nd, atol=1e-5)


def test_registering_is_quiet(
    registered: TrackedRun, model_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert register_model(registered.tracking_uri, registered.run_id, model_dir, "quiet") == 1
    assert capfd.readouterr() == ("", "")


def test_a_fresh_process_gives_the_same_predictions(
    registered: TrackedRun, cells: pd.DataFrame, model_dir: Path, tmp_path: Path
) -> None:
    cells.to_csv(tmp_path / "cells.csv")
    code = (
        "import sys, mlflow, pandas as pd\n"
        "mlflow.set_tracking_uri(sys.argv[1])\n"
        "model = mlflow.pyfunc.load_model('models:/blood@candidate')\n"
        "model.predict(model.input_example)\n"
        "model.predict(pd.read_csv('cells.csv', index_col=0)).to_json('found.json')\n"
        "import screformer\n"
        "assert '/code/screformer/' in screformer.__file__, screformer.__file__\n"
        "assert not {'ray', 'deepspeed', 'tiledbsoma', 'jobs'} & set(sys.modules)\n"
    )
    done = run_python("-I", "-c", code, registered.tracking_uri, cwd=tmp_path)
    assert done.stderr == ""
    found = pd.read_json(tmp_path / "found.json")
    predictor = Predictor.load(model_dir, device="cpu")
    direct = predictor.predict(predictor.genes.match(cells.columns.tolist()).select(cells.to_numpy()))
    assert found["predicted_labels"].tolist() == direct.labels.tolist()
    np.testing.assert_allclose(found["conf_score"], direct.confidence, atol=1e-6)


def test_bad_tables_are_refused(pyfunc: mlflow.pyfunc.PyFuncModel, cells: pd.DataFrame) -> None:
    with pytest.raises(ValueError, match=r"input: too few genes: 1 of the model's 40 genes found"):
        pyfunc.predict(cells.iloc[:, 29:30])
    assert len(pyfunc.predict(cells.iloc[:, 29:30], params={"min_gene_overlap": 0.001})) == 12
    with pytest.raises(
        ValueError, match=r"cell '.*, gene '.*: it is not a whole number; raw counts are needed"
    ):
        pyfunc.predict(np.log1p(cells))
    with pytest.raises(ValueError, match="is negative"):
        pyfunc.predict(cells - 1)
    with pytest.raises(ValueError, match="is missing or infinite; use 0 for genes that were not detected"):
        pyfunc.predict(cells.where(cells > 0))
    with pytest.raises(ValueError, match="column 'donor' has type object, not counts"):
        pyfunc.predict(cells.assign(donor="a"))
    with pytest.raises(ValueError, match="input is a list; give a pandas DataFrame"):
        pyfunc.predict([1, 2])
    with pytest.raises(ValueError, match=r"genes of another species: ids like ENSMUSG00000000000 \(mouse\)"):
        pyfunc.predict(cells.set_axis([f"ENSMUSG{i:011d}" for i in range(41)], axis=1))
    with pytest.raises(
        ValueError, match=r"another species: symbols like Gene0 instead of GENE0 \(mouse or rat\)"
    ):
        pyfunc.predict(cells.set_axis([f"Gene{i}" for i in range(41)], axis=1))


def test_files_and_anndata_give_the_same_as_a_table(
    pyfunc: mlflow.pyfunc.PyFuncModel, cells: pd.DataFrame, tmp_path: Path
) -> None:
    expected = pyfunc.predict(cells)
    adata = anndata.AnnData(
        cells.to_numpy(np.float32), obs=pd.DataFrame(index=cells.index), var=pd.DataFrame(index=cells.columns)
    )
    adata.layers["counts"], adata.raw = adata.X.copy(), adata
    adata.write_h5ad(tmp_path / "cells.h5ad")
    path = str(tmp_path / "cells.h5ad")
    two = pyfunc.predict(pd.DataFrame({"file": [path, path]}))
    pd.testing.assert_frame_equal(two.iloc[12:], expected, check_names=False)
    for same in (path, f"file://{path}", adata):
        pd.testing.assert_frame_equal(pyfunc.predict(same), expected, check_names=False)
    adata.X = np.log1p(adata.X)
    with pytest.raises(ValueError, match="is not a whole number"):
        pyfunc.predict(adata)
    for layer in ("counts", "raw"):
        pd.testing.assert_frame_equal(
            pyfunc.predict(adata, params={"layer": layer}), expected, check_names=False
        )
    adata.write_h5ad(tmp_path / "normalised.h5ad")
    with pytest.raises(ValueError, match=r"normalised.h5ad: X has .* it is not a whole number"):
        pyfunc.predict(str(tmp_path / "normalised.h5ad"))
    with pytest.raises(ValueError, match="input has no layer 'other'; it has counts"):
        pyfunc.predict(adata, params={"layer": "other"})
    with pytest.raises(ValueError, match="none.h5ad does not exist"):
        pyfunc.predict(str(tmp_path / "none.h5ad"))


def test_files_outside_the_root_are_not_read(
    registered: TrackedRun, cells: pd.DataFrame, tmp_path: Path
) -> None:
    adata = anndata.AnnData(
        cells.to_numpy(np.float32), obs=pd.DataFrame(index=cells.index), var=pd.DataFrame(index=cells.columns)
    )
    adata.write_h5ad(tmp_path / "secret.h5ad")
    root = tmp_path / "open"
    root.mkdir()
    shutil.copyfile(tmp_path / "secret.h5ad", root / "cells.h5ad")
    (root / "link.h5ad").symlink_to(tmp_path / "secret.h5ad")
    uri = str(resolve_model("models:/blood/1", TrackingConfig(uri=registered.tracking_uri)).parents[1])
    model = mlflow.pyfunc.load_model(uri, model_config={"files_root": str(root)})
    assert len(model.predict("cells.h5ad")) == len(model.predict(str(root / "cells.h5ad"))) == len(cells)
    for path in (
        "../secret.h5ad",
        str(tmp_path / "secret.h5ad"),
        "link.h5ad",
        "s3://b/cells.h5ad",
        "../no.h5ad",
    ):
        with pytest.raises(ValueError, match="outside files_root"):
            model.predict(path)
    with pytest.raises(ValueError, match="this model may not read files"):
        mlflow.pyfunc.load_model(uri).predict(str(root / "cells.h5ad"))


def test_rows_are_by_position_and_nullable_numbers_are_read(
    pyfunc: mlflow.pyfunc.PyFuncModel, cells: pd.DataFrame, tmp_path: Path
) -> None:
    rich = {"probabilities": True, "embedding": True}
    expected = pyfunc.predict(cells, params=rich)
    twice = cells.set_axis(["same"] * len(cells))
    adata = anndata.AnnData(
        cells.to_numpy(np.float32),
        obs=pd.DataFrame(index=[f"c{i // 2}" for i in range(len(cells))]),
        var=pd.DataFrame(index=cells.columns),
    )
    adata.write_h5ad(tmp_path / "twice.h5ad")
    for same in (twice, adata, str(tmp_path / "twice.h5ad"), cells.convert_dtypes()):
        found = pyfunc.predict(same, params=rich)
        pd.testing.assert_frame_equal(found.set_axis(expected.index), expected, check_dtype=False)
    missing = cells.convert_dtypes()
    missing.iloc[3, 4] = pd.NA
    with pytest.raises(ValueError, match=r"input has nan at cell 'cell3', gene '.*': it is missing"):
        pyfunc.predict(missing)


def test_the_model_card_describes_the_model(registered: TrackedRun, store: TrackingConfig) -> None:
    card = (resolve_model("models:/blood/1", store).parents[1] / "MODEL_CARD.md").read_text()
    assert MlflowClient(store.uri).get_model_version("blood", "1").description == card
    for words in (
        "# blood",
        "- B cell (CL:0000236)",
        "- mystery cell (no Cell Ontology term)",
        "ab12",
        registered.run_id,
    ):
        assert words in card
    assert "temperature 2.000" in card and "test/macro_f1 | 0.5000" in card


def test_served_annotated_and_loaded_answers_are_the_same(
    registered: TrackedRun,
    store: TrackingConfig,
    cells: pd.DataFrame,
    pyfunc: mlflow.pyfunc.PyFuncModel,
    tmp_path: Path,
) -> None:
    """MLflow's server answers over HTTP like the pyfunc in this process and `jobs.annotate`."""
    move_alias("blood", "champion", 1, reason={"why": "test"}, tracking=store)
    loaded = pyfunc.predict(cells)
    with model_server(tmp_path, "models:/blood@champion", registered.tracking_uri) as server:
        table = json.loads(cells.to_json(orient="split"))
        status, answer = _post(f"{server.url}/invocations", {"dataframe_split": table})
        assert status == 200
        served = pd.DataFrame(answer["predictions"], index=cells.index)
        status, answer = _post(
            f"{server.url}/invocations",
            {"dataframe_split": table | {"data": (-cells).to_numpy().tolist()}},
        )
        assert status == 400 and "is negative" in answer["message"]
        huge = (cells * 0 + 1e308).to_numpy().tolist()
        status, answer = _post(f"{server.url}/invocations", {"dataframe_split": table | {"data": huge}})
        assert status == 400, "finite answers or none"
        (tmp_path / "there.h5ad").touch()
        answers = set()
        for text in (tmp_path / "there.h5ad", tmp_path / "missing.h5ad", "s3://bucket/a.h5ad"):
            body = {"dataframe_split": {"columns": ["file"], "data": [[str(text)]]}}
            status, answer = _post(f"{server.url}/invocations", body)
            assert status == 400 and "this model may not read files" in answer["message"]
            said = answer.pop("message")  # starts with the client's own table
            answers.add(json.dumps([said[said.index("this model may not read files") :], answer]))
        assert len(answers) == 1, "a client cannot find out which files exist"
    adata = anndata.AnnData(
        cells.to_numpy(np.float32), obs=pd.DataFrame(index=cells.index), var=pd.DataFrame(index=cells.columns)
    )
    adata.write_h5ad(tmp_path / "in.h5ad")
    model = resolve_model("models:/blood@champion", store)
    predictor = Predictor.load(model, device="cpu")
    source = H5adCells.open(predictor, tmp_path / "in.h5ad", min_gene_overlap=0.1)
    annotate(predictor, source, tmp_path / "out.h5ad", model="models:/blood@champion")
    annotated = anndata.read_h5ad(tmp_path / "out.h5ad").obs
    assert loaded["unknown"].any() and loaded["predicted_labels"].nunique() > 1, (
        "a constant answer would test nothing"
    )
    for other in (served, annotated):
        for column in ("predicted_labels", "cell_type_ontology_term_id", "label_level", "best_label"):
            assert other[column].astype(str).tolist() == loaded[column].tolist()
        for column in ("conf_score", "unknown_score"):
            np.testing.assert_allclose(other[column].astype(float), loaded[column], atol=1e-6)


def _post(url: str, body: dict) -> tuple[int, dict]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_a_model_without_labels_is_not_registered(registered: TrackedRun, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no labels"):
        register_model(
            registered.tracking_uri,
            registered.run_id,
            write_tiny_model(tmp_path / "pretrained", has_labels=False),
            "blood",
        )
