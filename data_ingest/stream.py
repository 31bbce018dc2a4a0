"""Stream the cells of a query to each rank as batches of tokens.

Axes: `n` cells, `l` token slots, `g` genes of the vocabulary, `p` gene panels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import ray
import torch
from ray.data import ExecutionResources
from ray.data.collate_fn import ArrowBatchCollateFn

from data_ingest.datasource import (
    BLOCK_BYTES,
    AtlasReader,
    CellArrays,
    CellDatasource,
    Reader,
    gene_of_var,
    read_checked,
)
from data_ingest.epoch_plan import EpochPlan, sampled_cells
from data_ingest.packed import PackedCells
from data_ingest.shard_cache import ShardCache
from data_ingest.tasks import map_tasks, share_of_cluster
from screformer.augmentation import Augmentation
from screformer.config import AtlasConfig, StreamConfig, TokensConfig, grad_accum_steps
from screformer.counts import CellCounts, Panels
from screformer.tokenizer import PAD, CellTokenizer, GeneVocabulary

Batch = dict[str, torch.Tensor]

_CELLS_PER_SAMPLE_TASK = 4096
_MOST_READ_HERE = 256
"""Most cells of a stream that the caller's thread reads itself."""
_PREFETCHED_BATCHES = 4
"""Number of batches to prefetch per rank."""


class Sample(NamedTuple):
    """A sample of the cells of a stream."""

    cells: CellCounts
    joinids_n: np.ndarray
    labels_n: np.ndarray


