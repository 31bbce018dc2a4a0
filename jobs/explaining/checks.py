"""Summarise finished explanations: means, top genes, markers and reliability checks.

Axes: n cells, m pairs of cell and class, g genes, k classes.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from jobs.explaining.faithfulness import curves, sanity
from jobs.explaining.pictures import draw
from jobs.explaining.shards import GENES, MeasuredMeans, shards_of, values_matrix
from jobs.reports.artifacts import write_explained
from jobs.reports.gene_figures import dot_table
from screformer.cell_tokens import CellTokens
from screformer.cells import CellSource
from screformer.counts import Panels
from screformer.markers import markers, markers_of
from screformer.predictor import Predictor

ADDITIVITY_BOUND = 0.05
"""Median additivity error, as a share of the difference between output and base, above which a warning is
printed."""


TOP_GENES = 20

_DOT_GENES = 4
"""Genes of each label in the dot plot."""


def summarise(
    predictor: Predictor,
    source: CellSource,
    out: Path,
    background: list[CellTokens],
    plan: dict[str, Any],
    num_nodes: int,
) -> dict[str, Any]:
    """Compute mean values, top genes and checks of finished explanations; write tables and figures."""
    names, num_genes = predictor.label_names.tolist(), len(predictor.vocabulary)
    means = MeasuredMeans(len(names), pd.read_parquet(out / GENES))
    relative: list[np.ndarray] = []
    for table in shards_of(out):
        relative.append(
            (table["additivity_error"] / (table["output"] - table["base"]).abs().clip(lower=1e-6)).to_numpy()
        )
        own = table[table["class"] == table["predicted"]]
        means.add(
            np.array([names.index(label) for label in own["class"]]),
            own["panel"].to_numpy(),
            values_matrix(own, num_genes),
        )
    errors, mean_kg = np.concatenate(relative), means.mean_kg
    gene_names = predictor.vocabulary.readable_names
    frame = pd.DataFrame(mean_kg, index=names, columns=list(predictor.vocabulary.feature_ids)).rename_axis(
        "class"
    )
    frame.to_parquet(out / "mean_by_class.parquet")
    explained = np.flatnonzero(means.cells_k).tolist()

    candidates = _Candidates.read(predictor, source, np.array(plan["candidates"]))
    more_kg, regression = candidates.expressed_more(len(names)), candidates.regression_top()
    order_kg = np.argsort(-mean_kg, axis=1, kind="stable")
    # Genes whose expression supports a class, and genes whose absence does.
    top, lacking = (
        {
            code: [gene for gene in order_kg[code].tolist() if side_kg[code, gene]][:TOP_GENES]
            for code in explained
        }
        for side_kg in (more_kg, ~more_kg)
    )
    table = markers()
    rows = []
    for code in explained:
        known = markers_of(table, names[code], predictor.label_cl_ids[code])
        ids = [predictor.vocabulary.feature_ids[gene] for gene in top[code]]
        hits = [
            symbol
            for symbol, feature_id in zip(known["symbol"], known["feature_id"], strict=True)
            if feature_id in ids
        ]
        shared = len(set(top[code]) & regression[code]) / TOP_GENES if code in regression else float("nan")
        rows.append(
            {
                "label": names[code],
                "cells": int(means.cells_k[code]),
                "markers": ", ".join(hits),
                "markers_listed": len(known),
                "markers_in_model": int(known["feature_id"].isin(predictor.vocabulary.feature_ids).sum()),
                "shared_with_regression": shared,
                "top_genes": ", ".join(gene_names[top[code]]),
                "top_lacking": ", ".join(gene_names[lacking[code]]),
            }
        )
    classes = pd.DataFrame(rows)
    write_explained(out, "classes", classes)
    write_explained(out, "dots", candidates.dots(top, names, gene_names))
    summary = {
        "cells": len(plan["cells"]),
        "background": len(plan["background"]),
        "additivity_error": {
            "median": float(np.median(errors)),
            "p95": float(np.quantile(errors, 0.95)),
            "bound": ADDITIVITY_BOUND,
            "holds": bool(np.median(errors) <= ADDITIVITY_BOUND),
        },
        "curves": curves(predictor, source, out),
        **sanity(predictor, source, out, background, num_nodes),
        "classes": [{key: value for key, value in row.items() if value == value} for row in rows],
    }
    draw(out, names, gene_names, mean_kg, top)
    return summary


@dataclass(frozen=True, eq=False)
class _Candidates:
    """The cells from which the explained ones were chosen."""

    x_ng: sparse.csr_matrix
    """log1p of counts per 10,000."""
    codes_n: np.ndarray
    """Predicted label codes."""
    panels: Panels

    @classmethod
    def read(cls, predictor: Predictor, source: CellSource, positions: np.ndarray) -> _Candidates:
        cells = source.read(positions)
        return cls(sparse.csr_matrix(cells.normalised()), predictor.predict(cells).label_codes, cells.panels)

    def expressed_more(self, num_classes: int) -> np.ndarray:
        """Which genes each class expresses more than the average of the other classes.

        Only cells in which the gene was measured count. Returns bool (k, g).
        """
        num_panels, (num_cells, num_genes) = len(self.panels.measured_pg), self.x_ng.shape
        group_n = self.codes_n * num_panels + self.panels.panels_n
        groups = sparse.csr_matrix(
            (np.ones(num_cells), (group_n, np.arange(num_cells))), shape=(num_classes * num_panels, num_cells)
        )
        sums_kg = (groups @ self.x_ng).toarray().reshape(num_classes, num_panels, num_genes).sum(axis=1)
        cells_kg = (
            np.bincount(group_n, minlength=num_classes * num_panels).reshape(num_classes, num_panels)
            @ self.panels.measured_pg
        )
        mean_kg, seen_kg = sums_kg / np.maximum(cells_kg, 1), cells_kg > 0
        others_kg = (mean_kg.sum(axis=0) - mean_kg) / np.maximum(seen_kg.sum(axis=0) - seen_kg, 1)
        return mean_kg > others_kg

    def dots(self, top: dict[int, list[int]], names: list[str], gene_names: np.ndarray) -> pd.DataFrame:
        """Rows of `dot_table`: every label's first top genes in the cells of each label."""
        genes = list(dict.fromkeys(gene for code in top for gene in top[code][:_DOT_GENES]))
        cells = {names[code]: self.codes_n == code for code in top}
        return dot_table(self.x_ng, cells, genes, [str(gene_names[gene]) for gene in genes])

    def regression_top(self) -> dict[int, set[int]]:
        """By class, the genes with the largest coefficients in a regression on the model's labels."""
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression

        if (
            len(np.unique(self.codes_n)) < 3
        ):  # two classes share one row of coefficients, so there are no top genes per class
            return {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model = LogisticRegression(C=0.01, class_weight="balanced", max_iter=100).fit(
                self.x_ng, self.codes_n
            )
        return {
            int(code): set(np.argsort(-row)[:TOP_GENES].tolist())
            for code, row in zip(model.classes_, model.coef_, strict=True)
        }


def summary_lines(summary: dict[str, Any]) -> list[str]:
    """The summary as printable lines."""
    error = summary["additivity_error"]
    lines = [
        f"{summary['cells']} cells against {summary['background']} background cells",
        f"additivity error {error['median']:.2%} of the explained difference (median), {error['p95']:.2%}"
        f" (95th percentile)",
    ]
    if not error["holds"]:
        lines.append(
            f"WARNING: the median additivity error is above {error['bound']:.0%}; do not trust these values,"
            f" raise --nodes or --background"
        )
    curves = summary["curves"]
    lines += [
        f"deletion curve {curves['deletion']:.3f} (random genes {curves['deletion, random']:.3f}; lower is"
        f" better),"
        f" insertion {curves['insertion']:.3f} (random {curves['insertion, random']:.3f}; higher is better)",
        f"correlation with another hash seed {summary['correlation_other_hash_seed']:.3f}, with random"
        f" weights"
        f" {summary['correlation_random_weights']:.3f}",
        f"memory: {summary['memory_gb']['task_peak']:.2f} GB in a task,"
        f" {summary['memory_gb']['driver_peak']:.2f} GB in the driver",
    ]
    for row in summary["classes"]:
        known = (
            f"{row['markers_in_model']} of its {row['markers_listed']} listed markers are among the"
            " model's genes"
        )
        found = row["markers"] or f"none; {known}"
        lines.append(f"  {row['label']} ({row['cells']} cells), markers among the top {TOP_GENES}: {found}")
        lines.append(f"    expressed: {row['top_genes']}")
        lines.append(f"    absent: {row['top_lacking']}")
    return lines
