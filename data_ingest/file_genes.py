"""The Ensembl ids of a file's genes.

Axes: g genes of the file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from data_ingest.h5ad import H5adFile
from data_ingest.tables import listing
from screformer.gene_names import Symbols, find_genes_of_var

Duplicates = Literal["error", "sum", "drop"]

MIN_JOINED_SHARE = 0.5
"""Least share of a file's counts that its joined genes must carry; most files reach 0.95."""
_CELLS_LOOKED_AT = 256


@dataclass(frozen=True, kw_only=True)
class Genes:
    """The genes of one file, in the order of its columns.

    Attributes:
        feature_ids: Ensembl gene ids without version, shape (g,); empty where the gene could not be joined.
        names: Symbols, shape (g,); the feature id where the file has none.
        source: Where the ids came from, for reports.
        num_repeated: Genes whose id another gene of the file has too: their counts are to be added (`sum`) or
            were left out (`drop`).
    """

    feature_ids: np.ndarray
    names: np.ndarray
    source: str
    num_repeated: int


def find_file_genes(
    file: H5adFile,
    *,
    feature_id_column: str | None = None,
    symbols: dict[str, str] | None = None,
    duplicates: Duplicates = "error",
) -> Genes:
    """Find each gene's Ensembl id.

    Taken from `feature_id_column`, else from where most ids are. What is left is looked up by symbol, where a
    symbol table is given. `screformer.gene_names` says how names may be dressed.

    Args:
        file: The file.
        feature_id_column: var column of Ensembl ids; an error if it is not there.
        symbols: Symbol to feature id, from `read_symbol_table`.
        duplicates: When several genes have one id (old and new symbols of one gene, as a rule): `error`
            refuses the file, `sum` lets all keep the id, so that the caller adds up their counts, `drop`
            treats them as not joined.

    Raises:
        ValueError: No gene can be joined, or those that can carry too few of the counts; the column is
            missing, genes are of another species, or two genes have one id.
    """
    var, path = file.var, file.path
    if feature_id_column is not None and feature_id_column not in var.columns:
        raise ValueError(
            f"{path}: var has no column {feature_id_column!r} (--feature-id-column); it has:"
            f" {listing(var.columns)}"
        )
    pairs = Symbols(list((symbols or {}).items()))
    columns, source = find_genes_of_var(var, pairs, id_column=feature_id_column or "")
    feature_ids = columns.feature_ids
    if columns.species:
        raise ValueError(
            f"{path}: its genes are of another species, {columns.species}; atlases hold one species"
            " (Homo sapiens): map the genes to human orthologs, or leave the file out"
        )
    if columns.by_name.any():
        source = "symbol table" if columns.by_name.all() else f"{source} and symbol table"
    if not (feature_ids != "").any():
        raise ValueError(
            f"{path}: no gene can be joined: {source} holds no Ensembl gene ids (its names are"
            f" {columns.examples}, ...); name their column with --feature-id-column (var has:"
            f" {listing(var.columns)}), or bring --symbol-table TABLE"
        )
    repeated = pd.Series(feature_ids).duplicated(keep=False).to_numpy() & (feature_ids != "")
    if repeated.any() and duplicates == "error":
        first = np.flatnonzero(repeated)[0]
        pair = np.flatnonzero(feature_ids == feature_ids[first])[:2]
        raise ValueError(
            f"{path}: genes {var.index[pair[0]]!r} and {var.index[pair[1]]!r} are both"
            f" {feature_ids[first]} "
            f"({repeated.sum()} such genes); add up their counts with --duplicate-genes sum, leave them"
            f" out with "
            "--duplicate-genes drop, or correct the file"
        )
    if duplicates == "drop":
        feature_ids[repeated] = ""
    lost = _lost_share(file, columns.counted_v, feature_ids != "")
    lost_text = f"{lost:.1%} of the counts are in columns that cannot be joined, such as {columns.examples}"
    if 1 - lost < MIN_JOINED_SHARE:
        raise ValueError(
            f"{path}: only {(feature_ids != '').sum():,} of {len(feature_ids):,} columns can be joined, by"
            f" {source}: {lost_text}; at most {1 - MIN_JOINED_SHARE:.0%} may be lost. Name the column of"
            f" Ensembl ids with --feature-id-column (var has: {listing(var.columns)}), or bring another"
            f" --symbol-table"
        )
    if lost > 0.01:
        source = f"{source}; {lost_text}"
    return Genes(
        feature_ids=feature_ids,
        names=np.where(columns.names == "", feature_ids, columns.names).astype(object),
        source=source,
        num_repeated=int(repeated.sum()),
    )


def _lost_share(file: H5adFile, counted_v: np.ndarray, joined_v: np.ndarray) -> float:
    """Share of the counts of the first cells that would be lost, of all genes; antibodies are no genes."""
    lost_v = counted_v & ~joined_v
    if not lost_v.any():
        return 0.0
    _, counts = next(file.chunks(_CELLS_LOOKED_AT))
    totals = [float((counts @ columns_v.astype(np.float64)).sum()) for columns_v in (lost_v, counted_v)]
    return totals[0] / totals[1] if totals[1] else 0.0
