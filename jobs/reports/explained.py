"""The report's section of marker genes, from explanations."""

from __future__ import annotations

from typing import Any

import pandas as pd

from jobs.reports.artifacts import read_explanations
from jobs.reports.gene_figures import dot_figure, perturbation_figure
from jobs.reports.page import Report
from jobs.tracking.logged import LoggedRun

_GENES = 8
"""Genes of a label in the table; `classes.csv` has all."""


def add_explanations(report: Report, run: LoggedRun) -> None:
    """Add the section, if the run has explanations."""
    found = read_explanations(run)
    if found is None:
        return
    summary, tables = found
    error = summary["additivity_error"]
    report.section("Marker genes")
    report.facts(
        {
            "cells explained": f"{summary['cells']:,}",
            "background cells": f"{summary['background']:,}",
            "median additivity error": f"{error['median']:.1%}",
        }
    )
    if not error["holds"]:
        report.warning(
            f"The values of a cell do not add up to its logit: the median error is {error['median']:.1%}, and"
            f" {error['bound']:.0%} is the limit for trusting them. Run `explain` again with more `--nodes`."
        )
    report.text(
        "The contribution of a gene is what it adds to the logit of a label, compared with the background"
        " cells. Figures for each label, and all values, are in the run's artifacts under `explanations`."
    )
    if "dots" in tables and len(tables["dots"]):
        dots = tables["dots"]
        report.figure(
            "Dot plot of the top genes",
            dot_figure(dots),
            "The genes that contribute most to each label, in the order of the labels. The area of a dot is"
            " the share of the label's cells that express the gene; its colour is the mean of log1p of counts"
            " per 10,000.",
            f"Expression of {dots['gene'].nunique()} genes in {dots['label'].nunique()} predicted labels.",
        )
    if "classes" in tables:
        report.table(
            "Top genes of each label",
            _classes(tables["classes"]),
            "Supporting genes contribute by being expressed, missing ones by their absence. Known markers are"
            " the genes of a fixed list that are among the top genes. Agreement is the share of the top"
            " genes shared with a logistic regression of the model's labels.",
        )
    if "curves" in tables:
        curves, areas = tables["curves"], summary["curves"]
        report.figure(
            "Deleting and inserting genes",
            perturbation_figure(curves.set_index(curves.columns[0])),
            "Probability of the predicted label while genes are deleted or inserted,"
            f" largest contribution first. Areas: deletion {areas['deletion']:.3f} against"
            f" {areas['deletion, random']:.3f} for random genes (lower is better), insertion"
            f" {areas['insertion']:.3f} against {areas['insertion, random']:.3f} (higher is better).",
            f"Deletion area {areas['deletion']:.3f}, insertion area {areas['insertion']:.3f}.",
        )
    report.text(
        f"Values correlate {summary['correlation_other_hash_seed']:.3f} with those under other hashes (should"
        f" be near 1) and {summary['correlation_random_weights']:.3f} with those of a network with random"
        f" weights (should be near 0)."
    )


def _classes(classes: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "label": classes["label"],
            "cells": classes["cells"],
            "known markers": [_some(text) or "none" for text in classes["markers"]],
            "supporting genes": [_some(text) for text in classes["top_genes"]],
            "missing genes": [_some(text) for text in classes["top_lacking"]],
            "agreement": classes["shared_with_regression"],
        }
    )


def _some(genes: Any) -> str:
    names = str(genes).split(", ") if isinstance(genes, str) and genes else []
    return ", ".join(names[:_GENES]) + (f" and {len(names) - _GENES} more" if len(names) > _GENES else "")
