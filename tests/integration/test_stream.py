"""The stream through a real Ray: cells arrive in the order of the plan, as they are in the atlas."""

import json
import pickle
import shutil
import threading
import time

import numpy as np
import pyarrow as pa
import pytest
import ray
import tiledbsoma
import torch

from data_ingest import stream as stream_module
from data_ingest.atlas import pinned
from data_ingest.datasource import AtlasReader, CellArrays, CellDatasource, read_cells
from data_ingest.epoch_plan import EpochPlan
from data_ingest.schema import create_atlas, soma_context
from data_ingest.stream import CellStream
from jobs.benchmark.stream import main
from screformer.config import AtlasConfig, StreamConfig, TokensConfig
from screformer.counts import Panels
from screformer.tokenizer import CLS, NUM_SPECIAL, PAD, GeneVocabulary

pytestmark = pytest.mark.usefixtures("ray_local")
NUM_CELLS, NUM_GENES = 700, 50


def counts_of(joinids):
    """Counts that encode their row and column; every seventh cell is empty."""
    rows, genes = np.asarray(joinids)[:, None], np.arange(NUM_GENES)
    present = ((rows * 31 + genes * 17) % 5 < 2) & (rows % 7 != 0)
    return np.where(present, 1 + (rows + 3 * genes) % 11, 0).astype(np.float32)


@pytest.fixture(scope="module")
def locator(tmp_path_factory):
    uri = str(tmp_path_factory.mktemp("stream") / "atlas")
    context = soma_context()
    create_atlas(uri, context)
    with tiledbsoma.open(f"{uri}/census_data/homo_sapiens", "w", context=context) as experiment:
        rna = experiment.ms["RNA"]
        rna.var.change_domain(((0, NUM_GENES - 1),))
        rna.X["raw"].resize((NUM_CELLS, NUM_GENES))
    rows, genes = np.nonzero(counts_of(np.arange(NUM_CELLS)))
    with tiledbsoma.open(f"{uri}/census_data/homo_sapiens/ms/RNA", "w", context=context) as rna:
        names = pa.array([f"ENSG{gene:05d}" for gene in range(NUM_GENES)], pa.large_string())
        zeros = pa.array(np.zeros(NUM_GENES, np.int64))
        columns = {"soma_joinid": np.arange(NUM_GENES), "feature_id": names, "feature_name": names}
        rna.var.write(pa.table({**columns, "feature_length": zeros, "nnz": zeros, "n_measured_obs": zeros}))
        values = counts_of(np.arange(NUM_CELLS))[rows, genes]
        rna.X["raw"].write(pa.table({"soma_dim_0": rows, "soma_dim_1": genes, "soma_data": values}))
    return pinned(AtlasConfig(uri=uri))


def vocabulary(genes=None):
    ids = tuple(f"ENSG{gene:05d}" for gene in (range(NUM_GENES) if genes is None else genes))
    return GeneVocabulary(ids, ids, np.zeros(len(ids), np.float32))


def make_stream(
    locator,
    joinids=None,
    genes=None,
    tokens=None,
    seed=5,
    shuffle=True,
    global_batch_size=24,
    cells_per_task=120,
    panels=None,
    raw_sums=None,
):
    joinids = np.arange(NUM_CELLS) if joinids is None else joinids
    return CellStream(
        locator,
        joinids,
        joinids % 4,
        vocabulary(genes),
        tokens or TokensConfig(),
        StreamConfig(run_length=8, cells_per_task=cells_per_task),
        global_batch_size=global_batch_size,
        seed=seed,
        panels=panels,
        raw_sums=raw_sums,
        shuffle=shuffle,
    )


def epoch(stream, epoch=0, world_size=1, micro_batch_size=4, start_step=0):
    """Batches of all ranks, and their joinids, (steps, global batch)."""
    ranks = [
        list(
            stream.batches(
                epoch,
                rank=rank,
                world_size=world_size,
                micro_batch_size=micro_batch_size,
                start_step=start_step,
            )
        )
        for rank in range(world_size)
    ]
    lanes = stream.global_batch_size // world_size
    rows = [
        np.concatenate([batch["joinids"] for batch in batches] or [[]]).reshape(-1, lanes)
        for batches in ranks
    ]
    return [batch for batches in ranks for batch in batches], np.concatenate(rows, axis=1)


