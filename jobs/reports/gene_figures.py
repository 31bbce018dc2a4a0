"""Figures of genes: expression, and contributions to labels.

Axes: n cells, g genes, k labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy import sparse

from jobs.reports.figures import new_figure, plain, plain_names

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def perturbation_figure(curves: pd.DataFrame) -> Figure:
    """Curves over the share of genes deleted or inserted, one per column."""
    figure = new_figure(6, 4)
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
    """Mean contribution of each gene as a bar, the first gene on top."""
    figure = new_figure(5, 0.6 + 0.24 * len(genes))
    axes = figure.add_subplot()
    axes.barh(range(len(genes)), values, color="tab:red")
    axes.set_yticks(range(len(genes)), plain_names(genes))
    axes.invert_yaxis()
    axes.set(title=plain(title), xlabel="mean contribution to the logit")
    return figure


def beeswarm_figure(genes: Sequence[str] | np.ndarray, values_ng: np.ndarray, title: str) -> Figure:
    """Contribution of each gene in each cell: a row of dots per gene, the first on top.

    Overlapping dots are spread out.
    """
    figure = new_figure(6, 0.6 + 0.3 * len(genes))
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
    axes.set_yticks(range(len(genes)), plain_names(genes))
    axes.invert_yaxis()
    axes.set(title=f"{plain(title)} ({len(values_ng):,} cells)", xlabel="contribution to the logit")
    return figure


def dot_table(
    x_ng: sparse.csr_array, cells: Mapping[str, np.ndarray], genes: Sequence[int], names: Sequence[str]
) -> pd.DataFrame:
    """Expression of some genes in the cells of each label, for `dot_figure`.

    Args:
        x_ng: log1p of counts per 10,000, (n, g).
        cells: By label, which cells have it, bool (n,).
        genes: Columns of `x_ng`.
        names: Their names.

    Returns:
        One row per label and gene: `label`, `gene`, `share` of the label's cells that express it, and `mean`
        of their values.
    """
    rows = []
    for label, inside_n in cells.items():
        part = x_ng[inside_n][:, genes]
        share_g, mean_g = (np.asarray(values.mean(axis=0)).ravel() for values in (part > 0, part))
        for name, share, mean in zip(names, share_g, mean_g, strict=True):
            rows.append({"label": label, "gene": name, "share": share, "mean": mean})
    return pd.DataFrame(rows, columns=["label", "gene", "share", "mean"])


def dot_figure(dots: pd.DataFrame) -> Figure:
    """Dot plot of genes (columns) by labels (rows): share of cells that express the gene, and its mean.

    Args:
        dots: From `dot_table`; `share` is the area of the dot, `mean` its colour.
    """
    labels, genes = list(dict.fromkeys(dots["label"])), list(dict.fromkeys(dots["gene"]))
    figure = new_figure(3.4 + 0.24 * len(genes), 1.6 + 0.34 * len(labels))
    axes = figure.add_subplot()
    places = axes.scatter(
        dots["gene"].map(genes.index),
        dots["label"].map(labels.index),
        s=110 * dots["share"],
        c=dots["mean"],
        cmap="Reds",
        vmin=0,
        edgecolors="0.6",
        linewidths=0.4,
    )
    axes.set_xticks(range(len(genes)), plain_names(genes), rotation=90, fontsize=8)
    axes.set_yticks(range(len(labels)), plain_names(labels))
    axes.set(xlim=(-0.7, len(genes) - 0.3), ylim=(len(labels) - 0.4, -0.6))
    axes.grid(alpha=0.2)
    axes.set_axisbelow(True)
    figure.colorbar(places, ax=axes, label="mean log1p", shrink=0.9)
    return figure


def heat_figure(values_kg: np.ndarray, labels: Sequence[str], genes: Sequence[str] | np.ndarray) -> Figure:
    """Heat map of mean contributions, classes (rows) by genes: red supports the class, blue opposes it."""
    figure = new_figure(2.5 + 0.22 * len(genes), 1.6 + 0.35 * len(labels))
    axes = figure.add_subplot()
    largest = max(float(np.abs(values_kg).max()), 1e-9)
    image = axes.imshow(values_kg, cmap="RdBu_r", vmin=-largest, vmax=largest, aspect="auto")
    axes.set_xticks(range(len(genes)), plain_names(genes), rotation=90, fontsize=7)
    axes.set_yticks(range(len(labels)), plain_names(labels))
    figure.colorbar(image, ax=axes, label="mean contribution to the logit")
    return figure
