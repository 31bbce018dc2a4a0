"""Canonical marker genes of major cell types."""

from __future__ import annotations

from importlib import resources

import pandas as pd


def markers() -> pd.DataFrame:
    """Hand-picked marker genes: columns `cell_type`, `cl_id`, `symbol`, `feature_id`."""
    with resources.files("screformer").joinpath("markers.tsv").open() as file:
        return pd.read_csv(file, sep="\t", dtype=str)


def markers_of(table: pd.DataFrame, label: str, cl_id: str) -> pd.DataFrame:
    """The rows of `markers()` for a type, by its Cell Ontology id or its name."""
    return table[(table["cl_id"] == cl_id) | (table["cell_type"] == label)]
