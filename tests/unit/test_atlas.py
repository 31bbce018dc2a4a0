import json
import pickle
import socket

import pyarrow as pa
import pytest
import tiledbsoma

from data_ingest.atlas import census_release, located, open_atlas, pinned, saved_atlas
from data_ingest.schema import create_atlas, soma_context
from screformer.config import AtlasConfig
from screformer.settings import plain


@pytest.fixture(scope="module")
def empty_atlas(tmp_path_factory):
    uri = str(tmp_path_factory.mktemp("atlas") / "empty")
    create_atlas(uri, soma_context())
    return uri


def test_a_relative_path_becomes_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert located(AtlasConfig(uri="here/atlas")).uri == str(tmp_path / "here/atlas")
    assert located(AtlasConfig(uri="s3://bucket/atlas")).uri == "s3://bucket/atlas"


def test_round_trips_as_plain_values_and_by_pickle():
    config = AtlasConfig(
        uri="s3://bucket/atlas", tiledb_config={"vfs.s3.scheme": "http", "vfs.s3.region": "eu-west-1"}
    )
    again = saved_atlas(json.loads(json.dumps(plain(config))))
    assert again == config == pickle.loads(pickle.dumps(config))
    assert len({config, again}) == 1


def test_an_atlas_saved_by_an_earlier_version_is_read():
    old = {
        "uri": "s3://b/atlas",
        "measurement": "RNA",
        "x_layer": "raw",
        "timestamp_ms": 7,
        "tiledb_config": {},
    }
    assert saved_atlas(old) == AtlasConfig(uri="s3://b/atlas", timestamp_ms=7)
    with pytest.raises(ValueError, match="x_layer='scaled'; only 'raw' is supported now"):
        saved_atlas({**old, "x_layer": "scaled"})


@pytest.mark.parametrize(
    ("uri", "release"),
    [("census", ""), ("census:2025-11-08", "2025-11-08"), ("s3://b/census", None), ("./census", None)],
)
def test_forms(uri, release):
    assert census_release(AtlasConfig(uri=uri)) == release


@pytest.mark.parametrize("uri", ["census:latest", "census:2025", "census:08-11-2025"])
def test_a_malformed_release_is_rejected(uri):
    with pytest.raises(
        ValueError, match=f"atlas.uri='{uri}' is not a release of Census; write census or census:YYYY-MM-DD"
    ):
        located(AtlasConfig(uri=uri))


def test_an_empty_uri_is_refused():
    with pytest.raises(ValueError, match="atlas.uri is empty; use a folder, s3://bucket/prefix, census"):
        located(AtlasConfig(uri=""))


def test_a_missing_atlas_names_the_command_to_create_one(tmp_path):
    with (
        pytest.raises(ValueError, match="does not exist; create it with `python -m jobs.ingest"),
        open_atlas(AtlasConfig(uri=str(tmp_path / "none"))),
    ):
        pass


def test_a_file_is_not_an_atlas(tmp_path):
    path = tmp_path / "cells.h5ad"
    path.write_bytes(b"not really")
    with (
        pytest.raises(ValueError, match="is a file; an atlas is a folder: ingest the file with"),
        open_atlas(AtlasConfig(uri=str(path))),
    ):
        pass


def test_a_folder_without_soma_is_not_an_atlas(tmp_path):
    with pytest.raises(ValueError, match="is not a SOMA atlas"), open_atlas(AtlasConfig(uri=str(tmp_path))):
        pass


def test_a_bare_experiment_is_recognised(empty_atlas):
    bare = f"{empty_atlas}/census_data/homo_sapiens"
    with (
        pytest.raises(
            ValueError, match=r"is a SOMAExperiment of ms, obs, but an atlas has the layout of Census"
        ),
        open_atlas(AtlasConfig(uri=bare)),
    ):
        pass


def test_another_organism_is_listed(tmp_path):
    uri = str(tmp_path / "mouse")
    with tiledbsoma.Collection.create(uri) as root, root.add_new_collection("census_data") as data:
        data.add_new_collection("mus_musculus", kind=tiledbsoma.Experiment).close()
    with pytest.raises(
        ValueError,
        match="contains mus_musculus, but an atlas has the layout of Census, URI/census_data/homo_sapiens",
    ):
        open_atlas(AtlasConfig(uri=uri)).__enter__()


@pytest.mark.parametrize(
    ("measurement", "layer", "message"),
    [
        ("ATAC", "raw", "has no measurement 'RNA'; it has ATAC"),
        ("RNA", "scaled", "has no X layer 'raw'; it has scaled"),
    ],
)
def test_what_an_atlas_lacks_is_listed(tmp_path, measurement, layer, message):
    uri = str(tmp_path / "other")
    with tiledbsoma.Collection.create(uri) as root, root.add_new_collection("census_data") as data:
        with data.add_new_collection("homo_sapiens", kind=tiledbsoma.Experiment) as experiment:
            with experiment.add_new_collection("ms") as ms:
                with ms.add_new_collection(measurement, kind=tiledbsoma.Measurement) as found:
                    with found.add_new_collection("X") as layers:
                        layers.add_new_sparse_ndarray(layer, type=pa.float32(), shape=(1, 1)).close()
    with pytest.raises(ValueError, match=message), open_atlas(AtlasConfig(uri=uri)):
        pass


def test_the_context_is_bounded(empty_atlas):
    atlas = AtlasConfig(uri=empty_atlas, tiledb_config={"sm.mem.total_budget": "123456789"})
    with open_atlas(atlas, threads=3, buffer_bytes=2**20) as experiment:
        config = experiment.context.tiledb_config
    assert str(config["soma.init_buffer_bytes"]) == str(2**20)
    assert str(config["sm.compute_concurrency_level"]) == str(config["sm.io_concurrency_level"]) == "3"
    assert str(config["sm.mem.total_budget"]) == "123456789"


def test_a_pinned_atlas_does_not_see_later_writes(empty_atlas, tmp_path):
    uri = str(tmp_path / "atlas")
    create_atlas(uri, soma_context())
    fixed = pinned(AtlasConfig(uri=uri))
    assert fixed.timestamp_ms > 0 and pinned(fixed) == fixed
    with tiledbsoma.open(uri, "w", tiledb_timestamp=fixed.timestamp_ms + 1000) as root:
        root.metadata["later"] = "yes"
    with tiledbsoma.open(uri, tiledb_timestamp=fixed.timestamp_ms + 2000) as root:
        assert "later" in root.metadata
    with open_atlas(fixed) as experiment:
        assert experiment.tiledb_timestamp_ms == fixed.timestamp_ms


def test_census_without_a_network_is_reported():
    try:
        socket.create_connection(("census.cellxgene.cziscience.com", 443), timeout=3).close()
    except OSError:
        pass
    else:
        pytest.skip("the network is there")
    with pytest.raises(
        ValueError, match="release directory of CELLxGENE Census could not be reached; check the network"
    ):
        pinned(AtlasConfig(uri="census:2025-11-08"))
