"""The main job with fewer cells and steps: as a user runs it, and with the user's own files."""

import json
from pathlib import Path

import anndata
import pandas as pd
import pytest

from helpers.processes import run_here, run_python
from jobs import quickstart

SMALL = [
    "train.max_steps=40",
    "train.eval_every_steps=20",
    "train.warmup_steps=5",
    "model.depth=1",
    "tokens.max_genes=128",
    "model.n_hashes=1",
]


@pytest.mark.timeout(600)
def test_simulated_cells_from_nothing_to_labels(tmp_path: Path) -> None:
    words = ["--out", "qs", "--pretrain-steps", "10", "--cells", "900", *SMALL, "cluster.num_workers=1"]
    done = run_python("-m", "jobs.quickstart", *words, cwd=tmp_path)
    result, said = json.loads(done.stdout.splitlines()[-1]), done.stdout
    for noise in ("Traceback", "FutureWarning", "Failed to query", "Reporting training result"):
        assert noise not in done.stdout + done.stderr
    assert set(result) == {"model", "version", "test", "baseline", "annotated", "seconds"}
    assert (result["model"], result["version"]) == ("models:/screformer/1", 1)
    # Forty steps of a tiny network prove little, but a broken chain would be at chance, 0.35.
    assert result["test"]["accuracy"] > 0.6
    assert result["baseline"]["accuracy"] > 0.9
    for stage in (
        "simulate",
        "ingest",
        "query",
        "pretrain",
        "finetune",
        "register",
        "evaluate",
        "annotate",
        "report",
    ):
        assert f" s] {stage}" in said
    page = (tmp_path / "qs" / "report.html").read_text()
    assert (
        "logistic regression" in page
        and "of the model&#39;s embeddings" in page
        and "Annotated cells" in page
    )
    annotated = anndata.read_h5ad(result["annotated"])
    assert annotated.obs["conf_score"].between(0, 1).all()
    assert "models:/screformer/1" == annotated.uns["screformer"]["model"]
    assert not any(
        donor in said.partition("held-out donor_id")[2] for donor in annotated.obs["donor_id"].unique()
    )
    assert {path.name for path in tmp_path.iterdir()} == {"qs"}


@pytest.mark.timeout(600)
def test_own_files_with_named_test_donors(ray_local: None, tmp_path: Path, sim_h5ads: list[Path]) -> None:
    donors = ["sim_blood_donor2", "sim_blood_panel_donor4"]
    files = [str(path) for path in sim_h5ads[:2]]
    words = ["--out", "qs", "--h5ad", *files, "--test-donors", *donors, "--pretrain-steps", "0", *SMALL]
    result, said = run_here(quickstart.main, *words, cwd=tmp_path)
    assert "] finetune" in said and "] pretrain" not in said
    assert f"held-out donor_id: {', '.join(donors)}" in said
    tested = pd.read_parquet(next((tmp_path / "qs").rglob("test/cells.parquet"))).set_index("joinid")
    assert sorted(tested["donor_id"].unique()) == donors
    assert (tested["prediction"] == tested["label"]).mean() == pytest.approx(
        result["test"]["accuracy"], abs=1e-6
    )
    annotated = anndata.read_h5ad(result["annotated"])
    assert annotated.obs["dataset_id"].nunique() == 1
    # Test cells read from a file with their dataset's genes, not from the atlas: the same best labels, except
    # for rounding.
    same = (
        annotated.obs["best_label"].astype(str).to_numpy()
        == tested["prediction"][annotated.obs["soma_joinid"]].to_numpy()
    )
    assert (
        len(same) == (tested["dataset_id"] == annotated.obs["dataset_id"].iloc[0]).sum()
        and same.mean() > 0.99
    )


def test_refuses_what_cannot_be_used(
    tmp_path: Path, sim_h5ads: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    def error(*arguments: str) -> str:
        assert quickstart.main(["--out", str(tmp_path / "qs"), *arguments]) == 2
        return capsys.readouterr().err

    assert "missing.h5ad: no such file" in error("--h5ad", str(tmp_path / "missing.h5ad"))
    assert "unknown setting model.dept; did you mean model.depth?" in error("model.dept=2")
    assert "must be at least 20 for each of 12 donors" in error("--cells", "50")
    (tmp_path / "other" / "atlas").mkdir(parents=True)
    assert "holds an atlas that quickstart did not create" in error("--out", str(tmp_path / "other"))
