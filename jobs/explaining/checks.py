"""Checks of explanations: additivity, deletion and insertion curves, markers, seeds.

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

from jobs.explaining.shards import GENES, SHARDS, MeasuredMeans, shards_of, tokens_of, values_matrix
from jobs.reports.figures import bar_figure, beeswarm_figure, heat_figure, perturbation_figure
from screformer.cells import CellSource
from screformer.counts import Panels
from screformer.explain import Attribution, CellTokens, Explainer, markers, without_genes
from screformer.model import HASH_SEED, ScReformer
from screformer.predictor import Predictor
from screformer.tokenizer import CLS, NUM_SPECIAL

ADDITIVITY_BOUND = 0.05
"""Largest median additivity error, as a share of the distance of output and base, that passes without a loud
word."""


TOP_GENES = 20


_CHECKED_CELLS = 24


_REPEATED_CELLS = 6


_FRACTIONS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def summarise(
    predictor: Predictor,
    source: CellSource,
    out: Path,
    background: list[CellTokens],
    plan: dict[str, Any],
    num_nodes: int,
) -> dict[str, Any]:
    """Mean values, top genes and checks of finished explanations; writes tables and pictures."""
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
    # Genes that speak for a class by being there, and genes that do by being lacked.
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
        known = table[(table["cl_id"] == predictor.label_cl_ids[code]) | (table["cell_type"] == names[code])]
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
    classes.to_csv(out / "classes.csv", index=False)
    summary = {
        "cells": len(plan["cells"]),
        "background": len(plan["background"]),
        "additivity_error": {
            "median": float(np.median(errors)),
            "p95": float(np.quantile(errors, 0.95)),
            "bound": ADDITIVITY_BOUND,
            "holds": bool(np.median(errors) <= ADDITIVITY_BOUND),
        },
        "curves": _curves(predictor, source, out),
        **_sanity(predictor, source, out, background, num_nodes),
        "classes": [{key: value for key, value in row.items() if value == value} for row in rows],
    }
    _draw(out, names, gene_names, mean_kg, top)
    return summary


@dataclass(frozen=True, eq=False)
class _Candidates:
    """The cells that the explained ones were chosen from."""

    x_ng: sparse.csr_matrix
    """log1p of counts per 10,000."""
    codes_n: np.ndarray
    """What the model says of them."""
    panels: Panels

    @classmethod
    def read(cls, predictor: Predictor, source: CellSource, positions: np.ndarray) -> _Candidates:
        cells = source.read(positions)
        return cls(sparse.csr_matrix(cells.normalised()), predictor.predict(cells).label_codes, cells.panels)

    def expressed_more(self, num_classes: int) -> np.ndarray:
        """Which genes a class expresses more than the other classes do on average.

        Of the cells that measured them; bool (k, g).
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

    def regression_top(self) -> dict[int, set[int]]:
        """Genes with the largest coefficients of a logistic regression that predicts the model's labels.

        By class.
        """
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression

        if (
            len(np.unique(self.codes_n)) < 3
        ):  # two classes have one row of coefficients; a comparison of tops needs more
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


def _curves(predictor: Predictor, source: CellSource, out: Path) -> dict[str, Any]:
    """Areas under the deletion and insertion curves.

    A curve is the predicted label's probability over the share of genes taken away (deletion) or put in alone
    (insertion). Genes go by their value, largest first, and in random order for comparison.
    """
    rng = np.random.default_rng(0)
    every = np.ones(len(predictor.vocabulary), bool)
    nothing = CellTokens(
        token_ids=np.array([CLS]), values=np.zeros(1, np.float32), bin_ids=np.zeros(1, int), measured_g=every
    )
    explainer = Explainer(predictor.model, [nothing])
    cells = _some_rows(out)
    curves: dict[str, list[np.ndarray]] = {
        "deletion": [],
        "deletion, random": [],
        "insertion": [],
        "insertion, random": [],
    }
    for (_, row), tokens in zip(
        cells.iterrows(), tokens_of(predictor, source, cells["position"].to_numpy()), strict=True
    ):
        code, own = predictor.label_names.tolist().index(row["class"]), tokens.token_ids[1:] - NUM_SPECIAL
        value_of = dict(zip(row["genes"].tolist(), row["values"].tolist(), strict=True))
        ranked = own[np.argsort([-value_of.get(gene, 0.0) for gene in own.tolist()], kind="stable")]
        for suffix, order in (("", ranked), (", random", rng.permutation(own))):
            steps = [round(fraction * len(order)) for fraction in _FRACTIONS]
            for kind, removed in (
                ("deletion", [order[:step] for step in steps]),
                ("insertion", [order[step:] for step in steps]),
            ):
                logits = explainer.logits([without_genes(tokens, genes) for genes in removed])
                curves[kind + suffix].append(predictor.calibration.probabilities(logits)[:, code])
    means = {name: np.mean(values, axis=0) for name, values in curves.items()}
    frame = pd.DataFrame(means, index=pd.Index(_FRACTIONS, name="share_of_genes"))
    frame.to_csv(out / "curves.csv")
    perturbation_figure(frame).savefig(out / "curves.png", dpi=120)
    return {name: float(np.trapezoid(values, _FRACTIONS)) for name, values in means.items()}


