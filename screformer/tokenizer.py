"""From the counts of a cell to tokens.

Axes: n cells, l token slots, g genes of the vocabulary, p gene panels.

Three spaces of integers, never mixed: a gene's *index* in the vocabulary, its *token id* (index +
NUM_SPECIAL), and its joinid in an atlas, which does not occur here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse

from screformer.config import TokensConfig

PAD, CLS = 0, 1
"""Token ids of an unused slot and of the token that stands for the whole cell."""
NUM_SPECIAL = 2
"""The token id of gene i is i + NUM_SPECIAL."""

COUNTS_PER_CELL = 10_000.0
"""Expression values are log1p of counts per so many counts."""


@dataclass(frozen=True, eq=False)
class GeneVocabulary:
    """The genes that a model knows, in its order."""

    feature_ids: tuple[str, ...]
    """Such as ENSG00000156738; unique."""
    feature_names: tuple[str, ...]
    """Symbols; need not be unique."""
    mean_expression_g: np.ndarray
    """Mean log1p of counts per 10,000 over the training cells, float32; zeros where unknown."""

    def __post_init__(self) -> None:
        sizes = (len(self.feature_ids), len(self.feature_names), len(self.mean_expression_g))
        if len(set(sizes)) != 1:
            raise ValueError(
                f"a vocabulary has {sizes[0]} feature ids, {sizes[1]} names and {sizes[2]} mean expressions;"
                f" give one per gene"
            )
        if not self.feature_ids:
            raise ValueError("a vocabulary has no genes; check the var filter")
        if len(self._position) != len(self.feature_ids):
            first = next(name for index, name in enumerate(self.feature_ids) if self._position[name] != index)
            raise ValueError(f"feature id {first!r} stands twice in a vocabulary; ids must be unique")

    @cached_property
    def _position(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.feature_ids)}

    def __len__(self) -> int:
        return len(self.feature_ids)

    def index(self, feature_ids: Sequence[str]) -> np.ndarray:
        """Index of each gene, int32, -1 for those that the model does not know."""
        return np.fromiter(
            (self._position.get(name, -1) for name in feature_ids), dtype=np.int32, count=len(feature_ids)
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` gives the same vocabulary, to the bit."""
        return {
            "feature_ids": list(self.feature_ids),
            "feature_names": list(self.feature_names),
            "mean_expression": [float(value) for value in self.mean_expression_g],
        }

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> GeneVocabulary:
        """The inverse of `to_json`.

        Raises:
            ValueError: A part is missing, the parts differ in length, or an id stands twice.
        """
        missing = {"feature_ids", "feature_names", "mean_expression"} - set(tree)
        if missing:
            raise ValueError(
                f"a vocabulary lacks {', '.join(sorted(missing))}; it was not written by screformer"
            )
        return cls(
            tuple(tree["feature_ids"]),
            tuple(tree["feature_names"]),
            np.array(tree["mean_expression"], dtype=np.float32),
        )

    def save(self, path: str | Path) -> None:
        """Write JSON."""
        Path(path).write_text(json.dumps(self.to_json()))

    @classmethod
    def load(cls, path: str | Path) -> GeneVocabulary:
        """Read what `save` wrote."""
        return cls.from_json(json.loads(Path(path).read_text()))


@dataclass(frozen=True, eq=False)
class Panels:
    """Which of the vocabulary's genes were measured in which cells.

    A gene outside of a cell's panel is unknown there, not zero.
    """

    measured_pg: np.ndarray
    """Genes of each panel, bool (p, g)."""
    panels_n: np.ndarray
    """Panel of each cell, int64 (n,)."""

    @classmethod
    def one(cls, measured_g: np.ndarray, num_cells: int) -> Panels:
        """Cells that share a panel."""
        return cls(np.asarray(measured_g, dtype=bool)[None], np.zeros(num_cells, dtype=np.int64))

    def take(self, cells: np.ndarray) -> Panels:
        """Those of some cells, without the panels that none of them has."""
        used, panels_n = np.unique(self.panels_n[cells], return_inverse=True)
        return Panels(self.measured_pg[used], panels_n.astype(np.int64))


def normalised(counts_ng: sparse.csr_array | sparse.csr_matrix, total_n: np.ndarray) -> sparse.csr_array:
    """Expression values as `CellTokenizer` makes them, for many cells at once.

    Args:
        counts_ng: Raw counts.
        total_n: Counts of each cell over all measured genes, the library size.

    Returns:
        log1p of counts per 10,000, float32 (n, g).
    """
    values = sparse.csr_array(counts_ng, dtype=np.float32, copy=True)
    scale_n = COUNTS_PER_CELL / np.maximum(total_n, 1)
    values.data = np.log1p(values.data * np.repeat(scale_n, np.diff(values.indptr))).astype(np.float32)
    return values


