"""Convert a file's obs to the columns of the atlas."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from data_ingest import schema
from data_ingest.h5ad import H5adFile
from data_ingest.ingest_options import DERIVED, IngestOptions
from data_ingest.ontology import UNKNOWN, is_cell_term
from screformer.answers import PROVENANCE, original_column, predicted_columns

_SOURCES: dict[str, tuple[str, ...]] = {"dataset_id": ("dataset_id", "dataset")}
"""Accepted names in files for atlas columns, if not just the same name."""
_NO_VALUE = ("", "nan", "none", "na", "n/a", "<na>", "null", "unknown")
_TERM = re.compile(r"CL:\d{7}")
COMPARED = ("dataset_id", "donor_id", "cell_type")
"""Columns whose values are checked for inconsistent spelling."""


def standard_obs(file: H5adFile, options: IngestOptions) -> tuple[pd.DataFrame, list[str]]:
    """The file's obs in the atlas's columns, and remarks for the user.

    Surrounding and repeated whitespace is removed. Predictions of our models are not used as labels; the
    column they replaced is used instead, if it was kept.

    Raises:
        ValueError: A column is missing, a value is impossible, or a cell name appears twice.
    """
    obs = file.obs
    predicted = predicted_columns(obs.columns, file.uns(PROVENANCE))
    columns: dict[str, Any] = {"obs_id": obs.index.to_numpy(dtype=object)}
    notes: list[str] = []
    for name in schema.OBS_COLUMNS:
        if name in DERIVED:
            continue
        source = _source(name, file, options, predicted)
        if source in predicted:
            source = original_column(name, obs.columns)
            instead = f"{source!r} is used instead" if source else "so its cells have no author label"
            notes.append(f"obs column {name!r} has model predictions, not labels; {instead}")
        if name == "is_primary_data":
            columns[name] = _primary(file, source, options.constants.get(name))
        elif source is not None:
            columns[name] = _texts(obs[source])
        else:
            default = options.constants.get(name, Path(file.path).stem if name == "dataset_id" else UNKNOWN)
            columns[name] = pd.Categorical.from_codes(np.zeros(file.n_cells, np.int8), [default])
    table = pd.DataFrame(columns, index=pd.RangeIndex(file.n_cells))
    _refuse_repeated_cells(file, table)
    _check_terms(file, table, options)
    for name in COMPARED:
        notes += [f"{name}: {text}" for text in look_alikes(table[name].cat.categories)]
    return table, notes


def look_alikes(values: Iterable[str], known: Iterable[str] = ()) -> list[str]:
    """One sentence for each group of values that differ only in case, plural or punctuation.

    Args:
        values: All values.
        known: Groups that consist only of these values are left out.
    """
    known = set(known)
    groups: dict[str, list[str]] = {}
    for value in values:
        key = re.sub(r"[\s_\-.,]+", " ", value.casefold()).strip().removesuffix("s")
        groups.setdefault(key, []).append(value)
    return [
        f"{', '.join(map(repr, sorted(group)))} are different values; if they mean the same, use one spelling"
        for group in groups.values()
        if len(group) > 1 and not known.issuperset(group)
    ]


def is_newer_term(term: str) -> bool:
    """Whether this looks like a Cell Ontology term that is newer than the installed ontology."""
    return bool(_TERM.fullmatch(term)) and not is_cell_term(term)


def _source(name: str, file: H5adFile, options: IngestOptions, predicted: set[str]) -> str | None:
    """The file's column for an atlas column."""
    columns = file.obs.columns
    asked = options.obs_map.get(name)
    if asked is None:
        return next((column for column in _SOURCES.get(name, (name,)) if column in columns), None)
    if asked not in columns:
        has = ", ".join(map(str, columns)) or "none"
        raise ValueError(
            f"{file.path}: obs has no column {asked!r} (--obs-map {name}={asked}); it has: {has}"
        )
    if asked in predicted:
        raise ValueError(
            f"{file.path}: obs column {asked!r} (--obs-map {name}={asked}) has model predictions, not"
            f" labels; use the author's column, or copy it to another name after checking it"
        )
    return asked


def _texts(column: pd.Series) -> pd.Categorical:
    """A column as text with normalised whitespace; `unknown` for missing values."""
    category = column.astype("category")
    texts = [" ".join(str(value).split()) for value in category.cat.categories]
    texts = [UNKNOWN if text.casefold() in _NO_VALUE else text for text in texts]
    codes = category.cat.codes.to_numpy()
    return pd.Categorical(np.array([*texts, UNKNOWN], dtype=object)[codes])


def _refuse_repeated_cells(file: H5adFile, table: pd.DataFrame) -> None:
    repeated = table.duplicated(["dataset_id", "obs_id"], keep=False).to_numpy()
    if repeated.any():
        first = int(np.flatnonzero(repeated)[0])
        cell = table["obs_id"].iloc[first]
        other = int(np.flatnonzero(table["obs_id"].to_numpy() == cell)[1])
        raise ValueError(
            f"{file.path}: cell {cell!r} appears twice in obs (rows {first} and {other}), {repeated.sum()}"
            f" such cells; cell names must be unique: use adata.obs_names_make_unique()"
        )


def _check_terms(file: H5adFile, table: pd.DataFrame, options: IngestOptions) -> None:
    terms = table["cell_type_ontology_term_id"]
    for term in terms.cat.categories:
        if term != UNKNOWN and not _TERM.fullmatch(term):
            source = options.obs_map.get("cell_type_ontology_term_id", "cell_type_ontology_term_id")
            row = int(np.flatnonzero(terms == term)[0])
            raise ValueError(
                f"{file.path}: obs column {source!r} has {term!r} (cell {table['obs_id'].iloc[row]!r}),"
                f" which is not a Cell Ontology term such as CL:0000084; correct it or write 'unknown'"
            )


def _primary(file: H5adFile, source: str | None, constant: str | None) -> np.ndarray:
    """`is_primary_data`: the file's column, else the constant, else whether `duplicate_of` is empty."""
    words = {"true": True, "1": True, "false": False, "0": False}
    if source is None and constant is not None:
        if constant.lower() not in words:
            raise ValueError(f"--set is_primary_data={constant}: it must be true or false")
        return np.full(file.n_cells, words[constant.lower()])
    if source is not None:
        text = file.obs[source].astype(str).str.lower()
        wrong = text[~text.isin(list(words))]
        if len(wrong):
            raise ValueError(
                f"{file.path}: obs column {source!r} (is_primary_data) has"
                f" {file.obs[source].loc[wrong.index[0]]!r} "
                f"at cell {wrong.index[0]!r}; it must be true or false"
            )
        return text.map(words).to_numpy(bool)
    if "duplicate_of" in file.obs.columns:
        copies = file.obs["duplicate_of"]
        return (copies.isna() | copies.astype(str).str.casefold().isin(_NO_VALUE)).to_numpy()
    return np.ones(file.n_cells, bool)
