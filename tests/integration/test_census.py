"""A copy of CELLxGENE Census on an S3 server: the official client and ours, faults, and two releases."""

import json

import anndata
import cellxgene_census
import numpy as np
import pytest
import torch

from data_ingest.atlas import CENSUS_URL, open_root, pinned
from data_ingest.filters import full_obs_filter
from data_ingest.query import find_cells, load_query, run_query
from data_ingest.stream import CellStream
from helpers.census import LATER, RELABELLED, REMOVED, STABLE, Census, client
from helpers.faulty_s3 import faulty_server, set_faults
from helpers.local_ray import ONE_READER
from helpers.processes import run_here
from jobs import annotate, finetune, query
from screformer.checkpoint import load_model
from screformer.config import AtlasConfig, ExperimentConfig, QueryConfig, StreamConfig, TokensConfig

pytestmark = pytest.mark.usefixtures("ray_local")


@pytest.fixture(scope="module")
def locator(census: Census) -> AtlasConfig:
    return AtlasConfig(uri="census", tiledb_config=census.tiledb_config, census_url=census.url)


def test_census_is_its_stable_release_by_date_in_all_that_is_saved(locator, small_atlas, tmp_path):
    result = run_query(ExperimentConfig(atlas=locator))
    assert result.atlas.uri == f"census:{STABLE}"
    assert result.hash == find_cells(AtlasConfig(uri=small_atlas), QueryConfig()).hash
    result.save(tmp_path / "query.json")
    assert load_query(tmp_path / "query.json")[0] == result.atlas


def test_a_release_that_does_not_exist_is_refused_with_those_that_do(locator, monkeypatch):
    monkeypatch.setenv(CENSUS_URL, locator.census_url)
    assert pinned(AtlasConfig(uri=f"census:{LATER}")).census_url == locator.census_url
    with pytest.raises(ValueError, match=f"no such release; use one of census:{STABLE}, census:{LATER}"):
        pinned(AtlasConfig(uri="census:2024-07-01"))
    with pytest.raises(ValueError, match="directory of CELLxGENE Census at atlas.census_url=http.*404"):
        pinned(AtlasConfig(uri="census", census_url=f"{locator.census_url}/elsewhere"))


def test_two_releases_are_compared_cell_by_cell(census, monkeypatch, capsys):
    monkeypatch.setenv(CENSUS_URL, census.url)
    lines = {}
    for first, second in ((STABLE, LATER), (LATER, STABLE)):
        words = ["--atlas", f"census:{first}", "--compare", f"census:{second}", *census.words]
        assert query.main(words) == 0
        printed = capsys.readouterr().out.split(f"compared with census:{second}:\n")[1]
        lines[first] = [" ".join(line.split()) for line in printed.splitlines()]
    same = 900 - RELABELLED.stop + RELABELLED.start - REMOVED.stop + REMOVED.start
    for release, other in ((STABLE, "removed"), (LATER, "added")):
        assert f"{same} cells are in both, with the same label" in lines[release]
        assert {"7 relabelled", f"5 {other}"} <= set(lines[release]), lines
    assert sum(int(line.split()[0]) for line in lines[STABLE] if line.endswith("-> neuron")) == 7
    assert sum(int(line.split()[0]) for line in lines[LATER] if "neuron -> " in line) == 7


FILTERS = [
    QueryConfig(),
    QueryConfig(obs_filter="tissue_general == 'blood'"),
    QueryConfig(obs_filter="tissue_general != 'blood' and sex == 'female'"),
    QueryConfig(obs_filter="cell_type in ['B cell', 'platelet', 'fibroblast']"),
    QueryConfig(obs_filter="cell_type not in ['B cell', 'platelet'] or nnz > 300"),
    QueryConfig(obs_filter="(dataset_id == 'sim_lung' or nnz < 200) and raw_sum >= 250"),
    QueryConfig(obs_filter="200 <= nnz < 260"),
    QueryConfig(obs_filter="(assay != \"10x 5' v1\") & (disease == 'normal')"),
    QueryConfig(obs_filter="soma_joinid < 70", is_primary_data=False),
    QueryConfig(obs_filter="dataset_id == 'sim_lung'", var_filter="feature_name in ['CD3D', 'MS4A1', 'LYZ']"),
]


@pytest.fixture(scope="module")
def official(locator):
    with open_root(pinned(locator), dict(locator.tiledb_config)) as opened:
        yield opened


