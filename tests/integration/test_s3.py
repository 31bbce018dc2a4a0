"""Query and stream from an atlas on a real S3 server on loopback."""

import json
from pathlib import Path

import boto3
import numpy as np
import pytest

from data_ingest.atlas import open_atlas, pinned
from data_ingest.query import find_cells, load_query, run_query
from data_ingest.stream import CellStream
from screformer.config import AtlasConfig, ExperimentConfig, QueryConfig, StreamConfig, TokensConfig

pytestmark = pytest.mark.usefixtures("ray_local")


@pytest.fixture(scope="module")
def remote(s3, small_atlas):
    """The small atlas copied to the server file by file, since it refers to its parts by relative names."""
    client = boto3.client("s3", endpoint_url=s3.endpoint, region_name="us-east-1")
    root = Path(small_atlas)
    for path in sorted(root.rglob("*")):
        if path.is_file():
            client.upload_file(str(path), s3.bucket, f"copied/{path.relative_to(root)}")
    return AtlasConfig(uri=f"{s3.uri}/copied", tiledb_config=s3.tiledb_config)


def test_a_remote_atlas_gives_the_cells_of_the_local_one(remote, small_atlas):
    there = run_query(ExperimentConfig(atlas=remote))
    here = find_cells(AtlasConfig(uri=small_atlas), QueryConfig())
    assert there.hash == here.hash and there.summary() == here.summary()
    assert there.atlas.timestamp_ms > 0

    def batches(result):
        codes = result.obs["label"].cat.codes.to_numpy()
        stream = CellStream(
            result.atlas,
            result.obs_joinids[:200],
            codes[:200],
            result.vocabulary(),
            TokensConfig(),
            StreamConfig(cells_per_task=128),
            global_batch_size=32,
            seed=0,
        )
        return list(stream.batches(0, rank=1, world_size=2, micro_batch_size=16))

    pairs = list(zip(batches(there), batches(here), strict=True))
    assert len(pairs) == 7
    for remote_batch, local_batch in pairs:
        for name in local_batch:
            np.testing.assert_array_equal(remote_batch[name], local_batch[name])


def test_a_saved_query_reaches_the_server_again(remote, tmp_path):
    result = run_query(ExperimentConfig(atlas=remote))
    result.save(tmp_path / "query.json")
    atlas, query, expected_hash = load_query(tmp_path / "query.json")
    assert find_cells(atlas, query, expected_hash=expected_hash).hash == result.hash


def test_a_missing_atlas_is_reported_with_what_to_check(s3):
    locator = AtlasConfig(uri=f"{s3.uri}/nothing", tiledb_config=s3.tiledb_config)
    with (
        pytest.raises(
            ValueError,
            match="is not a SOMA atlas; check the address, atlas.tiledb_config and the credentials",
        ),
        open_atlas(locator),
    ):
        pass


@pytest.fixture
def census(remote, s3, monkeypatch):
    """The release directory and the mirrors of Census on the server, whose releases are the copied atlas."""
    from cellxgene_census import _release_directory as client

    release = {
        "release_build": "2025-01-30",
        "soma": {"uri": remote.uri, "relative_uri": "copied/", "s3_region": "us-east-1"},
        "h5ads": {"uri": f"{remote.uri}/h5ads/", "relative_uri": "copied/h5ads/", "s3_region": "us-east-1"},
        "flags": {"lts": True},
    }
    newest = {**release, "release_build": "2025-06-02", "flags": {"lts": False}}
    releases = {
        "stable": "2025-01-30",
        "latest": "2025-06-02",
        "2025-01-30": release,
        "2025-06-02": newest,
    }
    mirrors = {
        "default": "here",
        "here": {"provider": "S3", "base_uri": f"{s3.uri}/", "region": "us-east-1"},
    }
    server = boto3.client("s3", endpoint_url=s3.endpoint, region_name="us-east-1")
    for name, tree, address in (
        ("release.json", releases, "CELL_CENSUS_RELEASE_DIRECTORY_URL"),
        ("mirrors.json", mirrors, "CELL_CENSUS_MIRRORS_DIRECTORY_URL"),
    ):
        server.put_object(Bucket=s3.bucket, Key=name, Body=json.dumps(tree).encode(), ACL="public-read")
        monkeypatch.setattr(client, address, f"{s3.endpoint}/{s3.bucket}/{name}")
    return {**s3.tiledb_config, "vfs.s3.no_sign_request": "false"}  # the copied atlas is not public


def test_census_is_its_stable_release_by_date_in_all_that_is_saved(census, small_atlas, tmp_path):
    result = run_query(ExperimentConfig(atlas=AtlasConfig(uri="census", tiledb_config=census)))
    assert result.atlas.uri == "census:2025-01-30"
    assert result.hash == find_cells(AtlasConfig(uri=small_atlas), QueryConfig()).hash
    result.save(tmp_path / "query.json")
    assert load_query(tmp_path / "query.json")[0].uri == "census:2025-01-30"
    assert pinned(AtlasConfig(uri="census:2025-06-02", tiledb_config=census)).uri == "census:2025-06-02"
    with pytest.raises(ValueError, match="no such release; use one of 2025-01-30, 2025-06-02"):
        pinned(AtlasConfig(uri="census:2024-07-01"))
