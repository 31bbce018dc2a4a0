"""Match the columns of an input to genes by name; used for models and for ingest.

Gene names come in many forms: with spaces, versions (`ENSG00000156738.18`), `_PAR_Y`, a genome
(`GRCh38_CD3D`), id and symbol combined (`ENSG00000167286_CD3D`), R's `make.names` (`HLA.DRA`), or a suffix
that makes repeated names unique (`CD3D-1`). Columns of the same gene are summed.

Axes: v columns of an input.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

NAME_COLUMNS = ("feature_name", "gene_symbol", "gene_symbols", "gene_name", "gene_names", "symbol")
"""Common names of var columns with symbols, used if their contents do not decide."""

FEATURE_TYPE_COLUMNS = ("feature_types", "feature_type", "feature_biotype")
"""var columns that distinguish genes from other features, as written by Cell Ranger and CELLxGENE."""

_NO_GENE_TYPE = re.compile(r"antibody|capture|peak|crispr|multiplex|spike|custom|hashtag|\btag|adt|hto", re.I)
_NO_GENE_NAME = re.compile(r"^ERCC-\d{5}$|TotalSeq|^(?:ADT|HTO|CMO|AB)[_:-]|^Hashtag|^CMO\d+$", re.I)
_HUMAN_ID = re.compile(r"(?<![A-Za-z0-9])ENSG(?:(\d{11})|R(\d{10}))(?!\d)(?:\.\d+)?(?:_PAR_Y)?")
_FOREIGN_ID = re.compile(r"(?<![A-Za-z0-9])ENS[A-Z]{3,4}G\d{11}")
_SPECIES = {
    "ENSMUSG": "mouse",
    "ENSRNOG": "rat",
    "ENSDARG": "zebrafish",
    "ENSMMUG": "macaque",
    "ENSSSCG": "pig",
}
_MOUSE_SYMBOL = re.compile(r"[A-Z][a-z0-9-]*[a-z][a-z0-9-]*$")
_GENOME = re.compile(r"(?:GRCh\d+|hg\d+|hs|human|homo_sapiens)[_:.\- ]+", re.IGNORECASE)
_REPEATED = re.compile(r"(.+)[-.]\d{1,2}")


def ensembl_id(text: str) -> str:
    """The human Ensembl gene id in a string, without version or `_PAR_Y`; "" if there is none."""
    found = _HUMAN_ID.search(text)
    if found is None:
        return ""
    return f"ENSG{found[1]}" if found[1] else f"ENSG0{found[2]}"


def texts_of(values: Sequence[Any] | pd.Index | pd.Series) -> np.ndarray:
    """Values as stripped text, object (v,), "" for missing ones."""
    missing = pd.isna(pd.Series(values, dtype=object)).to_numpy()
    pairs = zip(values, missing, strict=True)
    return np.array(["" if gone else str(value).strip() for value, gone in pairs], dtype=object)


class Symbols:
    """Maps gene symbols to ids, including symbols with prefixes or altered characters."""

    def __init__(self, pairs: Sequence[tuple[str, str]]) -> None:
        """Take pairs of symbol and feature id; symbols with several ids match none of them."""
        ids: dict[str, set[str]] = {}
        for symbol, feature_id in pairs:
            if symbol:
                ids.setdefault(symbol, set()).add(feature_id)
        self._id_of = {symbol: next(iter(found)) for symbol, found in ids.items() if len(found) == 1}
        self.ambiguous = frozenset(symbol for symbol, found in ids.items() if len(found) > 1)
        upper = (symbol.upper() for symbol in ids)
        self._upper = frozenset(upper)

    def exact(self, name: str) -> str:
        """The id of an exact symbol; "" if unknown."""
        return self._id_of.get(name, "")

    def variant(self, name: str, prefix: str = "") -> str:
        """The id of a symbol after a prefix or id, or altered by R's `make.names`; "" if unknown."""
        bare = _HUMAN_ID.sub("", name.removeprefix(prefix)).strip("_|:.- ")
        for text in (bare, _GENOME.sub("", bare, count=1)):
            found = self._id_of.get(text) or self._by_letters.get(_letters(text))
            if found:
                return found
        return ""

    def looks_like_mouse(self, name: str) -> bool:
        """Whether a name is a known symbol written in the case used for mouse and rat (`Cd3d`)."""
        return bool(_MOUSE_SYMBOL.match(name)) and name.upper() in self._upper

    @cached_property
    def _by_letters(self) -> dict[str, str]:
        """Ids by `_letters` of their symbol, if they are unique."""
        found: dict[str, set[str]] = {}
        for symbol, feature_id in self._id_of.items():
            letters = _letters(symbol)
            found.setdefault(letters, set()).add(feature_id)
            if letters[:1].isdigit():
                found.setdefault("X" + letters, set()).add(feature_id)
        return {letters: next(iter(ids)) for letters, ids in found.items() if len(ids) == 1}


