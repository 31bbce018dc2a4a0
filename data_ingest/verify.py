"""Verify an atlas: compare the sums over X with `raw_sum` and `nnz` of each cell."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping

import numpy as np

from data_ingest import schema
from data_ingest.ingest_journal import Target, read_journal

logger = logging.getLogger(__name__)

_MOST_NAMED = 5


def verify_atlas(atlas_uri: str, tiledb_config: Mapping[str, str] | None = None) -> int:
    """Read all of X and compare the total and number of each cell's counts with obs.

    This finds cells whose counts are missing, belong to another cell, were written twice, or changed on disk.

    Args:
        atlas_uri: A path or `s3://...`.
        tiledb_config: Passed to TileDB unchanged.

    Returns:
        The number of cells, all correct.

    Raises:
        ValueError: There is no atlas, an ingest is unfinished, or cells are wrong (the first are listed).
    """
    context = schema.soma_context(tiledb_config, threads=os.cpu_count() or 1)
    target = Target(schema.atlas_place(atlas_uri), context)
    if not schema.find_atlas(target.uri, context):
        raise ValueError(f"--atlas {atlas_uri} does not exist; there is nothing to verify")
    if read_journal(target).writing:
        raise ValueError(
            f"--atlas {atlas_uri} has an unfinished ingest; run that command again, then verify the atlas"
        )
    with target.table(schema.OBS) as table:
        columns = ["soma_joinid", "dataset_id", "obs_id", "raw_sum", "nnz"]
        obs = table.read(column_names=columns).concat().to_pandas()
    size = int(obs["soma_joinid"].max()) + 1 if len(obs) else 0
    sums, numbers = np.zeros(size), np.zeros(size, np.int64)
    with target.matrix(schema.X) as matrix:
        for part in matrix.read().tables():
            joinids = part["soma_dim_0"].to_numpy()
            known = joinids < size
            counts = part["soma_data"].to_numpy()[known]
            sums += np.bincount(joinids[known], weights=counts, minlength=size)
            numbers += np.bincount(joinids[known][counts != 0], minlength=size)
    place = obs["soma_joinid"].to_numpy()
    wrong = (sums[place] != obs["raw_sum"].to_numpy()) | (numbers[place] != obs["nnz"].to_numpy())
    if wrong.any():
        shown = ", ".join(
            f"{cell.obs_id!r} of {cell.dataset_id!r} (sum {sums[cell.soma_joinid]:g}, not {cell.raw_sum:g})"
            for cell in obs[wrong].head(_MOST_NAMED).itertuples()
        )
        raise ValueError(
            f"--atlas {atlas_uri}: the counts of {wrong.sum()} of {len(obs)} cells have changed since they"
            f" were ingested: {shown}{', ...' if wrong.sum() > _MOST_NAMED else ''}; create the atlas"
            " again from its files"
        )
    return len(obs)
