import json
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from data_ingest.atlas import pinned
from data_ingest.atlas_cells import AtlasCells
from data_ingest.query import QueryResult, find_cells
from helpers.stores import new_store
from helpers.tiny_model import write_tiny_model
from jobs.promote import main
from jobs.tracking.comparison import compare, compare_folds
from jobs.tracking.models import model_aliases, register_model
from jobs.tracking.runs import start_run
from screformer.checkpoint import add_meta, load_model, save_model
from screformer.config import AtlasConfig, ExperimentConfig, QueryConfig, TrackingConfig
from screformer.predictor import Predictor
from screformer.start import logistic_start


def test_the_difference_is_paired_and_has_its_interval() -> None:
    rng = np.random.default_rng(1)
    labels = np.array(["A"] * 400 + ["B"] * 40, dtype=object)
    champion = rng.random(440) < 0.8
    candidate = champion.copy()
    candidate[np.flatnonzero(~champion)[:30]] = True
    found = compare(_answers(labels, candidate=candidate, champion=champion), labels, ["d"])
    by_type = [(candidate[labels == label].mean() - champion[labels == label].mean()) for label in ("A", "B")]
    assert found.difference == pytest.approx(np.mean(by_type)) and found.table[
        "difference"
    ].tolist() == pytest.approx(by_type)
    assert 0 < found.low < found.difference < found.high
    same = compare(_answers(labels, candidate=champion, champion=champion), labels, ["d"])
    assert (same.low, same.difference, same.high) == (0, 0, 0)


def test_macro_f1_falls_where_a_rare_type_is_predicted_too_often() -> None:
    labels = np.array(["A"] * 400 + ["B"] * 10, dtype=object)
    right = np.arange(410) >= 8  # eight A are called B
    found = compare(_answers(labels, candidate=right, champion=labels == labels), labels, ["d"])
    assert found.difference == pytest.approx(-0.01) and found.macro_f1["champion"] == 1
    assert found.macro_f1["candidate"] == pytest.approx((2 * 392 / 792 + 2 * 10 / 28) / 2)


def _answers(labels: np.ndarray, **right: np.ndarray) -> dict[str, np.ndarray]:
    """Labels that are right for some cells and the other type's for the rest."""
    other = np.where(labels == "A", "B", "A").astype(object)
    return {name: np.where(mask, labels, other) for name, mask in right.items()}


def test_models_of_the_same_folds_are_compared_by_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tracking = TrackingConfig(uri=new_store(tmp_path))
    folds = {"run_id": "r", "kind": "donor", "hash": "h", "names": ["0", "1", "2"]}
    with start_run(ExperimentConfig(tracking=tracking), "crossval") as run:
        for macro_f1 in ([0.70, 0.60, 0.80], [0.75, 0.66, 0.84], [0.77, 0.60, 0.90]):
            add_meta(
                write_tiny_model(tmp_path / "model"), {"folds": {**folds, "metrics": {"macro_f1": macro_f1}}}
            )
            register_model(run.tracking_uri, run.run_id, tmp_path / "model", "blood")
            for margin in ("0.05", "0"):
                main(["--model", "blood", "--tracking-uri", tracking.uri, "--margin", margin])
    first, _, short, second, _, third = (
        json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")
    )
    assert first["promoted"]
    assert "there is no champion; compared with the most frequent label" in first["reason"]
    assert first["comparison"]["difference"] == pytest.approx(0.70 - 1 / 4), "four labels"
    assert not short["promoted"] and short["comparison"] == second["comparison"], "better, but by less"
    assert "the interval must be above +0.0500" in short["reason"]
    assert (
        second["promoted"]
        and second["comparison"]["difference"] == pytest.approx(0.05)
        and 0 < second["comparison"]["low"] < 0.05
    )
    assert (
        "macro-F1 +0.0500" in second["reason"]
        and "on the 3 donor folds of both cross-validations" in second["reason"]
    )
    assert not third["promoted"] and third["comparison"]["low"] < 0 < third["comparison"]["difference"]
    assert compare_folds({**folds, "hash": "other"}, folds) is None and compare_folds(None, folds) is None


@pytest.fixture(scope="module")
def result(small_atlas: str) -> QueryResult:
    atlas = pinned(AtlasConfig(uri=small_atlas))
    return find_cells(atlas, QueryConfig(), "cell_type_major", ("donor_id",))


