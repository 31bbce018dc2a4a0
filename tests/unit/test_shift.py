"""Distance of cells from the training data: two-sample test, verdict, and the command on a file."""

import json
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest

from helpers.tiny_model import calibrated_tiny_model, tiny_vocabulary
from jobs.shift import main
from jobs.shifting.measure import AS_IT_IS, FINE_TUNE, PRETRAIN, TRAIN_NEW, verdict_of
from jobs.shifting.two_samples import CellSample, two_sample_auroc, usual_auroc
from screformer.predictor import Predictor
from screformer.reference import TrainingReference


def sample(seed: int, labels: list[int], *, moved: float = 0.0, donor_effect: float = 0.0) -> CellSample:
    """Cells of five donors; each label has a centre, and each donor its own effect."""
    rng, labels_n = np.random.default_rng(seed), np.array(labels)
    donors_n = np.arange(len(labels_n)) % 5
    x = rng.normal(size=(len(labels_n), 8)) + labels_n[:, None] * 3.0 + moved * (np.arange(8) == 1)
    return CellSample(
        embedding_nd=x + donor_effect * rng.normal(size=(5, 8))[donors_n],
        labels_n=labels_n,
        donors_n=donors_n,
    )


def test_alike_samples_are_not_told_apart_and_moved_ones_are() -> None:
    ours = sample(0, [0, 1] * 100)
    alike, moved = (
        two_sample_auroc(ours, sample(1, [0, 1] * 100)),
        two_sample_auroc(ours, sample(1, [0, 1] * 100, moved=3)),
    )
    assert alike is not None and moved is not None
    assert abs(alike - 0.5) < 0.1 and moved > 0.95


def test_a_different_composition_alone_does_not_tell_samples_apart() -> None:
    area = two_sample_auroc(sample(0, [0] * 150 + [1] * 50), sample(1, [0] * 20 + [1] * 180))
    assert area is not None and abs(area - 0.5) < 0.12


def test_donors_are_not_learned_by_heart() -> None:
    area = two_sample_auroc(sample(0, [0, 1] * 100, donor_effect=2), sample(1, [0, 1] * 100, donor_effect=2))
    assert area is not None and area < 0.8  # cells of the same donors on both sides would give 1.0


def test_what_cannot_be_compared_is_none() -> None:
    assert two_sample_auroc(sample(0, [0] * 40), sample(1, [1] * 40)) is None
    assert two_sample_auroc(sample(0, [0] * 40), sample(1, [0] * 5)) is None
    assert usual_auroc(sample(0, [0] * 10), np.arange(10) % 2) is None


GOOD = {
    "counts_share": 0.95,
    "expression_share": 0.97,
    "unknown_share": 0.05,
    "new_types_share": None,
    "accuracy": None,
}


@pytest.mark.parametrize(
    ("changed", "verdict", "reason"),
    [
        ({}, AS_IT_IS, ""),
        ({"unknown_share": 0.5}, FINE_TUNE, "50% of the cells are unknown to it (at most 15%)"),
        ({"new_types_share": 0.2}, FINE_TUNE, "20% of the labelled cells have types new to it"),
        ({"accuracy": 0.7}, FINE_TUNE, "right for 70% of the labelled cells"),
        ({"expression_share": 0.3}, FINE_TUNE, "cover 30% of the expression"),
        ({"counts_share": 0.2, "unknown_share": 0.5}, PRETRAIN, "only 20% of the counts"),
    ],
)
def test_the_verdict_follows_from_the_thresholds(changed: dict, verdict: str, reason: str) -> None:
    found, reasons = verdict_of({**GOOD, **changed}, additive=False)
    assert found == verdict and reason in " ".join(reasons)
    if verdict == PRETRAIN:
        assert verdict_of({**GOOD, **changed}, additive=True)[0] == TRAIN_NEW


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a sample of training cells."""
    folder = calibrated_tiny_model(tmp_path_factory.mktemp("model") / "model")
    rng = np.random.default_rng(0)
    dim = Predictor.load(folder, device="cpu").config.model.dim
    TrainingReference(
        embedding_nd=rng.normal(size=(120, dim)).astype(np.float16),
        labels_n=np.arange(120) % 4,
        donors_n=np.arange(120) % 6,
        datasets_n=np.arange(120) // 4 % 2,
        total_n=np.full(120, 80, np.float32),
        detected_n=np.full(120, 30),
    ).save(folder)
    return folder


def test_the_command_compares_a_file(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    genes = [*tiny_vocabulary().feature_ids[:30], "ENSG00000999999"]
    counts = np.random.default_rng(1).poisson(2.0, (90, 31)).astype(np.float32)
    obs = pd.DataFrame(
        {"donor_id": [f"d{cell % 3}" for cell in range(90)], "kind": ["B cell", "neuron", "unknown"] * 30},
        index=[f"c{cell}" for cell in range(90)],
    )
    anndata.AnnData(counts, obs=obs, var=pd.DataFrame(index=genes)).write_h5ad(tmp_path / "cells.h5ad")
    words = ["--model", str(model), "--h5ad", str(tmp_path / "cells.h5ad"), "--label-column", "kind"]
    assert main([*words, "--out", str(tmp_path / "shift.html")]) == 0
    printed = capsys.readouterr().out
    last = json.loads(printed.splitlines()[-1])
    assert last["cells"] == 90 and last["donors"] == 3
    assert (last["genes_measured"], last["genes_of_model"]) == (30, 40)
    assert last["new_types"] == ["neuron"] and last["new_types_share"] == 0.5
    assert 0.9 < last["counts_share"] < 1 and last["auroc"] > 0.9 and 0 <= last["usual_auroc"] <= 1
    assert 0 <= last["accuracy"] <= 1 and 0 <= last["calibration_error"] <= 1
    assert last["verdict"] == FINE_TUNE and "50% of the labelled cells have types new to it" in printed
    saved = json.loads((tmp_path / "shift.json").read_text())
    assert {row["label"]: row["in model"] for row in saved["types"]} == {"B cell": "yes", "neuron": "no"}
    assert sum(row["estimated share"] for row in saved["composition"]) == pytest.approx(1)
    assert len(saved["depth"]) == 4 and saved["sentence"] in printed
    page = (tmp_path / "shift.html").read_text()
    assert "Map of the cells" in page and "at most 15%" in page


def test_a_model_without_training_cells_is_compared_without_them(tmp_path: Path) -> None:
    folder = calibrated_tiny_model(tmp_path / "model")
    assert TrainingReference.load(folder) is None
    counts = np.ones((40, 40), np.float32)
    cells = anndata.AnnData(counts, var=pd.DataFrame(index=list(tiny_vocabulary().feature_ids)))
    cells.write_h5ad(tmp_path / "cells.h5ad")
    assert main(["-q", "--model", str(folder), "--h5ad", str(tmp_path / "cells.h5ad")]) == 0


def test_damaged_training_cells_are_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "training_cells.safetensors").write_bytes(
        (model / "training_cells.safetensors").read_bytes()[:-10]
    )
    with pytest.raises(ValueError, match=r"training_cells.safetensors is not a complete"):
        TrainingReference.load(tmp_path)


def test_what_does_not_go_together_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--h5ad", "a.h5ad", "--out", "shift.txt"]) == 2
    assert main(["--query", "q.json", "--label-column", "kind"]) == 2
    said = capsys.readouterr().err
    assert "--out shift.txt must end in .html" in said and "--label-column applies to files" in said
