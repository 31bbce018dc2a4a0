"""Cross-validation, search and ablation as users start them, on a real Ray and MLflow, with tiny
models."""

import json
import os
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from data_ingest.query import find_cells
from helpers.processes import REPO_ROOT, kill_tree, read_until, run_here, start_command
from helpers.tiny_model import tiny_vocabulary, write_tiny_model
from jobs import ablate, crossval
from jobs.studies.ablation import run_ablation
from jobs.studies.baselines import BASELINES
from jobs.studies.fold import register_final, run_fold
from jobs.studies.layout import check_study_layout, num_cpus
from jobs.studies.opening import read_study
from jobs.studies.results import results_of
from jobs.studies.study import open_study
from jobs.studies.trials import run_trials
from jobs.tracking.model_card import model_card
from jobs.tracking.models import resolve_model
from screformer.checkpoint import add_meta, load_model
from screformer.config import AtlasConfig, ExperimentConfig, QueryConfig
from screformer.metrics import OURS

SMOKE = REPO_ROOT / "jobs" / "recipes" / "smoke.yaml"
QUICK = ["majority", "logistic_l2"]
pytestmark = pytest.mark.timeout(1200)  # the first test waits for two commands, one of which is killed


@pytest.fixture(scope="module")
def settings(small_atlas: str) -> list[str]:
    return [
        f"atlas.uri={small_atlas}",
        "crossval.num_folds=2",
        "crossval.pretrain_steps=2",
        "labels.min_cells=2",
        "train.max_steps=4",
        "cluster.cpus_per_worker=0.5",
    ]


@pytest.fixture(scope="module")
def killed(
    settings: list[str], ray_local: None, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any], dict[Path, int], str]:
    """A cross-validation killed after its first fold and then given again: folder, result, times of the
    first fold's files, and the output of the second command."""
    folder = tmp_path_factory.mktemp("crossval")
    words = ["--config", str(SMOKE), *settings, f"crossval.baselines=[{', '.join(QUICK)}]"]
    words += ["crossval.register=true", "--run-dir", "study"]
    job = start_command("jobs.crossval", *words, cwd=folder)
    run_dir, deadline = Path(read_until(job, r"--resume (\S+)\)")[1]), time.monotonic() + 500
    assert run_dir == folder / "study"
    while not list(run_dir.glob("trials/*/fold-0.json")):
        assert time.monotonic() < deadline and job.poll() is None
        time.sleep(0.1)
    kill_tree(job)
    before = {path: path.stat().st_mtime_ns for path in run_dir.glob("*/*/fold-*")}
    assert not list(run_dir.glob("trials/*/fold-1.json"))
    _, said = run_here(crossval.main, *words, "train.lr=0.5", cwd=folder, status=2)
    assert "has a run with train.lr=0.001, now it is 0.5; use another folder" in said
    result, printed = run_here(crossval.main, *words, cwd=folder)
    return run_dir, result, before, printed


def test_a_killed_cross_validation_resumes_without_repeating_folds(killed: Any) -> None:
    run_dir, result, before, _ = killed
    assert before and all(path.stat().st_mtime_ns == changed for path, changed in before.items())
    (trial,) = (run_dir / "trials").iterdir()
    assert [result.fold for result in results_of(trial, 2)] == [0, 1]
    folds = pq.read_table(run_dir / "folds.parquet").to_pandas().set_index("joinid")["fold"]
    for fold in range(2):
        tested = [
            pq.read_table(folder / f"fold-{fold}.parquet")
            for folder in (trial, *(run_dir / "baselines").iterdir())
        ]
        for table in tested:
            assert (folds[table["joinid"].to_numpy()] == fold).all()
            np.testing.assert_array_equal(table["joinid"].to_numpy(), tested[0]["joinid"].to_numpy())
            np.testing.assert_array_equal(table["label"].to_numpy(), tested[0]["label"].to_numpy())
    assert result["baselines"].keys() == set(QUICK)
    assert result["baselines"]["logistic_l2"] > 0.7 > result["baselines"]["majority"]


