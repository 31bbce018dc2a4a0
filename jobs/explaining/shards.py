"""Saved explanations: the shards and functions that read them.

Axes: n cells, m pairs of cell and class, g genes, k classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import sparse

from jobs.reports.artifacts import EXPLAINED
from screformer.cell_tokens import CellTokens, cell_tokens
from screformer.cells import CellSource
from screformer.predictor import Predictor

SHARDS, BACKGROUND, GENES, PLAN = "values", "background.parquet", "genes.parquet", "plan.json"


@dataclass(frozen=True, eq=False, kw_only=True)
class Explanations:
    """The saved results of a finished run, as returned by `load_explanations`."""

    cells: pd.DataFrame
    """m rows: `cell`, `position`, `class`, `predicted`, `true`, `output`, `base`, `additivity_error`,
    `panel`."""
    values_mg: sparse.csr_matrix
    """Contribution of each gene to the class's logit, float32."""
    genes: pd.DataFrame
    """g rows: `feature_id`, `feature_name`, and `panel_0`, ...: whether the gene was measured in the cells of
    that `panel`."""

    def mean(self, label: str) -> pd.Series:
        """Mean contribution of each gene to a class, by gene name, largest first.

        The mean is over cells predicted to be of the class in which the gene was measured.
        """
        rows = ((self.cells["class"] == label) & (self.cells["predicted"] == label)).to_numpy()
        means = MeasuredMeans(1, self.genes)
        if rows.any():
            means.add(
                np.zeros(rows.sum(), np.int64), self.cells["panel"].to_numpy()[rows], self.values_mg[rows]
            )
        return pd.Series(means.mean_kg[0], index=self.genes["feature_name"]).sort_values(
            ascending=False, kind="stable"
        )


class MeasuredMeans:
    """Mean of each gene's value by class, over the cells whose data set measured the gene.

    Shards are added one at a time.
    """

    def __init__(self, num_classes: int, genes: pd.DataFrame) -> None:
        panels = [name for name in genes if name.startswith("panel_")]
        self._measured_pg = genes[panels].to_numpy().T
        self._sums_kg = np.zeros((num_classes, len(genes)))
        self._cells_kp = np.zeros((num_classes, len(panels)), dtype=np.int64)

    def add(self, codes_m: np.ndarray, panels_m: np.ndarray, values_mg: sparse.csr_matrix) -> None:
        """Add the rows of a shard."""
        entries = values_mg.tocoo()
        measured = self._measured_pg[panels_m[entries.row], entries.col]
        np.add.at(
            self._sums_kg, (codes_m[entries.row[measured]], entries.col[measured]), entries.data[measured]
        )
        np.add.at(self._cells_kp, (codes_m, panels_m), 1)

    @property
    def mean_kg(self) -> np.ndarray:
        """Mean value by class and gene, float64 (k, g)."""
        return self._sums_kg / np.maximum(self._cells_kp @ self._measured_pg, 1)

    @property
    def cells_k(self) -> np.ndarray:
        """Number of cells added, by class, int64 (k,)."""
        return self._cells_kp.sum(axis=1)


def load_explanations(out: str | Path) -> Explanations:
    """Read the output folder of a finished run.

    Raises:
        ValueError: The folder does not exist or the run is not finished.
    """
    out = Path(out)
    if not (out / EXPLAINED).is_file():
        raise ValueError(
            f"{out} has no finished explanations; run `python -m jobs.explain ... --out {out}` again to"
            f" resume where it stopped"
        )
    genes = pd.read_parquet(out / GENES)
    frames, rows = [], []
    for table in shards_of(out):
        frames.append(table.drop(columns=["genes", "values"]))
        rows.append(values_matrix(table, len(genes)))
    return Explanations(
        cells=pd.concat(frames, ignore_index=True), values_mg=sparse.vstack(rows, format="csr"), genes=genes
    )


def tokens_of(predictor: Predictor, source: CellSource, positions: np.ndarray) -> list[CellTokens]:
    """Tokens of the cells at some positions of a source."""
    cells = source.read(positions)
    return cell_tokens(predictor.tokenizer(cells), cells.panels)


def shards_of(out: Path) -> Iterator[pd.DataFrame]:
    """The finished shards as tables, in order."""
    for path in sorted((out / SHARDS).glob("*.parquet")):
        yield pd.read_parquet(path)


def values_matrix(table: pd.DataFrame, num_genes: int) -> sparse.csr_matrix:
    """A shard's values as a sparse matrix (m, g)."""
    offsets = np.concatenate([[0], np.cumsum([len(genes) for genes in table["genes"]])])
    columns, values = np.concatenate(table["genes"].tolist()), np.concatenate(table["values"].tolist())
    return sparse.csr_matrix((values, columns, offsets), shape=(len(table), num_genes))
