"""Label the cells of an AnnData in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from jobs.labelling.h5ad_copy import (
    _CELLS_PER_CHUNK,
    COLUMNS,
    MAJORITY_COLUMN,
    PRESENT_COLUMN,
    cluster_codes,
    majority,
    require_prior,
)
from jobs.tracking.models import resolve_model
from screformer.calibration import present_labels
from screformer.config import TrackingConfig
from screformer.genes import MIN_GENE_OVERLAP
from screformer.predictor import Predictor


def annotate_adata(
    adata: Any,
    model: str | Path,
    *,
    layer: str = "",
    majority_vote: str = "",
    drop_absent: bool = False,
    tracking_uri: str = "",
) -> Any:
    """Label the cells of an AnnData.

    Args:
        adata: Raw counts in X, genes by Ensembl id or symbol. It is not changed.
        model: `models:/NAME@ALIAS`, `models:/NAME/VERSION`, `runs:/RUN_ID` or a model directory.
        layer: Counts are in this layer instead of X.
        majority_vote: obs column of clusters; adds `majority_label`.
        drop_absent: Adds `present_label`, the best label among those that the cells as a whole hold.
        tracking_uri: Where models are kept; empty takes MLFLOW_TRACKING_URI, else ./mlflow.db.

    Returns:
        A copy with the obs columns `screformer.predictor.ANSWER_COLUMNS` (those of these names are replaced)
        and
        `obsm["X_screformer"]`, float32 (n, d).

    Raises:
        ValueError: No such model or layer, too few genes, or values that are no raw counts.
    """
    predictor = Predictor.load(resolve_model(str(model), TrackingConfig(uri=tracking_uri)))
    if layer and layer not in adata.layers:
        raise ValueError(f"adata has no layer {layer!r}; it has {', '.join(adata.layers) or 'none'}")
    counts = adata.layers[layer] if layer else adata.X
    match = predictor.match_var(adata.var)
    match.require(MIN_GENE_OVERLAP, source="adata")
    require_prior(predictor, drop_absent)
    tables, codes, embeddings, probabilities = [], [], [], []
    for start in range(0, adata.n_obs, _CELLS_PER_CHUNK):
        rows = slice(start, start + _CELLS_PER_CHUNK)
        found = predictor.predict_counts(counts[rows], match, source="adata")
        tables.append(found.table(adata.obs_names[rows]))
        codes.append(found.label_codes)
        embeddings.append(found.embedding_nd)
        if drop_absent:
            probabilities.append(found.probabilities_nk)
    labelled = adata.copy()
    table = pd.concat(tables)
    for name in COLUMNS:
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
