"""Find genes among the columns of an input: the one matcher, for models and for ingests.

Names of genes arrive dressed: with blanks, versions (`ENSG00000156738.18`), `_PAR_Y`, a genome
(`GRCh38_CD3D`), an id and a symbol in one (`ENSG00000167286_CD3D`), R's `make.names` (`HLA.DRA`), or the
suffix that makes repeated names unique (`CD3D-1`). Columns of one gene are added up.

Axes: n cells, v columns of an input, g genes of the vocabulary.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from screformer.counts import CellCounts, Panels, raw_counts
from screformer.tokenizer import GeneVocabulary

MIN_GENE_OVERLAP = 0.1
"""Least share of the model's expected expression that the input's genes must carry. By expression and not by
number of genes, because a panel of a thousand well-chosen genes tells types apart, while a vocabulary of a
whole atlas is mostly genes that are never seen."""

NAME_COLUMNS = ("feature_name", "gene_symbol", "gene_symbols", "gene_name", "gene_names", "symbol")
"""var columns of symbols, where their content does not decide."""

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
    """The human Ensembl gene id in a text, without version or `_PAR_Y`; "" where there is none."""
    found = _HUMAN_ID.search(text)
    if found is None:
        return ""
    return f"ENSG{found[1]}" if found[1] else f"ENSG0{found[2]}"


def texts_of(values: Sequence[Any] | pd.Index | pd.Series) -> np.ndarray:
    """Values as stripped texts, object (v,), "" where one is missing."""
    missing = pd.isna(pd.Series(values, dtype=object)).to_numpy()
    pairs = zip(values, missing, strict=True)
    return np.array(["" if gone else str(value).strip() for value, gone in pairs], dtype=object)


class Symbols:
    """Gene symbols and the ids that they stand for; finds a symbol also when it is dressed."""

    def __init__(self, pairs: Sequence[tuple[str, str]]) -> None:
        """Read pairs of symbol and feature id; a symbol of several ids stands for none of them."""
        ids: dict[str, set[str]] = {}
        for symbol, feature_id in pairs:
            if symbol:
                ids.setdefault(symbol, set()).add(feature_id)
        self._id_of = {symbol: next(iter(found)) for symbol, found in ids.items() if len(found) == 1}
        self.ambiguous = frozenset(symbol for symbol, found in ids.items() if len(found) > 1)
        upper = (symbol.upper() for symbol in ids)
        self._upper = frozenset(upper)

    def exact(self, name: str) -> str:
        """The id of a symbol as it is written, else ""."""
        return self._id_of.get(name, "")

    def dressed(self, name: str, prefix: str = "") -> str:
        """The id of a symbol behind a prefix or an id, or with its signs replaced as R does it, else ""."""
        bare = _HUMAN_ID.sub("", name.removeprefix(prefix)).strip("_|:.- ")
        for text in (bare, _GENOME.sub("", bare, count=1)):
            found = self._id_of.get(text) or self._by_letters.get(_letters(text))
            if found:
                return found
        return ""

    def looks_like_mouse(self, name: str) -> bool:
        """Whether a name is one of these but for its case, in the way of mouse and rat (`Cd3d`)."""
        return bool(_MOUSE_SYMBOL.match(name)) and name.upper() in self._upper

    @cached_property
    def _by_letters(self) -> dict[str, str]:
        """Ids by `_letters` of their symbol, where one symbol alone has them."""
        found: dict[str, set[str]] = {}
        for symbol, feature_id in self._id_of.items():
            letters = _letters(symbol)
            found.setdefault(letters, set()).add(feature_id)
            if letters[:1].isdigit():
                found.setdefault("X" + letters, set()).add(feature_id)
        return {letters: next(iter(ids)) for letters, ids in found.items() if len(ids) == 1}


def _letters(symbol: str) -> str:
    """A symbol with all its signs as dots, as R's `make.names` leaves it."""
    return re.sub(r"[^A-Za-z0-9]", ".", symbol)


@dataclass(frozen=True, eq=False, kw_only=True)
class Columns:
    """What the columns of an input are."""

    feature_ids: np.ndarray
    """Id of each column's gene, object (v,); "" where it was not found. Columns may share a gene."""
    by_name: np.ndarray
    """Which columns were found by name, bool (v,)."""
    names: np.ndarray
    """Name of each column, object (v,), for reports."""
    num_ambiguous: int
    """Columns left out because their name stands for several genes."""
    species: str
    """Another species than human that most columns look like, with an example; empty where they don't."""

    @property
    def examples(self) -> str:
        """Some names that were not found, for messages."""
        lost = self.names[self.feature_ids == ""][:4]
        return ", ".join(repr(str(name)) for name in lost)