@pytest.mark.parametrize("filters", FILTERS, ids=lambda filters: filters.obs_filter or "everything")
def test_the_official_client_finds_the_same_cells_and_counts(locator, official, filters):
    theirs: anndata.AnnData = cellxgene_census.get_anndata(
        official,
        "Homo sapiens",
        obs_value_filter=full_obs_filter(filters) or None,
        var_value_filter=filters.var_filter or None,
    )
    ours = find_cells(pinned(locator), filters)
    in_order = np.argsort(theirs.obs["soma_joinid"].to_numpy())
    np.testing.assert_array_equal(ours.obs_joinids, theirs.obs["soma_joinid"].to_numpy()[in_order])
    assert ours.feature_ids == tuple(theirs.var["feature_id"]) and 0 < len(ours.obs_joinids)
    stream = CellStream(
        ours.atlas,
        ours.obs_joinids,
        np.full(len(ours.obs_joinids), -1),
        ours.vocabulary(),
        TokensConfig(),
        StreamConfig(),
        global_batch_size=32,
        seed=0,
    )
    sample = stream.sample(len(ours.obs_joinids), seed=0)
    np.testing.assert_array_equal(sample.joinids_n, ours.obs_joinids)
    np.testing.assert_array_equal(sample.cells.counts_ng.toarray(), theirs.X[in_order].toarray())


def _chain(census: Census, folder, monkeypatch) -> dict:
    """Query, stream, fine-tune and annotate: joinids, weights and labels."""
    folder.mkdir()
    monkeypatch.setenv(CENSUS_URL, census.url)
    saved, store = folder / "lung.json", f"sqlite:///{folder / 'mlflow.db'}"
    lung = ["--obs-filter", "dataset_id == 'sim_lung'", *census.words]
    assert query.main(["--atlas", "census", *lung, "--out", str(saved)]) == 0
    atlas, filters, expected_hash = load_query(saved)
    steps = ["train.max_steps=3", "train.eval_every_steps=3", "train.global_batch_size=32"]
    steps += ["train.micro_batch_size=32", "stream.cells_per_task=64", "labels.min_cells=5", "model.dim=16"]
    trained, _ = run_here(
        finetune.main,
        *("--config", "blood", "--query", saved, *steps, f"tracking.uri={store}", *ONE_READER),
        cwd=folder,
    )
    labelled = folder / "labelled.parquet"
    words = ["--atlas", "census", *lung, "--model", trained["model_dir"], "--out", str(labelled)]
    assert annotate.main(words) == 0
    model = load_model(trained["model_dir"])
    return {
        "joinids": find_cells(atlas, filters, expected_hash=expected_hash).obs_joinids,
        "weights": model.model.state_dict(),
        "metrics": model.meta["metrics"],
        "labels": [path.read_bytes() for path in sorted(labelled.glob("*.parquet"))],
        "saved": saved,
    }


@pytest.mark.slow  # two trainings, and repeated requests: two minutes
def test_faults_of_the_network_change_nothing(census, tmp_path, monkeypatch):
    plain = _chain(census, tmp_path / "plain", monkeypatch)
    with faulty_server(tmp_path, census.s3.endpoint) as server:
        set_faults(server, ["slow", "503", "reset", "cut"], every=29)
        faulty = _chain(census.through(server.url), tmp_path / "faulty", monkeypatch)
        met = set_faults(server)
    assert min(met.get(kind, 0) for kind in ("slow", "503", "reset", "cut")) > 2, met
    np.testing.assert_array_equal(plain["joinids"], faulty["joinids"])
    assert plain["metrics"] == faulty["metrics"] and plain["labels"] == faulty["labels"]
    assert len(plain["weights"]) > 3 and plain["labels"]
    for name, tensor in plain["weights"].items():
        assert torch.equal(tensor, faulty["weights"][name]), name


@pytest.mark.slow  # a training each
@pytest.mark.parametrize("harm", ["missing", "changed"])
def test_a_damaged_release_is_refused_by_name(census, tmp_path, monkeypatch, harm):
    monkeypatch.setenv(CENSUS_URL, census.url)
    server, place = (
        client(census.s3),
        f"census/{LATER}/soma/census_data/homo_sapiens/ms/RNA/X/raw/__fragments",
    )
    listed = server.list_objects_v2(Bucket=census.s3.bucket, Prefix=place)["Contents"]
    values = {"Bucket": census.s3.bucket, "Key": max(listed, key=lambda entry: entry["Size"])["Key"]}
    content = server.get_object(**values)["Body"].read()
    server.delete_object(**values)
    if harm == "changed":
        half = len(content) // 2
        server.put_object(**values, Body=content[:half] + bytes(64) + content[half + 64 :])
    words = ["--config", "blood", f"atlas.uri=census:{LATER}", f"tracking.uri=sqlite:///{tmp_path}/m.db"]
    settings = json.dumps(census.tiledb_config)
    _, printed = run_here(
        finetune.main, *words, f"atlas.tiledb_config={settings}", *ONE_READER, cwd=tmp_path, status=2
    )
    server.put_object(**values, Body=content)
    line = printed.splitlines()[-1]
    assert line.startswith(f"screformer finetune: atlas census:{LATER} cannot be read"), printed
    assert "is missing or damaged" in line and "restore or copy it again" in line
    assert harm == "changed" or values["Key"] in line
    assert not list(tmp_path.glob("runs/*/model"))
