"""A model moves to another query: which cells, labels and genes its training takes."""

import dataclasses
import json
import shlex
import shutil
from pathlib import Path

import anndata
import numpy as np
import pytest
from mlflow import MlflowClient

from data_ingest.atlas import CENSUS_URL, pinned
from data_ingest.query import find_cells, load_query, saved_query
from helpers.census import STABLE
from helpers.local_ray import ONE_READER
from helpers.processes import REPO_ROOT, run_here
from helpers.stores import new_store
from helpers.tiny_model import tiny_vocabulary, write_tiny_model
from jobs import finetune, promote
from jobs.cli import main
from jobs.training.prepare import prepare_cells
from jobs.training.replay import LEAST_REPLAYED
from jobs.training.start import settings_of_start
from screformer.checkpoint import add_meta, load_model
from screformer.config import AtlasConfig, ExperimentConfig, QueryConfig

DONOR = "donor_id"


@pytest.fixture(scope="module")
def moved(small_atlas, tmp_path_factory):
    """A model of the blood data sets, the settings of a fine-tuning from it on lung, and the blood query."""
    atlas = pinned(AtlasConfig(uri=small_atlas))
    blood = find_cells(atlas, QueryConfig(obs_filter="dataset_id != 'sim_lung'"))
    donors = sorted(set(blood.obs[DONOR].astype(str)))
    groups = {"train": donors[:5], "val": donors[5:6], "test": donors[6:]}
    folder = write_tiny_model(tmp_path_factory.mktemp("m") / "m", tiny_vocabulary(blood.feature_ids[:40]))
    split = {"group_by": DONOR, "groups": groups}
    add_meta(folder, {"query": json.loads(json.dumps(blood.identity())), "split": split})
    config = ExperimentConfig().merge(
        {"atlas.uri": small_atlas, "query.obs_filter": "dataset_id == 'sim_lung'"}
    )
    start = load_model(folder)
    return start, settings_of_start(config, start, "m"), blood


def test_settings_that_weights_fix_are_the_models_unless_given(moved):
    start, config, _ = moved
    assert config.model.dim == start.config.model.dim == 16
    with pytest.raises(ValueError, match=r"model.dim=64, but the model m was trained with 16; set model.dim"):
        settings_of_start(ExperimentConfig().merge({"model.dim": 64}), start, "m")


def test_labels_and_genes_are_added_and_old_cells_replayed(moved):
    start, config, blood = moved
    cells = prepare_cells(config, "finetune", start=start)
    names = cells.labels["names"]
    assert names[:4] == start.labels["names"] and {"endothelial cell", "fibroblast"} <= set(names[4:])
    assert cells.genes.feature_ids[:40] == start.vocabulary.feature_ids and len(cells.genes) > 1000
    assert any("genes are added" in note for note in cells.notes)
    assert any("labels are added" in note for note in cells.notes)

    new_n, donor_n = cells.move.new_n, cells.query.obs[DONOR].astype(str).to_numpy()
    assert set(cells.query.obs["dataset_id"][new_n]) == {"sim_lung"} and (~new_n).any()
    groups = start.meta["split"]["groups"]
    for part, positions in cells.parts.items():
        old = positions[~new_n[positions]]
        assert len(old) and set(donor_n[old]) <= set(groups[part])
    train = cells.parts["train"]
    assert (~new_n[train]).sum() <= max(LEAST_REPLAYED, config.train.replay_share * new_n[train].sum())
    blood_k = np.bincount(
        [names.index(name) for name in blood.obs["label"] if name in names], minlength=len(names)
    )
    ratio_k = cells.natural_counts_k[:3] / blood_k[:3]  # types of both, as frequent as they were
    assert cells.natural_counts_k.sum() == pytest.approx(len(train)) and ratio_k.max() < 3 * ratio_k.min()
    assert not set(donor_n[train]) & set(donor_n[cells.parts["test"]])
    assert cells.identity()["move"]["old_test_groups"] == groups["test"]

    atlas, query, expected_hash = saved_query(cells.identity()["query"])
    again = find_cells(atlas, query, columns=(DONOR,), expected_hash=expected_hash)
    assert set(again.obs_joinids) >= set(blood.obs_joinids)


def test_excluded_labels_are_not_learned_unless_the_start_model_has_them(moved):
    start, config, _ = moved
    excluded = {"labels.exclude": ("fibroblast", start.labels["names"][0], "no such type")}
    cells = prepare_cells(config.merge(excluded), "finetune")
    assert not set(excluded["labels.exclude"]) & set(cells.labels["names"])
    for positions in cells.parts.values():
        assert not set(cells.query.obs["label"].iloc[positions]) & set(excluded["labels.exclude"])
    assert any("labels.exclude are left out: {'fibroblast': " in note for note in cells.notes)
    names = prepare_cells(config.merge(excluded), "finetune", start=start).labels["names"]
    assert names[:4] == start.labels["names"] and "fibroblast" not in names and len(names) > 4