def planned(stream, number=0):
    joinids = np.append(stream.arrays.joinids, -1)
    return joinids[np.array([stream.plan(number).cells(step) for step in range(stream.steps_per_epoch)])]


def test_batches_have_the_atlas_in_the_order_of_the_plan(locator):
    stream = make_stream(locator)
    batches, rows = epoch(stream)
    np.testing.assert_array_equal(rows, planned(stream))
    assert len(batches) == stream.steps_per_epoch * 6
    for batch in batches:
        assert {batch[name].dtype.__str__() for name in ("token_ids", "bin_ids", "labels", "joinids")} == {
            "torch.int64"
        }
        for joinid, label, tokens, values in zip(
            *(batch[name].numpy() for name in ("joinids", "labels", "token_ids", "values")), strict=True
        ):
            genes = tokens[tokens >= NUM_SPECIAL] - NUM_SPECIAL
            if joinid < 0:
                assert label == -1 and (tokens == PAD).all() and (values == 0).all()
                continue
            counts = counts_of([joinid])[0]
            assert label == joinid % 4 and tokens[0] == CLS
            np.testing.assert_array_equal(genes, np.flatnonzero(counts))
            expected = np.log1p(1e4 * counts[genes] / max(counts.sum(), 1))
            np.testing.assert_allclose(values[tokens >= NUM_SPECIAL], expected, rtol=1e-5)


def test_ranks_and_resumed_ranks_get_the_same_global_batches(locator):
    stream = make_stream(locator, joinids=np.arange(0, NUM_CELLS, 3))
    expected = planned(stream, 2)
    np.testing.assert_array_equal(epoch(stream, 2, world_size=2, micro_batch_size=6)[1], expected)
    np.testing.assert_array_equal(
        epoch(stream, 2, world_size=3, micro_batch_size=8, start_step=7)[1], expected[7:]
    )
    assert epoch(stream, 2, start_step=stream.steps_per_epoch)[0] == []


def test_epochs_and_seeds_differ_and_repeat(locator):
    stream = make_stream(locator, joinids=np.arange(200))
    orders = [epoch(stream, number)[1] for number in (0, 1, 0)]
    assert (orders[0] == orders[2]).all() and (orders[0] == orders[1]).mean() < 0.1
    other = make_stream(locator, joinids=np.arange(200), seed=6)
    assert (epoch(other)[1] == orders[0]).mean() < 0.1


def test_unshuffled_stream_gives_every_cell_once(locator):
    stream = make_stream(locator, joinids=np.arange(100)[::-1], shuffle=False)
    rows = epoch(stream)[1]
    np.testing.assert_array_equal(np.sort(rows[rows >= 0]), np.arange(100))
    np.testing.assert_array_equal(rows, epoch(stream, 9)[1])


def test_fewer_cells_than_a_batch(locator):
    rows = epoch(make_stream(locator, joinids=np.array([3, 600])))[1]
    assert rows.shape == (1, 24) and sorted(rows[rows >= 0]) == [3, 600]
    empty = make_stream(locator, joinids=np.zeros(0, np.int64))
    assert empty.steps_per_epoch == 0 and epoch(empty)[0] == []


def test_few_cells_are_read_without_ray_data_and_give_the_same_batches(locator, monkeypatch):
    few = make_stream(locator, np.arange(7, 147))
    here = list(few.batches(2, rank=1, world_size=2, micro_batch_size=6, start_step=1))
    monkeypatch.setattr(stream_module, "_MOST_READ_HERE", 0)
    tasks = list(few.batches(2, rank=1, world_size=2, micro_batch_size=6, start_step=1))
    assert len(here) == len(tasks) == 10
    for batch, other in zip(here, tasks, strict=True):
        assert batch.keys() == other.keys()
        assert all(torch.equal(tensor, other[name]) for name, tensor in batch.items())


