"""Look up which genes were measured in each cell of an atlas; others are unknown there, not zero."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from data_ingest.atlas import MEASUREMENT, experiment_of, open_root, reading
from screformer.config import AtlasConfig

PANELS = "screformer_panels"
"""Metadata key of the root collection that lists the panels."""


class Panel(NamedTuple):
    """Cells whose file measured different genes than their dataset's row in the presence matrix."""

    first: int
    """Joinid of the first cell."""
    end: int
    """One past the last."""
    row: int
    """Row of the presence matrix with their genes."""


def measured_genes(atlas: AtlasConfig, dataset_ids: Sequence[str], var_joinids: np.ndarray) -> np.ndarray:
    """Which genes each dataset measured.

    Args:
        atlas: Location and version.
        dataset_ids: The d datasets.
        var_joinids: Genes, (g,), increasing.

    Returns:
        bool (d, g), from the atlas's presence matrix. If the atlas does not list a dataset, all genes count
        as measured.

    Raises:
        ValueError: As for `open_atlas`.
    """
    with _presence(atlas) as presence:
        return presence.measured([presence.row_of.get(dataset, -1) for dataset in dataset_ids], var_joinids)


def measured_by_cells(
    atlas: AtlasConfig, dataset_ids: Sequence[str] | pd.Series, obs_joinids: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Which genes were measured in each cell: those of its dataset, or of its file if that differs.

    Args:
        atlas: Location and version.
        dataset_ids: Dataset of each cell, (n,).
        obs_joinids: Joinid of each cell, (n,).

    Returns:
        A panel index for each cell, (n,), and the var joinids measured by each panel, bool (d, v).

    Raises:
        ValueError: As for `open_atlas`.
    """
    with _presence(atlas) as presence:
        codes, datasets = pd.factorize(pd.Series(dataset_ids))
        rows_n = np.array([presence.row_of.get(dataset, -1) for dataset in datasets])[codes]
        for first, end, row in presence.panels:
            rows_n[(obs_joinids >= first) & (obs_joinids < end)] = row
        number_n, rows = pd.factorize(rows_n)
        return number_n, presence.measured(rows, np.arange(presence.num_genes))


def panels_of(root: Any) -> tuple[Panel, ...]:
    """The panels of an atlas, from its root collection."""
    return tuple(Panel(*panel) for panel in json.loads(root.metadata.get(PANELS, "[]")))


@dataclass(frozen=True)
class _Presence:
    """The open presence matrix of an atlas; None if it has none."""

    matrix: Any
    row_of: Mapping[str, int]
    panels: tuple[Panel, ...]
    num_genes: int
    """One more than the largest var joinid."""

    def measured(self, rows: Sequence[int], var_joinids: np.ndarray) -> np.ndarray:
        """Which genes are in each row, bool (d, g); all for row -1."""
        measured_dg = np.ones((len(rows), len(var_joinids)), bool)
        for index, row in enumerate(rows):
            if row >= 0:
                coords = ([int(row)], slice(int(var_joinids[0]), int(var_joinids[-1])))
                found = self.matrix.read(coords).tables().concat()
                present = found["soma_dim_1"].to_numpy()[found["soma_data"].to_numpy() > 0]
                measured_dg[index] = np.isin(var_joinids, present)
        return measured_dg


@contextmanager
def _presence(atlas: AtlasConfig) -> Iterator[_Presence]:
    root = open_root(atlas, dict(atlas.tiledb_config))
    try:
        with reading(atlas):
            yield _presence_in(atlas, root)
    finally:
        root.close()


def _presence_in(atlas: AtlasConfig, root: Any) -> _Presence:
    measurement = experiment_of(atlas, root).ms[MEASUREMENT]
    var = measurement.var.read(column_names=["soma_joinid"]).concat()
    num_genes = int(var["soma_joinid"].to_numpy().max(initial=-1)) + 1
    info = root.get("census_info", {})
    if "feature_dataset_presence_matrix" not in measurement or "datasets" not in info:
        return _Presence(None, {}, (), num_genes)
    known = info["datasets"].read(column_names=["soma_joinid", "dataset_id"]).concat().to_pydict()
    row_of = dict(zip(known["dataset_id"], known["soma_joinid"], strict=True))
    return _Presence(measurement["feature_dataset_presence_matrix"], row_of, panels_of(root), num_genes)
