"""A shard cache gives training the cells of the atlas, each once per epoch, and nothing else."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from data_ingest.atlas import pinned
from data_ingest.query import QueryResult, find_cells
from data_ingest.shard_cache import MANIFEST, ShardCache
from data_ingest.shard_write import write_cache
from data_ingest.stream import CellStream
from helpers.processes import run_here
from helpers.servers import S3
from jobs import shard
from jobs.training.prepare import prepare_cells
from screformer.config import AtlasConfig, ExperimentConfig, QueryConfig, StreamConfig, TokensConfig

pytestmark = pytest.mark.usefixtures("ray_local")


@pytest.fixture(scope="module")
def query(small_atlas: str) -> QueryResult:
    return find_cells(pinned(AtlasConfig(uri=small_atlas)), QueryConfig())


@pytest.fixture(scope="module")
def cache(query: QueryResult, tmp_path_factory: pytest.TempPathFactory) -> ShardCache:
    """Several shards of several blocks, the last ones not full."""
    folder = tmp_path_factory.mktemp("cache") / "cells"
    return write_cache(query, str(folder), seed=7, run_length=8, rows_per_shard=256, rows_per_block=32)


def make_stream(query, cache, positions=None, genes=None, shuffle=True):
    positions = np.arange(len(query.obs_joinids)) if positions is None else positions
    return CellStream(
        query.atlas,
        query.obs_joinids[positions],
        query.obs["label"].cat.codes.to_numpy()[positions],
        query.vocabulary(genes),
        TokensConfig(max_genes=10_000),
        StreamConfig(run_length=8, cells_per_task=128),
        global_batch_size=24,
        seed=1,
        raw_sums=query.raw_sums(positions),
        weights=positions.astype(np.float32),
        cache=cache,
        shuffle=shuffle,
    )


def rows(stream, epoch=0, world_size=1, start_step=0):
    """Joinids of the global batches, (steps, global batch)."""
    lanes = stream.global_batch_size // world_size
    ranks = [
        np.concatenate(
            [
                batch["joinids"]
                for batch in stream.batches(
                    epoch, rank=rank, world_size=world_size, micro_batch_size=4, start_step=start_step
                )
            ]
        ).reshape(-1, lanes)
        for rank in range(world_size)
    ]
    return np.concatenate(ranks, axis=1)


def by_cell(stream):
    """What the network would see of each cell."""
    found = {}
    for batch in stream.batches(0, rank=0, world_size=1, micro_batch_size=24):
        for row, joinid in enumerate(batch["joinids"].tolist()):
            used = batch["token_ids"][row] != 0
            shown = [batch[name][row][used].tolist() for name in ("token_ids", "values", "bin_ids")]
            shown += [batch[name][row].item() for name in ("labels", "weights")]
            found[joinid] = [*shown, batch["measured"][batch["panels"][row]].tolist()]
    found.pop(-1, None)  # padding
    return found


@pytest.mark.parametrize("some", [False, True], ids=["all cells and genes", "some cells and genes"])
def test_every_cell_is_as_in_the_atlas(query, cache, some):
    positions = np.flatnonzero(np.arange(len(query.obs_joinids)) % 5 != 2) if some else None
    genes = np.arange(len(query.feature_ids)) % 3 > 0 if some else None
    direct, cached = (by_cell(make_stream(query, each, positions, genes)) for each in (None, cache))
    assert len(direct) == len(query.obs_joinids if positions is None else positions)
    assert direct == cached


def test_each_cell_once_per_epoch_in_a_new_order(query, cache):
    stream = make_stream(query, cache)
    first, second = rows(stream, 0), rows(stream, 1)
    for found in (first, second):
        assert sorted(found[found >= 0]) == query.obs_joinids.tolist()
    assert (first == second).mean() < 0.05
    np.testing.assert_array_equal(first, rows(stream, 0))
    # A batch mixes cells from all over the atlas, not neighbours.
    steps = np.abs(np.diff(first[:-1], axis=1))
    assert np.median(steps) > len(query.obs_joinids) / 8


def test_an_epoch_resumes_on_another_number_of_ranks(query, cache):
    stream = make_stream(query, cache)
    whole = rows(stream, 2)
    np.testing.assert_array_equal(rows(stream, 2, world_size=3), whole)
    np.testing.assert_array_equal(rows(stream, 2, world_size=2, start_step=13), whole[13:])


def test_samples_do_not_depend_on_the_cache(query, cache):
    direct, cached = (make_stream(query, each).sample(100, seed=3) for each in (None, cache))
    np.testing.assert_array_equal(direct.joinids_n, cached.joinids_n)
    np.testing.assert_array_equal(direct.labels_n, cached.labels_n)
    assert (direct.cells.counts_ng != cached.cells.counts_ng).nnz == 0


def test_a_training_reads_only_its_training_cells_from_it(query, cache):
    place = cache.reader.place
    config = ExperimentConfig().merge(
        {"atlas.uri": query.atlas.uri, "stream.cache": place, "train.global_batch_size": 32}
    )
    cells = prepare_cells(config, "finetune")
    streams = cells.streams(cells.genes)
    assert streams["train"].reader == cache.reader and streams["val"].reader != cache.reader
    seen = rows(streams["train"])
    assert sorted(seen[seen >= 0]) == sorted(cells.query.obs_joinids[cells.parts["train"]])
    other = prepare_cells(config.merge({"query.obs_filter": "sex == 'male'"}), "finetune")
    with pytest.raises(ValueError, match=r"stream.cache=.* has other cells or genes than this query"):
        other.streams(other.genes)


def test_a_cache_of_another_query_or_version_is_refused(query, cache):
    cache.require(query)
    later = dataclasses.replace(query, atlas=dataclasses.replace(query.atlas, timestamp_ms=2**41))
    cache.require(later)  # the counts are the same
    changed = query.obs.assign(raw_sum=query.obs["raw_sum"] + (np.arange(len(query.obs)) == 5))
    with pytest.raises(ValueError, match=f"from version {query.atlas.timestamp_ms} of the atlas, this query"):
        cache.require(dataclasses.replace(later, obs=changed))
    genes = find_cells(query.atlas, QueryConfig(var_filter="feature_name != 'CD3D'"))
    with pytest.raises(ValueError, match=r"has other genes than this query .*; write a cache of this query"):
        cache.require(genes)
    with pytest.raises(ValueError, match=r"has other cells or genes than this query \(hash"):
        cache.require(find_cells(query.atlas, QueryConfig(obs_filter="sex == 'male'")))
    with pytest.raises(ValueError, match="lacks 1 of 2 cells, for example 999999"):
        cache.rows_of(np.array([0, 999_999]))
    fewer = {**cache.manifest, "feature_ids": cache.manifest["feature_ids"][1:]}
    with pytest.raises(ValueError, match="lacks 1 of the model's genes, for example ENSG"):
        make_stream(query, dataclasses.replace(cache, manifest=fewer))


def test_only_a_complete_cache_is_accepted(query, cache, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(cache.reader.place, folder)
    (folder / MANIFEST).unlink()  # as after a kill
    with pytest.raises(ValueError, match=r"has no manifest.json: .* or writing it was interrupted"):
        ShardCache.open(str(folder))
    (folder / "shard-000001.arrow").write_bytes(b"half")
    sizes = {"seed": 7, "run_length": 8, "rows_per_shard": 256, "rows_per_block": 32}
    again = write_cache(query, str(folder), **sizes)
    assert again.manifest == cache.manifest  # to the byte
    assert not list(folder.glob("writing*"))
    before = (folder / MANIFEST).stat().st_mtime_ns
    write_cache(query, str(folder), **sizes)
    assert (folder / MANIFEST).stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="has other cells or genes than this query"):
        write_cache(find_cells(query.atlas, QueryConfig(obs_filter="sex == 'male'")), str(folder), **sizes)
    damaged = folder / "shard-000002.arrow"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(ValueError, match=r"shard-000002.arrow has another SHA-256; delete it and run"):
        ShardCache.open(str(folder)).verify()
    with pytest.raises(Exception, match=r"is damaged: shard-000002.arrow cannot be read \(another checksum"):
        rows(make_stream(query, ShardCache.open(str(folder))))
    damaged.write_bytes(content[:-100])
    with pytest.raises(ValueError, match=r"shard-000002.arrow has \d+ bytes, not \d+"):
        ShardCache.open(str(folder))


def test_the_command_writes_to_s3(query: QueryResult, cache: ShardCache, s3: S3, tmp_path: Path) -> None:
    query.save(tmp_path / "query.json")
    place = f"{s3.uri}/cells?scheme=http&endpoint_override={s3.endpoint.removeprefix('http://')}"
    words = ("--query", str(tmp_path / "query.json"), "--out", place, "--verify")
    result, _ = run_here(shard.main, *words, cwd=tmp_path)
    assert result["cells"] == len(query.obs_joinids) and result["query_hash"] == query.hash
    remote = ShardCache.open(place)
    assert remote.manifest["rows_per_block"] == 256 and json.dumps(remote.manifest)
    some = np.arange(0, len(query.obs_joinids), 4)
    assert by_cell(make_stream(query, remote, some)) == by_cell(make_stream(query, cache, some))
    with pytest.raises(ValueError, match="has no manifest.json"):
        ShardCache.open(place.replace("/cells?", "/nothing?"))
