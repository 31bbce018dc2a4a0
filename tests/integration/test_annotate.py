import hashlib
import shutil
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import screformer
from data_ingest.atlas import open_atlas
from data_ingest.cells import H5adCells
from helpers.processes import run_python
from helpers.stores import new_store
from helpers.tiny_model import LABELS, calibrated_tiny_model, tiny_vocabulary, write_tiny_model
from jobs.annotate import main
from jobs.labelling.h5ad_copy import Annotation, annotate
from jobs.labelling.shards import CELLS_FOR_RAY, label_cells
from jobs.tracking.models import register_model
from jobs.tracking.runs import start_run
from screformer.composition import present_labels
from screformer.config import AtlasConfig, ExperimentConfig, TrackingConfig
from screformer.predictor import ANSWER_COLUMNS, Predictor


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("trained") / "model")


@pytest.fixture(scope="module")
def predictor(model_dir: Path) -> Predictor:
    return Predictor.load(model_dir, device="cpu")


def _cells(num_cells: int = 60, *, seed: int = 0) -> anndata.AnnData:
    """Raw counts of the model's genes and five unknown ones, with everything else such a file can contain."""
    rng = np.random.default_rng(seed)
    ids, names = tiny_vocabulary().feature_ids, tiny_vocabulary().feature_names
    unknown = [f"ENSG{i:011d}" for i in range(900, 905)]
    order = rng.permutation(45)
    var = pd.DataFrame({"feature_id": [*ids, *unknown]}, index=[*names, *(f"NEW{i}" for i in range(5))]).iloc[
        order
    ]
    counts = rng.poisson(2.0, size=(num_cells, 45)) * (
        rng.random((num_cells, 45)) < rng.random((num_cells, 1))
    )
    obs = pd.DataFrame(
        {"donor_id": pd.Categorical(rng.choice(["a", "b"], num_cells)), "depth": rng.random(num_cells)},
        index=[f"cell{i}" for i in range(num_cells)],
    )
    adata = anndata.AnnData(sparse.csr_matrix(counts.astype(np.float32)), obs=obs, var=var)
    adata.layers["half"] = adata.X * np.float32(0.5)
    adata.uns["source"] = {"lab": "ours"}
    adata.obsm["X_pca"] = rng.random((num_cells, 2))
    return adata


def label_copy(
    predictor: Predictor,
    source: Path,
    target: Path,
    *,
    layer: str | None = None,
    raw: bool = False,
    min_gene_overlap: float = 0.1,
    model: str = "model",
    **options: Any,
) -> Annotation:
    """`annotate`, from a path."""
    cells = H5adCells.open(predictor, source, min_gene_overlap=min_gene_overlap, layer=layer, raw=raw)
    return annotate(predictor, cells, target, model=model, **options)


def _expected(predictor: Predictor, adata: anndata.AnnData) -> pd.DataFrame:
    found = predictor.predict(predictor.genes.match(adata.var["feature_id"].tolist()).select(adata.X))
    return found.table().set_index(adata.obs_names)


def _check(obs: pd.DataFrame, expected: pd.DataFrame) -> None:
    assert obs["predicted_labels"].astype(str).tolist() == expected["predicted_labels"].tolist()
    for column in ("cell_type_ontology_term_id", "label_level", "best_label"):
        assert obs[column].astype(str).tolist() == expected[column].tolist()
    assert obs["unknown"].tolist() == expected["unknown"].tolist()
    np.testing.assert_allclose(obs["unknown_score"], expected["unknown_score"], atol=1e-4)
    np.testing.assert_allclose(obs["conf_score"], expected["conf_score"], atol=1e-5)


