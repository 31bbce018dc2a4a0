"""The bundled model: it matches its recipe, and its labels stay the same."""

import json
import shutil
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest

import screformer
from helpers.cells import MARKERS, marked_cells
from helpers.processes import run_python
from jobs.arguments import RECIPES
from jobs.explaining.faithfulness import untrained
from jobs.training.start import load_start, settings_of_start
from screformer.bundled import DEFAULT, FOLDER, bundled_model, bundled_models
from screformer.checkpoint import load_model
from screformer.config import ExperimentConfig
from screformer.predictor import Predictor

GOLDEN = Path(__file__).parents[1] / "golden" / "bundled_blood.json"


def test_it_is_small_and_found_by_name() -> None:
    assert bundled_models() == ["blood"]
    assert sum(path.stat().st_size for path in bundled_model(DEFAULT).iterdir()) <= 10e6
    with pytest.raises(ValueError, match="model 'bundled:lung' is not bundled .* models are bundled:blood"):
        bundled_model("bundled:lung")


def test_it_matches_the_recipe() -> None:
    config = load_model(bundled_model(DEFAULT)).config
    recipe = ExperimentConfig.from_file(RECIPES / "blood.yaml", command="finetune")
    settled = {"split.test_fraction": 0.0, "model.attention": "none"}
    assert config.differences(recipe.merge(settled)) == {}


def test_it_names_no_machine() -> None:
    text = "".join(
        path.read_text() for path in bundled_model(DEFAULT).iterdir() if path.suffix != ".safetensors"
    )
    assert "/home" not in text and "file://" not in text and "mlflow.db" not in text


def test_it_works_with_the_library_alone(tmp_path: Path) -> None:
    shutil.copytree(Path(screformer.__file__).parent, tmp_path / "screformer")
    marked_cells().write_h5ad(tmp_path / "cells.h5ad")
    program = """if True:
        import sys
        sys.path.insert(0, sys.argv[1])
        import anndata, screformer
        assert screformer.__file__.startswith(sys.argv[1])
        labelled = screformer.annotate(anndata.read_h5ad(sys.argv[1] + "/cells.h5ad"))
        print(len(labelled))
        assert not {"jobs", "data_ingest", "ray", "mlflow", "tiledbsoma", "deepspeed"} & set(sys.modules)
    """
    assert run_python("-c", program, tmp_path, cwd=tmp_path).stdout.strip().endswith(str(len(MARKERS)))


def test_cells_with_the_markers_of_a_type_get_its_label() -> None:
    labelled = screformer.annotate(marked_cells())
    assert dict(labelled.obs["best_label"]) == {name: name for name in MARKERS}


def test_training_starts_from_it_by_name() -> None:
    recipe = ExperimentConfig.from_file(RECIPES / "blood.yaml", command="finetune")
    start = load_start(recipe, DEFAULT)
    assert len(start.labels["names"]) == 7 and settings_of_start(recipe, start, DEFAULT) == recipe
    model = settings_of_start(ExperimentConfig(), start, DEFAULT).model
    assert (model.encoder, model.dim, model.linear_skip) == ("additive", 64, False)
    with pytest.raises(ValueError, match="model.dim=32, but the model bundled:blood was trained with 64"):
        settings_of_start(ExperimentConfig().merge({"model.dim": 32}), start, DEFAULT)


def test_its_random_control_gives_values() -> None:
    """Explanations are compared with those of random weights, which must not all be 0."""
    predictor = Predictor.load(bundled_model(DEFAULT), device="cpu")
    cells = predictor.genes.match(list(predictor.vocabulary.feature_ids)).select(marked_cells().X)
    found = predictor.outputs(cells)[0]
    predictor.model = untrained(predictor)
    logits, embedding = predictor.outputs(cells)
    assert logits.std(axis=0).min() > 0.01 and embedding.std(axis=0).max() > 0.01
    assert abs(np.corrcoef(found.ravel(), logits.ravel())[0, 1]) < 0.9


def real_labels(folder: Path) -> dict[str, int]:
    """Labels of 300 real cells, with their numbers."""
    adata = anndata.read_h5ad(folder / "pbmc1k_v3_unlabelled.h5ad")[:300].copy()
    return (
        screformer.annotate(adata).obs["predicted_labels"].astype(str).value_counts().sort_index().to_dict()
    )


def test_labels_of_real_cells_stay_the_same(real_data: Path) -> None:
    """When the model is updated, the golden file must be too; see tests/golden/README.md."""
    assert real_labels(real_data) == json.loads(GOLDEN.read_text())


def test_neighbours_in_other_data_sets_have_the_same_type(real_data: Path) -> None:
    """The embedding tells types apart across data sets, at least as well as an SVD of the shared genes."""
    labels = pd.read_csv(real_data / "label_map.tsv", sep="\t").set_index(["dataset", "cell_type"])
    embeddings, counts, types, sources = [], [], [], []
    for name in ("pbmc3k_10x", "kang18_ctrl_8donors", "zheng17_facs"):
        file = anndata.read_h5ad(real_data / f"{name}.h5ad", backed="r")
        adata = file[np.sort(np.random.default_rng(0).permutation(file.n_obs)[:300])].to_memory()
        file.file.close()
        found = screformer.annotate(adata)
        embeddings.append(found.obsm["X_screformer"])
        counts.append(adata.to_df())
        types += [labels.at[(name, text), "major_proposal"] for text in adata.obs["cell_type"]]
        sources += [name] * len(adata)
    shared = pd.concat(counts, join="inner").to_numpy()
    x = np.log1p(shared / shared.sum(axis=1, keepdims=True) * 1e4)
    u, s, _ = np.linalg.svd(x - x.mean(axis=0), full_matrices=False)
    known = np.array([kind != "hematopoietic progenitor" for kind in types])  # of one data set alone
    ours, svd = (
        right_by_neighbours(points[known], np.array(types)[known], np.array(sources)[known])
        for points in (np.concatenate(embeddings), u[:, :30] * s[:30])
    )
    assert ours > 0.9 and ours > svd, (ours, svd)


def right_by_neighbours(points_nd: np.ndarray, types_n: np.ndarray, sources_n: np.ndarray) -> float:
    """Share of cells whose type is the most frequent among their 15 nearest cells of other data sets."""
    distance_nn = ((points_nd[:, None] - points_nd[None]) ** 2).sum(axis=2)
    distance_nn[sources_n[:, None] == sources_n[None]] = np.inf
    nearest_n15 = types_n[np.argsort(distance_nn, axis=1)[:, :15]]
    voted = [pd.Series(row).mode()[0] for row in nearest_n15]
    return float((np.array(voted) == types_n).mean())


def test_the_folder_is_package_data() -> None:
    assert FOLDER.parent == Path(screformer.__file__).parent


if __name__ == "__main__":
    shared = Path(screformer.__file__).parents[2] / "shared" / "data"
    GOLDEN.write_text(json.dumps(real_labels(shared), indent=1) + "\n")
