"""Where cells to be labelled or explained come from.

An .h5ad file or an atlas query, read a few at a time in any process.

Axes: n cells.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import pandas as pd
from scipy import sparse

from data_ingest.atlas import MEASUREMENT, located, open_atlas, pinned
from data_ingest.datasource import read_cells
from data_ingest.h5ad import H5adFile, check_counts
from data_ingest.query import MAJOR, QueryResult, find_cells
from screformer.config import AtlasConfig, QueryConfig
from screformer.genes import GeneMatch
from screformer.predictor import Predictor
from screformer.tokenizer import GeneVocabulary, Panels

_CELLS_PER_READ = 2048


_CELLS_PER_CSC_READ = 16384  # each read of a CSC matrix costs a pass over all of it


class FlatCounts(NamedTuple):
    """Detected genes of cells as flat lists, as `Predictor.predict` takes them."""

    gene_ids: np.ndarray
    counts: np.ndarray
    offsets: np.ndarray
    total_counts: np.ndarray
    panels: Panels


class CellSource(Protocol):
    """Cells that can be read by position. Picklable and small; opens what it reads where it reads."""

    @property
    def num_cells(self) -> int:
        """How many."""

    def names(self, positions: np.ndarray) -> np.ndarray:
        """Name of each cell, object (n,)."""

    def labels(self, positions: np.ndarray) -> np.ndarray:
        """Known label of each cell, object (n,), "" where none is known."""

    def read(self, positions: np.ndarray) -> FlatCounts:
        """Raw counts over the model's genes of cells at increasing positions."""

    def panels(self, positions: np.ndarray) -> Panels:
        """Which of the model's genes were measured in which cells."""

    def identity(self) -> dict[str, str]:
        """What it is, as plain values that change with the cells."""

    @property
    def column_major(self) -> bool:
        """Whether each read passes over all cells, so that few large reads are better."""


