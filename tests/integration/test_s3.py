"""Query and stream from an atlas on a real S3 server on loopback."""

from pathlib import Path

import numpy as np
import pytest

from data_ingest.atlas import open_atlas
from data_ingest.query import find_cells, load_query, run_query
from data_ingest.stream import CellStream
from helpers.census import client, upload
from screformer.config import AtlasConfig, ExperimentConfig, QueryConfig, StreamConfig, TokensConfig

pytestmark = pytest.mark.usefixtures("ray_local")


@pytest.fixture(scope="module")
def remote(s3, small_atlas):
    """The small atlas, copied to the server."""
    upload(client(s3), s3.bucket, Path(small_atlas), "copied")
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