def test_the_report_compares_our_model_with_the_baselines(killed: Any) -> None:
    run_dir, result, _, printed = killed
    assert f"{OURS} has macro-F1" in printed
    tree = json.loads((run_dir / "report.json").read_text())
    for metric in ("macro_f1", "accuracy", "weighted_f1", "balanced_accuracy", "ontology_f1", "ece"):
        assert 0 <= tree["methods"][OURS]["metrics"][metric]["mean"] <= 1, metric
    difference = tree["methods"]["logistic_l2"]["metrics"]["macro_f1"]["difference"]
    assert difference["low"] < difference["mean"] < difference["high"] and difference["folds"] == 2
    ours, theirs = (tree["methods"][name]["metrics"]["macro_f1"]["values"] for name in (OURS, "logistic_l2"))
    assert difference["mean"] == pytest.approx(np.mean(np.subtract(ours, theirs)))
    page = (run_dir / "report.html").read_text()
    for text in (
        "logistic regression, L2",
        "95 % interval",
        "Confusion of scReformer-BERT",
        "Reliability",
        "F1 of each type",
    ):
        assert text in page, text
    assert tree["methods"][OURS]["parameters"] > 0 and tree["methods"][OURS]["peak_memory_gb"] > 0


def test_runs_nest_and_keep_the_report(killed: Any) -> None:
    from mlflow import MlflowClient

    _, result, _, _ = killed
    uri = os.environ["MLFLOW_TRACKING_URI"]
    client = MlflowClient(uri, registry_uri=uri)
    run = client.get_run(result["run_id"])
    assert run.info.status == "FINISHED" and run.data.metrics["cv/macro_f1"] == pytest.approx(
        result["scores"]["macro_f1"]
    )
    kept = {entry.path for entry in client.list_artifacts(result["run_id"])}
    assert {"folds.parquet", "report.html", "report.json"} <= kept
    children = client.search_runs([run.info.experiment_id], f"tags.mlflow.parentRunId = '{result['run_id']}'")
    assert {child.data.tags["fold"] for child in children if child.info.status == "FINISHED"} == {
        "0",
        "1",
        "all",
    }


def test_the_model_of_all_folds_carries_their_scores(killed: Any) -> None:
    _, result, _, _ = killed
    model_dir = resolve_model(f"models:/screformer/{result['model_version']}")
    meta = load_model(model_dir).meta
    assert (
        meta["folds"]["run_id"] == result["run_id"]
        and meta["folds"]["kind"] == "donor"
        and len(meta["folds"]["names"]) == 2
    )
    assert np.mean(meta["folds"]["metrics"]["macro_f1"]) == pytest.approx(result["scores"]["macro_f1"])
    assert meta["split"]["cells"]["test"] == 0
    # Like every registered model, it records its code, scores and best step.
    assert meta["code"]["screformer"] and meta["code"]["git"]
    assert 0 < meta["best_step"] <= 4 and 0 <= meta["metrics"]["best_val/macro_f1"] <= 1
    assert "best_val/ece" in meta["metrics"]
    assert "2 donor folds" in model_card(model_dir, name="screformer", run_id=result["run_id"])


@pytest.fixture(scope="module")
def prepared(
    settings: list[str], ray_local: None, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ExperimentConfig, Path]:
    """A configuration for studies in this process, and their folder."""
    config = (
        ExperimentConfig.from_file(SMOKE)
        .merge(settings)
        .merge({"crossval.baselines": [], "crossval.pretrain": "none"})
    )
    return config, tmp_path_factory.mktemp("studies")


def test_a_fold_is_the_same_whoever_runs_it_and_folds_are_reusable(prepared: Any, killed: Any) -> None:
    config, folder = prepared
    study = open_study(
        config.merge({"crossval.num_folds": 5}), run_dir=folder / "same", folds_from=killed[1]["run_id"]
    )
    assert len(study.folds) == 2
    settings = {"crossval.pretrain": "fold", "train.seed": 0}
    first = run_fold(study, settings, 1)
    (trial,) = (killed[0] / "trials").iterdir()
    theirs = results_of(trial, 2)[1]
    np.testing.assert_array_equal(first.joinids_n, theirs.joinids_n)
    np.testing.assert_allclose(first.probabilities_nk, theirs.probabilities_nk, atol=1e-5)
    again = time.perf_counter()
    run_fold(study, settings, 1)
    assert time.perf_counter() - again < 1


