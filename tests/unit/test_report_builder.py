import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from jobs.reports.page import Report


def _report() -> Report:
    report = Report("Cells & <types>", subtitle="run 1")
    report.text("Read **this** and `that`, not <b>this</b>.\n\n- one\n- two")
    report.section("Results")
    report.warning("Only **two** donors.")
    table = pd.DataFrame(
        {
            "model": ["a|b", "c"],
            "macro-F1": [0.91234, np.nan],
            "cells": [12345.0, np.nan],
            "known": [True, False],
        }
    )
    report.table("Scores", table, "higher is better")
    for num_points in (10, 5_000):
        figure = Figure()
        figure.add_subplot().scatter(*np.random.default_rng(0).random((2, num_points)))
        report.figure(f"{num_points} cells", figure, "each point a cell", "points")
    return report


def test_html_escapes_everything_and_is_reproducible(tmp_path):
    page = _report().write_html(tmp_path / "report.html").read_text()
    assert "<title>Cells &amp; &lt;types&gt;</title>" in page and "<b>" not in page
    assert (
        "<strong>this</strong> and <code>that</code>" in page and "<ul><li>one</li><li>two</li></ul>" in page
    )
    assert re.findall(r"<td[^>]*>(.*?)</td>", page) == ["0.912", "12,345", "yes", "–", "–", "no"]
    # A few points are drawn as vectors, many as pixels.
    assert re.findall(r'src="data:image/([^;]*);', page) == ["svg+xml", "png"]
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert _report().write_html(tmp_path / "again.html").read_text() == page


@pytest.mark.parametrize("has_lead", [True, False])
def test_contents_appear_once(tmp_path: Path, has_lead: bool) -> None:
    report = Report("r")
    if has_lead:
        report.text("first")
    for title in ("One", "Two", "Three"):
        report.section(title)
        report.text(title)
    assert report.write_html(tmp_path / "r.html").read_text().count("<nav ") == 1


def test_a_picture_without_words_is_refused():
    with pytest.raises(ValueError, match="alt of figure 'Loss' is empty"):
        Report("r").figure("Loss", Figure(), "caption", " ")