def test_a_vocabulary_of_some_genes_in_another_order_keeps_the_whole_library_size(locator):
    genes = [40, 3, 17, 25, 0]
    stream = make_stream(locator, genes=genes, joinids=np.arange(96))
    for batch in epoch(stream)[0]:
        for joinid, tokens, values in zip(
            batch["joinids"].numpy(), batch["token_ids"].numpy(), batch["values"].numpy(), strict=True
        ):
            counts = counts_of([joinid])[0]
            found = tokens >= NUM_SPECIAL
            np.testing.assert_array_equal(tokens[found] - NUM_SPECIAL, np.flatnonzero(counts[genes]))
            expected = np.log1p(1e4 * counts[genes][counts[genes] > 0] / max(counts.sum(), 1))
            np.testing.assert_allclose(values[found], expected, rtol=1e-5)


def test_cut_cells_are_counted(locator):
    stream = make_stream(locator, tokens=TokensConfig(max_genes=10), joinids=np.arange(96))
    batches, _ = epoch(stream)
    assert stream.num_cut == int((np.count_nonzero(counts_of(np.arange(96)), axis=1) > 10).sum()) > 0
    assert max(batch["token_ids"].shape[1] for batch in batches) == 11


def test_a_recipe_travels_by_reference_and_works_in_another_process(locator):
    stream = make_stream(locator)
    assert pickle.loads(pickle.dumps(stream))._arrays is None

    @ray.remote(num_cpus=1)
    def in_worker(stream):
        batches = list(stream.batches(1, rank=1, world_size=2, micro_batch_size=12))
        return np.concatenate([batch["joinids"].numpy() for batch in batches])

    joinids = ray.get(in_worker.remote(stream))
    np.testing.assert_array_equal(joinids.reshape(-1, 12), planned(stream, 1)[:, 12:])


def test_ranks_that_hold_every_cpu_get_their_cells_even_from_two_streams(locator):
    """Reading must not wait for a CPU held by a rank or by the paused stream of another rank."""
    train, val = make_stream(locator), make_stream(locator, joinids=np.arange(0, NUM_CELLS, 5), shuffle=False)

    @ray.remote(num_cpus=2)
    class Rank:
        def run(self, train, val, rank):
            batches = train.batches(0, rank=rank, world_size=2, micro_batch_size=12)
            seen = [next(batches)["joinids"].numpy()]
            validated = [
                batch["joinids"].numpy()
                for batch in val.batches(0, rank=rank, world_size=2, micro_batch_size=12)
            ]
            seen += [batch["joinids"].numpy() for batch in batches]
            return np.stack(seen), np.stack(validated)

    ranks = [Rank.remote() for _ in range(2)]
    results = ray.get([actor.run.remote(train, val, rank) for rank, actor in enumerate(ranks)], timeout=240)
    np.testing.assert_array_equal(np.concatenate([seen for seen, _ in results], axis=1), planned(train))
    np.testing.assert_array_equal(
        np.concatenate([validated for _, validated in results], axis=1), planned(val)
    )


def _threads() -> set[threading.Thread]:
    """All threads except those in which Ray waits for objects, which it never ends."""
    return {thread for thread in threading.enumerate() if thread.name != "Prefetcher"}


def test_an_early_stop_leaves_no_thread_behind(locator):
    epoch(make_stream(locator))  # start what Ray starts only once
    before = _threads()
    stream = make_stream(locator)
    batches = stream.batches(0, rank=0, world_size=1, micro_batch_size=4)
    next(batches)
    batches.close()
    deadline = time.monotonic() + 20
    while (left := _threads() - before) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left
    np.testing.assert_array_equal(epoch(stream)[1], planned(stream))


def test_an_error_while_reading_reaches_the_caller(locator, tmp_path):
    stream = make_stream(locator)
    stream.atlas = AtlasConfig(uri=str(tmp_path / "gone"))
    with pytest.raises(Exception, match="does not exist; create it with"):
        epoch(stream)


