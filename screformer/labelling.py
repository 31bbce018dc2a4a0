"""Label the cells of an AnnData with a model directory, without a registry, Ray or an atlas.

Axes: n cells, d model width, k classes.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from screformer import bundled
from screformer.answers import PROVENANCE
from screformer.calibration import FEW_COUNTS
from screformer.cells import AnnDataCells, predictions
from screformer.composition import present_labels
from screformer.genes import MIN_GENE_OVERLAP, GeneMatch
from screformer.predictor import Predictions, Predictor

MAJORITY_COLUMN, PRESENT_COLUMN = "majority_label", "present_label"
PROBABILITIES_KEY, EMBEDDING_KEY = "screformer_probabilities", "X_screformer"
"""In obsm."""

logger = logging.getLogger(__name__)


def annotate(
    adata: Any,
    model: str | Path | Predictor = bundled.DEFAULT,
    *,
    layer: str = "",
    raw: bool = False,
    min_gene_overlap: float = MIN_GENE_OVERLAP,
    probabilities: bool = False,
    majority_vote: str = "",
    drop_absent: bool = False,
) -> Any:
    """Label the cells of an AnnData.

    Args:
        adata: Raw counts in X, genes by Ensembl id or symbol. Not modified.
        model: A model directory, a loaded model, or `bundled:NAME` for one that comes with screformer.
        layer: Layer with the counts, instead of X.
        raw: Read counts from `raw.X` instead of X.
        min_gene_overlap: Minimum share of the model's expected expression covered by the genes, in [0, 1].
        probabilities: Adds `obsm["screformer_probabilities"]`, float32 (n, k), in the order of the labels'
            categories.
        majority_vote: obs column of clusters; adds `majority_label`.
        drop_absent: Adds `present_label`, the best label among the types estimated to be present.

    Returns:
        A copy in memory with the obs columns `screformer.answers.ANSWER_COLUMNS`, `obsm["X_screformer"]`,
        float32 (n, d), and a record in `uns["screformer"]`. Existing columns with these names are kept as
        `NAME_original`, unless an earlier call wrote them.

    Raises:
        ValueError: The model, layer or raw does not exist, too few genes match, or values are not raw counts.
    """
    predictor = model if isinstance(model, Predictor) else _load(str(model))
    require_prior(predictor, drop_absent)
    clusters_n = cluster_codes(adata.obs, majority_vote) if majority_vote else None
    cells = AnnDataCells.open(predictor, adata, min_gene_overlap=min_gene_overlap, layer=layer, raw=raw)
    parts = list(predictions(predictor, cells))
    probabilities_nk = np.concatenate([part.probabilities_nk for part in parts])
    table = answers(predictor, parts, clusters_n, probabilities_nk if drop_absent else None)
    labelled = adata.to_memory() if adata.isbacked else adata.copy()
    _write_columns(labelled, table)
    labelled.uns[PROVENANCE] = provenance(
        predictor, table, match=cells.match, counts=f"layers/{layer}" if layer else "raw/X" if raw else "X"
    )
    labelled.obsm[EMBEDDING_KEY] = np.concatenate([part.embedding_nd for part in parts])
    if probabilities:
        labelled.obsm[PROBABILITIES_KEY] = probabilities_nk
    return labelled


def answers(
    predictor: Predictor,
    parts: Sequence[Predictions | pd.DataFrame],
    clusters_n: np.ndarray | None = None,
    probabilities_nk: np.ndarray | None = None,
) -> pd.DataFrame:
    """The obs columns that describe the model's answers.

    Args:
        predictor: The model that labelled the cells.
        parts: Its predictions in parts, or their tables.
        clusters_n: Cluster of each cell, -1 for none; adds `majority_label`.
        probabilities_nk: Probability of each label; adds `present_label`.
    """
    tables = [part.table() if isinstance(part, Predictions) else part for part in parts]
    table = pd.concat([table.astype(predictor.names.dtypes) for table in tables], ignore_index=True)
    labels = {}
    if clusters_n is not None:
        best_n = table["best_label"].cat.codes.to_numpy().astype(np.int64)
        votes_n = np.array(table["unknown_reason"] != FEW_COUNTS)
        labels[MAJORITY_COLUMN] = majority(best_n, clusters_n, len(predictor.label_names), votes_n)
    if probabilities_nk is not None:
        labels[PRESENT_COLUMN] = present_labels(probabilities_nk, predictor.calibration.prior_k)
    for name, codes_n in labels.items():
        table[name] = pd.Categorical.from_codes(codes_n, categories=predictor.label_names.astype(str))
    return table


def _write_columns(adata: Any, table: pd.DataFrame) -> None:
    """Add columns to obs; existing ones with the same name are renamed, unless an earlier call wrote them."""
    record = adata.uns.get(PROVENANCE)
    written = record.get("columns", {}) if isinstance(record, Mapping) else {}
    for name in [*table, *(name for name in written if name not in table)]:
        if name not in adata.obs:
            continue
        if name in written and fingerprint(adata.obs[name]) == written[name]:
            del adata.obs[name]
        elif name in table:
            kept = kept_as(name, adata.obs)
            logger.warning("obs[%r] of the input is kept as %r", name, kept)
            adata.obs = adata.obs.rename(columns={name: kept})
    for name in table:
        adata.obs[name] = table[name].array


def kept_as(name: str, taken: Container[str]) -> str:
    """A free name to rename an input column to when we need its name."""
    kept, number = f"{name}_original", 1
    while kept in taken:
        number += 1
        kept = f"{name}_original_{number}"
    return kept


def fingerprint(column: pd.Series) -> str:
    """Hash of a column we wrote, to detect later changes."""
    values = column.astype(object) if column.dtype == "category" else column
    hashes_n = pd.util.hash_pandas_object(values, index=False).to_numpy()
    return hashlib.sha256(hashes_n.tobytes()).hexdigest()[:16]


def provenance(predictor: Predictor, table: pd.DataFrame, *, match: GeneMatch, counts: str) -> dict[str, Any]:
    """The record for `uns["screformer"]`: which model wrote which columns, from which counts."""
    return {
        "model": str(predictor.directory),
        "label_column": predictor.label_column,
        "labels": predictor.label_names.astype(str),
        "columns": {name: fingerprint(table[name]) for name in table},
        "counts": counts,
        "genes_found": match.num_found,
        "genes_of_model": match.num_model_genes,
        "expression_share": match.expression_share,
        "trained_on": json.dumps(predictor.meta, default=str),
    }


def majority(codes_n: np.ndarray, clusters_n: np.ndarray, num_labels: int, votes_n: np.ndarray) -> np.ndarray:
    """The most frequent label code in each cell's cluster (ties go to the first label).

    A cell without a cluster (-1) keeps its own label. Cells outside `votes_n` get their cluster's label but
    do not vote.
    """
    inside = clusters_n >= 0
    votes = np.zeros((int(clusters_n.max(initial=-1)) + 1, num_labels), dtype=np.int64)
    np.add.at(votes, (clusters_n[inside & votes_n], codes_n[inside & votes_n]), 1)
    voted = codes_n.copy()
    voted[inside] = votes.argmax(axis=1)[clusters_n[inside]]
    return voted


def require_prior(predictor: Predictor, drop_absent: bool) -> None:
    """Reject `drop_absent` for a model without label shares."""
    if drop_absent and not predictor.calibration.prior_k:
        raise ValueError(
            "--drop-absent needs a model that stores its labels' shares in training; this one is older, or"
            " had no validation cells"
        )


def cluster_codes(obs: pd.DataFrame, column: str) -> np.ndarray:
    """Codes of the clusters in an obs column, int64 (n,), -1 for none."""
    if column not in obs:
        raise ValueError(
            f"--majority-vote {column}: obs has no such column; it has"
            f" {', '.join(map(str, obs.columns)) or 'none'}"
        )
    return obs[column].astype("category").cat.codes.to_numpy().astype(np.int64)


def _load(model: str) -> Predictor:
    if model.startswith(("models:/", "runs:/")):
        raise ValueError(
            f"model {model!r} is in a registry; pass a model directory, for example the result of"
            f" `jobs.tracking.models.resolve_model({model!r})`, or use"
            f" `mlflow.pyfunc.load_model({model!r}).predict(adata)`"
        )
    return Predictor.load(bundled.bundled_model(model) if model.startswith(bundled.PREFIX) else model)
