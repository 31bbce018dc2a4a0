"""Figures of cells, labels and scores, drawn by matplotlib without a display; gene_figures.py has the others.

Axes: n cells, k labels.
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


def plain_names(names: Iterable[object]) -> list[str]:
    """Escape names as `plain` does."""
    return [plain(name) for name in names]


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, that needs no display."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def confusion_figure(counts_kk: np.ndarray, names: Sequence[str]) -> Figure:
    """Confusion matrix of true (rows) and predicted (columns) labels; colours are shares of the row.

    `counts_kk` is (k, k), `names` the k labels.
    """
    rows = counts_kk.sum(axis=1, keepdims=True)
    share = np.divide(counts_kk, rows, out=np.zeros(counts_kk.shape), where=rows > 0)
    size = max(4.0, 1.8 + 0.5 * len(names))
    figure = new_figure(size + 1, size)
    axes = figure.add_subplot()
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    labels = plain_names(names)
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
    figure = new_figure(6, 4)
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
    figure = new_figure(4.2 * len(parts), 4)
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
    figure = new_figure(5.4, 4.4 + 0.2 * ((len(names) + 2) // 2))
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
    figure = new_figure(5.4, 4.8)
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
    figure = new_figure(6, 3.2)
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
    figure = new_figure(7, 1 + 0.4 * len(scores))
    axes = figure.add_subplot()
    for row, (name, values) in enumerate(list(scores.items())[::-1]):
        axes.barh(row, np.mean(values), color="#4878a8" if name == ours else "#b8c4d0")
        axes.scatter(values, [row] * len(values), color="black", s=12, zorder=3)
    axes.set_yticks(range(len(scores)), plain_names(list(scores)[::-1]))
    axes.set_xlim(0, 1)
    axes.set_xlabel("macro-F1")
    axes.grid(axis="x", alpha=0.3)
    return figure


def curve_figure(table: pd.DataFrame, size: str, score: str, sd: str) -> Figure:
    """A score of each `method` against a number of cells, on a logarithmic axis, with standard deviations."""
    figure = new_figure(7, 4.5)
    axes = figure.add_subplot()
    for method, rows in table.groupby("method", sort=False):
        spread = rows[sd].fillna(0).astype(float)
        axes.errorbar(rows[size], rows[score], yerr=spread, fmt="o-", capsize=3, label=plain([method])[0])
    axes.set_xscale("log")
    sizes = sorted(table[size].unique())
    axes.set_xticks(sizes, [str(value) for value in sizes])
    axes.minorticks_off()
    axes.set_ylim(0, 1)
    axes.set_xlabel(size)
    axes.set_ylabel("macro-F1")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def differences_figure(differences: Mapping[str, tuple[float, float, float]]) -> Figure:
    """Differences in macro-F1 from a reference: mean, lower and upper bound (which may be infinite)."""
    figure = new_figure(7.5, 1 + 0.3 * len(differences))
    axes = figure.add_subplot()
    for place, (mean, low, high) in enumerate(list(differences.values())[::-1]):
        finite = math.isfinite(low) and math.isfinite(high) and low < high
        error = [[mean - low], [high - mean]] if finite else None
        axes.errorbar(mean, place, xerr=error, fmt="o", color="#4878a8", capsize=3)
    axes.axvline(0, color="gray", linewidth=1)
    axes.set_yticks(range(len(differences)), plain_names(list(differences)[::-1]))
    axes.set_xlabel("macro-F1 minus reference")
    axes.grid(axis="x", alpha=0.3)
    return figure