class CellStream:
    """Cells of one atlas as epochs of global batches, for any number of ranks.

    Small and picklable: if Ray is running, its arrays are passed by reference. Its output is a pure function
    of its arguments, the epoch and the step. The order of cells in a global batch does not depend on the
    number of ranks.
    """

    def __init__(
        self,
        atlas: AtlasConfig,
        joinids: np.ndarray,
        labels: np.ndarray,
        vocabulary: GeneVocabulary,
        tokens: TokensConfig,
        stream: StreamConfig,
        *,
        global_batch_size: int,
        seed: int,
        panels: Panels | None = None,
        raw_sums: np.ndarray | None = None,
        weights: np.ndarray | None = None,
        augmentation: Augmentation | None = None,
        shuffle: bool = True,
        read_cpus: float = 0.5,
        cache: ShardCache | None = None,
    ) -> None:
        """Look up the vocabulary's genes in the atlas.

        Args:
            atlas: The pinned atlas.
            joinids: Shape (n,), unique, any order (the stream sorts them).
            labels: Shape (n,), label code of each cell, -1 for none.
            vocabulary: Genes that become tokens; other genes count only towards a cell's total.
            tokens: How a cell becomes tokens.
            stream: Run length and cells per task.
            global_batch_size: Cells per step over all ranks.
            seed: Random seed of the order.
            panels: Which genes were measured in which cells, in the order of `joinids`; None if all were.
            raw_sums: Total counts of each cell according to obs, in the order of `joinids`; cells read with a
                different total are rejected. None skips the check.
            weights: Weight of each cell in the loss, in the order of `joinids`; None for no weights.
            augmentation: Changes cells before they become tokens; None for no change.
            shuffle: If False, cells keep joinid order, up to the lanes of `EpochPlan`.
            read_cpus: CPUs that a read task counts as when dividing the free CPUs among ranks.
            cache: Read batches from this copy of the cells instead of the atlas. The order differs.

        Raises:
            ValueError: A joinid appears twice, the atlas has none of the vocabulary's genes, or the cache
                lacks a cell or gene.
        """
        joinids, labels = np.asarray(joinids, np.int64), np.asarray(labels, np.int64)
        ordered = np.sort(joinids)
        twice = np.flatnonzero(ordered[1:] == ordered[:-1])
        if len(twice):
            raise ValueError(
                f"joinid {ordered[twice[0]]} appears twice among the cells of a stream; list each cell once"
            )
        rows = joinids if cache is None else cache.rows_of(joinids)
        order = np.argsort(rows, kind="stable")
        genes_of_var = gene_of_var(atlas, vocabulary)
        cached = None if cache is None else cache.cached(rows[order], vocabulary, genes_of_var)
        self._cache = None if cache is None else cache.reader
        self.atlas, self.vocabulary, self.tokens, self.stream = atlas, vocabulary, tokens, stream
        self.global_batch_size, self.seed, self.shuffle, self.read_cpus = (
            global_batch_size,
            seed,
            shuffle,
            read_cpus,
        )
        self.weights = None if weights is None else np.asarray(weights, np.float32)[order]
        self.augmentation = augmentation
        self.num_cells = len(joinids)
        self.num_cut = 0
        """Number of cells truncated to `tokens.max_genes` genes so far, in this process."""
        panels = panels.take(order) if panels else Panels.one(np.ones(len(vocabulary)), len(joinids))
        sums = None if raw_sums is None else np.asarray(raw_sums, np.float32)[order]
        self._arrays: CellArrays | None = CellArrays(
            joinids[order], labels[order], genes_of_var, panels, sums, cached
        )
        self._reference: ray.ObjectRef | None = None
        self.plan(0)

    @property
    def steps_per_epoch(self) -> int:
        """Number of global batches per epoch; the last one may have padding."""
        return -(-self.num_cells // self.global_batch_size)

    @property
    def arrays(self) -> CellArrays:
        """Data for the read tasks, with cells in joinid order."""
        if self._arrays is None:
            self._arrays = ray.get(self._reference)
        return self._arrays

    @property
    def reader(self) -> Reader:
        """What reads the cells of batches."""
        return self._cache or AtlasReader(self.atlas, threads=max(1, round(self.read_cpus)))

    def plan(self, epoch: int) -> EpochPlan:
        """The order of an epoch."""
        return EpochPlan(
            num_cells=self.num_cells,
            seed=self.seed,
            epoch=epoch,
            run_length=self._cache.rows_per_block if self._cache else self.stream.run_length,
            cells_per_task=self.stream.cells_per_task,
            global_batch_size=self.global_batch_size,
            shuffle=self.shuffle,
        )

    def batches(
        self, epoch: int, *, rank: int, world_size: int, micro_batch_size: int, start_step: int = 0
    ) -> Iterator[Batch]:
        """Micro-batches of one rank in one epoch.

        Each step has global_batch_size / (micro_batch_size x world_size) micro-batches. So does the last
        step, whose missing cells are padding rows. Reading, tokenizing and conversion run outside the
        caller's thread, except for a few cells, for which Ray's tasks take longer. Ray must be running.

        Args:
            epoch: Any number >= 0.
            rank: Rank whose cells to yield.
            world_size: Number of ranks; together they get every cell once.
            micro_batch_size: Cells per micro-batch.
            start_step: Number of steps of this epoch already taken, by any number of ranks.

        Yields:
            `token_ids` int64, `values` float32, `bin_ids` int64, each (n, l); `labels` int64 (n,), -1 for
            none; `joinids` int64 (n,), -1 for padding rows, which contain only PAD; `measured` bool (p, g)
            and `panels` int64 (n,): which genes were measured in which cells; and if the stream has weights,
            `weights` float32 (n,), 0 for padding rows.

        Raises:
            ValueError: The global batch is not a multiple of micro-batch x world size.
        """
        per_step = grad_accum_steps(self.global_batch_size, micro_batch_size, world_size)
        num_batches = (self.steps_per_epoch - start_step) * per_step
        if num_batches <= 0:
            return
        collate = _Collate(partial(self._tokenized, CellTokenizer(self.tokens, self.vocabulary), epoch))
        if self.num_cells <= _MOST_READ_HERE:
            source = self._source(epoch, rank, world_size, start_step)
            rows = pa.concat_tables(table for task in source.get_read_tasks(1) for table in task())
            firsts = range(0, rows.num_rows, micro_batch_size)
            batches = (collate(rows.slice(first, micro_batch_size)) for first in firsts)
        else:
            dataset = self.dataset(epoch, rank=rank, world_size=world_size, start_step=start_step)
            batches = dataset.iter_torch_batches(
                batch_size=micro_batch_size, collate_fn=collate, prefetch_batches=_PREFETCHED_BATCHES
            )
        delivered = 0
        for batch, num_cut in batches:
            delivered += 1
            self.num_cut += num_cut
            yield batch
        assert delivered == num_batches, f"the stream returned {delivered} of {num_batches} batches"

    def dataset(self, epoch: int, *, rank: int, world_size: int, start_step: int = 0) -> ray.data.Dataset:
        """The cells of `batches` before they become tokens, with the columns of `datasource.schema`."""
        tasks, num_cpus, store_bytes = share_of_cluster(world_size, self.read_cpus)
        source = self._source(epoch, rank, world_size, start_step)
        num_units = max(1, len(source.units))
        dataset = ray.data.read_datasource(
            source, num_cpus=num_cpus, concurrency=min(tasks, num_units), override_num_blocks=num_units
        )
        context = dataset.context
        context.target_max_block_size = BLOCK_BYTES
        context.execution_options.preserve_order = True
        context.execution_options.resource_limits = ExecutionResources.for_limits(
            object_store_memory=store_bytes
        )
        return dataset

    def _source(self, epoch: int, rank: int, world_size: int, start_step: int) -> CellDatasource:
        return CellDatasource(
            self.reader,
            self._shared(),
            self.plan(epoch),
            num_genes=len(self.vocabulary),
            rank=rank,
            world_size=world_size,
            start_step=start_step,
        )

    def sample(self, max_cells: int, seed: int, *, even_labels: bool = False) -> Sample:
        """Raw counts of at most `max_cells` random cells, in joinid order, read by parallel Ray tasks.

        Args:
            max_cells: Maximum number of cells.
            seed: Random seed.
            even_labels: Sample equally many cells of each label, or all of a label that has fewer.

        Returns:
            The sample; its memory is proportional to the detected genes of its cells.
        """
        reference = self._shared()
        arrays = self.arrays
        by_joinid = np.argsort(arrays.joinids, kind="stable")
        found = sampled_cells(arrays.labels[by_joinid], max_cells, seed, even_labels=even_labels)
        chosen = by_joinid[found]
        tasks, num_cpus, _ = share_of_cluster(1, self.read_cpus)
        calls = [
            (self.atlas, reference, chosen[first : first + _CELLS_PER_SAMPLE_TASK])
            for first in range(0, len(chosen), _CELLS_PER_SAMPLE_TASK)
        ]
        parts: list[CellCounts] = map_tasks(read_checked, calls, num_cpus=num_cpus, at_once=tasks)
        cells = CellCounts.joined(parts, arrays.panels.take(chosen))
        return Sample(cells, arrays.joinids[chosen], arrays.labels[chosen])

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the arrays if Ray can pass them by reference: every rank gets a pickled stream."""
        if ray.is_initialized():
            self._shared()
        state = dict(self.__dict__)
        if self._reference is not None:
            state["_arrays"] = None
        return state

    def _shared(self) -> ray.ObjectRef:
        if self._reference is None:
            self._reference = ray.put(self._arrays)
        return self._reference

    def _tokenized(self, tokenizer: CellTokenizer, epoch: int, table: pa.Table) -> tuple[Batch, int]:
        """The batch of a table, and how many of its cells were truncated; must be thread-safe."""
        arrays, packed = self.arrays, PackedCells.from_table(table)
        positions = table["cell"].to_numpy()
        real, cells = positions >= 0, np.maximum(positions, 0)
        joinids, labels = (np.where(real, values[cells], -1) for values in (arrays.joinids, arrays.labels))
        counts_ng = packed.counts_ng(len(self.vocabulary))
        counts = CellCounts(counts_ng, packed.total_n, arrays.panels.take(cells))
        if self.augmentation is not None:
            counts = self.augmentation(counts, joinids, epoch)
        tokens = tokenizer(counts)
        tokens["token_ids"][~real] = PAD
        batch = {
            "token_ids": torch.from_numpy(tokens["token_ids"]).long(),
            "values": torch.from_numpy(tokens["values"]),
            "bin_ids": torch.from_numpy(tokens["bin_ids"]).long(),
            "labels": torch.from_numpy(labels),
            "joinids": torch.from_numpy(joinids),
            "measured": torch.from_numpy(counts.panels.measured_pg),
            "panels": torch.from_numpy(counts.panels.panels_n),
        }
        if self.weights is not None:
            batch["weights"] = torch.from_numpy(np.where(real, self.weights[cells], 0))
        return batch, tokens["num_cut"]


class _Collate(ArrowBatchCollateFn):
    """Called by Ray Data, in its threads, with the rows of each micro-batch."""

    def __init__(self, tokenized: Callable[[pa.Table], tuple[Batch, int]]) -> None:
        self._tokenized = tokenized

    def __call__(self, batch: pa.Table) -> tuple[Batch, int]:
        return self._tokenized(batch)
