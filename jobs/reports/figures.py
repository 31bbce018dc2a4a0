"""All figures of results, drawn by matplotlib without a display.

Axes: n cells, g genes, k labels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEAST_CELLS = 10
"""Reliability diagrams leave out bins with fewer cells, whose shares are mostly noise."""

_MOST_WRITTEN = 25
"""A confusion matrix with more labels has no room for numbers."""
_MOST_COLOURS = 20


def plain(text: object) -> str:
    """Escape a name so that matplotlib shows it literally; `$` would start a formula."""
    return str(text).replace("$", r"\$")


def _plain(names: Iterable[object]) -> list[str]:
    return [plain(name) for name in names]


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def confusion_figure(counts_kk: np.ndarray, names: Sequence[str]) -> Figure:
    """Confusion matrix of true (rows) and predicted (columns) labels; colours are shares of the row.

    `counts_kk` is (k, k), `names` the k labels.
    """
    rows = counts_kk.sum(axis=1, keepdims=True)
    share = np.divide(counts_kk, rows, out=np.zeros(counts_kk.shape), where=rows > 0)
    size = max(4.0, 1.8 + 0.5 * len(names))
    figure = _figure(size + 1, size)
    axes = figure.add_subplot()
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    labels = _plain(names)
    axes.set_xticks(range(len(names)), labels, rotation=60, ha="right")
    axes.set_yticks(
        range(len(names)),
        [f"{name} ({int(count):,})" for name, count in zip(labels, rows[:, 0], strict=True)],
    )
    axes.set_xlabel("predicted")
    axes.set_ylabel("true (cells)")
    if len(names) <= _MOST_WRITTEN:
        for row, column in np.argwhere(counts_kk > 0):
            value = share[row, column]
            axes.text(
                column,
                row,
                f"{value:.2f}\n{int(counts_kk[row, column]):,}",
                ha="center",
                va="center",
                fontsize=6,
                linespacing=1.0,
                color="white" if value > 0.6 else "black",
            )
    figure.colorbar(image, ax=axes, label="share of the true label's cells", shrink=0.8)
    return figure


def learning_figure(name: str, curves: Mapping[str, list[tuple[int, float]]]) -> Figure:
    """Metrics of one `name` over optimizer steps; `curves` maps each to its (step, value) points.

    The axis is logarithmic if all values are positive and span more than two decades.
    """
    figure = _figure(6, 4)
    axes = figure.add_subplot()
    shown = []
    for key, points in sorted(curves.items()):
        finite = [(step, value) for step, value in points if math.isfinite(value)]
        shown += [value for _, value in finite]
        axes.plot(
            [step for step, _ in finite],
            [value for _, value in finite],
            label=plain(key),
            marker="." if len(finite) < 30 else None,
        )
    if shown and min(shown) > 0 and max(shown) > 100 * min(shown):
        axes.set_yscale("log")
    axes.set_xlabel("optimizer step")
    axes.locator_params(axis="x", integer=True)
    axes.set_ylabel(plain(name))
    axes.legend()
    axes.grid(alpha=0.3)
    return figure


def reliability_figure(table: pd.DataFrame) -> Figure:
    """Confidence against accuracy, a panel per part; only bins of at least `LEAST_CELLS` cells.

    Args:
        table: Rows of `screformer.calibration.reliability` with `part` and `calibration` (before or after).
    """
    parts = list(table["part"].unique())
    figure = _figure(4.2 * len(parts), 4)
    for axes, part in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts, strict=True):
        axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle="--")
        for state, rows in table[table["part"] == part].groupby("calibration", sort=False):
            drawn = rows[rows["cells"] >= LEAST_CELLS]
            axes.plot(
                drawn["confidence"],
                drawn["accuracy"],
                marker="o",
                markersize=4,
                label=f"{state} calibration, ECE {calibration_error(rows):.3f}",
            )
        axes.set(
            xlim=(0, 1),
            ylim=(0, 1),
            title=f"{part} ({rows['cells'].sum():,} cells)",
            xlabel="confidence",
            ylabel="share of correct predictions",
        )
        axes.legend(loc="upper left", fontsize=8)
        axes.grid(alpha=0.3)
    return figure


def calibration_error(rows: pd.DataFrame) -> float:
    """Expected calibration error of the rows of one reliability diagram, over all bins."""
    distance = (rows["confidence"] - rows["accuracy"]).abs()
    return float((rows["cells"] * distance).sum() / rows["cells"].sum())


def perturbation_figure(curves: pd.DataFrame) -> Figure:
    """Curves over the share of genes deleted or inserted, one per column."""
    figure = _figure(6, 4)
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
    figure = _figure(5, 0.6 + 0.24 * len(genes))
    axes = figure.add_subplot()
    axes.barh(range(len(genes)), values, color="tab:red")
    axes.set_yticks(range(len(genes)), _plain(genes))
    axes.invert_yaxis()
    axes.set(title=plain(title), xlabel="mean contribution to the logit")
    return figure


def beeswarm_figure(genes: Sequence[str] | np.ndarray, values_ng: np.ndarray, title: str) -> Figure:
    """Contribution of each gene in each cell: a row of dots per gene, the first on top.

    Overlapping dots are spread out.
    """
    figure = _figure(6, 0.6 + 0.3 * len(genes))
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
    axes.set_yticks(range(len(genes)), _plain(genes))
    axes.invert_yaxis()
    axes.set(title=f"{plain(title)} ({len(values_ng):,} cells)", xlabel="contribution to the logit")
    return figure


def dot_figure(dots: pd.DataFrame) -> Figure:
    """Dot plot of genes (columns) by labels (rows): share of cells that express the gene, and its mean.

    Args:
        dots: `label`, `gene`, `share` in [0, 1] (the area of the dot) and `mean` (its colour).
    """
    labels, genes = list(dict.fromkeys(dots["label"])), list(dict.fromkeys(dots["gene"]))
    figure = _figure(3.4 + 0.24 * len(genes), 1.6 + 0.34 * len(labels))
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
    axes.set_xticks(range(len(genes)), _plain(genes), rotation=90, fontsize=8)
    axes.set_yticks(range(len(labels)), _plain(labels))
    axes.set(xlim=(-0.7, len(genes) - 0.3), ylim=(len(labels) - 0.4, -0.6))
    axes.grid(alpha=0.2)
    axes.set_axisbelow(True)
    figure.colorbar(places, ax=axes, label="mean log1p", shrink=0.9)
    return figure


def heat_figure(values_kg: np.ndarray, labels: Sequence[str], genes: Sequence[str] | np.ndarray) -> Figure:
    """Heat map of mean contributions, classes (rows) by genes: red supports the class, blue opposes it."""
    figure = _figure(2.5 + 0.22 * len(genes), 1.6 + 0.35 * len(labels))
    axes = figure.add_subplot()
    largest = max(float(np.abs(values_kg).max()), 1e-9)
    image = axes.imshow(values_kg, cmap="RdBu_r", vmin=-largest, vmax=largest, aspect="auto")
    axes.set_xticks(range(len(genes)), _plain(genes), rotation=90, fontsize=7)
    axes.set_yticks(range(len(labels)), _plain(labels))
    figure.colorbar(image, ax=axes, label="mean contribution to the logit")
    return figure


def map_figure(points_n2: np.ndarray, groups_n: pd.Series, names: Sequence[str]) -> Figure:
    """Scatter plot of cells, coloured by group.

    Args:
        points_n2: Coordinates, (n, 2).
        groups_n: Group of each cell.
        names: Groups in the order of their colours; groups beyond 20 share one colour.
    """
    from matplotlib import colormaps

    if len(names) > _MOST_COLOURS:
        names = names[: _MOST_COLOURS - 1]
    # Strong colours first, then the pale colour of each pair.
    colours = colormaps["tab20"]([*range(0, _MOST_COLOURS, 2), *range(1, _MOST_COLOURS, 2)])
    figure = _figure(5.4, 4.4 + 0.2 * ((len(names) + 2) // 2))
    axes = figure.add_subplot()
    other_n = ~groups_n.isin(names).to_numpy()
    size = float(np.clip(6000 / len(points_n2), 3, 24))
    if other_n.any():
        x_n, y_n = points_n2[other_n].T
        axes.scatter(x_n, y_n, s=size, color="0.7", linewidths=0, label="others")
    for name, colour in zip(names, colours, strict=False):
        chosen_n = (groups_n == name).to_numpy()
        x_n, y_n = points_n2[chosen_n].T
        axes.scatter(x_n, y_n, s=size, color=colour, linewidths=0, label=plain(name), alpha=0.85)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_color("0.8")
    figure.legend(
        loc="outside lower center", ncols=2, fontsize=10, markerscale=(40 / size) ** 0.5, frameon=False
    )
    return figure


def confidence_map(points_n2: np.ndarray, confidence_n: np.ndarray) -> Figure:
    """Scatter plot of cells, (n, 2), coloured by confidence in [0, 1]; the least confident on top."""
    figure = _figure(5.4, 4.8)
    axes = figure.add_subplot()
    order = np.argsort(-confidence_n, kind="stable")
    x_n, y_n = points_n2[order].T
    size = float(np.clip(6000 / len(points_n2), 3, 24))
    dots = axes.scatter(x_n, y_n, s=size, c=confidence_n[order], cmap="viridis", vmin=0, vmax=1, linewidths=0)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_color("0.8")
    figure.colorbar(dots, ax=axes, label="confidence", shrink=0.8)
    return figure


def confidence_figure(answers: pd.DataFrame) -> Figure:
    """Histogram of confidence, stacked by the level of the answer.

    Args:
        answers: Columns `conf_score` and `label_level`.
    """
    figure = _figure(6, 3.2)
    axes = figure.add_subplot()
    levels = answers["label_level"].astype(str)
    names = levels.value_counts().index.tolist()
    axes.hist(
        [answers.loc[levels == name, "conf_score"] for name in names],
        bins=40,
        range=(0, 1),
        stacked=True,
        label=names,
    )
    axes.set(xlim=(0, 1), xlabel="confidence", ylabel="cells", yscale="log")
    axes.legend(title="answer")
    axes.grid(alpha=0.3)
    return figure


def scores_figure(scores: Mapping[str, Sequence[float]], ours: str) -> Figure:
    """Macro-F1 of methods over folds: a bar for the mean, a dot per fold; `ours` is highlighted."""
    figure = _figure(7, 1 + 0.4 * len(scores))
    axes = figure.add_subplot()
    for row, (name, values) in enumerate(list(scores.items())[::-1]):
        axes.barh(row, np.mean(values), color="#4878a8" if name == ours else "#b8c4d0")
        axes.scatter(values, [row] * len(values), color="black", s=12, zorder=3)
    axes.set_yticks(range(len(scores)), _plain(list(scores)[::-1]))
    axes.set_xlim(0, 1)
    axes.set_xlabel("macro-F1")
    axes.grid(axis="x", alpha=0.3)
    return figure


def differences_figure(differences: Mapping[str, tuple[float, float, float]]) -> Figure:
    """Differences in macro-F1 from a reference: mean, lower and upper bound (which may be infinite)."""
    figure = _figure(7.5, 1 + 0.3 * len(differences))
    axes = figure.add_subplot()
    for place, (mean, low, high) in enumerate(list(differences.values())[::-1]):
        finite = math.isfinite(low) and math.isfinite(high) and low < high
        error = [[mean - low], [high - mean]] if finite else None
        axes.errorbar(mean, place, xerr=error, fmt="o", color="#4878a8", capsize=3)
    axes.axvline(0, color="gray", linewidth=1)
    axes.set_yticks(range(len(differences)), _plain(list(differences)[::-1]))
    axes.set_xlabel("macro-F1 minus reference")
    axes.grid(axis="x", alpha=0.3)
    return figure