def find_genes(
    ids: np.ndarray, names: np.ndarray, symbols: Symbols, *, known: Mapping[str, int] | None = None
) -> Columns:
    """Find the gene of each column: by its id, else by its name.

    Args:
        ids: Text of each column that may hold an id, as `texts_of` gives it.
        names: Text of each column that may hold a symbol.
        symbols: Symbols that are known.
        known: Ids that are known; None takes every human Ensembl id.
    """
    if len(ids) != len(names):
        raise ValueError(
            f"genes have {len(ids)} ids but {len(names)} names; give one of each for every column"
        )
    ensembl = [ensembl_id(text) for text in ids]
    if known is None:
        found = list(ensembl)
    else:
        own = (human or text for human, text in zip(ensembl, ids, strict=True))
        found = [text if text in known else "" for text in own]
    by_name = np.zeros(len(ids), dtype=bool)
    num_ambiguous = 0
    prefix = _common_prefix(names)
    for column, name in enumerate(names):
        if found[column] or not name:
            continue
        # A column whose id is known to be another gene is found by its exact name only.
        found[column] = symbols.exact(name) or ("" if ensembl[column] else symbols.dressed(name, prefix))
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
        num_ambiguous=num_ambiguous,
        species=_other_species(ids, names, symbols),
    )


def find_genes_of_var(
    var: pd.DataFrame, symbols: Symbols, *, known: Mapping[str, int] | None = None, id_column: str = ""
) -> tuple[Columns, str]:
    """Find the gene of each row of a table of genes.

    Ids and names are each taken from where most of them are, index or text column.

    Args:
        var: A row per column of the counts, as `AnnData.var`.
        symbols: Symbols that are known.
        known: Ids that are known; None takes every human Ensembl id.
        id_column: Ids are in this column.

    Returns:
        The columns, and where their ids are, for reports.
    """
    places = {"var index": texts_of(var.index)}
    for name, column in var.items():
        if not pd.api.types.is_numeric_dtype(column.dtype):
            places[f"var column {name}"] = texts_of(column)

    def num_ids(place: str) -> tuple[int, int]:
        texts = [ensembl_id(text) or text for text in places[place]]
        own = sum(text in known for text in texts) if known is not None else 0
        return own, sum(bool(_HUMAN_ID.match(text) or _FOREIGN_ID.search(text)) for text in texts)

    def num_names(place: str) -> tuple[int, bool]:
        named = place.removeprefix("var column ") in NAME_COLUMNS
        return sum(bool(symbols.exact(text)) for text in places[place]), named

    def num_dressed(place: str) -> int:
        return sum(bool(symbols.dressed(text)) for text in places[place])

    id_place = f"var column {id_column}" if id_column else max(places, key=num_ids)
    if id_place not in places:
        places[id_place] = texts_of(var[id_column])
    name_place = max(places, key=num_names)
    if not num_names(name_place)[0]:
        name_place = max(places, key=num_dressed)
    return find_genes(places[id_place], places[name_place], symbols, known=known), id_place


def _common_prefix(names: np.ndarray) -> str:
    """What most names begin with, up to a sign: a genome or a sample; "" where nothing is common."""
    heads = Counter(head[0] for name in names if (head := re.match(r"[^_:|]+[_:|]+", name)))
    prefix, times = heads.most_common(1)[0] if heads else ("", 0)
    return prefix if len(names) > 1 and 2 * times > len(names) else ""