def test_a_sample_of_the_cells(locator):
    stream = make_stream(locator, joinids=np.arange(0, NUM_CELLS, 2), genes=[7, 1, 30])
    sample = stream.sample(100, seed=1)
    assert (
        sample.cells.counts_ng.shape == (100, 3)
        and (np.diff(sample.joinids_n) > 0).all()
        and (sample.joinids_n % 2 == 0).all()
    )
    expected = counts_of(sample.joinids_n)
    np.testing.assert_array_equal(sample.cells.counts_ng.toarray(), expected[:, [7, 1, 30]])
    np.testing.assert_array_equal(sample.cells.total_n, expected.sum(1))
    np.testing.assert_array_equal(sample.labels_n, sample.joinids_n % 4)
    np.testing.assert_array_equal(sample.joinids_n, stream.sample(100, seed=1).joinids_n)
    assert (sample.joinids_n != stream.sample(100, seed=2).joinids_n).any()
    np.testing.assert_array_equal(stream.sample(10_000, seed=1).joinids_n, np.arange(0, NUM_CELLS, 2))


def test_cells_whose_counts_changed_on_disk_are_refused(locator):
    raw_sums = counts_of(np.arange(NUM_CELLS)).sum(1)
    np.testing.assert_array_equal(
        epoch(make_stream(locator, raw_sums=raw_sums))[1], planned(make_stream(locator))
    )
    raw_sums[17] += 1
    stream = make_stream(locator, raw_sums=raw_sums)
    message = "the counts of cell 17 of the atlas sum to .* X is damaged"
    with pytest.raises(ValueError, match=message):
        stream.sample(NUM_CELLS, seed=0)
    with pytest.raises(Exception, match=message):
        epoch(stream)


def test_batches_and_samples_say_which_genes_were_measured(locator):
    panels = Panels(
        np.arange(NUM_GENES) < np.array([[NUM_GENES], [20], [5]]), np.arange(NUM_CELLS) % 2
    )  # the last one belongs to no dataset
    stream = make_stream(locator, joinids=np.arange(NUM_CELLS), panels=panels)
    seen = 0
    for batch in stream.batches(0, rank=0, world_size=1, micro_batch_size=stream.global_batch_size):
        real = batch["joinids"] >= 0
        sizes = batch["measured"].sum(dim=1)[batch["panels"]]
        assert torch.equal(sizes[real], torch.where(batch["joinids"][real] % 2 == 0, NUM_GENES, 20))
        assert len(batch["measured"]) <= 2
        seen += int(real.sum())
    assert seen == NUM_CELLS
    sample = stream.sample(50, seed=0)
    np.testing.assert_array_equal(
        sample.cells.panels.measured_pg.sum(1)[sample.cells.panels.panels_n],
        np.where(sample.joinids_n % 2 == 0, NUM_GENES, 20),
    )
    assert make_stream(locator).sample(5, seed=0).cells.panels.measured_pg.all()


def test_a_sample_with_even_labels_keeps_the_rare_ones(locator):
    joinids = np.sort(
        np.concatenate([np.arange(label, 4 * size, 4) for label, size in enumerate((60, 20, 5))])
    )
    stream = make_stream(locator, joinids=joinids)
    assert np.bincount(stream.sample(25, seed=1, even_labels=True).labels_n).tolist() == [10, 10, 5]
    first, second = (stream.sample(25, seed=seed, even_labels=True).joinids_n for seed in (1, 2))
    assert (first != second).any()


def test_read_tasks_are_small_cheap_and_always_the_same(locator):
    joinids = np.arange(NUM_CELLS)
    plan = EpochPlan(
        num_cells=NUM_CELLS, seed=0, epoch=0, run_length=8, cells_per_task=120, global_batch_size=24
    )
    panels = Panels.one(np.ones(NUM_GENES), NUM_CELLS)
    arrays = ray.put(CellArrays(joinids, joinids, np.arange(NUM_GENES, dtype=np.int32), panels))
    source = CellDatasource(AtlasReader(locator), arrays, plan, num_genes=NUM_GENES, rank=1, world_size=2)
    first, second = (
        source.get_read_tasks(1),
        source.get_read_tasks(200, data_context=ray.data.DataContext.get_current()),
    )
    tables = [[pa.concat_tables(task()) for task in tasks] for tasks in (first, second)]
    assert all(a.equals(b) for a, b in zip(*tables, strict=True))
    assert [task.metadata.num_rows for task in first] == [table.num_rows for table in tables[0]]
    assert sum(task.metadata.num_rows for task in first) == plan.num_steps * 12
    assert max(len(ray.cloudpickle.dumps(task)) for task in first) < 20_000


