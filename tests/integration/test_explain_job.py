import json
import re
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from mlflow import MlflowClient
from scipy import sparse

from data_ingest.atlas import open_atlas
from helpers.stores import new_store
from helpers.tiny_model import LABELS, tiny_vocabulary, write_tiny_model
from jobs.explain import main
from jobs.explaining.shards import load_explanations
from screformer.checkpoint import load_model, save_model
from screformer.config import AtlasConfig

pytestmark = pytest.mark.usefixtures("ray_local")
PICTURES = {
    f"{kind}_{stem}.png"
    for kind in ("bar", "beeswarm")
    for stem in ("01_B_cell", "02_T_cell", "03_monocyte", "04_mystery_cell")
} | {"heat.png"}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("trained") / "model", **{"model.attention": "full"})


@pytest.fixture(scope="module")
def h5ad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    counts = rng.poisson(2.0, (120, 40)) * (rng.random((120, 40)) < 0.6)
    obs = pd.DataFrame(
        {"cell_type_major": rng.choice(LABELS["names"], 120)}, index=[f"cell{i}" for i in range(120)]
    )
    adata = anndata.AnnData(
        sparse.csr_matrix(counts.astype(np.float32)),
        obs=obs,
        var=pd.DataFrame(index=list(tiny_vocabulary().feature_ids)),
    )
    path = tmp_path_factory.mktemp("cells") / "cells.h5ad"
    adata.write_h5ad(path)
    return path