def _other_species(ids: np.ndarray, names: np.ndarray, symbols: Symbols) -> str:
    """What most columns look like, if not human: ids with a species in them, or symbols as of mouse."""
    foreign = [found[0] for text in ids if (found := _FOREIGN_ID.search(text))]
    if 2 * len(foreign) > len(ids):
        prefix = foreign[0].rstrip("0123456789")
        return f"ids such as {foreign[0]} ({_SPECIES.get(prefix, 'not human')})"
    mouse = [name for name in names if symbols.looks_like_mouse(name)]
    if len(mouse) > sum(bool(symbols.exact(name)) or name in symbols.ambiguous for name in names):
        return f"symbols such as {mouse[0]} instead of {mouse[0].upper()} (mouse or rat)"
    return ""


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
    """Columns left out because several genes of the model have their name."""
    num_model_genes: int
    """Genes of the model, found or not."""
    expression_share: float
    """Share of the model's expected expression that the found genes carry, in [0, 1]."""
    species: str = ""
    """Another species than human that most columns look like, with an example; empty where they don't."""
    examples: str = ""
    """Some names of columns that were not found."""

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
        looks = f" These are genes of another species: {self.species}." if self.species else ""
        names = f" Not found: {self.examples}, ..." if self.examples else ""
        raise ValueError(
            f"{source}: too few genes: {self}; at least {minimum:.1%} of the expression is needed."
            f"{names}{looks} Give human Ensembl gene ids"
            " (ENSG...) or HGNC symbols; another species needs its own model"
        )

    def select(
        self,
        counts_nv: Any,
        *,
        source: str = "input",
        place: Callable[[int, int], str] | None = None,
        elsewhere: str = "",
    ) -> CellCounts:
        """Raw counts over the model's genes, from a matrix over the columns that were matched.

        Args:
            counts_nv: Raw counts, cells by columns, dense or sparse, of any dtype.
            source: Where they come from, for messages.
            place: Names the cell and gene of a row and column, where they have names.
            elsewhere: Where counts may be instead.

        Raises:
            ValueError: Another number of columns, or a value that is no raw count.
        """
        if counts_nv.shape[1] != len(self.vocabulary_index):
            raise ValueError(
                f"{source}: counts have {counts_nv.shape[1]} columns, but genes were matched for"
                f" {len(self.vocabulary_index)}"
            )
        counts = raw_counts(counts_nv, source=source, place=place, elsewhere=elsewhere)
        total_n = np.asarray(counts.sum(axis=1, dtype=np.float64)).ravel()
        return CellCounts.of(
            counts @ self._to_genes,
            total_n=total_n,
            panels=Panels.one(self.measured_g, counts.shape[0]),
        )

    @cached_property
    def _to_genes(self) -> sparse.csr_matrix:
        """Adds up the columns of each gene, float32 (v, g)."""
        known = np.flatnonzero(self.vocabulary_index >= 0)
        entries = (np.ones(len(known), dtype=np.float32), (known, self.vocabulary_index[known]))
        return sparse.csr_matrix(entries, shape=(len(self.vocabulary_index), self.num_model_genes))


class GeneMatcher:
    """Finds the genes of a vocabulary."""

    def __init__(self, vocabulary: GeneVocabulary) -> None:
        self._vocabulary = vocabulary
        self._known = {feature_id: index for index, feature_id in enumerate(vocabulary.feature_ids)}
        self._symbols = Symbols(list(zip(vocabulary.feature_names, vocabulary.feature_ids, strict=True)))

    def match(self, feature_ids: Sequence[str], names: Sequence[str] | None = None) -> GeneMatch:
        """Find the model's genes among columns.

        Args:
            feature_ids: Ensembl id of each column; anything else that stands there is simply not found.
            names: Gene symbol of each column; None takes `feature_ids` for both.
        """
        ids = texts_of(feature_ids)
        return self._match(
            find_genes(ids, ids if names is None else texts_of(names), self._symbols, known=self._known)
        )

    def match_var(self, var: pd.DataFrame) -> GeneMatch:
        """Find the model's genes in a table of genes, a row per column of the counts, as `AnnData.var`."""
        return self._match(find_genes_of_var(var, self._symbols, known=self._known)[0])

    def _match(self, columns: Columns) -> GeneMatch:
        index = self._vocabulary.index(columns.feature_ids.tolist())
        by_id = np.unique(index[(index >= 0) & ~columns.by_name])
        index[columns.by_name & np.isin(index, by_id)] = -1  # a gene is taken once, by its id
        weight = self._vocabulary.mean_expression_g
        if not weight.any():
            weight = np.ones(len(self._vocabulary), dtype=np.float32)
        found = np.unique(index[index >= 0])
        return GeneMatch(
            vocabulary_index=index,
            num_by_id=len(by_id),
            num_by_name=len(found) - len(by_id),
            num_ambiguous=columns.num_ambiguous,
            num_model_genes=len(self._vocabulary),
            expression_share=float(weight[found].sum(dtype=np.float64) / weight.sum(dtype=np.float64)),
            species=columns.species,
            examples=columns.examples,
        )
