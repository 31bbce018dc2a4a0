"""Label the cells of an AnnData with a model directory. Needs no registry, no Ray and no atlas.

Axes: n cells, d model width, k classes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from screformer.calibration import present_labels
from screformer.genes import MIN_GENE_OVERLAP
from screformer.predictor import ANSWER_COLUMNS, Predictor

MAJORITY_COLUMN = "majority_label"
PRESENT_COLUMN = "present_label"

_CELLS_PER_READ = 2048


def annotate(
    adata: Any,
    model: str | Path | Predictor,
    *,
    layer: str = "",
    majority_vote: str = "",
    drop_absent: bool = False,
) -> Any:
    """Label the cells of an AnnData.

    Args:
        adata: Raw counts in X, genes by Ensembl id or symbol. It is not changed.
        model: A model directory, or a loaded model.
        layer: Counts are in this layer instead of X.
        majority_vote: obs column of clusters; adds `majority_label`.
        drop_absent: Adds `present_label`, the best label among those that the cells as a whole hold.

    Returns:
        A copy with the obs columns `screformer.predictor.ANSWER_COLUMNS` (those of these names are replaced)
        and `obsm["X_screformer"]`, float32 (n, d).

    Raises:
        ValueError: No such model or layer, too few genes, or values that are no raw counts.
    """
    predictor = model if isinstance(model, Predictor) else _load(str(model))
    if layer and layer not in adata.layers:
        raise ValueError(f"adata has no layer {layer!r}; it has {', '.join(adata.layers) or 'none'}")
    counts = adata.layers[layer] if layer else adata.X
    match = predictor.match_var(adata.var)
    match.require(MIN_GENE_OVERLAP, source="adata")
    require_prior(predictor, drop_absent)
    tables, codes, embeddings, probabilities = [], [], [], []
    for start in range(0, adata.n_obs, _CELLS_PER_READ):
        rows = slice(start, start + _CELLS_PER_READ)
        found = predictor.predict_counts(counts[rows], match, source="adata")
        tables.append(found.table(adata.obs_names[rows]))
        codes.append(found.label_codes)
        embeddings.append(found.embedding_nd)
        if drop_absent:
            probabilities.append(found.probabilities_nk)
    labelled = adata.copy()
    table = pd.concat(tables)
    for name in ANSWER_COLUMNS:
        labelled.obs[name] = table[name].astype("category") if table[name].dtype == object else table[name]
    labelled.obsm["X_screformer"] = np.concatenate(embeddings)
    if majority_vote:
        voted = majority(
            np.concatenate(codes), cluster_codes(adata.obs, majority_vote), len(predictor.label_names)
        )
        labelled.obs[MAJORITY_COLUMN] = pd.Categorical.from_codes(
            voted, categories=predictor.label_names.tolist()
        )
    if drop_absent:
        present = present_labels(np.concatenate(probabilities), predictor.calibration.prior_k)
        labelled.obs[PRESENT_COLUMN] = pd.Categorical.from_codes(
            present, categories=predictor.label_names.tolist()
        )
    return labelled


def majority(codes_n: np.ndarray, clusters_n: np.ndarray, num_labels: int) -> np.ndarray:
    """The most frequent label code of each cell's cluster (ties: the first label).

    A cell without cluster (-1) keeps its own.
    """
    inside = clusters_n >= 0
    votes = np.zeros((int(clusters_n.max(initial=-1)) + 1, num_labels), dtype=np.int64)
    np.add.at(votes, (clusters_n[inside], codes_n[inside]), 1)
    voted = codes_n.copy()
    voted[inside] = votes.argmax(axis=1)[clusters_n[inside]]
    return voted


def require_prior(predictor: Predictor, drop_absent: bool) -> None:
    """Refuse `drop_absent` for a model without label shares."""
    if drop_absent and not predictor.calibration.prior_k:
        raise ValueError(
            "--drop-absent needs a model that knows its labels' shares in training; this one is older, or had"
            " no validation cells"
        )


def cluster_codes(obs: pd.DataFrame, column: str) -> np.ndarray:
    """Codes of an obs column of clusters, int64 (n,), -1 for none."""
    if column not in obs:
        raise ValueError(
            f"--majority-vote {column}: obs has no such column; it has"
            f" {', '.join(map(str, obs.columns)) or 'none'}"
        )
    return obs[column].astype("category").cat.codes.to_numpy().astype(np.int64)


def _load(model: str) -> Predictor:
    if model.startswith(("models:/", "runs:/")):
        raise ValueError(
            f"model {model!r} is an address in a registry; give a model directory, such as"
            f" `jobs.tracking.models.resolve_model({model!r})` finds, or use"
            f" `mlflow.pyfunc.load_model({model!r}).predict(adata)`"
        )
    return Predictor.load(model)
