"""Starting point of a training run: a model, its own checkpoint, or its cells.

Axes: n cells, g genes, k classes.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import ray.train

from data_ingest.epoch_plan import sampled_cells
from jobs.tracking.models import resolve_model
from jobs.training.cells import TrainingCells
from jobs.training.reference import cells_to_show
from screformer.additive_start import Labelled, additive_start, informative_genes, reference_profile
from screformer.checkpoint import LoadedModel, load_model
from screformer.config import ExperimentConfig, touching
from screformer.extension import extended, fit_new_rows
from screformer.objective import class_weights, dataset_weights
from screformer.start import LinearStart, Start, logistic_start, svd_gene_embeddings
from screformer.tokenizer import GeneVocabulary

SAMPLE_CELLS = 4096
"""Maximum number of training cells used for mean expression and the SVD start."""
ADDITIVE_SAMPLE_CELLS = 16384
"""The same for an additive encoder; sampled evenly over the labels."""
MOVED_SAMPLE_CELLS = 4096
"""The same for a model that is extended, evenly over the labels."""
HEADS = ("classification_head.", "linear_skip.")


def load_start(config: ExperimentConfig, init_from: str) -> LoadedModel:
    """Load the model to start from.

    Args:
        config: The run's settings; `tracking` says where models are.
        init_from: A run id, `runs:/...`, `models:/NAME@ALIAS` or a model directory.

    Raises:
        ValueError: The model does not exist, or its directory cannot be used.
    """
    return load_model(resolve_model(init_from, config.tracking))


def settings_of_start(config: ExperimentConfig, start: LoadedModel, init_from: str) -> ExperimentConfig:
    """The run's settings with those that the start model's weights fix.

    A setting that has its default takes the model's value. `model.input_genes` may be larger than the
    model's: inputs are then added.

    Raises:
        ValueError: A setting that was given differs from the model's; the message names it.
    """
    ours, theirs, default = config.to_dict(), start.config.to_dict(), ExperimentConfig().to_dict()
    taken: dict[str, Any] = {}
    for path in touching("weights"):
        section, name = path.split(".")
        given, needed = ours[section][name], theirs[section][name]
        if given in (needed, "auto") or (path == "model.input_genes" and given > needed):
            continue
        if given != default[section][name]:
            raise ValueError(
                f"{path}={given!r}, but the model {init_from} was trained with"
                f" {needed!r}; set {path}={needed}, or start from another model"
            )
        taken[path] = needed
    if taken.get("model.encoder") == "additive":
        taken["model.linear_skip"] = False
    return config.merge(taken)


def starting_point(
    cells: TrainingCells, model: LoadedModel | None, checkpoint: ray.train.Checkpoint | None = None
) -> tuple[GeneVocabulary, Start]:
    """The vocabulary of the run's model and the starting point of its network. Ray must be running.

    Args:
        cells: The run's cells.
        model: Model to start from.
        checkpoint: Checkpoint of the run itself, with all weights.

    Raises:
        ValueError: The checkpoint has different labels.
    """
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            saved = load_model(Path(folder) / "model")
        if saved.labels["names"] != cells.labels["names"]:
            raise ValueError(
                f"the run was started with the labels {saved.labels['names']}, but they are now"
                f" {cells.labels['names']}"
            )
        return saved.vocabulary, Start()
    if model is not None and cells.move is not None:
        return _moved_point(cells, model)
    if model is not None:
        same_labels = model.labels["names"] == cells.labels["names"]
        return model.vocabulary, Start(
            weights=_weights(model, with_heads=same_labels),
            linear=None if same_labels else linear_start(cells),
        )
    if cells.config.model.encoder == "additive":
        return _additive_point(cells)
    kind, seed = cells.config.model.gene_embedding, cells.config.train.seed
    found = cells.sample("train", SAMPLE_CELLS)
    values_ng = found.cells.normalised()
    mean_g = np.asarray(values_ng.mean(axis=0), dtype=np.float32).reshape(-1)
    start = Start(linear=linear_start(cells))
    if kind in ("svd", "shuffled"):
        embeddings_gd = svd_gene_embeddings(values_ng, cells.config.model.dim, seed)
        if kind == "shuffled":
            embeddings_gd = np.random.default_rng([seed, 3]).permutation(embeddings_gd)
        start = replace(start, gene_embeddings_gd=embeddings_gd)
    return replace(cells.genes, mean_expression_g=mean_g), start


def _weights(model: LoadedModel, *, with_heads: bool) -> dict[str, np.ndarray]:
    state = model.model.state_dict()
    return {
        name: tensor.numpy() for name, tensor in state.items() if with_heads or not name.startswith(HEADS)
    }


def _moved_point(cells: TrainingCells, model: LoadedModel) -> tuple[GeneVocabulary, Start]:
    """A model for cells of another query: its vocabulary and network, extended."""
    names, old = cells.labels["names"], model.labels["names"]
    keeps_head = bool(old) and names[: len(old)] == old
    vocabulary, weights = cells.genes, _weights(model, with_heads=keeps_head)
    if len(vocabulary) > len(model.vocabulary) or (keeps_head and len(names) > len(old)):
        sample = cells.sample("train", MOVED_SAMPLE_CELLS, even_labels=True)
        datasets_n = cells.datasets_n[np.searchsorted(cells.query.obs_joinids, sample.joinids_n)]
        found = Labelled(sample.cells, sample.labels_n, datasets_n)
        num_classes = len(names) if keeps_head else model.model.num_classes
        extension = extended(model, cells.config, vocabulary, found, num_classes)
        vocabulary, weights = extension.vocabulary, extension.weights
        if keeps_head and len(names) > len(old):
            chosen = sampled_cells(
                sample.labels_n, cells_to_show(cells), cells.config.train.seed, even_labels=True
            )
            part, labels_n = sample.cells.take(chosen), sample.labels_n[chosen]
            fit_new_rows(weights, cells.config, vocabulary, cells.labels, model, part, labels_n)
    if not keeps_head:
        weights = {name: array for name, array in weights.items() if not name.startswith(HEADS)}
    return vocabulary, Start(weights=weights, linear=None if keeps_head else linear_start(cells))


def _additive_point(cells: TrainingCells) -> tuple[GeneVocabulary, Start]:
    """Vocabulary (with input genes and reference profile) and start of an additive encoder."""
    config, joinids = cells.config, cells.query.obs_joinids
    sample = cells.sample("train", ADDITIVE_SAMPLE_CELLS, even_labels=True)
    datasets_n = cells.datasets_n[np.searchsorted(joinids, sample.joinids_n)]
    found = Labelled(sample.cells, sample.labels_n, datasets_n)
    inputs = informative_genes(found, config.model.input_genes)
    reference_g = reference_profile(found).astype(np.float32)
    values_ng = sample.cells.normalised(reference_g)
    vocabulary = replace(
        cells.genes,
        mean_expression_g=np.asarray(values_ng.mean(axis=0), dtype=np.float32).reshape(-1),
        reference_g=reference_g,
        inputs_g=np.isin(np.arange(len(cells.genes)), inputs),
    )
    weights_n = dataset_weights(sample.labels_n, datasets_n)
    start = additive_start(
        values_ng, sample.cells.panels, weights_n, inputs, config.model.dim, config.train.seed
    )
    return vocabulary, Start(additive=start)


def linear_start(cells: TrainingCells) -> LinearStart | None:
    """A logistic regression on a sample of training cells, or None if it is turned off."""
    config = cells.config
    if not (cells.labels["names"] and config.model.linear_skip and config.model.linear_start_cells):
        return None
    found = cells.sample("train", config.model.linear_start_cells, even_labels=True)
    values_ng = found.cells.normalised()
    if config.tokens.expression == "binary":
        values_ng.data[:] = 1
    counts_k = np.bincount(found.labels_n, minlength=len(cells.labels["names"]))
    weights_k = class_weights(counts_k, config.train.class_weighting)
    return logistic_start(values_ng, found.labels_n, weights_k, found.cells.panels)
