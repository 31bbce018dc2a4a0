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
"""Minimum share of the model's expected expression that the input's genes must cover. It is measured by
expression rather than number of genes, because a panel of a thousand well-chosen genes can distinguish types,
while most genes in the vocabulary of a whole atlas are rarely detected."""
_REPORTED_OVERLAP = 0.8
"""Below this share, the match is logged as a warning."""


@dataclass(frozen=True, eq=False, kw_only=True)
class GeneMatch:
    """Assignment of an input's columns to a model's genes."""

    vocabulary_index: np.ndarray
    """Vocabulary index of each input column, int32, -1 for genes unknown to the model. Columns of the same
    gene are summed."""
    counted_v: np.ndarray
    """Which columns count towards the library size, bool (v,): human genes, known to the model or not."""
    num_by_id: int
    """Number of model genes found by `feature_id`."""
    num_by_name: int
    """Number of model genes found by name."""
    num_ambiguous: int
    """Number of columns left out because their name matches several model genes."""
    num_model_genes: int
    """Number of model genes, found or not."""
    expression_share: float
    """Share of the model's expected expression covered by the genes found, in [0, 1]."""
    species: str = ""
    """Non-human species that most columns appear to be from, with an example; empty otherwise."""
    examples: str = ""
    """A few names of columns that were not found."""

    @property
    def num_found(self) -> int:
        """Number of model genes in the input."""
        return self.num_by_id + self.num_by_name

    @property
    def measured_g(self) -> np.ndarray:
        """Which model genes are in the input, bool (g,)."""
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
        """Check that the input has enough of the model's genes.

        Args:
            minimum: Minimum share of expected expression, in [0, 1].
            source: Origin of the genes, for the message.

        Raises:
            ValueError: Too few genes match; the message gives their number and some names not found.
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

        It multiplies from the left, so the columns of the product are in order without sorting.
        """
        known = np.flatnonzero(self.vocabulary_index >= 0)
        entries = (np.ones(len(known), dtype=np.float32), (self.vocabulary_index[known], known))
        return sparse.csr_matrix(entries, shape=(self.num_model_genes, len(self.vocabulary_index)))


class GeneMatcher:
    """Matches the columns of inputs to the genes of a vocabulary."""

    def __init__(self, vocabulary: GeneVocabulary) -> None:
        self._vocabulary = vocabulary
        self._known = {feature_id: index for index, feature_id in enumerate(vocabulary.feature_ids)}
        self._symbols = Symbols(list(zip(vocabulary.feature_names, vocabulary.feature_ids, strict=True)))

    def match(self, feature_ids: Sequence[str], names: Sequence[str] | None = None) -> GeneMatch:
        """Match columns to the model's genes.

        Args:
            feature_ids: Ensembl id of each column; other text matches nothing.
            names: Gene symbol of each column; None uses `feature_ids` for both.
        """
        ids = texts_of(feature_ids)
        return self._match(
            find_genes(ids, ids if names is None else texts_of(names), self._symbols, known=self._known)
        )

    def match_var(self, var: pd.DataFrame) -> GeneMatch:
        """Match a table with a row per column of the counts, like `AnnData.var`, to the model's genes."""
        return self._match(find_genes_of_var(var, self._symbols, known=self._known)[0])

    def _match(self, columns: Columns) -> GeneMatch:
        index = self._vocabulary.index(columns.feature_ids.tolist())
        by_id = np.unique(index[(index >= 0) & ~columns.by_name])
        index[columns.by_name & np.isin(index, by_id)] = -1  # genes found by id are not also matched by name
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
