"""Turn the counts of a cell into tokens.

Axes: n cells, l token slots, g genes of the vocabulary.

Three kinds of integers must not be confused: a gene's *index* in the vocabulary, its *token id* (index +
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

from screformer.config import TokensConfig
from screformer.counts import CellCounts

PAD, CLS = 0, 1
"""Token ids of padding and of the token for the whole cell."""
NUM_SPECIAL = 2
"""The token id of gene i is i + NUM_SPECIAL."""


@dataclass(frozen=True, eq=False)
class GeneVocabulary:
    """The genes of a model, in order."""

    feature_ids: tuple[str, ...]
    """Ensembl ids, for example ENSG00000156738; unique."""
    feature_names: tuple[str, ...]
    """Symbols; need not be unique."""
    mean_expression_g: np.ndarray
    """Mean log1p of counts per 10,000 over the training cells, float32; zeros if unknown."""
    reference_g: np.ndarray | None = None
    """A typical profile used to scale values, float32; None scales by library size. See
    `CellCounts.per_10k`."""
    inputs_g: np.ndarray | None = None
    """Which genes become tokens, bool; None means all. Others still count towards the library size."""

    def __post_init__(self) -> None:
        sizes = (len(self.feature_ids), len(self.feature_names), len(self.mean_expression_g))
        if len(set(sizes)) != 1:
            raise ValueError(
                f"a vocabulary has {sizes[0]} feature ids, {sizes[1]} names and {sizes[2]} mean expressions;"
                f" pass one of each per gene"
            )
        if not self.feature_ids:
            raise ValueError("the vocabulary has no genes; check query.var_filter")
        if len(self._position) != len(self.feature_ids):
            first = next(name for index, name in enumerate(self.feature_ids) if self._position[name] != index)
            raise ValueError(f"feature id {first!r} appears twice in a vocabulary; ids must be unique")

    @cached_property
    def _position(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.feature_ids)}

    def __len__(self) -> int:
        return len(self.feature_ids)

    @property
    def weight_g(self) -> np.ndarray:
        """Expected expression of each gene that becomes a token, (g,); 1 if unknown."""
        weight_g = self.mean_expression_g
        if self.inputs_g is not None:
            weight_g = weight_g * self.inputs_g
        return weight_g if weight_g.any() else np.ones(len(self), dtype=np.float32)

    def index(self, feature_ids: Sequence[str]) -> np.ndarray:
        """Index of each gene, int32, -1 for unknown genes."""
        return np.fromiter(
            (self._position.get(name, -1) for name in feature_ids), dtype=np.int32, count=len(feature_ids)
        )

    @property
    def readable_names(self) -> np.ndarray:
        """Name of each gene, object (g,): its symbol, or its id if it has none."""
        pairs = zip(self.feature_names, self.feature_ids, strict=True)
        return np.array([name or feature_id for name, feature_id in pairs], dtype=object)

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` restores the same vocabulary exactly."""
        tree: dict[str, Any] = {
            "feature_ids": list(self.feature_ids),
            "feature_names": list(self.feature_names),
            "mean_expression": [float(value) for value in self.mean_expression_g],
        }
        if self.reference_g is not None:
            tree["reference"] = [float(value) for value in self.reference_g]
        if self.inputs_g is not None:
            tree["inputs"] = np.flatnonzero(self.inputs_g).tolist()
        return tree

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> GeneVocabulary:
        """The inverse of `to_json`.

        Raises:
            ValueError: A part is missing, the parts differ in length, or an id appears twice.
        """
        missing = {"feature_ids", "feature_names", "mean_expression"} - set(tree)
        if missing:
            raise ValueError(
                f"a vocabulary lacks {', '.join(sorted(missing))}; it was not written by screformer"
            )
        inputs_g = None
        if "inputs" in tree:
            inputs_g = np.zeros(len(tree["feature_ids"]), dtype=bool)
            inputs_g[tree["inputs"]] = True
        return cls(
            tuple(tree["feature_ids"]),
            tuple(tree["feature_names"]),
            np.array(tree["mean_expression"], dtype=np.float32),
            np.array(tree["reference"], dtype=np.float32) if "reference" in tree else None,
            inputs_g,
        )

    def save(self, path: str | Path) -> None:
        """Write as JSON."""
        Path(path).write_text(json.dumps(self.to_json()))

    @classmethod
    def load(cls, path: str | Path) -> GeneVocabulary:
        """Read a file written by `save`."""
        return cls.from_json(json.loads(Path(path).read_text()))