@dataclass(frozen=True, eq=False)
class H5adCells:
    """Cells of one .h5ad file."""

    path: Path
    layer: str | None
    raw: bool
    match: GeneMatch
    num_cells: int
    label_column: str
    column_major: bool

    @classmethod
    def open(
        cls,
        predictor: Predictor,
        path: Path,
        *,
        min_gene_overlap: float,
        layer: str | None = None,
        raw: bool = False,
        label_column: str = "",
    ) -> H5adCells:
        """Find the model's genes in a file.

        Args:
            predictor: The model.
            path: The file.
            min_gene_overlap: As `GeneMatch.require`.
            layer: Counts are in this layer instead of X.
            raw: Counts are in `raw.X` instead of X.
            label_column: obs column of known labels; taken where the file has it.

        Raises:
            ValueError: An unreadable file, or too few genes.
        """
        with H5adFile.open(path, layer=layer, raw=raw) as file:
            match = predictor.match_var(file.var)
            match.require(min_gene_overlap, source=f"{path} ({file.source})")
            column = label_column if label_column in file.obs else ""
            return cls(path.resolve(), layer, raw, match, file.n_cells, column, file.format == "csc")

    def names(self, positions: np.ndarray) -> np.ndarray:
        """As `CellSource.names`."""
        return self._obs.index.astype(str).to_numpy(dtype=object)[positions]

    def labels(self, positions: np.ndarray) -> np.ndarray:
        """As `CellSource.labels`."""
        if not self.label_column:
            return np.full(len(positions), "", dtype=object)
        return (
            self._obs[self.label_column]
            .astype(object)
            .fillna("")
            .astype(str)
            .to_numpy(dtype=object)[positions]
        )

    def read(self, positions: np.ndarray) -> FlatCounts:
        """As `CellSource.read`.

        Raises:
            ValueError: Values that are no raw counts.
        """
        known = np.flatnonzero(self.match.vocabulary_index >= 0)
        entries = (np.ones(len(known), dtype=np.float32), (known, self.match.vocabulary_index[known]))
        to_genes = sparse.csr_matrix(
            entries, shape=(len(self.match.vocabulary_index), self.match.num_model_genes)
        )
        rows, totals = [], []
        with H5adFile.open(self.path, layer=self.layer, raw=self.raw) as file:
            size = _CELLS_PER_CSC_READ if self.column_major else _CELLS_PER_READ
            for first in np.unique(positions // size) * size:
                inside = positions[(positions >= first) & (positions < first + size)]
                start, stop = int(inside[0]), int(inside[-1]) + 1
                for _, counts in file.chunks(size, start=start, stop=stop):
                    chosen = counts[inside - start]
                    check_counts(counts, file=file, start=start)
                    totals.append(np.asarray(chosen.sum(axis=1, dtype=np.float64)).ravel())
                    rows.append(chosen @ to_genes)
        matrix = sparse.vstack(rows, format="csr")
        matrix.eliminate_zeros()
        counts, offsets = matrix.data.astype(np.float32), matrix.indptr.astype(np.int64)
        return FlatCounts(matrix.indices, counts, offsets, np.concatenate(totals), self.panels(positions))

    def panels(self, positions: np.ndarray) -> Panels:
        """As `CellSource.panels`: the genes that the file has."""
        return Panels.one(self.match.measured_g, len(positions))

    def identity(self) -> dict[str, str]:
        """As `CellSource.identity`."""
        stat = self.path.stat()
        return {
            "h5ad": str(self.path),
            "bytes": str(stat.st_size),
            "changed": str(stat.st_mtime_ns),
            "counts": self.layer or str(self.raw),
        }

    @cached_property
    def _obs(self) -> pd.DataFrame:
        with H5adFile.open(self.path, layer=self.layer, raw=self.raw) as file:
            return file.obs

    def __getstate__(self) -> dict[str, object]:
        """Without obs, which each process reads itself if it needs it."""
        return {name: value for name, value in self.__dict__.items() if name != "_obs"}


@dataclass(frozen=True, eq=False)
class AtlasCells:
    """Cells of an atlas query."""

    atlas: AtlasConfig
    joinids: np.ndarray
    known: Sequence[str]
    gene_of_var: np.ndarray
    every_panel: Panels
    query_hash: str

    @classmethod
    def open(cls, predictor: Predictor, result: QueryResult, *, min_gene_overlap: float) -> AtlasCells:
        """Find the model's genes in an atlas.

        Raises:
            ValueError: Too few genes.
        """
        with open_atlas(result.atlas) as experiment:
            var = experiment.ms[MEASUREMENT].var.read(column_names=["soma_joinid", "feature_id"]).concat()
        ids = var["feature_id"].to_pylist()
        match = predictor.match_genes(ids, [""] * len(ids))
        match.require(min_gene_overlap, source=f"atlas {result.atlas.uri}")
        joinids = var["soma_joinid"].to_numpy()
        gene_of_var = np.full(int(joinids.max(initial=-1)) + 1, -1, dtype=np.int32)
        gene_of_var[joinids] = match.vocabulary_index
        labels = (
            result.obs["label"].astype(object).where(result.obs["label"].notna(), "").astype(str).tolist()
        )
        panels = result.panels(gene_of_var, len(predictor.vocabulary))
        return cls(result.atlas, result.obs_joinids, labels, gene_of_var, panels, result.hash)

    @property
    def num_cells(self) -> int:
        """As `CellSource.num_cells`."""
        return len(self.joinids)

    @property
    def column_major(self) -> bool:
        """As `CellSource.column_major`: an atlas is not."""
        return False

    def names(self, positions: np.ndarray) -> np.ndarray:
        """As `CellSource.names`: the joinids."""
        return self.joinids[positions].astype(str).astype(object)

    def labels(self, positions: np.ndarray) -> np.ndarray:
        """As `CellSource.labels`."""
        return np.array(self.known, dtype=object)[positions]

    def read(self, positions: np.ndarray) -> FlatCounts:
        """As `CellSource.read`."""
        offsets, genes, counts, totals = read_cells(self.atlas, self.joinids[positions], self.gene_of_var)
        return FlatCounts(genes, counts, offsets, totals, self.panels(positions))

    def panels(self, positions: np.ndarray) -> Panels:
        """As `CellSource.panels`: the genes that the cell's dataset measured."""
        return self.every_panel.take(positions)

    def identity(self) -> dict[str, str]:
        """As `CellSource.identity`."""
        return {
            "atlas": self.atlas.uri,
            "timestamp_ms": str(self.atlas.timestamp_ms),
            "query_hash": self.query_hash,
        }


def query_cells(
    predictor: Predictor, uri: str, obs_filter: str, *, min_gene_overlap: float, resumed: Path | None = None
) -> AtlasCells:
    """Cells of an atlas that fulfil a filter.

    Args:
        predictor: The model.
        uri: The atlas.
        obs_filter: The filter.
        min_gene_overlap: As `GeneMatch.require`.
        resumed: JSON file with the `source` (`CellSource.identity`) of a run that may be there already: of
            the same atlas, the version that it took is taken again. None, and where there is no such file,
            takes the newest.

    Raises:
        ValueError: No such atlas, a filter that it does not understand, no cells, or too few genes.
    """
    atlas = located(AtlasConfig(uri=uri))
    if resumed is not None and resumed.exists():
        source = json.loads(resumed.read_text()).get("source", {})
        if source.get("atlas") == atlas.uri:
            atlas = dataclasses.replace(atlas, timestamp_ms=int(source["timestamp_ms"]))
    atlas = pinned(atlas)
    with open_atlas(atlas) as experiment:
        has_labels = predictor.label_column == MAJOR or predictor.label_column in experiment.obs.schema.names
    result = find_cells(
        atlas, QueryConfig(obs_filter=obs_filter), predictor.label_column if has_labels else "cell_type"
    )
    return AtlasCells.open(predictor, result, min_gene_overlap=min_gene_overlap)


def vocabulary_names(vocabulary: GeneVocabulary) -> np.ndarray:
    """A readable name of each gene: its symbol, or its id where it has none."""
    pairs = zip(vocabulary.feature_names, vocabulary.feature_ids, strict=True)
    return np.array([name or feature_id for name, feature_id in pairs], dtype=object)
