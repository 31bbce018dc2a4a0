"""Find the Ensembl ids of a file's genes.

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
"""Minimum share of a file's counts in genes with an Ensembl id; most files reach 0.95."""
_CELLS_LOOKED_AT = 256


@dataclass(frozen=True, kw_only=True)
class Genes:
    """The genes of a file, in column order.

    Attributes:
        feature_ids: Ensembl gene ids without version, shape (g,); empty for genes without a match.
        names: Symbols, shape (g,); the feature id if the file has no symbol.
        source: Where the ids came from, for reports.
        num_repeated: Number of genes that share their id with another gene of the file. Their counts must be
            summed (`sum`) or they were left out (`drop`).
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

    Ids come from `feature_id_column`, or from wherever most ids are. Remaining genes are looked up by symbol
    if a symbol table is given. See `screformer.gene_names` for the accepted forms of names.

    Args:
        file: The file.
        feature_id_column: var column of Ensembl ids; must exist.
        symbols: Symbol to feature id, from `read_symbol_table`.
        duplicates: What to do if several genes share an id (usually old and new symbols of a gene): `error`
            rejects the file, `sum` keeps the id for all, so the caller sums their counts, `drop` treats them
            as unmatched.

    Raises:
        ValueError: No gene matches, too few of the counts are in matching genes, the column is missing, genes
            are of another species, or two genes share an id.
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
            f"{path}: its genes are of another species, {columns.species}; atlases are human only: map the"
            " genes to human orthologs, or leave the file out"
        )
    if columns.by_name.any():
        source = "symbol table" if columns.by_name.all() else f"{source} and symbol table"
    if not (feature_ids != "").any():
        raise ValueError(
            f"{path}: no gene can be matched: {source} has no Ensembl gene ids (its names are"
            f" {columns.examples}, ...); give their column with --feature-id-column (var has:"
            f" {listing(var.columns)}), or pass --symbol-table TABLE"
        )
    repeated = pd.Series(feature_ids).duplicated(keep=False).to_numpy() & (feature_ids != "")
    if repeated.any() and duplicates == "error":
        first = np.flatnonzero(repeated)[0]
        pair = np.flatnonzero(feature_ids == feature_ids[first])[:2]
        raise ValueError(
            f"{path}: genes {var.index[pair[0]]!r} and {var.index[pair[1]]!r} are both"
            f" {feature_ids[first]} "
            f"({repeated.sum()} such genes); sum their counts with --duplicate-genes sum, leave them"
            f" out with "
            "--duplicate-genes drop, or correct the file"
        )
    if duplicates == "drop":
        feature_ids[repeated] = ""
    lost = _lost_share(file, columns.counted_v, feature_ids != "")
    lost_text = f"{lost:.1%} of the counts are in unmatched columns, for example {columns.examples}"
    if 1 - lost < MIN_JOINED_SHARE:
        raise ValueError(
            f"{path}: only {(feature_ids != '').sum():,} of {len(feature_ids):,} columns can be matched, by"
            f" {source}: {lost_text}; at most {1 - MIN_JOINED_SHARE:.0%} may be lost. Give the column of"
            f" Ensembl ids with --feature-id-column (var has: {listing(var.columns)}), or pass another"
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
    """Share of the gene counts of the first cells that would be lost; antibodies are not genes."""
    lost_v = counted_v & ~joined_v
    if not lost_v.any():
        return 0.0
    _, counts = next(file.chunks(_CELLS_LOOKED_AT))
    totals = [float((counts @ columns_v.astype(np.float64)).sum()) for columns_v in (lost_v, counted_v)]
    return totals[0] / totals[1] if totals[1] else 0.0
