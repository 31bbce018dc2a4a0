"""Match the genes of an input to those of a model, and check raw counts."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

MIN_GENE_OVERLAP = 0.1
"""Least share of the model's expected expression that the input's genes must carry. By expression and not by
number of genes, because a panel of a thousand well-chosen genes tells types apart, while a vocabulary of a
whole atlas is mostly genes that are never seen."""


_FOREIGN_ID = re.compile(r"ENS[A-Z]{3,4}G\d{11}")


_SPECIES = {
    "ENSMUSG": "mouse",
    "ENSRNOG": "rat",
    "ENSDARG": "zebrafish",
    "ENSMMUG": "macaque",
    "ENSSSCG": "pig",
}


_MOUSE_SYMBOL = re.compile(r"[A-Z][a-z0-9-]*[a-z][a-z0-9-]*$")


@dataclass(frozen=True, eq=False, kw_only=True)
class GeneMatch:
    """Which column of an input is which gene of the model."""

    vocabulary_index: np.ndarray
    """Vocabulary index of each input column, int32, -1 where the model does not know it. Columns of one gene
    are summed."""
    num_by_id: int
    """Genes of the model found by `feature_id`."""
    num_by_name: int
    """Genes of the model found by name."""
    num_ambiguous: int
    """Columns left out because several genes of the model, or several columns, have their name."""
    num_model_genes: int
    """Genes of the model, found or not."""
    expression_share: float
    """Share of the model's expected expression that the found genes carry, in [0, 1]."""
    species: str = ""
    """Another species than human that most columns look like, with an example; empty where they don't."""

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
        return (
            f"{self.num_found:,} of the model's {self.num_model_genes:,} genes found ({self.num_by_id:,} by"
            f" id, {self.num_by_name:,} by"
            f" name{ambiguous}), {self.expression_share:.1%} of the expression it knows"
        )

    def require(self, minimum: float, *, source: str) -> None:
        """Stop where the input has too few of the model's genes.

        Args:
            minimum: Least share of expected expression, in [0, 1].
            source: Whose genes they are, for the message.

        Raises:
            ValueError: Too few; the message says how many were found, and some names that were not
                understood.
        """
        if self.num_found and self.expression_share >= minimum:
            return
        looks = f"These are genes of another species: {self.species}. " if self.species else ""
        raise ValueError(
            f"{source}: too few genes: {self}; at least {minimum:.1%} of the expression is needed."
            f" {looks}Give human Ensembl gene ids"
            " (ENSG...) or HGNC symbols; another species needs its own model"
        )


def check_counts(values: np.ndarray, *, source: str) -> None:
    """Refuse anything that is no raw count.

    Args:
        values: Counts of any shape and dtype.
        source: Where they come from, for the message.

    Raises:
        ValueError: A missing, negative or fractional value; the message names the first one and what to do.
    """
    values = np.asarray(values).ravel()
    if values.dtype.kind not in "iufb":
        raise ValueError(
            f"{source}: counts are of type {values.dtype}, not numbers; keep cell names in the index, not in"
            f" a column"
        )
    if values.dtype.kind in "ub":
        return
    for bad, what in (
        (~np.isfinite(values), "is missing or infinite; fill genes that were not detected with 0"),
        (values < 0, "is negative, as after scaling; give raw counts"),
        (
            values != np.trunc(values),
            "is fractional, as after normalising or log1p; give raw counts (often in `layers['counts']` or"
            " `raw`)",
        ),
    ):
        if bad.any():
            raise ValueError(
                f"{source}: value {values[bad.argmax()]:g} {what}; whole numbers >= 0 are needed"
            )
