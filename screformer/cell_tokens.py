"""Tokens of single cells without padding, the input of explanations.

Axes: l token slots, g genes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from screformer.counts import Panels
from screformer.tokenizer import CLS, NUM_SPECIAL, PAD


@dataclass(frozen=True, eq=False, kw_only=True)
class CellTokens:
    """The tokens of one cell, [CLS] first; arrays have shape (l,) except the last."""

    token_ids: np.ndarray
    values: np.ndarray
    bin_ids: np.ndarray
    measured_g: np.ndarray
    """Which genes were measured in the cell, bool (g,)."""


def cell_tokens(tokens: dict[str, np.ndarray], panels: Panels) -> list[CellTokens]:
    """Split the output of `CellTokenizer` into cells, without padding."""
    cells = []
    for ids, values, bins, panel in zip(
        tokens["token_ids"], tokens["values"], tokens["bin_ids"], panels.panels_n, strict=True
    ):
        used = ids != PAD
        cells.append(
            CellTokens(
                token_ids=ids[used],
                values=values[used],
                bin_ids=bins[used],
                measured_g=panels.measured_pg[panel],
            )
        )
    return cells


def without_genes(cell: CellTokens, genes: np.ndarray) -> CellTokens:
    """The cell as if the given genes (vocabulary indices) had not been detected."""
    kept = ~np.isin(cell.token_ids, np.asarray(genes) + NUM_SPECIAL)
    assert kept[cell.token_ids == CLS].all()
    return replace(cell, token_ids=cell.token_ids[kept], values=cell.values[kept], bin_ids=cell.bin_ids[kept])