class CellTokenizer:
    """Turns detected genes of cells into padded tokens. Pure, picklable, numpy only.

    A cell's tokens do not depend on the cells beside it, except for the number of padded slots at its end.

    Args:
        config: Input mode, length limit and expression encoding.
        vocabulary: The model's genes; their mean expression decides which genes a cell that is too long
            keeps.
    """

    def __init__(self, config: TokensConfig, vocabulary: GeneVocabulary):
        self.config = config
        self._mean_expression_g = np.asarray(vocabulary.mean_expression_g, dtype=np.float32)

    def __call__(
        self,
        gene_ids: np.ndarray,
        counts: np.ndarray,
        offsets: np.ndarray,
        *,
        total_counts: np.ndarray | None = None,
    ) -> dict[str, Any]:
        """Tokenize a batch of cells.

        Slot 0 is [CLS]; genes follow in the order of the vocabulary; PAD fills the rest. In `detected` mode a
        cell with more than
        `max_genes` genes keeps those whose value exceeds the gene's mean expression most (ties: the first
        gene).

        Args:
            gene_ids: Vocabulary indices of all cells one after another, integer, in [0, g); unique within a
                cell.
            counts: Raw counts beside them, >= 0; zeros are no genes.
            offsets: Cell i has the entries `offsets[i]:offsets[i + 1]`; integer, (n + 1,).
            total_counts: Counts of each cell over all measured genes, (n,), the library size; None sums the
                given counts.

        Returns:
            `token_ids` int32 (n, l); `values` float32 (n, l), log1p of counts per 10,000 (1 with `binary`), 0
            for [CLS], PAD and genes that are not detected; `bin_ids` int32 (n, l) in [0, num_bins), 0 exactly
            where the value is 0 (with `continuous` and
            `binary` 1 elsewhere);
            `num_cut`, the number of cells that lost genes. l is 1 + the number of genes of the longest cell.

        Raises:
            ValueError: The arrays do not fit together, an index is out of range, or a gene stands twice in a
                cell.
        """
        gene_ids, counts, offsets = (
            np.asarray(gene_ids),
            np.asarray(counts, dtype=np.float32),
            np.asarray(offsets, dtype=np.int64),
        )
        self._check(gene_ids, counts, offsets)
        num_cells, lengths_n = len(offsets) - 1, np.diff(offsets)
        if total_counts is None:
            total_counts = (
                np.add.reduceat(np.append(counts, 0), offsets[:-1], dtype=np.float64) * (lengths_n > 0)
                if num_cells
                else counts
            )
        scale_n = np.divide(
            COUNTS_PER_CELL, total_counts, out=np.zeros(num_cells), where=np.asarray(total_counts) > 0
        ).astype(np.float32)
        cells = np.repeat(np.arange(num_cells, dtype=np.int32), lengths_n)

        if counts.size and not counts.all():
            cells, gene_ids, counts = _select(counts > 0, cells, gene_ids, counts)
        if not _increasing(cells, gene_ids):
            order = np.lexsort((gene_ids, cells))
            cells, gene_ids, counts = _select(order, cells, gene_ids, counts)
            if not _increasing(cells, gene_ids):
                raise ValueError(
                    "a gene stands twice in a cell; sum the counts of entries with the same gene first"
                )

        cp10k = counts * scale_n[cells]
        values = np.log1p(cp10k)
        bins = self._bins(cells, values, cp10k, num_cells)
        if self.config.input_mode == "all":
            return self._every_gene(cells, gene_ids, self._shown(values), bins, num_cells)
        lengths_n = np.bincount(cells, minlength=num_cells)
        num_cut = int((lengths_n > self.config.max_genes).sum())
        if num_cut:
            cells, gene_ids, values, bins = _select(
                self._kept(cells, gene_ids, values, lengths_n), cells, gene_ids, values, bins
            )
            lengths_n = np.minimum(lengths_n, self.config.max_genes)

        slots = np.arange(1 + lengths_n.max(initial=0))
        gene_slots_nl = (slots > 0) & (slots <= lengths_n[:, None])
        tokens = _empty_tokens(num_cells, len(slots))
        tokens["token_ids"][gene_slots_nl] = gene_ids + NUM_SPECIAL
        tokens["values"][gene_slots_nl] = self._shown(values)
        tokens["bin_ids"][gene_slots_nl] = bins
        return {**tokens, "num_cut": num_cut}

    def _every_gene(
        self, cells: np.ndarray, gene_ids: np.ndarray, values: np.ndarray, bins: np.ndarray, num_cells: int
    ) -> dict[str, Any]:
        num_genes = len(self._mean_expression_g)
        tokens = _empty_tokens(num_cells, 1 + num_genes)
        tokens["token_ids"][:, 1:] = np.arange(NUM_SPECIAL, NUM_SPECIAL + num_genes)
        tokens["values"][cells, gene_ids + 1] = values
        tokens["bin_ids"][cells, gene_ids + 1] = bins
        return {**tokens, "num_cut": 0}

    def _shown(self, values: np.ndarray) -> np.ndarray:
        """What the network gets of the values.

        Which genes a cell keeps is decided before, alike for every encoding.
        """
        return np.ones_like(values) if self.config.expression == "binary" else values

    def _bins(self, cells: np.ndarray, values: np.ndarray, cp10k: np.ndarray, num_cells: int) -> np.ndarray:
        levels = self.config.num_bins - 1
        if self.config.expression in ("continuous", "binary"):
            return np.ones(len(values), dtype=np.int32)
        if self.config.expression == "log2_bins":
            return np.minimum(1 + np.log2(1 + cp10k).astype(np.int32), levels)
        # The share of a cell's genes with a smaller value. Positive floats sort like their bits, so one
        # integer carries cell and value.
        keys = (cells.astype(np.int64) << 32) | values.view(np.int32)
        distinct, which, repeats = np.unique(keys, return_inverse=True, return_counts=True)
        lengths_n = np.bincount(cells, minlength=num_cells)
        num_before = (np.cumsum(repeats) - repeats)[which] - (np.cumsum(lengths_n) - lengths_n)[cells]
        return (1 + levels * num_before // lengths_n[cells]).astype(np.int32)

    def _kept(
        self, cells: np.ndarray, gene_ids: np.ndarray, values: np.ndarray, lengths_n: np.ndarray
    ) -> np.ndarray:
        """Mask of the entries that stay, `max_genes` for each cell that is too long."""
        long_n = lengths_n > self.config.max_genes
        of_long = long_n[cells]
        genes, kept_lengths = gene_ids[of_long], lengths_n[long_n]
        # Order of the score in the upper half, the gene in the lower: distinct keys, hence one answer however
        # the cells are batched.
        bits = (values[of_long] - self._mean_expression_g[genes]).view(np.int32)
        ordered = np.where(bits < 0, bits ^ 0x7FFFFFFF, bits).astype(np.int64)
        keys = (ordered << 32) - genes
        width = int(kept_lengths.max())
        table = np.full((len(kept_lengths), width), np.iinfo(np.int64).min)
        table[np.arange(width) < kept_lengths[:, None]] = keys
        table.partition(width - self.config.max_genes, axis=1)
        keep = np.ones(len(cells), dtype=bool)
        keep[of_long] = keys >= np.repeat(table[:, width - self.config.max_genes], kept_lengths)
        return keep

    def _check(self, gene_ids: np.ndarray, counts: np.ndarray, offsets: np.ndarray) -> None:
        if len(gene_ids) != len(counts):
            raise ValueError(f"{len(gene_ids)} gene ids but {len(counts)} counts; give one count per gene")
        if not len(offsets) or offsets[0] != 0 or offsets[-1] != len(counts) or (np.diff(offsets) < 0).any():
            raise ValueError(f"offsets must rise from 0 to the number of counts ({len(counts)})")
        if not len(counts):
            return
        for bad in (gene_ids.min(), gene_ids.max()):
            if not 0 <= bad < len(self._mean_expression_g):
                raise ValueError(
                    f"gene id {bad} is outside the vocabulary of {len(self._mean_expression_g)} genes; drop"
                    f" unknown genes first"
                )
        if not counts.min() >= 0:
            raise ValueError(f"count {counts.min()} is not >= 0; give raw counts")


def _empty_tokens(num_cells: int, num_slots: int) -> dict[str, np.ndarray]:
    token_ids = np.full((num_cells, num_slots), PAD, dtype=np.int32)
    token_ids[:, 0] = CLS
    return {
        "token_ids": token_ids,
        "values": np.zeros((num_cells, num_slots), dtype=np.float32),
        "bin_ids": np.zeros((num_cells, num_slots), dtype=np.int32),
    }


def _select(which: np.ndarray, *arrays: np.ndarray) -> list[np.ndarray]:
    return [array[which] for array in arrays]


def _increasing(cells: np.ndarray, gene_ids: np.ndarray) -> bool:
    """Whether genes increase strictly inside each cell."""
    return bool(((gene_ids[1:] > gene_ids[:-1]) | (cells[1:] != cells[:-1])).all())
