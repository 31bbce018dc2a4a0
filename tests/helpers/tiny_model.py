"""A small model directory with random weights, for tests of how models are used, not of what they learned."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from data_ingest.ontology import lineage
from screformer.calibration import Calibration
from screformer.checkpoint import NO_LABELS, load_model, save_model
from screformer.config import ExperimentConfig
from screformer.model import ScReformer
from screformer.tokenizer import GeneVocabulary

LABELS = {
    "column": "cell_type_major",
    "names": ["B cell", "T cell", "monocyte", "mystery cell"],
    "cl_ids": ["CL:0000236", "CL:0000084", "CL:0000576", ""],
}


def tiny_vocabulary(
    feature_ids: Sequence[str] | None = None, feature_names: Sequence[str] | None = None
) -> GeneVocabulary:
    """The given genes, or about thirty; no mean expression is 0."""
    ids = tuple(feature_ids or (f"ENSG{i:011d}" for i in range(40)))
    names = tuple(feature_names or (f"GENE{i}" for i in range(len(ids))))
    return GeneVocabulary(ids, names, np.linspace(2.0, 0.1, len(ids)).astype(np.float32))


def calibrated_tiny_model(directory: Path) -> Path:
    """The tiny model with a calibration that calls some cells unknown."""
    loaded = load_model(write_tiny_model(directory))
    calibration = Calibration(
        temperature=2.0,
        logit_mean_k=(1.0,) * 4,
        logit_std_k=(0.5,) * 4,
        unknown_threshold=0.0,
        lineage=lineage(LABELS["cl_ids"]),
        prior_k=(0.25,) * 4,
        measured={
            "cells": 9.0,
            "false_alarm_rate": 0.05,
            "accuracy": 0.5,
            "ece_before": 0.2,
            "ece_after": 0.1,
        },
    )
    save_model(
        directory, loaded.model, loaded.config, loaded.vocabulary, loaded.labels, loaded.meta, calibration
    )
    return directory


def write_tiny_model(
    directory: Path, vocabulary: GeneVocabulary | None = None, *, has_labels: bool = True, **overrides: object
) -> Path:
    """Save a model with weights random enough for cells to get different labels."""
    vocabulary = vocabulary or tiny_vocabulary()
    small = {
        "model.dim": 16,
        "model.depth": 2,
        "model.heads": 2,
        "model.attention": "lsh",
        "model.bucket_size": 4,
        "model.n_hashes": 2,
        "tokens.max_genes": 64,
    }
    config = ExperimentConfig().merge({**small, **overrides})
    labels = LABELS if has_labels else NO_LABELS
    model = ScReformer(
        config.model, config.tokens, num_genes=len(vocabulary), num_classes=len(labels["names"]), seed=0
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    meta = {
        "atlas": {"uri": "atlas", "timestamp_ms": 5},
        "query_hash": "ab12",
        "metrics": {"test/macro_f1": 0.5},
    }
    save_model(directory, model, config, vocabulary, labels, meta)
    return directory