def test_a_finished_study_registers_nothing_twice(prepared: Any, killed: Any) -> None:
    run_dir, result, _, _ = killed
    study = open_study(
        ExperimentConfig.from_dict(read_study(str(run_dir))["config"]), run_dir=run_dir, resume=True
    )
    assert register_final(study, {}, {}) == result["model_version"], (
        "the version that is there, not another one"
    )


def test_a_stopped_trial_frees_its_resources(prepared: Any) -> None:
    """ASHA stops the configuration that learns nothing after its first fold; the process that trains its
    second fold must end."""
    import ray
    from ray import tune

    config, folder = prepared
    config = config.merge(
        {
            "search.scheduler": "asha",
            "model.linear_skip": False,
            "train.max_steps": 16,
            "train.eval_every_steps": 16,
        }
    )
    study = open_study(config, run_dir=folder / "asha")
    before = ray.available_resources()["CPU"]
    tried = run_trials(study, {"train.lr": tune.grid_search([1e-2, 1e-9])})
    folds = {setting["train.lr"]: len(results_of(study.trial_folder(setting), 2)) for setting in tried}
    assert folds == {1e-2: 2, 1e-9: 1}
    deadline = time.monotonic() + 30
    while ray.available_resources().get("CPU", 0) < before - 0.01 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert ray.available_resources()["CPU"] == pytest.approx(before, abs=0.01)


