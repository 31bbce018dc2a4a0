"""Write labels into obs of the atlas that the cells came from."""

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
"""Of the obs columns in an atlas, whose own columns are never touched."""


def write_to_atlas(source: AtlasCells, folder: Path) -> None:
    """Put the labels into obs of the atlas they came from, as columns `screformer_...`.

    Cells outside the query keep what they had.

    The new columns make a new version of the atlas; a pinned one stays as it is. obs is held in memory for
    it.

    Raises:
        ValueError: A public release of Census, which nobody can write to.
    """
    if census_release(source.atlas) is not None:
        raise ValueError(f"{source.atlas.uri} cannot be written to; name a folder with --out instead")
    labels = pd.concat([pd.read_parquet(path) for path in shard_files(folder)]).set_index("cell")
    labels.index = labels.index.astype(np.int64)
    texts = labels.select_dtypes("category").columns
    labels = labels.astype(dict.fromkeys(texts, object))
    newest = dataclasses.replace(source.atlas, timestamp_ms=0)
    with open_atlas(newest) as experiment:
        obs, uri, context = experiment.obs.read().concat().to_pandas(), experiment.uri, experiment.context
    place = pd.Index(obs["soma_joinid"]).get_indexer(labels.index)
    assert (place >= 0).all(), "cells of the query are cells of the atlas"
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
    )  # the newest version, not a pinned one
    with tiledbsoma.Experiment.open(uri, "w", context=writable) as experiment:
        tiledbsoma.io.update_obs(experiment, obs.drop(columns="soma_joinid"))
