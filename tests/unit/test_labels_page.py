"""The report of labelled cells, from the command to the page."""

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest

from helpers.cells import marked_cells
from jobs.annotate import main
from jobs.labelling.page import by_donor, marker_dots, types
from jobs.shifting.cells import compared_file
from screformer.bundled import DEFAULT, bundled_model
from screformer.predictor import Predictor


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve cells of each of four types, from two donors, and an empty cell."""
    one = marked_cells()
    counts = np.random.default_rng(0).poisson(np.repeat(np.asarray(one.X), 12, axis=0))
    counts = np.concatenate([counts, np.zeros((1, counts.shape[1]))]).astype(np.float32)
    obs = pd.DataFrame({"donor_id": ["ann", "bob"] * 24 + ["bob"]}, index=[f"c{i}" for i in range(49)])
    path = tmp_path_factory.mktemp("page") / "cells.h5ad"
    anndata.AnnData(counts, obs=obs, var=one.var).write_h5ad(path)
    return path


@pytest.mark.parametrize("out", ["labelled.h5ad", "labels.parquet"])
def test_the_command_writes_a_page(
    source: Path, tmp_path: Path, out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    words = ["--h5ad", str(source), "--out", str(tmp_path / out), "--report", str(page), "--device", "cpu"]
    assert main(words) == 0 and f"report: {page}" in capsys.readouterr().out
    text = page.read_text()
    shown_texts = (
        "49 cells",
        "bundled:blood",
        "natural killer cell",
        "too few counts",
        "ann",
        "Marker genes",
    )
    for shown in shown_texts:
        assert shown in text, shown
    assert text.count("<img") == 4 and "<script" not in text


def test_cells_of_a_type_express_its_own_markers(source: Path) -> None:
    predictor = Predictor.load(bundled_model(DEFAULT), device="cpu")
    dots = marker_dots(predictor, compared_file(predictor, source)).pivot(
        index="label", columns="gene", values="mean"
    )
    for label, gene in {"B cell": "MS4A1", "T cell": "CD3D"}.items():
        assert dots[gene].idxmax() == label


def test_answers_are_counted_by_type_and_donor() -> None:
    answers = pd.DataFrame(
        {
            "predicted_labels": pd.Categorical(["a", "a", "b", "unknown"]),
            "cell_type_ontology_term_id": pd.Categorical(["CL:1", "CL:1", "CL:2", "unknown"]),
            "label_level": pd.Categorical(["label", "label", "label", "unknown"]),
            "conf_score": [0.9, 0.7, 0.6, 0.2],
        }
    )
    found = types(answers)
    assert found["answer"].tolist()[0] == "a" and found["cells"].tolist() == [2, 1, 1]
    assert found["share"].sum() == 1 and found["median confidence"].iloc[0] == pytest.approx(0.8)
    donors = by_donor(answers, np.array(["x", "x", "y", "x"])).set_index("donor")
    assert donors.loc["x", "cells"] == 3 and donors.loc["x", "a"] == pytest.approx(2 / 3)
    assert donors.loc["y", "b"] == 1


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--report", "page.pdf"], "must end in .html"),
        (["--h5ad", "b.h5ad", "--report", "page.html"], "give one --h5ad"),
    ],
)
def test_what_cannot_be_reported_is_refused(
    words: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    h5ads = ["--h5ad", "a.h5ad", *(words[1:2] if words[0] == "--h5ad" else [])]
    rest = words[2:] if words[0] == "--h5ad" else words
    assert main([*h5ads, "--out", "folder", *rest]) == 2
    assert reason in capsys.readouterr().err
