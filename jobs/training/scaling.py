"""Arithmetic of large trainings: what the stream of cells needs so that the workers do not wait for it.

The rates were measured on one core of a machine without a GPU (docs/scaling.md); time is proportional to the
number of detected genes.
"""

from __future__ import annotations

import math

from data_ingest.datasource import BLOCK_BYTES
from data_ingest.tasks import MOST_READ_TASKS

READ_S = {"atlas": 64e-9, "cache": 13e-9}
"""CPU seconds of a read task per count."""
BATCH_S = 40e-9
"""CPU seconds per count of the threads of a worker that turn cells into batches."""
CACHE_BYTES = 3.04
"""Size of a count in a shard cache."""
CELL_BYTES = 40
"""What each node holds per cell: joinid, label, panel, sum, weight, and row of the cache."""
READER_BYTES = 0.7e9
"""Memory of a read task."""
_CELLS_PER_REQUEST = {"atlas": 64 / 3, "cache": 256}
"""An atlas has three columns in tiles of 64 cells; a cache has blocks of 256."""


def stream_needs(
    *,
    num_cells: int,
    counts_per_cell: float,
    cells_per_s: float,
    num_workers: int,
    source: str,
) -> dict[str, float]:
    """What an epoch takes, and what reading its cells needs, over all workers.

    Args:
        num_cells: Training cells.
        counts_per_cell: Mean number of detected genes.
        cells_per_s: Speed of the training steps of all workers together.
        num_workers: Number of workers.
        source: `atlas` or `cache`.

    Returns:
        `hours_per_epoch`; `reader_cores` that keep up with the steps; `read_tasks_per_worker`, and
        `batch_threads_per_worker` in the workers themselves; `most_cells_per_s` that the stream can deliver;
        `reader_memory_gb` and `object_store_gb`; `node_gb` that each node holds; `requests_per_s` to an
        object store; and `cache_gb`, the size of a shard cache.
    """
    read_s, batch_s = (seconds * counts_per_cell for seconds in (READ_S[source], BATCH_S))
    tasks = min(MOST_READ_TASKS, math.ceil(cells_per_s * read_s / num_workers))
    return {
        "hours_per_epoch": num_cells / cells_per_s / 3600,
        "reader_cores": cells_per_s * read_s,
        "read_tasks_per_worker": tasks,
        "batch_threads_per_worker": cells_per_s * batch_s / num_workers,
        "most_cells_per_s": num_workers * min(MOST_READ_TASKS / read_s, 1 / batch_s),
        "reader_memory_gb": num_workers * tasks * READER_BYTES / 1e9,
        "object_store_gb": num_workers * (3 * tasks + 2) * BLOCK_BYTES / 1e9,
        "node_gb": num_cells * CELL_BYTES / 1e9,
        "requests_per_s": cells_per_s / _CELLS_PER_REQUEST[source],
        "cache_gb": num_cells * counts_per_cell * CACHE_BYTES / 1e9,
    }