class CellTokenizer:
    """Turns the detected genes of cells into padded tokens. Pure, picklable, NumPy only.

    A cell's tokens do not depend on the other cells, except for the number of padded slots at the end.

    Args:
        config: Input mode, length limit and expression encoding.
        vocabulary: The model's genes. Determines which genes become tokens, how values are scaled and, by
            mean expression, which genes are kept in cells that are too long.
    """

    def __init__(self, config: TokensConfig, vocabulary: GeneVocabulary):
        self.config = config
        self._mean_expression_g = np.asarray(vocabulary.mean_expression_g, dtype=np.float32)
        self._reference_g, self._inputs_g = vocabulary.reference_g, vocabulary.inputs_g

    def lengths(self, cells: CellCounts) -> np.ndarray:
        """Number of gene tokens of each cell, int64 (n,)."""
        if self.config.input_mode == "all":
            return np.full(len(cells), len(self._mean_expression_g))
        lengths_n = cells.lengths_n
        if self._inputs_g is not None:
            rows = np.repeat(np.arange(len(cells)), lengths_n)
            lengths_n = np.bincount(rows[self._inputs_g[cells.counts_ng.indices]], minlength=len(cells))
        return np.minimum(lengths_n, self.config.max_genes)

    def __call__(self, cells: CellCounts) -> dict[str, Any]:
        """Tokenize a batch of cells.

        Slot 0 is [CLS], genes follow in vocabulary order, and PAD fills the rest. In `detected` mode, a cell
        with more than `max_genes` genes keeps those that most exceed their mean expression (ties go to the
        first gene).

        Args:
            cells: Raw counts over the vocabulary.

        Returns:
            `token_ids` int32 (n, l); `values` float32 (n, l), log1p of counts per 10,000 (1 with `binary`), 0
            for [CLS], PAD and undetected genes; `bin_ids` int32 (n, l) in [0, num_bins), 0 exactly where the
            value is 0 (with `continuous` and `binary` 1 elsewhere); `num_cut`, the number of truncated cells.
            l is 1 + the number of genes of the longest cell.

        Raises:
            ValueError: The number of genes differs, or columns are not in increasing order.
        """
        genes, lengths_n = cells.counts_ng.indices, cells.lengths_n
        rows = np.repeat(np.arange(len(cells), dtype=np.int32), lengths_n)
        if cells.counts_ng.shape[1] != len(self._mean_expression_g):
            raise ValueError(
                f"counts have {cells.counts_ng.shape[1]} genes, but the vocabulary has"
                f" {len(self._mean_expression_g)}"
            )
        if not ((genes[1:] > genes[:-1]) | (rows[1:] != rows[:-1])).all():
            raise ValueError(
                "genes are not in increasing order in each cell; build counts with CellCounts.of"
            )

        cp10k = cells.per_10k(self._reference_g)
        if self._inputs_g is not None:
            kept = self._inputs_g[genes]
            rows, genes, cp10k = rows[kept], genes[kept], cp10k[kept]
            lengths_n = np.bincount(rows, minlength=len(cells))
        values = np.log1p(cp10k)
        bins = self._bins(rows, values, cp10k, len(cells))
        if self.config.input_mode == "all":
            return self._every_gene(rows, genes, self._shown(values), bins, len(cells))
        num_cut = int((lengths_n > self.config.max_genes).sum())
        if num_cut:
            kept = self._kept(rows, genes, values, lengths_n)
            genes, values, bins = genes[kept], values[kept], bins[kept]
            lengths_n = np.minimum(lengths_n, self.config.max_genes)

        slots = np.arange(1 + lengths_n.max(initial=0))
        gene_slots_nl = (slots > 0) & (slots <= lengths_n[:, None])
        tokens = _empty_tokens(len(cells), len(slots))
        tokens["token_ids"][gene_slots_nl] = genes + NUM_SPECIAL
        tokens["values"][gene_slots_nl] = self._shown(values)
        tokens["bin_ids"][gene_slots_nl] = bins
        return {**tokens, "num_cut": num_cut}

    def _every_gene(
        self, rows: np.ndarray, genes: np.ndarray, values: np.ndarray, bins: np.ndarray, num_cells: int
    ) -> dict[str, Any]:
        num_genes = len(self._mean_expression_g)
        tokens = _empty_tokens(num_cells, 1 + num_genes)
        tokens["token_ids"][:, 1:] = np.arange(NUM_SPECIAL, NUM_SPECIAL + num_genes)
        tokens["values"][rows, genes + 1] = values
        tokens["bin_ids"][rows, genes + 1] = bins
        return {**tokens, "num_cut": 0}

    def _shown(self, values: np.ndarray) -> np.ndarray:
        """Encode the values for the network, after choosing the genes to keep."""
        return np.ones_like(values) if self.config.expression == "binary" else values

    def _bins(self, rows: np.ndarray, values: np.ndarray, cp10k: np.ndarray, num_cells: int) -> np.ndarray:
        levels = self.config.num_bins - 1
        if self.config.expression in ("continuous", "binary"):
            return np.ones(len(values), dtype=np.int32)
        if self.config.expression == "log2_bins":
            return np.minimum(1 + np.log2(1 + cp10k).astype(np.int32), levels)
        # The share of a cell's genes with a smaller value. Positive floats sort like their bit patterns, so
        # one integer can hold cell and value.
        keys = (rows.astype(np.int64) << 32) | values.view(np.int32)
        distinct, which, repeats = np.unique(keys, return_inverse=True, return_counts=True)
        lengths_n = np.bincount(rows, minlength=num_cells)
        num_before = (np.cumsum(repeats) - repeats)[which] - (np.cumsum(lengths_n) - lengths_n)[rows]
        return (1 + levels * num_before // lengths_n[rows]).astype(np.int32)

    def _kept(
        self, rows: np.ndarray, genes: np.ndarray, values: np.ndarray, lengths_n: np.ndarray
    ) -> np.ndarray:
        """Mask of the entries to keep, `max_genes` for each cell that is too long."""
        long_n = lengths_n > self.config.max_genes
        of_long = long_n[rows]
        long_genes, kept_lengths = genes[of_long], lengths_n[long_n]
        # The rank of the score is in the upper half, the gene in the lower half. So keys are distinct and the
        # result does not depend on the batch.
        bits = (values[of_long] - self._mean_expression_g[long_genes]).view(np.int32)
        ordered = np.where(bits < 0, bits ^ 0x7FFFFFFF, bits).astype(np.int64)
        keys = (ordered << 32) - long_genes
        width = int(kept_lengths.max())
        table = np.full((len(kept_lengths), width), np.iinfo(np.int64).min)
        table[np.arange(width) < kept_lengths[:, None]] = keys
        table.partition(width - self.config.max_genes, axis=1)
        keep = np.ones(len(rows), dtype=bool)
        keep[of_long] = keys >= np.repeat(table[:, width - self.config.max_genes], kept_lengths)
        return keep


def _empty_tokens(num_cells: int, num_slots: int) -> dict[str, np.ndarray]:
    token_ids = np.full((num_cells, num_slots), PAD, dtype=np.int32)
    token_ids[:, 0] = CLS
    return {
        "token_ids": token_ids,
        "values": np.zeros((num_cells, num_slots), dtype=np.float32),
        "bin_ids": np.zeros((num_cells, num_slots), dtype=np.int32),
    }
