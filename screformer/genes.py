"""Match a model's genes to the columns of an input, and collect their counts.

Axes: n cells, v columns of an input, g genes of the vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from screformer.counts import CellCounts, Panels, raw_counts
from screformer.gene_names import Columns, Symbols, find_genes, find_genes_of_var, texts_of
from screformer.tokenizer import GeneVocabulary

logger = logging.getLogger(__name__)

MIN_GENE_OVERLAP = 0.1
"""Least share of the model's expected expression that the input's genes must carry. By expression and not by
number of genes, because a panel of a thousand well-chosen genes tells types apart, while a vocabulary of a
whole atlas is mostly genes that are never seen."""
_REPORTED_OVERLAP = 0.8
"""Below it, what was found is logged as a warning."""


@dataclass(frozen=True, eq=False, kw_only=True)
class GeneMatch:
    """Which column of an input is which gene of a model."""

    vocabulary_index: np.ndarray
    """Vocabulary index of each input column, int32, -1 for genes unknown to the model. Columns of the same
    gene are summed."""
    counted_v: np.ndarray
    """Which columns count towards the library size, bool (v,): human genes, known to the model or not."""
    num_by_id: int
    """Genes of the model found by `feature_id`."""
    num_by_name: int
    """Genes of the model found by name."""
    num_ambiguous: int
    """Columns left out because their name matches several genes of the model."""
    num_model_genes: int
    """Genes of the model, found or not."""
    expression_share: float
    """Share of the model's expected expression covered by the genes found, in [0, 1]."""
    species: str = ""
    """Non-human species that most columns appear to be from, with an example; empty otherwise."""
    examples: str = ""
    """A few names of columns that were not found."""

    @property
    def num_found(self) -> int:
        """Genes of the model that the input has."""
        return self.num_by_id + self.num_by_name

    @property
    def measured_g(self) -> np.ndarray:
        """Which genes of the model the input has, bool (g,)."""
        measured_g = np.zeros(self.num_model_genes, dtype=bool)
        measured_g[self.vocabulary_index[self.vocabulary_index >= 0]] = True
        return measured_g

    def __str__(self) -> str:
        ambiguous = f", {self.num_ambiguous:,} ambiguous ones left out" if self.num_ambiguous else ""
        others = int((~self.counted_v).sum())
        left_out = f"; {others:,} columns are not human genes and are ignored" if others else ""
        return (
            f"{self.num_found:,} of the model's {self.num_model_genes:,} genes found ({self.num_by_id:,} by"
            f" id, {self.num_by_name:,} by name{ambiguous}), covering {self.expression_share:.1%} of its"
            f" expected expression{left_out}"
        )

    def require(self, minimum: float, *, source: str) -> None:
        """Raise an error if the input has too few of the model's genes.

        Args:
            minimum: Minimum share of expected expression, in [0, 1].
            source: Origin of the genes, for the message.

        Raises:
            ValueError: Too few genes; the message gives the number found and some names that were not
                found.
        """
        if self.num_found and self.expression_share >= minimum:
            if self.expression_share < _REPORTED_OVERLAP and self.examples:
                logger.warning("%s: %s; not found: %s, ...", source, self, self.examples)
            return
        looks = f" These look like genes of another species: {self.species}." if self.species else ""
        names = f" Not found: {self.examples}, ..." if self.examples else ""
        raise ValueError(
            f"{source}: too few genes: {self}; at least {minimum:.1%} of the expression is needed."
            f"{names}{looks} Use human Ensembl gene ids"
            " (ENSG...) or HGNC symbols; other species need their own model"
        )

    def select(
        self,
        counts_nv: Any,
        *,
        source: str = "input",
        place: Callable[[int, int], str] | None = None,
        elsewhere: str = "",
    ) -> CellCounts:
        """Raw counts over the model's genes, from a matrix over the matched columns.

        Args:
            counts_nv: Raw counts, cells by columns, dense or sparse, of any dtype.
            source: Their origin, for messages.
            place: Names the cell and gene of a row and column, if they have names.
            elsewhere: Another place to look for counts.

        Raises:
            ValueError: The number of columns differs, or a value is not a raw count.
        """
        if counts_nv.shape[1] != len(self.vocabulary_index):
            raise ValueError(
                f"{source}: counts have {counts_nv.shape[1]} columns, but genes were matched for"
                f" {len(self.vocabulary_index)}"
            )
        counts = raw_counts(counts_nv, source=source, place=place, elsewhere=elsewhere)
        total_n = counts @ self.counted_v.astype(np.float64)
        return CellCounts.of(
            (self._to_genes @ counts.T.tocsr()).T.tocsr(),
            total_n=total_n,
            panels=Panels.one(self.measured_g, counts.shape[0]),
        )

    @cached_property
    def _to_genes(self) -> sparse.csr_matrix:
        """Matrix that sums the columns of each gene, float32 (g, v).

        Multiplied from the left, because columns then come out in order and need no sorting.
        """
        known = np.flatnonzero(self.vocabulary_index >= 0)
        entries = (np.ones(len(known), dtype=np.float32), (self.vocabulary_index[known], known))
        return sparse.csr_matrix(entries, shape=(self.num_model_genes, len(self.vocabulary_index)))


class GeneMatcher:
    """Finds the genes of a vocabulary."""

    def __init__(self, vocabulary: GeneVocabulary) -> None:
        self._vocabulary = vocabulary
        self._known = {feature_id: index for index, feature_id in enumerate(vocabulary.feature_ids)}
        self._symbols = Symbols(list(zip(vocabulary.feature_names, vocabulary.feature_ids, strict=True)))

    def match(self, feature_ids: Sequence[str], names: Sequence[str] | None = None) -> GeneMatch:
        """Find the model's genes among columns.

        Args:
            feature_ids: Ensembl id of each column; anything else counts as not found.
            names: Gene symbol of each column; None uses `feature_ids` for both.
        """
        ids = texts_of(feature_ids)
        return self._match(
            find_genes(ids, ids if names is None else texts_of(names), self._symbols, known=self._known)
        )

    def match_var(self, var: pd.DataFrame) -> GeneMatch:
        """Find the model's genes in a table with a row per column of the counts, like `AnnData.var`."""
        return self._match(find_genes_of_var(var, self._symbols, known=self._known)[0])

    def _match(self, columns: Columns) -> GeneMatch:
        index = self._vocabulary.index(columns.feature_ids.tolist())
        by_id = np.unique(index[(index >= 0) & ~columns.by_name])
        index[columns.by_name & np.isin(index, by_id)] = -1  # a gene found by id is not matched by name too
        weight = self._vocabulary.weight_g
        found = np.unique(index[index >= 0])
        return GeneMatch(
            vocabulary_index=index,
            counted_v=columns.counted_v,
            num_by_id=len(by_id),
            num_by_name=len(found) - len(by_id),
            num_ambiguous=columns.num_ambiguous,
            num_model_genes=len(self._vocabulary),
            expression_share=float(weight[found].sum(dtype=np.float64) / weight.sum(dtype=np.float64)),
            species=columns.species,
            examples=columns.examples,
        )