@pytest.mark.parametrize(
    ("settings", "meta", "note"),
    [
        ({"train.replay_share": 0}, {}, ""),
        ({}, {"query": {"atlas": {"uri": "/elsewhere"}}}, "they are in another atlas, /elsewhere"),
        (
            {},
            {"split": {"group_by": "dataset_id"}},
            "it was split by dataset_id, not by split.group_by=donor",
        ),
        ({}, {"query": {"hash": "0123"}}, "hash .* instead of 0123"),
        ({}, None, "it does not record an atlas"),
    ],
    ids=["not wanted", "other atlas", "other split", "other cells", "bundled"],
)
def test_why_nothing_is_replayed_is_noted(moved, settings, meta, note):
    start, config, _ = moved
    whole = {}
    if meta is not None:
        whole = {name: {**start.meta[name], **meta.get(name, {})} for name in ("query", "split")}
    changed = dataclasses.replace(start, meta=whole)
    cells = prepare_cells(config.merge(settings), "finetune", start=changed)
    assert set(cells.query.obs["dataset_id"]) == {"sim_lung"} and cells.move.new_n.all()
    assert cells.labels["names"][:4] == start.labels["names"]
    found = [text for text in cells.notes if "replayed" in text]
    assert (len(found) == 1 and found[0].find(note.split(" .* ")[-1]) > 0) if note else not found


def test_the_models_own_query_changes_nothing(moved):
    start, config, _ = moved
    own = config.merge({"query.obs_filter": "dataset_id != 'sim_lung'"})
    cells = prepare_cells(own, "finetune", start=start)
    assert cells.move is None and cells.genes.feature_ids == start.vocabulary.feature_ids


def _five_commands() -> list[list[str]]:
    """The words of the commands in the README's section, without `screformer`."""
    section = (REPO_ROOT / "README.md").read_text().split("## A new tissue in five commands\n")[1]
    lines = section.split("\n## ")[0].splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith("    screformer ")]


def test_the_readmes_five_commands_move_a_model_that_is_judged_on_both(
    census, sim_h5ads, ray_local, tmp_path, monkeypatch, capsys
):
    """The additive encoder, from blood to brain, on a local Census: labels and inputs grow."""
    store = new_store(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.setenv(CENSUS_URL, census.disk_url)
    monkeypatch.chdir(tmp_path)
    words = ["--config", "blood", "atlas.uri=census", "--obs-filter", "tissue_general == 'blood'"]
    words += ["train.max_steps=40", "train.eval_every_steps=40", "train.seed=1", "labels.min_cells=5"]
    words += ["train.global_batch_size=32", "train.micro_batch_size=32", "model.input_genes=300"]
    first, _ = run_here(finetune.main, *words, *ONE_READER, cwd=tmp_path)
    assert promote.main(["--model", "screformer", "--force"]) == 0
    (lung,) = (path for path in sim_h5ads if "lung" in path.name)
    shutil.copy(lung, "brain.h5ad")

    printed = {}
    for command, *options in _five_commands():
        capsys.readouterr()
        assert main([command, *options]) == 0, command
        printed[command] = capsys.readouterr().out
    assert list(printed) == ["query", "shift", "finetune", "promote", "annotate"]

    assert load_query("brain.json")[0].uri == f"census:{STABLE}"
    assert "endothelial cell" in printed["shift"] and Path("shift.html").exists()
    second, found = (json.loads(printed[name].splitlines()[-1]) for name in ("finetune", "promote"))
    before, after = load_model(first["model_dir"]), load_model(second["model_dir"])
    assert after.labels["names"][: len(before.labels["names"])] == before.labels["names"]
    assert len(after.labels["names"]) > len(before.labels["names"])
    assert after.vocabulary.inputs_g.sum() == 1024 and before.vocabulary.inputs_g.sum() == 300
    assert "724 genes become inputs" in printed["finetune"]
    assert "are replayed in training" in printed["finetune"]
    scores = after.meta["move"]["scores"]
    assert scores["move/new/macro_f1_after"] > scores["move/new/macro_f1_before"]
    assert {"move/old/macro_f1_before", "move/old/macro_f1_after"} <= set(scores)
    client = MlflowClient(store)
    assert client.get_run(second["run_id"]).data.metrics["move/old/accuracy_after"] > 0.5
    assert "move/before_after.csv" in {file.path for file in client.list_artifacts(second["run_id"], "move")}
    known = found["comparison"]["known_cells"]
    assert set(known["groups"]) == set(after.meta["move"]["old_test_groups"])
    assert not set(found["comparison"]["groups"]) & set(known["groups"])
    gained = known["macro_f1"]["candidate"] - known["macro_f1"]["champion"]
    kept = min(gained, known["difference"]) >= -0.01
    assert found["promoted"] == (found["comparison"]["low"] > 0 and kept)
    where = f"{known['num_cells']} cells of the query that the start model was trained on"
    said = f"macro-F1 {gained:+.4f} and balanced accuracy {known['difference']:+.4f} on {where}"
    assert said in found["reason"]
    labelled = anndata.read_h5ad("labelled.h5ad")
    assert len(labelled) == 321 and set(labelled.obs["best_label"]) <= set(after.labels["names"])
