"""The report of a labelled file: which types, how sure, a map of the cells, and their marker genes.

Axes: n cells.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from data_ingest.h5ad import H5adFile
from jobs.reports.cell_map import HOW_TO_READ, MOST_ON_MAP, layout
from jobs.reports.figures import confidence_figure, confidence_map, map_figure
from jobs.reports.gene_figures import dot_figure, dot_table
from jobs.reports.page import Report
from jobs.shifting.cells import DONOR, ComparedCells, compared_file
from screformer.answers import ANSWER_COLUMNS
from screformer.calibration import LABEL, UNKNOWN
from screformer.markers import markers, markers_of
from screformer.predictor import Predictor

_MUCH_UNKNOWN = 0.2
_MOST_DONORS, _MOST_LABELS, _MOST_MARKERS = 40, 8, 5


def labels_page(
    predictor: Predictor, model: str, source: Path, target: Path, *, layer: str | None, raw: bool
) -> Report:
    """Describe the labels of a file.

    Args:
        predictor: The model.
        model: Its name.
        source: The .h5ad file that was labelled.
        target: Its labelled copy, or its folder of Parquet files.
        layer: Layer of the counts, instead of X.
        raw: Whether the counts are in `raw.X`.
    """
    answers = read_answers(target)
    with H5adFile.open(source, layer=layer, raw=raw) as file:
        obs = file.obs
    sample = compared_file(predictor, source, layer=layer, raw=raw)
    unknown = float((answers["label_level"] == UNKNOWN).mean())
    report = Report(f"Labels of {target.name}", subtitle=f"{len(answers):,} cells, by {model}")
    found = answers.loc[answers["label_level"] == LABEL, "predicted_labels"].nunique()
    report.facts(
        {
            "cells": f"{len(answers):,}",
            "types": f"{found}",
            "unknown cells": f"{unknown:.1%}",
            "median confidence": f"{answers['conf_score'].median():.2f}",
            "genes of the model": f"{sample.measured_g.mean():.0%}",
        }
    )
    if unknown > _MUCH_UNKNOWN:
        report.warning(
            f"{unknown:.0%} of the cells are unknown. The model may not fit this tissue or protocol;"
            f" `screformer shift` measures how far they are from its training cells."
        )
    report.section("Types")
    report.table("", types(answers), "Median confidence is the calibrated probability of the answer.")
    if unknown:
        reasons = answers.loc[answers["label_level"] == UNKNOWN, "unknown_reason"].astype(str)
        table = reasons.value_counts().rename_axis("reason").reset_index(name="cells")
        report.table("Why cells are unknown", table)
    if DONOR in obs and obs[DONOR].nunique() > 1:
        report.table(
            "Donors",
            by_donor(answers, obs[DONOR].astype(str).to_numpy()),
            "Share of each answer among a donor's cells.",
        )
    report.section("Confidence")
    report.figure(
        "",
        confidence_figure(answers),
        "Cells by confidence. Of the cells with a confidence of 0.9, about 90 % should be right.",
        f"Histogram of confidence; the median is {answers['conf_score'].median():.2f}.",
    )
    _add_map(report, sample)
    _add_markers(report, predictor, sample)
    return report


def read_answers(target: Path) -> pd.DataFrame:
    """The answers in a labelled copy, or in a folder of Parquet files, in the order of the cells."""
    if target.is_dir():
        return pd.read_parquet(target, columns=list(ANSWER_COLUMNS))
    with H5adFile.open(target) as file:
        return file.obs[list(ANSWER_COLUMNS)].reset_index(drop=True)


def types(answers: pd.DataFrame) -> pd.DataFrame:
    """One row per answer, the most frequent first: its id, level, cells, share and median confidence."""
    groups = answers.groupby(
        ["predicted_labels", "cell_type_ontology_term_id", "label_level"], observed=True
    )["conf_score"].agg(["size", "median"])
    table = groups.sort_values("size", ascending=False).reset_index()
    return pd.DataFrame(
        {
            "answer": table["predicted_labels"].astype(str),
            "Cell Ontology id": table["cell_type_ontology_term_id"].astype(str),
            "level": table["label_level"].astype(str),
            "cells": table["size"],
            "share": table["size"] / len(answers),
            "median confidence": table["median"],
        }
    )


def by_donor(answers: pd.DataFrame, donors_n: np.ndarray) -> pd.DataFrame:
    """Cells of each donor, and the share of each of the most frequent answers among them."""
    labels = answers["predicted_labels"].astype(str)
    names = labels.value_counts().index[:_MOST_LABELS]
    shares = pd.crosstab(donors_n, labels.to_numpy(), normalize="index")[list(names)]
    cells = pd.Series(donors_n).value_counts()
    table = shares.assign(cells=cells).sort_values("cells", ascending=False).head(_MOST_DONORS)
    return table[["cells", *names]].rename_axis("donor").reset_index()


def _add_map(report: Report, sample: ComparedCells) -> None:
    found = sample.predictions
    chosen = np.sort(np.random.default_rng(0).permutation(len(found))[:MOST_ON_MAP])
    if len(chosen) < 3:
        return
    points_n2, how = layout(found.embedding_nd[chosen])
    labels = pd.Series(found.labels[chosen]).astype(str)
    report.section("Map of the cells")
    report.text(f"{how} of the model's embeddings of {len(chosen):,} cells. {HOW_TO_READ}")
    names = labels.value_counts().index.tolist()
    alt = f"Map by answer: {', '.join(names)}."
    report.figure("By answer", map_figure(points_n2, labels, names), "", alt)
    report.figure(
        "By confidence",
        confidence_map(points_n2, found.confidence[chosen]),
        "",
        "The same map, coloured by confidence.",
    )


def _add_markers(report: Report, predictor: Predictor, sample: ComparedCells) -> None:
    dots = marker_dots(predictor, sample)
    if not len(dots):
        return
    report.section("Marker genes")
    report.figure(
        "",
        dot_figure(dots),
        "Known markers of each type, in the order of the types. The area of a dot is the share of the cells"
        " that express the gene; its colour is the mean of log1p of counts per 10,000. Cells of a type should"
        " express its own markers.",
        f"Expression of {dots['gene'].nunique()} marker genes in {dots['label'].nunique()} types.",
    )


def marker_dots(predictor: Predictor, sample: ComparedCells) -> pd.DataFrame:
    """Rows of `dot_table`: the listed markers of the types found, in the cells of each of these types.

    Only measured genes are used; empty if no marker was measured.
    """
    place = {feature_id: gene for gene, feature_id in enumerate(predictor.vocabulary.feature_ids)}
    measured = {feature_id for feature_id, gene in place.items() if sample.measured_g[gene]}
    listed = markers()
    listed = listed[listed["feature_id"].isin(measured)]
    best_n, known_n = sample.predictions.label_codes, ~sample.predictions.unknown
    codes = np.unique(best_n[known_n]).tolist()
    names, cl_ids = predictor.label_names, predictor.label_cl_ids
    own = [markers_of(listed, names[code], cl_ids[code]).head(_MOST_MARKERS) for code in codes]
    genes = pd.concat([listed.head(0), *own]).drop_duplicates("feature_id")
    cells = {str(names[code]): known_n & (best_n == code) for code in codes}
    columns = [place[name] for name in genes["feature_id"]]
    return dot_table(sample.counts.normalised(), cells, columns, genes["symbol"].tolist())