def test_a_layout_that_returns_a_cells_values_in_pieces(locator, tmp_path):
    """Census stores tiles of genes, so the values of a cell are not contiguous."""
    uri = str(tmp_path / "atlas")
    create_atlas(uri, soma_context())
    path = f"{uri}/census_data/homo_sapiens/ms/RNA/X"
    tiles = {"soma_dim_0": {"tile": 64}, "soma_dim_1": {"tile": 7}}
    create = {
        "dims": tiles,
        "allows_duplicates": True,
        "capacity": 100,
        "tile_order": "row-major",
        "cell_order": "row-major",
    }
    rows, genes = np.nonzero(counts_of(np.arange(NUM_CELLS)))
    values = counts_of(np.arange(NUM_CELLS))[rows, genes]
    with tiledbsoma.open(path, "d") as layers:
        del layers["raw"]
    shutil.rmtree(f"{path}/raw")
    with tiledbsoma.open(path, "w") as layers:
        layer = layers.add_new_sparse_ndarray(
            "raw",
            type=pa.float32(),
            shape=(NUM_CELLS, NUM_GENES),
            platform_config={"tiledb": {"create": create}},
        )
        for half in (rows < 350, rows >= 350):
            layer.write(
                pa.table({"soma_dim_0": rows[half], "soma_dim_1": genes[half], "soma_data": values[half]})
            )
    joinids = np.sort(np.random.default_rng(0).permutation(NUM_CELLS)[:300])
    tiled = AtlasConfig(uri=uri)
    genes, panels = np.arange(NUM_GENES, dtype=np.int32), Panels.one(np.ones(NUM_GENES), len(joinids))
    ours, theirs = (read_cells(atlas, joinids, genes, panels) for atlas in (tiled, locator))
    for part in ("data", "indices", "indptr"):
        np.testing.assert_array_equal(getattr(ours.counts_ng, part), getattr(theirs.counts_ng, part))
    np.testing.assert_array_equal(ours.total_n, theirs.total_n)


def test_wrong_sizes_and_cells_are_refused(locator):
    stream = make_stream(locator)
    with pytest.raises(
        ValueError,
        match=r"train.global_batch_size=24 is not a multiple of .* \(5 x 1 = 5\); try 20 or 25",
    ):
        next(stream.batches(0, rank=0, world_size=1, micro_batch_size=5))
    with pytest.raises(ValueError, match="joinid 3 appears twice among the cells of a stream"):
        make_stream(locator, joinids=np.array([3, 1, 3]))
    with pytest.raises(
        ValueError, match="stream.cells_per_task=12 must be at least train.global_batch_size=24"
    ):
        make_stream(locator, cells_per_task=12)
    strange = GeneVocabulary(("X1",), ("X1",), np.zeros(1, np.float32))
    with pytest.raises(
        ValueError,
        match=r"has none of the vocabulary's 1 genes \(for example 'X1'; the"
        r" atlas has ENSG00000, .*matched by feature_id",
    ):
        CellStream(
            locator,
            np.arange(3),
            np.zeros(3),
            strange,
            TokensConfig(),
            StreamConfig(),
            global_batch_size=1,
            seed=0,
        )


def test_the_benchmark_measures_all_contestants_on_one_atlas(capsys):
    assert main(["--cells", "1500", "--genes", "300", "--rounds", "1"]) == 0
    printed = capsys.readouterr().out
    result = json.loads(printed.splitlines()[-1])
    assert result["cells"] == 1500 and result["cores"] >= 1 and result["entropy_over_random"] > 0.97
    assert all(rate > 0 for rate in result["cells_per_s"].values())
    assert {
        "raw SOMA scan",
        "our read tasks, called directly",
        "our stream, tokens in the loop",
        "cache: read tasks, called directly",
    } <= set(result["cells_per_s"])
    assert len(result["versions"]) >= 4 and "our stream, tokens in the loop" in printed


def test_the_benchmark_reports_a_user_error_in_one_line(locator, capsys):
    assert main(["--atlas", locator.uri + "-gone"]) == 2
    assert "does not exist" in capsys.readouterr().err