def _letters(symbol: str) -> str:
    """A symbol with special characters replaced by dots, as by R's `make.names`."""
    return re.sub(r"[^A-Za-z0-9]", ".", symbol)


@dataclass(frozen=True, eq=False, kw_only=True)
class Columns:
    """The genes of an input's columns."""

    feature_ids: np.ndarray
    """Id of each column's gene, object (v,); "" if not found. Columns may share a gene."""
    by_name: np.ndarray
    """Which columns were found by name, bool (v,)."""
    names: np.ndarray
    """Name of each column, object (v,), for reports."""
    counted_v: np.ndarray
    """Which columns count towards a cell's library size, bool (v,): human genes, known or not, but not
    antibodies, tags, spike-ins or genes of other species."""
    num_ambiguous: int
    """Number of columns left out because their name matches several genes."""
    species: str
    """Non-human species that most columns appear to be from, with an example; empty otherwise."""

    @property
    def examples(self) -> str:
        """A few names that were not found, for messages."""
        lost = self.names[self.feature_ids == ""][:4]
        return ", ".join(repr(str(name)) for name in lost)


def find_genes(
    ids: np.ndarray,
    names: np.ndarray,
    symbols: Symbols,
    *,
    known: Mapping[str, int] | None = None,
    is_gene_v: np.ndarray | None = None,
) -> Columns:
    """Find the gene of each column by its id, or else by its name.

    Args:
        ids: Text of each column that may contain an id, as returned by `texts_of`.
        names: Text of each column that may contain a symbol.
        symbols: Known symbols.
        known: Known ids; None accepts every human Ensembl id.
        is_gene_v: Which columns are genes, if the input states this.
    """
    if len(ids) != len(names):
        raise ValueError(
            f"there are {len(ids)} gene ids but {len(names)} names; pass one of each for every column"
        )
    is_gene_v = np.ones(len(ids), dtype=bool) if is_gene_v is None else is_gene_v
    ids, names_of_genes = (np.where(is_gene_v, texts, "").astype(object) for texts in (ids, names))
    ensembl = [ensembl_id(text) for text in ids]
    if known is None:
        found = list(ensembl)
    else:
        own = (human or text for human, text in zip(ensembl, ids, strict=True))
        found = [text if text in known else "" for text in own]
    by_name = np.zeros(len(ids), dtype=bool)
    num_ambiguous = 0
    prefix = _common_prefix(names)
    for column, name in enumerate(names_of_genes):
        if found[column] or not name:
            continue
        # Columns with the id of another gene are matched only by exact name.
        found[column] = symbols.exact(name) or ("" if ensembl[column] else symbols.variant(name, prefix))
        by_name[column] = bool(found[column])
        num_ambiguous += name in symbols.ambiguous
    column_of = {name: column for column, name in reversed(list(enumerate(names)))}
    for column, name in enumerate(names):
        repeated = None if found[column] or ensembl[column] else _REPEATED.fullmatch(name)
        if repeated and (first := column_of.get(repeated[1])) is not None and by_name[first]:
            found[column] = found[first]
            by_name[column] = True
    return Columns(
        feature_ids=np.array(found, dtype=object),
        by_name=by_name,
        names=names,
        counted_v=is_gene_v & _counted(ids, names, ensembl, by_name),
        num_ambiguous=num_ambiguous,
        species=_other_species(ids, names, symbols),
    )


