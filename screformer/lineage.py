"""Cell Ontology terms above a model's labels.

Axes: k classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Term:
    """A Cell Ontology term above several of a model's labels."""

    cl_id: str
    name: str
    labels: tuple[int, ...]
    """Classes at or below the term, increasing."""


@dataclass(frozen=True, kw_only=True)
class Lineage:
    """The terms above each label that cover more than that label but not all labels.

    Built at training time (`data_ingest.ontology.lineage`), so prediction does not need the ontology.
    """

    terms: tuple[Term, ...] = ()
    above_k: tuple[tuple[int, ...], ...] = ()
    """Indices of each class's terms, nearest first (fewest labels first)."""

    def to_json(self) -> dict[str, Any]:
        """Plain values; the inverse of `from_json`."""
        terms = [{"cl_id": term.cl_id, "name": term.name, "labels": list(term.labels)} for term in self.terms]
        return {"terms": terms, "above": [list(indices) for indices in self.above_k]}

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> Lineage:
        """The inverse of `to_json`."""
        terms = tuple(
            Term(cl_id=term["cl_id"], name=term["name"], labels=tuple(term["labels"]))
            for term in tree["terms"]
        )
        return cls(terms=terms, above_k=tuple(tuple(indices) for indices in tree["above"]))
