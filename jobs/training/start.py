"""What a training run starts from: a given model, SVD gene embeddings, a logistic regression.

Axes: n cells, g genes of the vocabulary, d model width, k classes.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
import ray.train.torch
import torch

from jobs.tracking.models import resolve_model
from jobs.training.cells import TrainingCells
from screformer.attention import settle_attention
from screformer.checkpoint import (
    LoadedModel,
    load_model,
)
from screformer.config import ExperimentConfig, touching
from screformer.model import ScReformer
from screformer.objective import class_weights
from screformer.start import logistic_start, svd_gene_embeddings
from screformer.tokenizer import GeneVocabulary

HEADS = ("classification_head.", "linear_skip.")


def load_start(config: ExperimentConfig, init_from: str) -> LoadedModel:
    """The model to start from; refuses one of another shape."""
    start = load_model(resolve_model(init_from, config.tracking))
    ours, theirs = config.to_dict(), start.config.to_dict()
    for path in touching("weights"):
        section, name = path.split(".")
        if ours[section][name] not in (theirs[section][name], "auto"):
            raise ValueError(
                f"{path}={ours[section][name]!r}, but the model {init_from} was trained with"
                f" {theirs[section][name]!r};"
                f" set {path}={theirs[section][name]}, or start from another model"
            )
    return start


def initial_arrays(
    cells: TrainingCells, start: LoadedModel | None, checkpoint: ray.train.Checkpoint | None
) -> tuple[TrainingCells, dict[str, Any]]:
    """The cells with their final vocabulary, and the arrays that the network starts from."""
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            saved = load_model(Path(folder) / "model")
        if saved.labels["names"] != cells.labels["names"]:
            raise ValueError(
                f"the run was started with the labels {saved.labels['names']}, now they are"
                f" {cells.labels['names']}"
            )
        return dataclasses.replace(cells, vocabulary=saved.vocabulary), {}
    if start is not None:
        same_labels = start.labels["names"] == cells.labels["names"]
        weights = {
            name: tensor.numpy()
            for name, tensor in start.model.state_dict().items()
            if same_labels or not name.startswith(HEADS)
        }
        return cells, {"weights": weights, **({} if same_labels else linear_start(cells))}
    sample = cells.sample
    mean_g = np.asarray(sample.mean(axis=0), dtype=np.float32).reshape(-1)
    vocabulary = GeneVocabulary(cells.vocabulary.feature_ids, cells.vocabulary.feature_names, mean_g)
    arrays = {}
    start_from, seed = cells.config.model.gene_embedding, cells.config.train.seed
    if start_from in ("svd", "shuffled"):
        embeddings_gd = svd_gene_embeddings(sample, cells.config.model.dim, seed)
        shuffles = start_from == "shuffled"
        arrays["gene_embeddings"] = (
            np.random.default_rng([seed, 3]).permutation(embeddings_gd) if shuffles else embeddings_gd
        )
    return dataclasses.replace(cells, vocabulary=vocabulary), {**arrays, **linear_start(cells)}


def linear_start(cells: TrainingCells) -> dict[str, Any]:
    """`linear` of `jobs.worker.start_from`, or nothing where none is wanted."""
    config = cells.config
    if not (cells.labels["names"] and config.model.linear_skip and config.model.linear_start_cells):
        return {}
    found = cells.stream("train").sample(config.model.linear_start_cells, config.train.seed, even_labels=True)
    values_ng = found.cells.normalised()
    if config.tokens.expression == "binary":
        values_ng.data[:] = 1
    counts_k = np.bincount(found.labels_n, minlength=len(cells.labels["names"]))
    return {
        "linear": logistic_start(
            values_ng,
            found.labels_n,
            class_weights(counts_k, config.train.class_weighting),
            found.cells.panels,
        )
    }


def settled(
    config: ExperimentConfig, cells: TrainingCells, start: LoadedModel | None
) -> tuple[ExperimentConfig, str]:
    """The configuration with its attention named.

    The start model's, whose weights fit no other one, or the faster one.
    """
    if start is not None and config.model.attention == "auto":
        config = config.merge({"model.attention": start.config.model.attention})
    model, says = settle_attention(config.model, config.tokens.most_slots(len(cells.vocabulary)))
    return dataclasses.replace(config, model=model), says


def start_from(model: ScReformer, start: dict[str, Any]) -> None:
    """Put given weights into a new network.

    Args:
        model: The network.
        start: `gene_embeddings` (g, d); `weights` by name, which may leave out some; `linear`, the weights
            (g, k), bias (k,) and center (g,) of a linear classifier. Each may be missing; without any the
            random start is left.
    """
    if "gene_embeddings" in start:
        model.set_gene_embeddings(torch.from_numpy(np.array(start["gene_embeddings"])))
    if "weights" in start:
        state = model.state_dict()
        model.load_state_dict(
            {**state, **{name: torch.from_numpy(np.array(array)) for name, array in start["weights"].items()}}
        )
    if "linear" in start:
        model.set_linear_start(*(torch.from_numpy(np.array(array)) for array in start["linear"]))