def _model(folder: Path, result: QueryResult, *, learned: bool, test: list[str]) -> Path:
    """A model of the atlas's cells, with random weights or from a logistic regression on training donors."""
    names = [str(name) for name in result.obs["label"].cat.categories]
    loaded = load_model(write_tiny_model(folder, result.vocabulary()))
    model = type(loaded.model)(
        loaded.config.model,
        loaded.config.tokens,
        num_genes=len(result.feature_ids),
        num_classes=len(names),
        seed=0,
    )
    labels = {
        "column": "cell_type_major",
        "names": names,
        "cl_ids": [result.label_cl_ids[name] for name in names],
    }
    donors = result.obs["donor_id"].astype(str).to_numpy()
    train = sorted(set(donors) - set(test))
    meta = {
        "query": result.identity(),
        "split": {"group_by": "donor_id", "groups": {"train": train, "val": [], "test": test}, "cells": {}},
    }
    save_model(folder, model, loaded.config, loaded.vocabulary, labels, meta)
    if learned:
        predictor = Predictor.load(folder, device="cpu")
        rows = np.flatnonzero(~np.isin(donors, test) & (result.obs["label"].cat.codes >= 0))
        cells = AtlasCells.open(predictor, result, min_gene_overlap=0.1).read(rows)
        codes = result.obs["label"].cat.codes.to_numpy()[rows].astype(np.int64)
        start = logistic_start(cells.normalised(), codes, np.ones(len(names)), cells.panels)
        predictor.model.set_linear_start(*map(torch.from_numpy, start))
        save_model(folder, predictor.model, loaded.config, loaded.vocabulary, labels, meta)
    return folder


def test_champion_moves_only_to_a_better_model(
    result: QueryResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tracking = TrackingConfig(uri=new_store(tmp_path))
    donors = sorted(set(result.obs["donor_id"].astype(str)))
    random = _model(tmp_path / "random", result, learned=False, test=donors[:4])
    learned = _model(tmp_path / "learned", result, learned=True, test=donors[:4])
    other = _model(tmp_path / "other", result, learned=True, test=donors[4:])

    def promote(*words: str) -> tuple[int, dict, str]:
        status = main(["--model", "blood", "--tracking-uri", tracking.uri, *words])
        printed = capsys.readouterr()
        return (
            status,
            json.loads(printed.out.splitlines()[-1]) if printed.out else {},
            printed.out + printed.err,
        )

    assert promote()[0] == 2
    with start_run(ExperimentConfig(tracking=tracking), "finetune") as run:
        register_model(run.tracking_uri, run.run_id, random, "blood")
        status, found, text = promote()
        assert (status, found["promoted"]) == (0, False), "random weights are no better than one label"
        assert "blood: there is still no champion: " in text and "balanced accuracy" in text
        assert "champion" not in model_aliases("blood", tracking)
        status, found, text = promote("--force")
        assert (status, found["promoted"]) == (0, True) and "(forced)" in text
        status, found, _ = promote()
        assert (status, found["promoted"]) == (0, False)

        register_model(run.tracking_uri, run.run_id, learned, "blood")
        status, found, text = promote()
        assert (status, found["champion"]) == (0, 2), text
        assert found["comparison"]["low"] > 0.1 and found["comparison"]["groups"] == donors[:4]
        assert model_aliases("blood", tracking) == {"candidate": 2, "champion": 2}

        register_model(run.tracking_uri, run.run_id, random, "blood")
        status, found, text = promote()
        assert (status, found["promoted"]) == (0, False), "a comparison that was made is a success"
        assert "version 2 stays the champion: balanced accuracy -" in text
        assert model_aliases("blood", tracking)["champion"] == 2
        status, found, text = promote("--force")
        assert (status, found["champion"]) == (0, 3) and "(forced)" in text
        reason = json.loads(
            MlflowClient(tracking.uri).get_model_version("blood", "3").tags["promotion.champion"]
        )
        assert (
            reason["forced"] is True
            and reason["champion_before"] == 2
            and "balanced accuracy -" in reason["reason"]
        )

        register_model(run.tracking_uri, run.run_id, other, "blood")
        status, _, text = promote()
        assert status == 2 and "the champion was trained on all of the candidate's held-out groups" in text
