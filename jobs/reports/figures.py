"""Pictures of results, as matplotlib figures that need no display."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from matplotlib.figure import Figure
from typing import TYPE_CHECKING


def confusion_figure(counts_kk: np.ndarray, names: Sequence[str]) -> Figure:
    """Cells by true (row) and predicted (column) label, rows normalised to 1.

    `counts_kk` is (k, k), `names` the k labels.
    """
    from matplotlib.figure import Figure

    rows = counts_kk.sum(axis=1, keepdims=True)
    share = np.divide(counts_kk, rows, out=np.zeros(counts_kk.shape), where=rows > 0)
    size = max(4.0, 1.8 + 0.45 * len(names))
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(names)), [str(name) for name in names], rotation=60, ha="right")
    axes.set_yticks(
        range(len(names)), [f"{name} ({int(count)})" for name, count in zip(names, rows[:, 0], strict=True)]
    )
    axes.set_xlabel("predicted")
    axes.set_ylabel("true (cells)")
    if len(names) <= 25:
        for row, column in np.argwhere(counts_kk > 0):
            value = share[row, column]
            axes.text(
                column,
                row,
                f"{value:.2f}",
                ha="center",
                va="center",
                fontsize=7,
                color="white" if value > 0.6 else "black",
            )
    figure.colorbar(image, ax=axes, label="share of the true label's cells", shrink=0.8)
    return figure


def learning_figure(name: str, curves: Mapping[str, list[tuple[int, float]]]) -> Figure:
    """Metrics of one `name` over optimizer steps; `curves` maps each to its (step, value) points."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for key, points in sorted(curves.items()):
        finite = [(step, value) for step, value in points if math.isfinite(value)]
        axes.plot(
            [step for step, _ in finite],
            [value for _, value in finite],
            label=key,
            marker="." if len(finite) < 30 else None,
        )
    axes.set_xlabel("optimizer step")
    axes.locator_params(axis="x", integer=True)
    axes.set_ylabel(name)
    axes.legend()
    axes.grid(alpha=0.3)
    return figure


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
            error = (rows["cells"] * (rows["confidence"] - rows["accuracy"]).abs()).sum() / rows[
                "cells"
            ].sum()
            axes.plot(
                rows["confidence"],
                rows["accuracy"],
                marker="o",
                markersize=4,
                label=f"{state} calibration, ECE {error:.3f}",
            )
        axes.set(
            xlim=(0, 1),
            ylim=(0, 1),
            title=f"{part} ({rows['cells'].sum():,} cells)",
            xlabel="confidence",
            ylabel="share that is right",
        )
        axes.legend(loc="upper left", fontsize=8)
        axes.grid(alpha=0.3)
    return figure


def perturbation_figure(curves: pd.DataFrame) -> Figure:
    """Curves over the share of genes, one per column."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, values in curves.items():
        axes.plot(
            curves.index, values, marker=".", linestyle="--" if "random" in str(name) else "-", label=name
        )
    axes.set(xlabel="share of the cell's genes", ylabel="probability of the label", ylim=(0, 1))
    axes.legend()
    axes.grid(alpha=0.3)
    return figure


def bar_figure(genes: Sequence[str] | np.ndarray, values: np.ndarray, title: str) -> Figure:
    """Mean contribution of genes, one bar each, the first on top."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 0.6 + 0.24 * len(genes)), layout="constrained")
    axes = figure.add_subplot()
    axes.barh(range(len(genes)), values, color="tab:red")
    axes.set_yticks(range(len(genes)), list(genes))
    axes.invert_yaxis()
    axes.set(title=title, xlabel="mean contribution to the logit")
    return figure


def beeswarm_figure(genes: Sequence[str] | np.ndarray, values_ng: np.ndarray, title: str) -> Figure:
    """Contribution of genes in each cell, a row of dots per gene, the first on top.

    Dots that would overlap stand beside each other.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 0.6 + 0.3 * len(genes)), layout="constrained")
    axes = figure.add_subplot()
    bins = np.linspace(values_ng.min(), values_ng.max() + 1e-9, 80)
    for row in range(len(genes)):
        place = np.digitize(values_ng[:, row], bins)
        rank = pd.Series(place).groupby(place).cumcount().to_numpy()
        size = pd.Series(place).groupby(place).transform("size").to_numpy()
        offset = (rank - (size - 1) / 2) * min(0.06, 0.8 / max(size.max(), 1))
        colors = np.where(values_ng[:, row] > 0, "tab:red", "tab:blue")
        axes.scatter(values_ng[:, row], row + offset, s=6, c=colors.tolist(), linewidths=0)
    axes.axvline(0, color="grey", linewidth=0.8)
    axes.set_yticks(range(len(genes)), list(genes))
    axes.invert_yaxis()
    axes.set(title=f"{title} ({len(values_ng):,} cells)", xlabel="contribution to the logit")
    return figure


def heat_figure(values_kg: np.ndarray, labels: Sequence[str], genes: Sequence[str] | np.ndarray) -> Figure:
    """Classes (rows) by genes, mean contributions, red for and blue against."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.5 + 0.22 * len(genes), 1.6 + 0.35 * len(labels)), layout="constrained")
    axes = figure.add_subplot()
    largest = max(float(np.abs(values_kg).max()), 1e-9)
    image = axes.imshow(values_kg, cmap="RdBu_r", vmin=-largest, vmax=largest, aspect="auto")
    axes.set_xticks(range(len(genes)), list(genes), rotation=90, fontsize=7)
    axes.set_yticks(range(len(labels)), list(labels))
    figure.colorbar(image, ax=axes, label="mean contribution to the logit")
    return figure
