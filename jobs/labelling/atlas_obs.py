"""Write labels to obs of the atlas that the cells came from."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
import tiledbsoma
import tiledbsoma.io

from data_ingest.atlas import census_release, open_atlas
from data_ingest.atlas_cells import AtlasCells
from jobs.labelling.shards import shard_files
from screformer.predictor import ANSWER_COLUMNS

OBS_PREFIX = "screformer_"
"""Prefix of the label columns in obs; the atlas's own columns are never changed."""


def write_to_atlas(source: AtlasCells, folder: Path) -> None:
    """Write the labels to obs of the cells' atlas, as columns `screformer_...`.

    Cells outside the query keep their values. Writing creates a new version of the atlas; a pinned version
    does not change. The whole obs table is read into memory.

    Raises:
        ValueError: The atlas is a public Census release, which is read-only.
    """
    if census_release(source.atlas) is not None:
        raise ValueError(f"{source.atlas.uri} is read-only; write to a folder with --out instead")
    labels = pd.concat([pd.read_parquet(path) for path in shard_files(folder)]).set_index("cell")
    labels.index = labels.index.astype(np.int64)
    texts = labels.select_dtypes("category").columns
    labels = labels.astype(dict.fromkeys(texts, object))
    newest = dataclasses.replace(source.atlas, timestamp_ms=0)
    with open_atlas(newest) as experiment:
        obs, uri, context = experiment.obs.read().concat().to_pandas(), experiment.uri, experiment.context
    place = pd.Index(obs["soma_joinid"]).get_indexer(labels.index)
    assert (place >= 0).all(), "every cell of the query is in the atlas"
    for name in ANSWER_COLUMNS:
        column, values = OBS_PREFIX + name, labels[name].to_numpy()
        if column not in obs:
            obs[column] = (
                ""
                if labels[name].dtype == object
                else False
                if labels[name].dtype == bool
                else np.float32("nan")
            )
        whole = obs[column].to_numpy(
            dtype=object if labels[name].dtype == object else labels[name].dtype, copy=True
        )
        whole[place] = values
        obs[column] = whole
    writable = tiledbsoma.SOMATileDBContext(
        tiledb_config=dict(context.tiledb_config)
    )  # the latest version, not a pinned one
    with tiledbsoma.Experiment.open(uri, "w", context=writable) as experiment:
        tiledbsoma.io.update_obs(experiment, obs.drop(columns="soma_joinid"))