def test_the_command_labels_a_copy_and_changes_nothing_else(
    model_dir: Path, predictor: Predictor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tracking = TrackingConfig(uri=new_store(tmp_path))
    with start_run(ExperimentConfig(tracking=tracking), "finetune") as run:
        register_model(run.tracking_uri, run.run_id, model_dir, "blood")
    source, target = tmp_path / "in.h5ad", tmp_path / "made" / "out.h5ad"
    _cells().write_h5ad(source)
    before = hashlib.sha256(source.read_bytes()).hexdigest()
    command = [
        "--model",
        "models:/blood@candidate",
        "--h5ad",
        str(source),
        "--out",
        str(target),
        "--tracking-uri",
        tracking.uri,
    ]
    assert main([*command, "--probabilities", "--embedding"]) == 0
    printed = capsys.readouterr().out
    assert "model models:/blood/1: 4 labels, 40 genes" in printed
    assert (
        "60 cells in" in printed
        and "40 of the model's 40 genes found (40 by id, 0 by name), covering 100.0%" in printed
    )
    assert hashlib.sha256(source.read_bytes()).hexdigest() == before
    assert [path.name for path in target.parent.iterdir()] == ["out.h5ad"]

    given, made = anndata.read_h5ad(source), anndata.read_h5ad(target)
    assert made.obs.columns.tolist() == ["donor_id", "depth", *ANSWER_COLUMNS]
    assert made.obs["predicted_labels"].cat.categories.tolist() == [*LABELS["names"], "unknown"]
    _check(made.obs, _expected(predictor, given))
    assert made.obs["predicted_labels"].nunique() > 1, "a constant answer would test nothing"
    pd.testing.assert_frame_equal(made.obs[["donor_id", "depth"]], given.obs)
    pd.testing.assert_frame_equal(made.var, given.var)
    for part in ("data", "indices", "indptr"):
        np.testing.assert_array_equal(getattr(made.X, part), getattr(given.X, part))
        np.testing.assert_array_equal(getattr(made.layers["half"], part), getattr(given.layers["half"], part))
    assert made.uns["source"] == {"lab": "ours"}
    provenance = made.uns["screformer"]
    assert (
        provenance["model"] == "models:/blood/1"
        and provenance["genes_found"] == 40
        and provenance["counts"] == "X"
    )
    assert provenance["labels"].tolist() == LABELS["names"]
    np.testing.assert_array_equal(made.obsm["X_pca"], given.obsm["X_pca"])
    sure = ~made.obs["unknown"].to_numpy()
    highest = made.obsm["screformer_probabilities"].max(axis=1)
    np.testing.assert_allclose(highest[sure], made.obs["conf_score"][sure])
    assert made.obsm["X_screformer"].shape == (60, 16)
    shares = made.obs["predicted_labels"].value_counts(normalize=True)
    assert all(
        f"{shares[label]:.1%}" in line
        for label in LABELS["names"]
        for line in printed.splitlines()
        if label in line
    )
    made.write_h5ad(tmp_path / "again.h5ad")


def _to_csc(adata: anndata.AnnData) -> None:
    adata.X = sparse.csc_matrix(adata.X)


def _to_symbols(adata: anndata.AnnData) -> None:
    del adata.var["feature_id"]


def _to_ids_in_index(adata: anndata.AnnData) -> None:
    adata.var.index = [f"{name}.4" for name in adata.var["feature_id"]]
    del adata.var["feature_id"]


def _to_other_column(adata: anndata.AnnData) -> None:
    adata.var["Ensembl"] = pd.Categorical(adata.var.pop("feature_id"))
    adata.var.index = [str(i) for i in range(45)]
    adata.obs.index.name = "barcode"


@pytest.mark.parametrize("change", [_to_csc, _to_symbols, _to_ids_in_index, _to_other_column])
def test_layouts_and_gene_names_make_no_difference(predictor: Predictor, tmp_path: Path, change) -> None:
    adata = _cells()
    expected = _expected(predictor, adata)
    change(adata)
    adata.write_h5ad(tmp_path / "in.h5ad")
    done = label_copy(predictor, tmp_path / "in.h5ad", tmp_path / "out.h5ad", model="model")
    assert done.genes.num_found == 40 and done.num_cells == 60
    _check(anndata.read_h5ad(tmp_path / "out.h5ad").obs, expected)


def test_counts_in_a_layer_or_in_raw(predictor: Predictor, tmp_path: Path) -> None:
    adata = _cells()
    expected = _expected(predictor, adata)
    adata.raw = adata
    adata.layers["counts"] = adata.X.copy()
    adata = adata[:, :7].copy()
    adata.X = np.log1p(adata.X)
    adata.write_h5ad(tmp_path / "in.h5ad")
    with pytest.raises(ValueError, match=r"in.h5ad: X has 1.09861 at cell .*whole number.*--use raw"):
        label_copy(
            predictor, tmp_path / "in.h5ad", tmp_path / "out.h5ad", model="model", min_gene_overlap=0.0
        )
    assert not list(tmp_path.glob("out*")), "a rejected file leaves nothing behind"
    label_copy(predictor, tmp_path / "in.h5ad", tmp_path / "out.h5ad", model="model", raw=True)
    _check(anndata.read_h5ad(tmp_path / "out.h5ad").obs, expected)
    seven = _expected(predictor, anndata.read_h5ad(tmp_path / "in.h5ad").raw.to_adata()[:, adata.var_names])
    done = label_copy(
        predictor,
        tmp_path / "in.h5ad",
        tmp_path / "layer.h5ad",
        model="model",
        layer="counts",
        min_gene_overlap=0.01,
    )
    assert done.genes.num_found < 8
    _check(anndata.read_h5ad(tmp_path / "layer.h5ad").obs, seven)


def test_columns_of_the_input_are_kept(predictor: Predictor, tmp_path: Path) -> None:
    adata = _cells()
    expected = _expected(predictor, adata)
    theirs = ["CL:0000084"] * 30 + ["CL:0000236"] * 30
    adata.obs["cell_type_ontology_term_id"] = pd.Categorical(theirs)
    adata.obs["conf_score"] = 0.25
    adata.write_h5ad(tmp_path / "in.h5ad")
    done = label_copy(predictor, tmp_path / "in.h5ad", tmp_path / "once.h5ad", model="models:/blood/1")
    assert done.moved == {
        "conf_score": "conf_score_original",
        "cell_type_ontology_term_id": "cell_type_ontology_term_id_original",
    }
    assert "obs['conf_score'] of the input is kept as 'conf_score_original'" in str(done)
    once = anndata.read_h5ad(tmp_path / "once.h5ad").obs
    again = label_copy(
        predictor, tmp_path / "once.h5ad", tmp_path / "twice.h5ad", model="models:/blood/2", embedding=True
    )
    assert again.moved == {}
    label_copy(
        predictor, tmp_path / "twice.h5ad", tmp_path / "thrice.h5ad", model="models:/blood/3", embedding=True
    )
    twice = anndata.read_h5ad(tmp_path / "thrice.h5ad")
    assert twice.uns["screformer"]["model"] == "models:/blood/3"
    for obs in (once, twice.obs):
        assert obs["cell_type_ontology_term_id_original"].tolist() == theirs
        assert (obs["conf_score_original"] == 0.25).all()
        assert sorted(obs.columns) == sorted(
            [
                "donor_id",
                "depth",
                "conf_score_original",
                "cell_type_ontology_term_id_original",
                *ANSWER_COLUMNS,
            ]
        )
        _check(obs, expected)
    adata.obs["conf_score_original"] = 1.0
    adata.write_h5ad(tmp_path / "full.h5ad")
    done = label_copy(predictor, tmp_path / "full.h5ad", tmp_path / "full_out.h5ad")
    assert done.moved["conf_score"] == "conf_score_original_2"
    full = anndata.read_h5ad(tmp_path / "full_out.h5ad").obs
    assert (full["conf_score_original"] == 1.0).all() and (full["conf_score_original_2"] == 0.25).all()

    curated = anndata.read_h5ad(tmp_path / "once.h5ad")
    curated.obs["predicted_labels"] = "mine"
    curated.write_h5ad(tmp_path / "curated.h5ad")
    done = label_copy(predictor, tmp_path / "curated.h5ad", tmp_path / "curated_out.h5ad")
    assert done.moved == {"predicted_labels": "predicted_labels_original"}, "changed since we wrote it"


def test_cells_without_a_known_gene_are_counted(predictor: Predictor, tmp_path: Path) -> None:
    adata = _cells(20)
    dense = adata.X.toarray() + 1
    dense[4:7, adata.var["feature_id"].isin(tiny_vocabulary().feature_ids)] = 0
    adata.X = sparse.csr_matrix(dense)
    adata.write_h5ad(tmp_path / "in.h5ad")
    done = label_copy(predictor, tmp_path / "in.h5ad", tmp_path / "out.h5ad", model="model")
    assert done.num_empty == 3 and "3 cells have too few counts" in str(done)
    assert done.table["cells"].sum() == 20
    obs = anndata.read_h5ad(tmp_path / "out.h5ad").obs
    assert (obs["predicted_labels"].iloc[4:7] == "unknown").all() and obs["unknown"].iloc[4:7].all()
    assert (obs["unknown_reason"].iloc[4:7] == "too few counts").all()
    assert (obs["conf_score"].iloc[4:7] == 0).all() and not obs["unknown"].iloc[:4].any()
    counted = anndata.read_h5ad(tmp_path / "out.h5ad").obs.groupby("predicted_labels", observed=True)[
        "conf_score"
    ]
    table = done.table.set_index("label")
    assert table["cells"].to_dict() == counted.size().to_dict()
    assert table["mean_confidence"].to_dict() == pytest.approx(counted.mean().to_dict(), rel=1e-5)


def test_bad_requests_stop_with_a_remedy(
    predictor: Predictor, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adata = _cells()
    good = tmp_path / "good.h5ad"
    adata.write_h5ad(good)
    mouse = adata.copy()
    mouse.var = pd.DataFrame(index=[f"Gene{i}" for i in range(45)])
    mouse.write_h5ad(tmp_path / "mouse.h5ad")
    scaled = adata.copy()
    scaled.X = sparse.csr_matrix(scaled.X - 3 * (scaled.X > 5))
    scaled.X.data[0] = -2
    scaled.write_h5ad(tmp_path / "scaled.h5ad")
    (tmp_path / "cut.h5ad").write_bytes(good.read_bytes()[:5000])

    def message(*words: str) -> str:
        assert main(["--model", str(model_dir), *words]) == 2
        return capsys.readouterr().err

    out = str(tmp_path / "out.h5ad")
    assert "mouse.h5ad (X): too few genes: 0 of the model's 40 genes found" in message(
        "--h5ad", str(tmp_path / "mouse.h5ad"), "--out", out
    )
    assert "at least 99.0%" in message(
        "--h5ad", str(_cut_genes(adata, tmp_path)), "--out", out, "--min-gene-overlap", "0.99"
    )
    assert "is negative" in message("--h5ad", str(tmp_path / "scaled.h5ad"), "--out", out)
    assert "cut.h5ad is" in message("--h5ad", str(tmp_path / "cut.h5ad"), "--out", out)
    assert "does not exist" in message("--h5ad", str(tmp_path / "none.h5ad"), "--out", out)
    assert "has no layer 'counts'" in message("--h5ad", str(good), "--out", out, "--layer", "counts")
    assert "is the input file, which is never changed" in message("--h5ad", str(good), "--out", str(good))
    assert "already exists; give another path or add --overwrite" in message(
        "--h5ad", str(good), "--out", str(tmp_path / "mouse.h5ad")
    )
    assert "is a file, but there are 2 inputs; give a folder" in message(
        "--h5ad", str(good), str(tmp_path / "mouse.h5ad"), "--out", out
    )
    assert "two inputs would both be written to" in message(
        "--h5ad", str(good), str(good), "--out", str(tmp_path / "folder")
    )
    assert "the output is NAME.h5ad (a copy of the file) or NAME.parquet" in message(
        "--h5ad", str(good), "--out", str(tmp_path / "labels.csv")
    )
    unwritable = message("--h5ad", str(good), "--out", str(good / "inside" / "out.h5ad"))
    assert "where a folder should be" in unwritable and unwritable.count("\n") == 1
    assert main(["--model", str(tmp_path / "nothing"), "--h5ad", str(good), "--out", out]) == 2
    assert "is not a directory with weights.safetensors" in capsys.readouterr().err
    assert not list(tmp_path.glob("out.h5ad*"))


def _cut_genes(adata: anndata.AnnData, folder: Path) -> Path:
    adata[:, :20].write_h5ad(folder / "panel.h5ad")
    return folder / "panel.h5ad"


def test_several_files_are_written_to_a_folder(model_dir: Path, tmp_path: Path) -> None:
    for seed in (1, 2):
        _cells(seed=seed).write_h5ad(tmp_path / f"{seed}.h5ad")
    assert (
        main(
            [
                "--model",
                str(model_dir),
                "--h5ad",
                str(tmp_path / "1.h5ad"),
                str(tmp_path / "2.h5ad"),
                "--out",
                str(tmp_path / "done"),
            ]
        )
        == 0
    )
    assert sorted(path.name for path in (tmp_path / "done").iterdir()) == ["1.h5ad", "2.h5ad"]


def test_parquet_is_the_same_table_and_is_resumed(
    model_dir: Path,
    predictor: Predictor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    adata = _cells()
    adata.write_h5ad(tmp_path / "in.h5ad")
    monkeypatch.setattr("data_ingest.cells.CELLS_PER_READ", 25)
    out = tmp_path / "out.parquet"
    command = ["--model", str(model_dir), "--h5ad", str(tmp_path / "in.h5ad"), "--out", str(out)]
    assert main([*command, "--probabilities", "--embedding"]) == 0, capsys.readouterr().err
    made = pd.read_parquet(out).set_index("cell")
    assert made.index.tolist() == adata.obs_names.tolist()
    _check(made, _expected(predictor, adata))
    assert {"probability: mystery cell", "embedding_15"} <= set(made.columns)

    shards = sorted(out.glob("0*.parquet"))
    assert [len(pd.read_parquet(path)) for path in shards] == [25, 25, 10]
    before = shards[0].stat().st_mtime_ns
    shards[1].unlink()
    assert main([*command, "--probabilities", "--embedding"]) == 0
    assert shards[0].stat().st_mtime_ns == before and shards[1].exists(), "only what was missing is made"
    pd.testing.assert_frame_equal(pd.read_parquet(out).set_index("cell"), made)
    assert main(command) == 2
    assert "has labels of other cells, another model or other columns" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0
    assert "embedding_0" not in pd.read_parquet(out)
    (tmp_path / "mine.parquet").mkdir()
    assert main([*command[:-1], str(tmp_path / "mine.parquet"), "--overwrite"]) == 2
    assert "was not written by this command" in capsys.readouterr().err


def test_many_cells_are_labelled_in_parallel(
    ray_local: None, model_dir: Path, predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adata = _cells()
    adata.write_h5ad(tmp_path / "in.h5ad")
    monkeypatch.setattr("data_ingest.cells.CELLS_PER_READ", 20)
    monkeypatch.setitem(CELLS_FOR_RAY, "reformer", 60)
    out = tmp_path / "out.parquet"
    assert main(["--model", str(model_dir), "--h5ad", str(tmp_path / "in.h5ad"), "--out", str(out)]) == 0
    assert len(list(out.glob("0*.parquet"))) == 3
    _check(pd.read_parquet(out).set_index("cell"), _expected(predictor, adata))
    label_copy(predictor, tmp_path / "in.h5ad", tmp_path / "out.h5ad", model="model")
    _check(anndata.read_h5ad(tmp_path / "out.h5ad").obs, _expected(predictor, adata))


def test_an_interrupted_copy_resumes_with_the_existing_labels(
    predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adata, folder = _cells(), tmp_path / "out.h5ad.labels"
    adata.write_h5ad(tmp_path / "in.h5ad")
    monkeypatch.setattr("data_ingest.cells.CELLS_PER_READ", 25)
    source = H5adCells.open(predictor, tmp_path / "in.h5ad", min_gene_overlap=0.1)

    def interrupted(model: str) -> None:
        """Leave the files of a killed run: two of three shards, one of them marked to show whether it is
        used."""
        first, second, _ = sorted(
            label_cells(predictor, source, folder, model=model).folder.glob("0*.parquet")
        )
        pd.read_parquet(first).assign(conf_score=np.float32(0.125)).to_parquet(first, index=False)
        second.unlink()

    expected = _expected(predictor, adata)
    for before, kept in (("model", True), ("another model", False)):
        interrupted(before)
        label_copy(predictor, tmp_path / "in.h5ad", tmp_path / "out.h5ad", model="model")
        made = anndata.read_h5ad(tmp_path / "out.h5ad").obs
        assert (made["conf_score"].iloc[:25] == 0.125).all() == kept
        _check(made.iloc[25:], expected.iloc[25:])
        assert not folder.exists()
        (tmp_path / "out.h5ad").unlink()
    late = _cells(100)
    late.X.data[-1] = 0.5  # after the cells that are checked first
    late.write_h5ad(tmp_path / "late.h5ad")
    with pytest.raises(ValueError, match="X has 0.5 at cell"):
        label_copy(predictor, tmp_path / "late.h5ad", tmp_path / "out.h5ad", model="model")
    assert not list(tmp_path.glob("out*")), "a rejected file leaves nothing behind"


def test_an_atlas_query_is_labelled_and_written_back(
    ray_local: None,
    small_atlas: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("data_ingest.atlas_cells.CELLS_PER_READ", 20)
    shutil.copytree(small_atlas, tmp_path / "atlas")
    atlas = str(tmp_path / "atlas")
    with open_atlas(AtlasConfig(uri=atlas)) as experiment:
        var = experiment.ms["RNA"].var.read(column_names=["feature_id", "feature_name"]).concat().to_pandas()
        before = experiment.obs.read().concat().to_pandas()
    chosen = before["donor_id"].astype(str) == before["donor_id"].astype(str)[0]
    write_tiny_model(
        tmp_path / "model", tiny_vocabulary(var["feature_id"].tolist(), var["feature_name"].tolist())
    )
    command = [
        "--model",
        str(tmp_path / "model"),
        "--atlas",
        atlas,
        "--obs-filter",
        f"donor_id == '{before['donor_id'][0]}'",
    ]
    command += ["--out", str(tmp_path / "out.parquet"), "--write-obs"]
    assert main(command) == 0, capsys.readouterr().err
    made = pd.read_parquet(tmp_path / "out.parquet")
    assert (
        made["cell"].astype(int).tolist() == before["soma_joinid"][chosen].tolist()
        and len(made) == chosen.sum()
    )
    with open_atlas(AtlasConfig(uri=atlas)) as experiment:
        after = experiment.obs.read().concat().to_pandas()
    assert after["screformer_predicted_labels"][chosen].tolist() == made["predicted_labels"].tolist()
    np.testing.assert_allclose(after["screformer_conf_score"][chosen], made["conf_score"])
    assert (after["screformer_predicted_labels"][~chosen] == "").all() and after["screformer_conf_score"][
        ~chosen
    ].isna().all()
    for column in before:
        assert after[column].astype(str).tolist() == before[column].astype(str).tolist(), (
            f"{column} stays as it is"
        )

    first, second, *_ = sorted((tmp_path / "out.parquet").glob("0*.parquet"))
    second.unlink()
    times = first.stat().st_mtime_ns
    assert main(command) == 0, "an interrupted run goes on with the version of the atlas that it began with"
    assert first.stat().st_mtime_ns == times
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "out.parquet"), made)


def test_types_absent_from_the_file_are_dropped(predictor: Predictor, tmp_path: Path) -> None:
    adata, model_dir = _cells(), calibrated_tiny_model(tmp_path / "model")
    calibrated = Predictor.load(model_dir, device="cpu")
    adata.write_h5ad(tmp_path / "in.h5ad")
    label_copy(
        calibrated,
        tmp_path / "in.h5ad",
        tmp_path / "out.h5ad",
        model="model",
        drop_absent=True,
        probabilities=True,
    )
    written = anndata.read_h5ad(tmp_path / "out.h5ad")
    expected = present_labels(written.obsm["screformer_probabilities"], calibrated.calibration.prior_k)
    found = written.obs["present_label"].astype(str).tolist()
    assert found == [LABELS["names"][code] for code in expected] and len(set(found)) > 1
    _check(written.obs, _expected(calibrated, adata))  # the other columns depend only on the cell itself
    adata.var.index = adata.var["feature_id"]
    assert (
        screformer.annotate(adata, model=model_dir, drop_absent=True)
        .obs["present_label"]
        .astype(str)
        .tolist()
        == found
    )
    with pytest.raises(
        ValueError, match="--drop-absent needs a model that stores its labels' shares in training"
    ):
        label_copy(predictor, tmp_path / "in.h5ad", tmp_path / "none.h5ad", model="model", drop_absent=True)


def test_a_majority_vote_over_clusters(predictor: Predictor, model_dir: Path, tmp_path: Path) -> None:
    adata = _cells()
    best = _expected(predictor, adata)["best_label"].to_numpy()
    adata.obs["leiden"] = pd.Categorical(np.where(np.arange(60) < 40, "0", "1")).astype(object)
    adata.obs.loc[adata.obs_names[-1], "leiden"] = np.nan
    adata.write_h5ad(tmp_path / "in.h5ad")
    label_copy(predictor, tmp_path / "in.h5ad", tmp_path / "out.h5ad", model="model", majority_vote="leiden")
    voted = anndata.read_h5ad(tmp_path / "out.h5ad").obs["majority_label"].astype(str)
    names = LABELS["names"]
    for rows in (slice(0, 40), slice(40, 59)):
        votes = [(best[rows] == name).sum() for name in names]
        assert set(voted.iloc[rows]) == {names[int(np.argmax(votes))]}
    assert voted.iloc[-1] == best[-1], "a cell without cluster keeps its label"
    label_copy(
        predictor, tmp_path / "out.h5ad", tmp_path / "again.h5ad", model="model", majority_vote="leiden"
    )
    with pytest.raises(ValueError, match="--majority-vote louvain: obs has no such column"):
        label_copy(
            predictor, tmp_path / "in.h5ad", tmp_path / "none.h5ad", model="model", majority_vote="louvain"
        )

    adata.var.index = adata.var["feature_id"]
    labelled = screformer.annotate(adata, model=model_dir, majority_vote="leiden")
    _check(labelled.obs, _expected(predictor, adata))
    assert labelled.obs["majority_label"].astype(str).tolist() == voted.tolist()
    assert labelled.obsm["X_screformer"].shape == (60, 16) and "predicted_labels" not in adata.obs
    with pytest.raises(ValueError, match="adata has no layer 'other'"):
        screformer.annotate(adata, model=model_dir, layer="other")


def test_a_real_file_is_labelled_and_not_changed(real_data: Path, tmp_path: Path) -> None:
    source, target = real_data / "bonemarrow_accordion_unlabelled.h5ad", tmp_path / "out.h5ad"
    var = anndata.read_h5ad(source, backed="r").var
    ids = var["feature_id"].astype(str)
    known = ids[ids.str.startswith("ENSG") & ~ids.duplicated(keep=False)].sample(3_000, random_state=0)
    vocabulary = tiny_vocabulary(known.tolist(), known.index.tolist())
    predictor = Predictor.load(write_tiny_model(tmp_path / "model", vocabulary), device="cpu")
    done = label_copy(predictor, source, target, model="model")
    assert (done.num_cells, done.genes.num_by_id, done.genes.num_by_name) == (1_482, 3_000, 0)
    assert done.table["cells"].sum() == 1_482
    made = anndata.read_h5ad(target)
    assert (
        made.obs["conf_score"].between(0.25, 1).all()
        and made.obs["predicted_labels"].isin(LABELS["names"]).all()
    )

    def compare(name: str, element: h5py.Group | h5py.Dataset) -> None:
        if isinstance(element, h5py.Dataset):
            before, after = element[()], copy[name][()]
            assert (
                before.tobytes() == after.tobytes()
                if isinstance(before, np.ndarray) and before.dtype != object
                else np.all(before == after)
            ), name

    with h5py.File(source) as given, h5py.File(target) as copy:
        given.visititems(compare)


def test_memory_does_not_grow_with_cells(model_dir: Path, tmp_path: Path) -> None:
    # More cells than fit in one read, but fewer than CELLS_FOR_RAY, so that Ray is not used.
    code = """if True:
        import re, sys
        from pathlib import Path
        from data_ingest.cells import H5adCells
        from jobs.labelling.h5ad_copy import annotate
        from screformer.predictor import Predictor
        predictor = Predictor.load(sys.argv[1], device="cpu")
        for name in ("5000", "18000"):
            cells = H5adCells.open(predictor, Path(f"{name}.h5ad"), min_gene_overlap=0.1)
            done = annotate(predictor, cells, f"{name}.out.h5ad", model="model", probabilities=True)
            # Not getrusage: its peak includes what the parent process held when it started this one.
            peak = re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]
            print(done.num_cells, int(peak) / 1024)
    """
    for num_cells in (5_000, 18_000):
        _write_wide(tmp_path / f"{num_cells}.h5ad", num_cells)
    lines = run_python("-c", code, model_dir, cwd=tmp_path).stdout.splitlines()
    (few, before), (many, after) = (map(float, line.split()) for line in lines)
    assert (few, many) == (5_000, 18_000)
    assert after - before < 40, f"{before} MiB, then {after} MiB for 18,000 cells, whose counts take 115 MB"


def _write_wide(path: Path, num_cells: int) -> None:
    """Write cells with 800 of 3,200 genes detected: 6.4 KB per cell as float32 and int32, 115 MB for 18,000
    cells. The model knows 40 of the genes."""
    per_cell, num_genes = 800, 3_200
    indices = (np.arange(per_cell) * 4 + np.arange(num_cells)[:, None] % 4).astype(np.int32).ravel()
    matrix = sparse.csr_matrix(
        (np.ones(len(indices), np.float32), indices, np.arange(num_cells + 1) * per_cell),
        shape=(num_cells, num_genes),
    )
    ids = [*tiny_vocabulary().feature_ids, *(f"ENSG{i:011d}" for i in range(1000, 1000 + num_genes - 40))]
    names = [f"cell{i}" for i in range(num_cells)]
    anndata.AnnData(matrix, obs=pd.DataFrame(index=names), var=pd.DataFrame(index=ids)).write_h5ad(path)
    with h5py.File(path) as file:
        assert len(file["X/data"]) == num_cells * per_cell
