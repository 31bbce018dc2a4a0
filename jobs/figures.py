"""Pictures of results, as matplotlib figures that need no display."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def reliability_figure(table: pd.DataFrame) -> Figure:
    """Confidence against accuracy, a panel per part.

    Args:
        table: Rows of `screformer.calibration.reliability` with `part` and `calibration` (before or after).
    """
    from matplotlib.figure import Figure

    parts = list(table["part"].unique())
    figure = Figure(figsize=(4.2 * len(parts), 4), layout="constrained")
    for axes, part in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts, strict=True):
        axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle="--")
        for state, rows in table[table["part"] == part].groupby("calibration", sort=False):
            error = (rows["cells"] * (rows["confidence"] - rows["accuracy"]).abs()).sum() / rows["cells"].sum()
            axes.plot(rows["confidence"], rows["accuracy"], marker="o", markersize=4, label=f"{state} calibration, ECE {error:.3f}")
        axes.set(
            xlim=(0, 1), ylim=(0, 1), title=f"{part} ({rows['cells'].sum():,} cells)", xlabel="confidence", ylabel="share that is right"
        )
        axes.legend(loc="upper left", fontsize=8)
        axes.grid(alpha=0.3)
    return figure