def find_genes_of_var(
    var: pd.DataFrame, symbols: Symbols, *, known: Mapping[str, int] | None = None, id_column: str = ""
) -> tuple[Columns, str]:
    """Find the gene of each row of a table of genes.

    Ids and names are read from the index or text column with the most matches. Rows marked as something other
    than a gene, for example in `feature_types`, are not genes, whatever their name.

    Args:
        var: A row per column of the counts, like `AnnData.var`.
        symbols: Known symbols.
        known: Known ids; None accepts every human Ensembl id.
        id_column: Column with the ids.

    Returns:
        The columns, and a description of where their ids were found.
    """
    places = {"var index": texts_of(var.index)}
    for name, column in var.items():
        if name == id_column or not pd.api.types.is_numeric_dtype(column.dtype):
            places[f"var column {name}"] = texts_of(column)

    def num_ids(place: str) -> tuple[int, int]:
        texts = [ensembl_id(text) or text for text in places[place]]
        own = sum(text in known for text in texts) if known is not None else 0
        return own, sum(bool(_HUMAN_ID.match(text) or _FOREIGN_ID.search(text)) for text in texts)

    def num_names(place: str) -> tuple[int, bool]:
        named = place.removeprefix("var column ") in NAME_COLUMNS
        return sum(bool(find(text)) for text in places[place]), named

    find = symbols.exact
    if not max(num_names(place)[0] for place in places):
        find = symbols.variant
    id_place = f"var column {id_column}" if id_column else max(places, key=num_ids)
    names = places[max(places, key=num_names)]
    typed_v = np.ones(len(var), dtype=bool)
    for name in set(FEATURE_TYPE_COLUMNS) & set(var.columns):
        typed_v &= ~np.array([bool(_NO_GENE_TYPE.search(text)) for text in texts_of(var[name])], dtype=bool)
    return find_genes(places[id_place], names, symbols, known=known, is_gene_v=typed_v), id_place


def _counted(ids: np.ndarray, names: np.ndarray, ensembl: list[str], by_name: np.ndarray) -> np.ndarray:
    human_v = np.array([bool(text) for text in ensembl], dtype=bool)
    if 2 * human_v.sum() > len(ids):  # if most columns have an id, one without an id is not a gene
        return human_v | by_name
    foreign = (_FOREIGN_ID.search(text) or _NO_GENE_NAME.search(text) for text in ids)
    other = (_NO_GENE_NAME.search(text) for text in names)
    return by_name | np.array([not (a or b) for a, b in zip(foreign, other, strict=True)], dtype=bool)


def _common_prefix(names: np.ndarray) -> str:
    """Prefix shared by most names, up to a separator (a genome or sample); "" if there is none."""
    heads = Counter(head[0] for name in names if (head := re.match(r"[^_:|]+[_:|]+", name)))
    prefix, times = heads.most_common(1)[0] if heads else ("", 0)
    return prefix if len(names) > 1 and 2 * times > len(names) else ""


def _other_species(ids: np.ndarray, names: np.ndarray, symbols: Symbols) -> str:
    """Describe the columns if most are not human (ids of another species or mouse-style symbols); else ""."""
    foreign = [found[0] for text in ids if (found := _FOREIGN_ID.search(text))]
    if 2 * len(foreign) > len(ids):
        prefix = foreign[0].rstrip("0123456789")
        return f"ids like {foreign[0]} ({_SPECIES.get(prefix, 'not human')})"
    mouse = [name for name in names if symbols.looks_like_mouse(name)]
    if len(mouse) > sum(bool(symbols.exact(name)) or name in symbols.ambiguous for name in names):
        return f"symbols like {mouse[0]} instead of {mouse[0].upper()} (mouse or rat)"
    return ""
