"""Names from files stay plain text in figures and spreadsheets, whatever characters they contain."""

import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from jobs.reports.figures import (
    confusion_figure,
    differences_figure,
    learning_figure,
    map_figure,
    reliability_figure,
    scores_figure,
)
from jobs.reports.gene_figures import bar_figure, beeswarm_figure, dot_figure, heat_figure
from screformer.files import csv_text, read_csv

NAMES = [r"$\bad$", "$", "a_b^c", "CD14+ CD16-"]


def _figures() -> list[Figure]:
    values = np.random.default_rng(0).normal(size=(5, 4))
    dots = pd.DataFrame({"label": NAMES, "gene": NAMES, "share": 0.5, "mean": 1.0})
    return [
        confusion_figure(np.eye(4, dtype=int), NAMES),
        bar_figure(NAMES, values[0], NAMES[0]),
        beeswarm_figure(NAMES, values, NAMES[0]),
        heat_figure(values, NAMES, NAMES),
        dot_figure(dots),
        learning_figure(NAMES[0], {name: [(0, 1.0), (1, 0.5)] for name in NAMES}),
        map_figure(values[:4, :2], pd.Series(NAMES), NAMES),
        scores_figure({name: [0.5, 0.6] for name in NAMES}, NAMES[0]),
        differences_figure(dict.fromkeys(NAMES, (0.1, 0.0, 0.2))),
    ]


def test_dollars_in_names_are_not_formulas() -> None:
    for figure in _figures():
        picture = io.BytesIO()
        figure.savefig(picture, format="svg", metadata={"Date": None})
        assert b"bad" in picture.getvalue()


def test_small_bins_are_not_drawn() -> None:
    rows = {"confidence": [0.2, 0.5, 0.9], "accuracy": [1.0, 0.5, 0.9], "cells": [1, 10, 100]}
    figure = reliability_figure(pd.DataFrame(rows).assign(part="test", calibration="after"))
    line = figure.axes[0].lines[1]
    assert list(line.get_xdata()) == [0.5, 0.9]
    error = (1 * 0.8 + 0 + 0) / 111
    assert line.get_label() == f"after calibration, ECE {error:.3f}", "the error covers all bins"


def test_confusion_has_shares_and_counts() -> None:
    figure = confusion_figure(np.array([[3, 1], [0, 2000]]), ["a", "b"])
    assert [text.get_text() for text in figure.axes[0].texts] == ["0.75\n3", "0.25\n1", "1.00\n2,000"]


@pytest.mark.parametrize("text", ["=1+1", "+x", "-2 cells", "@sum", "'quoted", "NA", 'a, "b"'])
def test_spreadsheets_do_not_compute_names(tmp_path: Path, text: str) -> None:
    table = pd.DataFrame({"label": [text, "b"], text: [-1.5, 2.0]})
    (tmp_path / "t.csv").write_text(csv_text(table))
    pd.testing.assert_frame_equal(read_csv(tmp_path / "t.csv"), table)
    for cell in pd.read_csv(tmp_path / "t.csv", keep_default_na=False)["label"]:
        assert not cell.startswith(("=", "+", "-", "@"))