def test_a_layout_that_cannot_fit_is_rejected_with_the_calculation() -> None:
    def node(cpus: float, gpus: float = 0) -> dict[str, Any]:
        return {"Alive": True, "Resources": {"CPU": cpus, "GPU": gpus}}

    config = ExperimentConfig().merge({"crossval.concurrent_trials": 2, "crossval.concurrent_folds": 2})
    assert num_cpus(config) == pytest.approx(2 * (0.01 + 2) + 0.5 + 1)
    check_study_layout(config, [node(4), node(2)])
    with pytest.raises(
        ValueError,
        match=r"concurrent_trials=2 x .* \+ one read task of 0.5 \+ 1 for a baseline = 5.52 CPUs,"
        r" but Ray has 4",
    ):
        check_study_layout(config, [node(4)])
    with pytest.raises(ValueError, match="need 4 GPUs, but Ray has 2"):
        check_study_layout(config.merge({"cluster.use_gpu": True}), [node(8, 2)])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["crossval.baselines=[logistic]"],
            "crossval.baselines has no 'logistic'; choose from all, majority",
        ),
        (["crossval.val_fraction=0"], "crossval.val_fraction=0.0 must be between 0 and 1"),
        (["crossval.num_fold=3"], "unknown setting crossval.num_fold; did you mean crossval.num_folds?"),
        (["--folds", "nowhere"], "crossval.num_folds has no effect with --folds nowhere"),
        (["--resume", "nowhere"], "give nothing else"),
    ],
)
def test_bad_input_is_reported_in_one_line(
    settings: list[str], words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert crossval.main(["--config", str(SMOKE), *settings, *words]) == 2
    assert message in capsys.readouterr().err


def test_missing_folds_are_named(settings: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--config", str(SMOKE), settings[0], "labels.min_cells=2", "--dry-run", "--folds", "nowhere"]
    assert crossval.main(words) == 2
    assert "has no artifact folds.parquet" in capsys.readouterr().err


def test_dry_run_describes_the_study(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--config", str(SMOKE), *settings, "--group-by", "dataset_id", "--dry-run"]
    assert crossval.main([*words, "labels.exclude=[B cell]"]) == 0
    printed = capsys.readouterr().out
    assert "no method learns B cell; their test cells count as errors" in printed
    assert (
        "group_by: dataset_id" in printed
        and "name: sim_blood_panel" in printed
        and re.search(r"ours: \d", printed)
    )
    recipe = REPO_ROOT / "jobs" / "recipes" / "ablation.yaml"
    assert (
        ablate.main(["--config", str(recipe), *settings, "--axes", "attention", "pooling", "--dry-run"]) == 0
    )
    listed = capsys.readouterr().out.partition("\nvariants:")[2]
    assert "- model.attention=none" in listed and "- model.pooling=cls" in listed
    assert "- model.dim=64" not in listed
    assert ablate.main(["--config", str(recipe), *settings, "--axes", "atention", "--dry-run"]) == 2
    assert "unknown axis 'atention'; choose from attention" in capsys.readouterr().err
    assert not list(tmp_path.iterdir()), "nothing is written"


def test_models_of_dataset_folds_record_what_was_held_out(settings: list[str]) -> None:
    config = ExperimentConfig.from_file(SMOKE).merge([*settings, "crossval.group_by=dataset_id"])
    study = open_study(config)
    split = study.cells(study.config, "finetune", 0).identity()["split"]
    assert split["group_by"] == "dataset_id"
    assert study.folds.names[0] not in split["groups"]["train"]


def test_a_subset_of_the_ablation_runs(
    prepared: Any, settings: list[str], monkeypatch: Any, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe, fine = (
        REPO_ROOT / "jobs" / "recipes" / "ablation.yaml",
        "labels.column=cell_type crossval.pretrain=none",
    )
    small = {
        "model.dim": 16,
        "model.depth": 1,
        "tokens.max_genes": 64,
        "train.max_steps": 3,
        "train.micro_batch_size": 16,
    }
    few = {
        "crossval.num_folds": 2,
        "crossval.max_cells": 300,
        "ablation.axes": {"attention": ["model.attention=none"], "label_level": [fine]},
    }
    config = ExperimentConfig.from_file(recipe).merge(settings).merge(small | few)
    result = run_ablation(config)
    assert result["variants"].keys() == {"reference", "model.attention=none", fine}
    assert len(list((Path(result["run_dir"]) / "pretrained").iterdir())) == 4, "two architectures, two folds"
    tree = json.loads((Path(result["run_dir"]) / "report.json").read_text())
    _, without, fine_row = tree["variants"]
    assert not without["identical"] and without["difference"]["folds"] == 2
    assert fine_row["difference"] is None and fine_row["mean"] != tree["variants"][0]["mean"], (
        "labels of its own: nothing to pair"
    )
    assert all(row["seconds_per_1000_cells"] > 0 and row["parameters"] > 0 for row in tree["variants"])
    assert tree["exact"]["ff_chunks_bit_equal"] and tree["exact"]["reversible_gradient_error"] < 1e-5


def test_every_baseline_has_its_time_and_title() -> None:
    assert len({baseline.title for baseline in BASELINES.values()}) == len(BASELINES) >= 10


def test_a_learning_curve_from_another_tissues_model(
    small_atlas: str, ray_local: None, tmp_path: Path
) -> None:
    """Every method gets the same few cells; our model, and only ours, may also answer with old types."""
    blood = find_cells(AtlasConfig(uri=small_atlas), QueryConfig(obs_filter="dataset_id != 'sim_lung'"))
    start = write_tiny_model(tmp_path / "start", tiny_vocabulary(blood.feature_ids[:40]))
    add_meta(start, {"query": json.loads(json.dumps(blood.identity()))})
    words = [f"atlas.uri={small_atlas}", "query.obs_filter=dataset_id == 'sim_lung'", "train.max_steps=2"]
    words += ["crossval.cells_per_type=[20]", "crossval.num_folds=2", "--from", str(start)]
    words += ["crossval.baselines=[logistic_l2, gradient_boosting]", "train.global_batch_size=32"]
    result, printed = run_here(crossval.main, *words, "cluster.cpus_per_worker=0.5", cwd=tmp_path)
    table = pd.DataFrame(result["curve"]).set_index(["method", "cells per type"])
    methods = list(dict.fromkeys(table.index.get_level_values(0)))
    assert methods == [
        f"{OURS}, from {start}",
        f"{OURS}, without pre-training",
        "logistic regression, L2",
        "gradient boosting (LightGBM)",
    ]
    assert (table["folds"] == 2).all() and len(table) == 4
    linear = table.loc["logistic regression, L2", "macro_f1_true"]
    assert linear[20] > 0.5
    assert table.loc["gradient boosting (LightGBM)", "macro_f1_true"][20] > 0.3
    assert "Macro-F1 of true types" in Path(result["report"]).read_text() and "logistic" in printed
    saved = list(Path(result["run_dir"]).glob("trials/*/fold-0.json"))
    known = [set(json.loads(path.read_text())["known"]) for path in saved]
    assert len(saved) == 2 and len({len(names) for names in known}) == 2, "with and without the old types"
