"""Roll up Cell Ontology terms to first-tier ("major") cell types.

A term belongs to the most specific configured type among itself and its ancestors. Terms broader than every
configured type ("leukocyte", "progenitor cell") belong to none, because choosing one would invent a label.
Terms under several unrelated types belong to the type that `before` ranks first; otherwise they are ambiguous
and belong to none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from data_ingest.tables import read_table
from screformer.lineage import Lineage, Term

UNKNOWN = "unknown"
Outcome = Literal["mapped", "none", "ambiguous", "missing", "newer"]


@dataclass(frozen=True, kw_only=True)
class MajorType:
    """A first-tier cell type.

    Attributes:
        name: Label in `cell_type_major`.
        cl_id: Term in `cell_type_major_ontology_term_id`.
        also: Further terms whose descendants belong here although they are not below `cl_id` in the ontology.
        before: Names of types over which this one takes precedence for terms below both.
    """

    name: str
    cl_id: str
    also: tuple[str, ...] = ()
    before: tuple[str, ...] = ()


MAJOR_TYPES: tuple[MajorType, ...] = (
    MajorType(name="T cell", cl_id="CL:0000084"),
    MajorType(name="B cell", cl_id="CL:0000236"),
    # Plasma cells are not below B cell in the ontology, and their expression has little in common with it.
    MajorType(name="plasma cell", cl_id="CL:0000786"),
    # Natural killer cells are innate lymphoid cells; the more specific type takes precedence.
    MajorType(name="natural killer cell", cl_id="CL:0000623"),
    MajorType(name="innate lymphoid cell", cl_id="CL:0001065"),
    # Cells committed to one lineage belong to it, even if the ontology calls them precursors.
    MajorType(name="monocyte", cl_id="CL:0000576", before=("hematopoietic precursor cell",)),
    MajorType(name="macrophage", cl_id="CL:0000235"),
    MajorType(name="dendritic cell", cl_id="CL:0000451"),
    MajorType(name="granulocyte", cl_id="CL:0000094", before=("hematopoietic precursor cell",)),
    MajorType(name="mast cell", cl_id="CL:0000097"),
    # Platelets are shed by megakaryocytes and carry their transcripts; the ontology has no term for both.
    MajorType(name="megakaryocyte/platelet", cl_id="CL:0000556", also=("CL:0000233",)),
    MajorType(name="erythroid lineage cell", cl_id="CL:0000764", before=("hematopoietic precursor cell",)),
    MajorType(name="hematopoietic precursor cell", cl_id="CL:0008001"),
    MajorType(name="neuron", cl_id="CL:0000540"),
    # Radial glia, neuroblasts, glioblasts and neural stem cells are dividing cells of the developing brain
    # without a common term.
    MajorType(
        name="neural progenitor cell",
        cl_id="CL:0011020",
        also=("CL:0000681", "CL:0000031", "CL:0000030", "CL:0000047", "CL:0000337"),
    ),
    MajorType(name="astrocyte", cl_id="CL:0000127"),
    MajorType(name="oligodendrocyte", cl_id="CL:0000128"),
    MajorType(name="oligodendrocyte precursor cell", cl_id="CL:0002453"),
    MajorType(name="microglial cell", cl_id="CL:0000129"),
    MajorType(name="Schwann cell", cl_id="CL:0002573"),
    MajorType(name="ependymal cell", cl_id="CL:0000065"),
    MajorType(name="endothelial cell", cl_id="CL:0000115"),
    # The ontology also places neuroendocrine epithelial cells (such as pancreatic D cells) under neuron.
    MajorType(name="epithelial cell", cl_id="CL:0000066", before=("neuron",)),
    MajorType(name="hepatocyte", cl_id="CL:0000182"),
    MajorType(name="mesothelial cell", cl_id="CL:0000077"),
    # Fibroblasts of muscle or the renal cortex are also below terms for the organ's own cells.
    MajorType(name="fibroblast", cl_id="CL:0000057", before=("epithelial cell", "skeletal muscle cell")),
    MajorType(name="pericyte", cl_id="CL:0000669"),
    MajorType(name="smooth muscle cell", cl_id="CL:0000192"),
    MajorType(name="cardiac muscle cell", cl_id="CL:0000746"),
    MajorType(name="skeletal muscle cell", cl_id="CL:0000188"),
    MajorType(name="adipocyte", cl_id="CL:0000136"),
    MajorType(name="chondrocyte", cl_id="CL:0000138"),
    MajorType(name="osteoblast", cl_id="CL:0000062"),
    MajorType(name="melanocyte", cl_id="CL:0000148"),
    MajorType(name="germ cell", cl_id="CL:0000586"),
)
"""The default set: types that most atlases annotate and that expression alone can distinguish."""


@dataclass(frozen=True, kw_only=True)
class RollUp:
    """Result of rolling up a term; `name` and `cl_id` are `unknown` unless `outcome` is `mapped`."""

    name: str
    cl_id: str
    outcome: Outcome
    candidates: tuple[str, ...]


class MajorTypes:
    """A configured set of major types.

    Picklable. Reads the ontology shipped with `cellxgene-ontology-guide`, offline.
    """

    def __init__(self, types: Sequence[MajorType] = MAJOR_TYPES) -> None:
        """Check the set.

        Raises:
            ValueError: A term is not in the ontology, or a name or term appears twice.
        """
        self.types = tuple(types)
        self._by_term: dict[str, MajorType] = {}
        names: set[str] = set()
        for major in self.types:
            if major.name in names:
                raise ValueError(f"major type {major.name!r} appears twice")
            names.add(major.name)
            for term in (major.cl_id, *major.also):
                if not is_cell_term(term):
                    raise ValueError(
                        f"major type {major.name!r}: {term!r} is not a Cell Ontology term such as CL:0000084"
                    )
                if term in self._by_term:
                    raise ValueError(
                        f"term {term} is in two major types, {self._by_term[term].name!r} and {major.name!r}"
                    )
                self._by_term[term] = major

    @classmethod
    def from_table(cls, path: str | Path) -> MajorTypes:
        """Read a tab-separated table: `name`, `cl_id`, optionally `also` and `before` (comma-separated)."""
        table = read_table(path, "--major-types", ("name", "cl_id"))
        split = {
            name: [_split(v) for v in table[name]] if name in table.columns else [()] * len(table)
            for name in ("also", "before")
        }
        return cls(
            [
                MajorType(name=name, cl_id=cl_id, also=also, before=before)
                for name, cl_id, also, before in zip(
                    table["name"], table["cl_id"], split["also"], split["before"], strict=True
                )
            ]
        )

    def roll_up(self, cl_id: str) -> RollUp:
        """Find the major type of a term.

        Args:
            cl_id: A term such as `CL:0000895`; `unknown` or empty for a cell without one.

        Raises:
            ValueError: The term is not in the Cell Ontology.
        """
        if cl_id in ("", UNKNOWN):
            return RollUp(name=UNKNOWN, cl_id=UNKNOWN, outcome="missing", candidates=())
        if not is_cell_term(cl_id):
            raise ValueError(
                f"{cl_id!r} is not a Cell Ontology term; use an id such as CL:0000084, or 'unknown'"
            )
        hits = [term for term in (cl_id, *_ancestors(cl_id)) if term in self._by_term]
        nearest = [term for term in hits if not any(term in _ancestors(other) for other in hits)]
        found = {self._by_term[term].name: self._by_term[term] for term in nearest}
        lost = {name for major in found.values() for name in major.before}
        kept = [major for name, major in found.items() if name not in lost]
        candidates = tuple(sorted(found))
        if len(kept) == 1:
            return RollUp(name=kept[0].name, cl_id=kept[0].cl_id, outcome="mapped", candidates=candidates)
        return RollUp(
            name=UNKNOWN, cl_id=UNKNOWN, outcome="ambiguous" if kept else "none", candidates=candidates
        )


def is_cell_term(cl_id: str) -> bool:
    """Whether this is the id of a Cell Ontology term, including obsolete terms."""
    return cl_id.startswith("CL:") and cl_id in _ontology()


def cell_term_name(cl_id: str) -> str:
    """The name of a term in the ontology."""
    return str(_ontology()[cl_id]["label"])


def is_at_or_below(cl_id: str, general: str) -> bool:
    """Whether a term equals another one or is more specific."""
    return cl_id == general or (is_cell_term(cl_id) and general in _ancestors(cl_id))


_FORM = {"CL:0000000", "CL:0000003", "CL:0000255", "CL:0002242", "CL:0000226", "CL:0000548", "CL:0000219"}
"""Terms that describe a cell's form rather than its type: cell, native cell, eukaryotic, nucleate, single
nucleate, animal and motile cell."""


def lineage(cl_ids: Sequence[str]) -> Lineage:
    """The terms above the labels of a model, for `screformer.calibration`.

    Of ancestors that cover the same labels, only the nearest is kept. Ancestors that cover a single label or
    all labels, and terms of form like "nucleate cell", are left out because they carry no information.

    Args:
        cl_ids: Term of each class. Classes without one ("" or `unknown`) and ids missing from the ontology
            have no terms above them.
    """
    own = [cl_id if is_cell_term(cl_id) else "" for cl_id in cl_ids]
    holders = [_ancestors(cl_id) | {cl_id} if cl_id else frozenset() for cl_id in own]
    known = {code for code, cl_id in enumerate(own) if cl_id}
    terms: dict[str, Term] = {}
    chains: list[list[str]] = []
    for code, cl_id in enumerate(own):
        nearest: dict[tuple[int, ...], str] = {}
        distances = _ontology()[cl_id]["ancestors"] if cl_id else {}
        for term in sorted(distances, key=lambda term: (distances[term], term)):
            below = tuple(other for other in sorted(known) if term in holders[other])
            if term not in _FORM and 1 < len(below) < len(known) and code in below:
                nearest.setdefault(below, term)
        for below, term in nearest.items():
            terms[term] = Term(cl_id=term, name=cell_term_name(term), labels=below)
        chains.append(
            sorted(nearest.values(), key=lambda term: (len(terms[term].labels), distances[term], term))
        )
    order = sorted(terms)
    return Lineage(
        terms=tuple(terms[term] for term in order),
        above_k=tuple(tuple(order.index(term) for term in chain) for chain in chains),
    )


def _ancestors(cl_id: str) -> frozenset[str]:
    entry = _ontology()[cl_id]
    if entry.get("deprecated"):
        replacement = str(entry.get("replaced_by", ""))
        return _ancestors(replacement) | {replacement} if is_cell_term(replacement) else frozenset()
    return frozenset(entry["ancestors"])


@cache
def _ontology() -> dict[str, Any]:
    from cellxgene_ontology_guide.ontology_parser import OntologyParser

    return dict(OntologyParser().cxg_schema.ontology("CL"))


def _split(value: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in value.split(",") if part.strip())
