import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from data_ingest.ontology import lineage
from helpers.tiny_model import LABELS, tiny_vocabulary, write_tiny_model
from screformer.calibration import LEVELS, Calibration
from screformer.calibration_fit import fit_calibration
from screformer.checkpoint import load_model, save_model
from screformer.composition import composition, present_labels
from screformer.lineage import Lineage, Term
from screformer.metrics import CellOutputs, OutputSample, expected_calibration_error, reliability
from screformer.predictor import Predictor

BLOOD = ["CL:0000236", "CL:0000084", "CL:0000623", "CL:0000576", ""]


def _outputs(num_cells: int, *, stretch: float, seed: int = 0) -> CellOutputs:
    """Cells with labels drawn from the softmax of their logits, which are then scaled up."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (num_cells, 4))
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = (rng.random((num_cells, 1)) > probabilities.cumsum(axis=1)).sum(axis=1)
    detected = rng.integers(20, 1000, num_cells)
    return CellOutputs(logits_nk=(stretch * logits).astype(np.float32), labels_n=labels, detected_n=detected)


@pytest.mark.parametrize("stretch", [0.5, 1.0, 3.0])
def test_the_temperature_undoes_over_and_underconfidence(stretch: float) -> None:
    calibration = fit_calibration(_outputs(20_000, stretch=stretch), Lineage())
    assert calibration.temperature == pytest.approx(stretch, rel=0.05)
    other = _outputs(20_000, stretch=stretch, seed=1)
    before = expected_calibration_error(Calibration().probabilities(other.logits_nk), other.labels_n)
    after = expected_calibration_error(calibration.probabilities(other.logits_nk), other.labels_n)
    assert after < 0.015 and (stretch == 1 or after < before / 3)
    assert calibration.measured is not None and calibration.measured["ece_after"] < 0.015


def test_the_temperature_depends_on_the_detected_genes() -> None:
    """Logits that shrink with the genes of a cell are calibrated for many genes and for few."""
    outputs = _outputs(20_000, stretch=1.0)
    shrunk_nk = outputs.logits_nk * (outputs.detected_n[:, None] / 200) ** 0.5
    outputs = dataclasses.replace(outputs, logits_nk=shrunk_nk.astype(np.float32))
    rich = outputs.detected_n > 600
    parts = [
        CellOutputs(
            logits_nk=outputs.logits_nk[rows],
            labels_n=outputs.labels_n[rows],
            detected_n=outputs.detected_n[rows],
        )
        for rows in (rich, ~rich)
    ]
    calibration = fit_calibration(parts[0], Lineage(), varied=parts[1])
    assert calibration.depth_slope == pytest.approx(0.5, abs=0.03)
    assert calibration.by_depth is not None
    assert calibration.by_depth.slope == pytest.approx(0.5, abs=0.1)
    again = Calibration.from_json(calibration.to_json())
    for part in parts:
        found = again.probabilities(part.logits_nk, part.detected_n)
        assert expected_calibration_error(found, part.labels_n) < 0.015
        flagged = again.unknown_scores(part.logits_nk, part.detected_n) > again.unknown_threshold
        assert flagged.mean() < 0.1, "few genes alone make no cell unknown"
    plain = fit_calibration(parts[0], Lineage())
    assert plain.depth_slope == 0 and plain.to_json()["format"] == "1"
    one = plain.probabilities(parts[1].logits_nk)
    np.testing.assert_array_equal(one, plain.probabilities(parts[1].logits_nk, parts[1].detected_n))
    assert expected_calibration_error(one, parts[1].labels_n) > 0.05


def _query(shares: list[float], num_cells: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Labels drawn with these shares, and probabilities of an observer who expects equal shares and sees each
    label's number with noise."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(len(shares), num_cells, p=shares)
    seen = np.eye(len(shares))[labels] + rng.normal(0, 0.5, (num_cells, len(shares)))
    likelihood = np.exp(-((seen[:, None] - np.eye(len(shares))) ** 2).sum(2) / (2 * 0.5**2))
    return labels, likelihood / likelihood.sum(axis=1, keepdims=True)


def test_the_composition_of_a_query_is_found_and_absent_types_are_dropped() -> None:
    shares = [0.7, 0.27, 0.03, 0.0]
    labels, probabilities = _query(shares, 5_000)
    best = probabilities.argmax(axis=1)
    assert (best == 3).sum() > 100, "some cells look like the absent type"
    found = composition(probabilities, [0.25] * 4)
    assert found.sum() == pytest.approx(5_000) and found[:3] == pytest.approx(
        np.bincount(labels, minlength=3), rel=0.15
    )
    assert found[3] < 0.5
    present = present_labels(probabilities, [0.25] * 4)
    assert set(present) == {0, 1, 2} and (present[best < 3] == best[best < 3]).all(), (
        "other cells keep their label"
    )
    assert (present == labels).mean() > (best == labels).mean()
    # With different training shares, probabilities differ too, but the composition is the same.
    prior = np.array([0.1, 0.1, 0.4, 0.4])
    shifted = probabilities * prior / (probabilities * prior).sum(axis=1, keepdims=True)
    assert composition(shifted, prior) == pytest.approx(found, rel=1e-3, abs=0.5)
    assert len(present_labels(np.zeros((0, 4), np.float32), prior)) == 0


def test_the_calibration_error_is_its_definition() -> None:
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.3, 0.7], [1.0, 0.0]])
    labels = np.array([0, 1, 1, 0])
    rows = reliability(probabilities, labels)
    assert [row["cells"] for row in rows] == [1, 2, 1]
    assert [row["accuracy"] for row in rows] == [1.0, 0.5, 1.0]
    assert expected_calibration_error(probabilities, labels) == pytest.approx((0.3 + 2 * 0.4 + 0) / 4)


def test_the_stated_share_of_validation_cells_is_unknown() -> None:
    outputs = _outputs(2_000, stretch=1.0)
    calibration = fit_calibration(outputs, Lineage(), false_alarm_rate=0.1)
    scores = calibration.unknown_scores(outputs.logits_nk)
    assert 0.095 < (scores > calibration.unknown_threshold).mean() <= 0.1
    nothing = calibration.unknown_scores(np.full((1, 4), -9.0, dtype=np.float32))
    assert nothing[0] > calibration.unknown_threshold, "low logits throughout resemble no known type"


def test_terms_above_blood_types() -> None:
    found = lineage(BLOOD)
    chains = [[found.terms[index].name for index in chain] for chain in found.above_k]
    assert chains == [["lymphocyte"]] * 3 + [[], []], (
        "terms of one label, of all labels, and of a cell's form are left out"
    )
    lymphocyte = found.terms[found.above_k[0][0]]
    assert (lymphocyte.cl_id, lymphocyte.labels) == ("CL:0000542", (0, 1, 2))
    assert Lineage.from_json(json.loads(json.dumps(found.to_json()))) == found
    nested = lineage(["CL:0000084", "CL:0000624", "CL:0000625", "CL:0000236"])  # T, CD4 T, CD8 T, B
    assert "T cell" in [nested.terms[index].name for index in nested.above_k[1]]


def test_an_unsure_cell_gets_the_nearest_term_that_is_likely_enough() -> None:
    calibration = Calibration(unknown_threshold=5.0, min_probability=0.5, lineage=lineage(BLOOD), measured={})
    probabilities = np.array(
        [
            [0.60, 0.10, 0.10, 0.10, 0.10],  # sure of B
            [0.30, 0.30, 0.05, 0.25, 0.10],  # a lymphocyte, 0.65
            [0.20, 0.10, 0.10, 0.40, 0.20],  # nothing is likely enough
            [0.90, 0.02, 0.02, 0.02, 0.04],  # sure, but unlike everything
        ],
        dtype=np.float32,
    )
    answers = calibration.answer(probabilities, np.array([0, 0, 0, 9.0]), BLOOD)
    names, cl_ids = calibration.answer_names(["B", "T", "NK", "mono", "mystery"], BLOOD)
    assert [names[code] for code in answers.codes_n] == ["B", "lymphocyte", "unknown", "unknown"]
    assert [cl_ids[code] for code in answers.codes_n] == ["CL:0000236", "CL:0000542", "unknown", "unknown"]
    assert [LEVELS[level] for level in answers.levels_n] == ["label", "broader term", "unknown", "unknown"]
    np.testing.assert_allclose(answers.probability_n, [0.6, 0.65, 0.4, 0.9], atol=1e-6)


def test_a_term_that_is_a_label_keeps_the_labels_name() -> None:
    ids = ["CL:0000084", "CL:0000624", "CL:0000236"]
    steps = Lineage(terms=(Term(cl_id="CL:0000084", name="T cell", labels=(0, 1)),), above_k=((), (0,), ()))
    calibration = Calibration(min_probability=0.5, lineage=steps, measured={})
    names, cl_ids = calibration.answer_names(["T lymphocyte", "CD4", "B"], ids)
    assert names == ["T lymphocyte", "CD4", "B", "unknown"] and cl_ids == [*ids, "unknown"]
    answers = calibration.answer(np.array([[0.35, 0.4, 0.25]], dtype=np.float32), np.zeros(1), ids)
    assert (answers.codes_n[0], LEVELS[answers.levels_n[0]]) == (0, "broader term")
    assert answers.probability_n[0] == pytest.approx(0.75)


@pytest.fixture
def one_rank() -> Iterator[None]:
    """A process group with only this process; an earlier training here may have left one."""
    group = torch.distributed
    left = group.is_initialized()
    if not left:
        group.init_process_group("gloo", store=group.HashStore(), rank=0, world_size=1)
    yield
    if not left:
        group.destroy_process_group()


def test_the_sample_does_not_depend_on_batches(one_rank: None) -> None:
    rng = np.random.default_rng(0)
    joinids, labels, logits = (
        torch.arange(500),
        torch.from_numpy(rng.integers(-1, 3, 500)),
        torch.from_numpy(rng.normal(size=(500, 3))),
    )
    kept = []
    for size in (7, 500):
        sample = OutputSample(3, most_cells=60)
        for start in range(0, 500, size):
            rows = slice(start, start + size)
            sample.add(joinids[rows], labels[rows], logits[rows], joinids[rows])
        kept.append(sample.gather())
    assert len(kept[0].labels_n) == 60 and (kept[0].labels_n >= 0).all()
    np.testing.assert_array_equal(kept[0].labels_n, kept[1].labels_n)
    np.testing.assert_array_equal(kept[0].logits_nk, kept[1].logits_nk)
    np.testing.assert_array_equal(kept[0].logits_nk, logits.float()[kept[0].detected_n])


def test_a_model_directory_carries_its_calibration(tmp_path: Path) -> None:
    plain = load_model(write_tiny_model(tmp_path / "plain"))
    assert plain.calibration == Calibration() and not (tmp_path / "plain" / "calibration.json").exists()
    calibration = Calibration(
        temperature=2.0,
        logit_mean_k=(1.0,) * 4,
        logit_std_k=(0.5,) * 4,
        unknown_threshold=0.0,
        lineage=lineage(LABELS["cl_ids"]),
        measured={"cells": 9.0},
    )
    save_model(
        tmp_path / "model", plain.model, plain.config, plain.vocabulary, plain.labels, plain.meta, calibration
    )
    assert load_model(tmp_path / "model").calibration == calibration

    sharp, soft = (Predictor.load(tmp_path / name, device="cpu") for name in ("plain", "model"))
    counts = np.random.default_rng(0).poisson(2.0, (30, 40))
    match = sharp.genes.match(tiny_vocabulary().feature_ids)
    one, other = sharp.predict(match.select(counts)), soft.predict(match.select(counts))
    root = np.sqrt(one.probabilities_nk.astype(np.float64))
    np.testing.assert_allclose(other.probabilities_nk, root / root.sum(axis=1, keepdims=True), atol=1e-5)
    assert not one.unknown.any() and other.unknown.any() and not other.unknown.all()
    assert other.best_labels.tolist() == one.labels.tolist()
    assert set(other.labels[other.unknown]) == {"unknown"} and set(other.cl_ids[other.unknown]) == {"unknown"}
    np.testing.assert_array_equal(other.unknown_score > 0, other.table()["unknown"])

    (tmp_path / "model" / "calibration.json").write_text(
        json.dumps(calibration.to_json() | {"temperature": 1.0})
    )
    with pytest.raises(ValueError, match=r"calibration.json is not the file saved with these weights"):
        load_model(tmp_path / "model")
    (tmp_path / "model" / "calibration.json").unlink()
    with pytest.raises(ValueError, match=r"calibration.json is not the file"):
        load_model(tmp_path / "model")
    with pytest.raises(ValueError, match="calibration has format 9, but this screformer reads 1"):
        Calibration.from_json({"format": "9"})