def test_explanations_are_saved_checked_and_resumed(
    model_dir: Path, h5ad: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, store = tmp_path / "out", new_store(tmp_path)
    command = [
        "--model",
        str(model_dir),
        "--h5ad",
        str(h5ad),
        "--out",
        str(out),
        "--background",
        "4",
        "--nodes",
        "6",
        "--tracking-uri",
        store,
    ]
    assert main([*command, "--cells", "40"]) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    result = json.loads(printed.splitlines()[-1])
    assert "additivity error" in printed and "deletion curve" in printed and "memory:" in printed
    assert re.search(r"mystery cell .*: none; 0 of its 0 listed markers are among the model's genes", printed)

    found = load_explanations(out)
    assert found.cells["position"].nunique() == 40 and found.values_mg.shape == (len(found.cells), 40)
    sums = np.asarray(found.values_mg.sum(axis=1)).ravel()
    distance = (found.cells["output"] - found.cells["base"]).to_numpy()
    np.testing.assert_allclose(np.abs(sums - distance), found.cells["additivity_error"], atol=1e-4)
    relative = found.cells["additivity_error"] / np.abs(distance).clip(min=1e-6)
    assert result["additivity_error"]["median"] == pytest.approx(np.median(relative), rel=1e-4)
    own = found.cells["class"] == found.cells["predicted"]
    assert own.groupby(found.cells["position"]).sum().eq(1).all(), "the predicted class of each cell, once"
    assert set(found.cells["class"][~own]) and (found.cells["class"] == found.cells["true"])[~own].all(), (
        "and the true one"
    )
    background = pd.read_parquet(out / "background.parquet")
    assert len(background) == 4 and not set(background["position"]) & set(found.cells["position"])
    assert {path.name for path in (out / "pictures").iterdir()} <= PICTURES and (
        out / "pictures" / "heat.png"
    ).stat().st_size > 1000
    top = found.mean(found.cells["class"][own].iloc[0])
    assert top.iloc[0] > 0 and top.is_monotonic_decreasing
    logged = {entry.path for entry in MlflowClient(store).list_artifacts(result["run"], "explanations")}
    assert {
        "explanations/values",
        "explanations/pictures",
        "explanations/summary.json",
        "explanations/mean_by_class.parquet",
    } <= logged
    for words in ("Marker genes", "Dot plot of the top genes", "Top genes of each label", "insertion area"):
        assert words in (out / "report.html").read_text(), words
    curves = pd.read_csv(out / "curves.csv", index_col=0)
    assert (
        curves["deletion"].mean() < curves["deletion, random"].mean()
        and curves["insertion"].mean() > curves["insertion, random"].mean()
    )

    shards = sorted((out / "values").iterdir())
    assert len(shards) == 2
    (out / "summary.json").unlink()
    with pytest.raises(ValueError, match="has no finished explanations"):
        load_explanations(out)
    before, content = shards[0].stat().st_mtime_ns, pd.read_parquet(shards[1])
    shards[1].unlink()
    assert main([*command, "--cells", "40"]) == 0
    assert shards[0].stat().st_mtime_ns == before, "a shard that is there is not made again"
    again = pd.read_parquet(shards[1])
    np.testing.assert_allclose(
        np.concatenate(again["values"].tolist()), np.concatenate(content["values"].tolist()), atol=1e-5
    )
    capsys.readouterr()
    assert main([*command, "--cells", "30"]) == 2
    assert "holds explanations of other cells, another model or other settings" in capsys.readouterr().err


def test_cells_of_an_atlas_whose_datasets_measured_different_genes(
    small_atlas: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_atlas(AtlasConfig(uri=small_atlas)) as experiment:
        var = experiment.ms["RNA"].var.read(column_names=["feature_id", "feature_name"]).concat().to_pandas()
    loaded = load_model(
        write_tiny_model(
            tmp_path / "model", tiny_vocabulary(var["feature_id"].tolist(), var["feature_name"].tolist())
        )
    )
    assert loaded.model.linear_skip is not None
    loaded.model.linear_skip.center.uniform_(generator=torch.Generator().manual_seed(0))
    save_model(tmp_path / "model", loaded.model, loaded.config, loaded.vocabulary, loaded.labels, loaded.meta)
    out = tmp_path / "out"
    command = [
        "--model",
        str(tmp_path / "model"),
        "--atlas",
        small_atlas,
        "--out",
        str(out),
        "--cells",
        "34",
        "--background",
        "3",
    ]
    command += ["--nodes", "8", "--tracking-uri", new_store(tmp_path)]
    assert main(command) == 0, capsys.readouterr().err
    found = load_explanations(out)
    panels = found.genes.filter(like="panel_").to_numpy()
    assert panels.shape[1] > 1 and panels.any(axis=1).all() and not panels.all()
    label = found.cells["class"].iloc[0]
    rows = ((found.cells["class"] == label) & (found.cells["predicted"] == label)).to_numpy()
    gene = int(np.argmin(panels.mean(axis=1)))
    measured = panels[gene][found.cells["panel"].to_numpy()[rows]]
    values = found.values_mg[rows][:, [gene]].toarray().ravel()
    mean = found.mean(label)[found.genes["feature_name"][gene]]
    assert mean == pytest.approx(values[measured].mean() if measured.any() else 0, rel=1e-5)
    relative = found.cells["additivity_error"] / (found.cells["output"] - found.cells["base"]).abs()
    assert relative.median() < 0.1, "what was measured on one side only has its share"

    classes = pd.read_csv(out / "classes.csv", keep_default_na=False)
    assert all(
        not set(row.top_genes.split(", ")) & set(row.top_lacking.split(", ")) for row in classes.itertuples()
    )
    last = sorted((out / "values").iterdir())[-1]
    last.unlink()
    assert main(command) == 0, "an interrupted run goes on with the version of the atlas that it began with"
    assert last.exists()


def test_bad_requests_are_rejected(
    model_dir: Path, h5ad: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--model", str(model_dir), "--h5ad", str(h5ad), "--out", str(tmp_path / "out")]
    assert main([*command, "--cells", "0"]) == 2
    assert "argument --cells: 0 must be at least 1" in capsys.readouterr().err
    assert main([*command, "--background", "500"]) == 2
    assert "120 cells are too few for a background of 500" in capsys.readouterr().err
    assert main([*command[:2], "--h5ad", str(tmp_path / "none.h5ad"), "--out", str(tmp_path / "out")]) == 2
    assert "does not exist" in capsys.readouterr().err