def _some_rows(out: Path) -> pd.DataFrame:
    """Evenly chosen rows of cells with their predicted class.

    Of the others only the positions are ever in memory.
    """
    positions = []
    for path in sorted((out / SHARDS).glob("*.parquet")):
        table = pd.read_parquet(path, columns=["position", "class", "predicted"])
        positions.append(table["position"][table["class"] == table["predicted"]].to_numpy())
    every = np.concatenate(positions)
    wanted = set(every[np.unique(np.linspace(0, len(every) - 1, _CHECKED_CELLS).astype(int))].tolist())
    kept = [
        table[(table["class"] == table["predicted"]) & table["position"].isin(wanted)]
        for table in shards_of(out)
    ]
    return pd.concat(kept, ignore_index=True).sort_values("position")


def _sanity(
    predictor: Predictor, source: CellSource, out: Path, background: list[CellTokens], num_nodes: int
) -> dict[str, float]:
    """Correlation of a few cells' values with those under another hash seed.

    And with those of a network with random weights.

    The first should be near 1, the second near 0.
    """
    table = next(shards_of(out))
    positions = np.unique(table["position"])[:_REPEATED_CELLS]
    tokens = tokens_of(predictor, source, positions)
    config = predictor.config
    untrained = ScReformer(
        config.model,
        config.tokens,
        num_genes=len(predictor.vocabulary),
        num_classes=len(predictor.label_names),
        seed=config.train.seed + 1,
    )
    explainer = Explainer(predictor.model, background, num_nodes=num_nodes)
    other_hashes = Explainer(predictor.model, background, num_nodes=num_nodes, hash_seed=HASH_SEED + 1)
    random_weights = Explainer(untrained.to(predictor.device).eval(), background, num_nodes=num_nodes)
    hashes, weights = [], []
    for cell in tokens:
        code = int(explainer.logits([cell])[0].argmax())
        own = explainer.attribute(cell, [code])[0]
        hashes.append(_correlation(own, other_hashes.attribute(cell, [code])[0]))
        weights.append(_correlation(own, random_weights.attribute(cell, [code])[0]))
    return {
        "correlation_other_hash_seed": float(np.mean(hashes)),
        "correlation_random_weights": float(np.mean(weights)),
    }


def _correlation(one: Attribution, other: Attribution) -> float:
    values = pd.concat([pd.Series(found.values, index=found.genes) for found in (one, other)], axis=1).fillna(
        0
    )
    return float(np.corrcoef(values.to_numpy().T)[0, 1])


def _draw(
    out: Path, names: list[str], gene_names: np.ndarray, mean_kg: np.ndarray, top: dict[int, list[int]]
) -> None:
    """Beeswarm and bar picture of each class, heat map of classes by top genes."""
    pictures = out / "pictures"
    pictures.mkdir(exist_ok=True)
    for code, genes in top.items():
        rows = []
        for table in shards_of(out):
            own = table[(table["class"] == names[code]) & (table["predicted"] == names[code])]
            if len(own):
                rows.append(values_matrix(own, len(gene_names))[:, genes].toarray())
        stem = "".join(letter if letter.isalnum() else "_" for letter in names[code])
        bar_figure(gene_names[genes], mean_kg[code, genes], names[code]).savefig(
            pictures / f"bar_{stem}.png", dpi=100
        )
        beeswarm_figure(gene_names[genes], np.concatenate(rows), names[code]).savefig(
            pictures / f"beeswarm_{stem}.png", dpi=100
        )
    shown = list(dict.fromkeys(int(gene) for genes in top.values() for gene in genes[:8]))
    heat_figure(mean_kg[np.ix_(list(top), shown)], [names[code] for code in top], gene_names[shown]).savefig(
        pictures / "heat.png", dpi=100
    )


def summary_lines(summary: dict[str, Any]) -> list[str]:
    """The summary in words."""
    error = summary["additivity_error"]
    lines = [
        f"{summary['cells']} cells against {summary['background']} background cells",
        f"additivity error {error['median']:.2%} of the explained difference (median), {error['p95']:.2%}"
        f" (95th percentile)",
    ]
    if not error["holds"]:
        lines.append(
            f"WARNING: the median additivity error is above {error['bound']:.0%}: do not trust these values;"
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
            f"{row['markers_in_model']} of the {row['markers_listed']} listed for it are among the"
            " model's genes"
        )
        found = row["markers"] or f"none; {known}"
        lines.append(f"  {row['label']} ({row['cells']} cells), markers among the top {TOP_GENES}: {found}")
        lines.append(f"    by being expressed: {row['top_genes']}")
        lines.append(f"    by being lacked: {row['top_lacking']}")
    return lines
