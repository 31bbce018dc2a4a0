"""A trained network with more genes and labels: what it knew stays, bit by bit.

Axes: n cells, g genes, i input genes of an additive encoder, d model width, k classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from scipy import sparse
from scipy.optimize import minimize

from screformer.additive import responses
from screformer.additive_start import Labelled, informative_genes
from screformer.checkpoint import LoadedModel
from screformer.config import ExperimentConfig
from screformer.counts import CellCounts
from screformer.model import ScReformer
from screformer.objective import class_weights
from screformer.predictor import Predictor
from screformer.tokenizer import NUM_SPECIAL, GeneVocabulary

NEIGHBOURS = 8
"""Co-expressed genes whose mean embedding a new gene starts from."""
_CORRELATED_CELLS = 1024
"""Cells over which genes are correlated, at most."""
_CHUNK = 1024
"""New genes whose correlations are computed at a time."""
_PENALTY = 1e-3
"""L2 penalty of the new rows of the head."""


def extended_vocabulary(known: GeneVocabulary, found: GeneVocabulary) -> GeneVocabulary:
    """The genes of a model, followed by those that it lacks.

    New genes have a mean expression of 0, are not part of the reference profile, and are no inputs: the
    values of the known genes stay the same.
    """
    new = np.flatnonzero(known.index(found.feature_ids) < 0)
    if not len(new):
        return known
    return GeneVocabulary(
        known.feature_ids + tuple(found.feature_ids[gene] for gene in new),
        known.feature_names + tuple(found.feature_names[gene] for gene in new),
        _padded(known.mean_expression_g, len(new)),
        None if known.reference_g is None else _padded(known.reference_g, len(new)),
        None if known.inputs_g is None else _padded(known.inputs_g, len(new)),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Extended:
    """A network with more genes or labels."""

    vocabulary: GeneVocabulary
    weights: dict[str, np.ndarray]


def extended(
    known: LoadedModel,
    config: ExperimentConfig,
    vocabulary: GeneVocabulary,
    found: Labelled,
    num_classes: int,
) -> Extended:
    """Extend a network.

    A new gene starts from the mean embedding of the genes that it is expressed with. New labels have no
    weight on single genes yet; `new_rows` fits their rows of the head. All other weights are those of the
    known network.

    Args:
        known: The network.
        config: The settings of the extended one; its additive encoder has `model.input_genes` inputs.
        vocabulary: By `extended_vocabulary`.
        found: Training cells, over that vocabulary.
        num_classes: Labels of the extended network, the known ones first.
    """
    values_ng = sparse.csc_array(found.cells.normalised(vocabulary.reference_g))
    weights = {name: tensor.numpy() for name, tensor in known.model.state_dict().items()}
    num_known, num_genes = len(known.vocabulary), len(vocabulary)
    measured_n = found.cells.panels.measured_pg[:, num_known:].sum(axis=1)[found.cells.panels.panels_n]
    cells = np.flatnonzero(measured_n >= max(0.5 * measured_n.max(initial=0), 1))
    if not len(cells):  # no new genes
        cells = np.arange(values_ng.shape[0])
    cells = cells[np.linspace(0, len(cells) - 1, min(len(cells), _CORRELATED_CELLS)).astype(int)]
    rows_ng = sparse.csc_array(sparse.csr_array(values_ng)[cells])
    if known.model.additive is not None:
        vocabulary = _more_inputs(
            weights, vocabulary, found, min(config.model.input_genes, num_genes), rows_ng, values_ng
        )
    elif num_genes > num_known:
        table = weights["gene_embedding.weight"]
        if len(table) == num_known + NUM_SPECIAL:  # else all genes share one vector
            new_gd = _neighbour_means(
                rows_ng, np.arange(num_known), np.arange(num_known, num_genes), table[NUM_SPECIAL:]
            )
            weights["gene_embedding.weight"] = np.concatenate([table, new_gd])
        if "linear_skip.center" in weights:
            weights["linear_skip.center"] = _padded(weights["linear_skip.center"], num_genes - num_known)
            table = weights["linear_skip.weight.weight"]
            weights["linear_skip.weight.weight"] = _padded(table, num_genes - num_known)
    more = num_classes - known.model.num_classes
    if more and "classification_head.weight" in weights:
        for name in ("classification_head.weight", "classification_head.bias"):
            weights[name] = _padded(weights[name], more)
        if "linear_skip.weight.weight" in weights:
            weights["linear_skip.weight.weight"] = _padded(weights["linear_skip.weight.weight"].T, more).T
    mean_g = vocabulary.mean_expression_g.copy()
    mean_g[num_known:] = np.asarray(rows_ng.mean(axis=0)).ravel()[num_known:]
    return Extended(dataclasses.replace(vocabulary, mean_expression_g=mean_g), weights)


def fit_new_rows(
    weights: dict[str, np.ndarray],
    config: ExperimentConfig,
    vocabulary: GeneVocabulary,
    labels: Mapping[str, Any],
    known: LoadedModel,
    cells: CellCounts,
    labels_n: np.ndarray,
) -> None:
    """Fit the rows of the head of new labels on some cells, and put them into the weights.

    The training cells that the known model keeps as embeddings take part, so that its labels are not lost to
    the new ones.

    Args:
        weights: Of the extended network; changed.
        config: Its settings.
        vocabulary: Its genes.
        labels: Its labels.
        known: The model before its extension; its labels come first.
        cells: Training cells.
        labels_n: Their classes.
    """
    num_labels, num_known = len(labels["names"]), known.model.num_classes
    model = ScReformer(
        config.model, config.tokens, num_genes=len(vocabulary), num_classes=num_labels, seed=config.train.seed
    )
    given = {name: torch.from_numpy(np.array(array)) for name, array in weights.items()}
    model.load_state_dict({**model.state_dict(), **given})
    loaded = LoadedModel(
        model=model.eval(), config=config, vocabulary=vocabulary, labels=dict(labels), meta={}
    )
    logits_nk, embedding_nd = Predictor(loaded, "", device="cpu").outputs(cells)
    if known.reference is not None and known.model.linear_skip is None:
        old_nd = known.reference.embedding_nd.astype(np.float32)
        old_nk = np.zeros((len(old_nd), num_labels), np.float32)
        head = known.model.classification_head
        assert head is not None
        old_nk[:, :num_known] = head(torch.from_numpy(old_nd)).detach().numpy()
        embedding_nd, logits_nk = np.concatenate([embedding_nd, old_nd]), np.concatenate([logits_nk, old_nk])
        labels_n = np.concatenate([labels_n, known.reference.labels_n])
    weights_k = class_weights(np.bincount(labels_n, minlength=num_labels), "sqrt")
    rows_kd, bias_k = new_rows(embedding_nd, logits_nk, labels_n, weights_k[labels_n], num_known)
    weights["classification_head.weight"] = weights["classification_head.weight"].copy()
    weights["classification_head.weight"][num_known:] = rows_kd
    weights["classification_head.bias"] = weights["classification_head.bias"].copy()
    weights["classification_head.bias"][num_known:] = bias_k


def new_rows(
    embedding_nd: np.ndarray, logits_nk: np.ndarray, labels_n: np.ndarray, weights_n: np.ndarray, known: int
) -> tuple[np.ndarray, np.ndarray]:
    """Fit the rows of new labels next to those that a head has.

    The rows minimise the cross-entropy over all labels, with the logits of the known labels as they are.

    Args:
        embedding_nd: Cell vectors.
        logits_nk: Logits; of those of new labels nothing is used.
        labels_n: Class of each cell.
        weights_n: Weight of each cell.
        known: Number of known labels, which come first.

    Returns:
        Weights (k - known, d) and biases (k - known,), float32.
    """
    x_nd, weight_n = embedding_nd.astype(np.float64), weights_n / weights_n.sum()
    k, d = logits_nk.shape[1], embedding_nd.shape[1]
    truth_nk = np.eye(k)[labels_n]

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        rows_kd = flat.reshape(k - known, d + 1)
        logits = logits_nk.astype(np.float64)
        logits[:, known:] = x_nd @ rows_kd[:, :d].T + rows_kd[:, d]
        logits -= logits.max(axis=1, keepdims=True)
        log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        error_nk = (np.exp(log_p) - truth_nk) * weight_n[:, None]
        gradient = np.concatenate(
            [
                error_nk[:, known:].T @ x_nd + _PENALTY * rows_kd[:, :d],
                error_nk[:, known:].sum(axis=0)[:, None],
            ],
            axis=1,
        )
        loss = -float(weight_n @ (log_p * truth_nk).sum(axis=1)) + _PENALTY / 2 * float(
            (rows_kd[:, :d] ** 2).sum()
        )
        return loss, gradient.ravel()

    found = minimize(
        objective, np.zeros((k - known) * (d + 1)), jac=True, method="L-BFGS-B", options={"maxiter": 200}
    ).x.reshape(k - known, d + 1)
    return found[:, :d].astype(np.float32), found[:, d].astype(np.float32)


def _more_inputs(
    weights: dict[str, np.ndarray],
    vocabulary: GeneVocabulary,
    found: Labelled,
    num_inputs: int,
    rows_ng: Any,
    values_ng: Any,
) -> GeneVocabulary:
    """Add the genes to an additive encoder that separate the labels best; changes `weights`."""
    assert vocabulary.inputs_g is not None
    old_slots = weights["additive.slots"]
    num_old = len(weights["additive.genes.weight"])
    old = np.flatnonzero(vocabulary.inputs_g)
    others_pg = found.cells.panels.measured_pg & ~vocabulary.inputs_g
    others = dataclasses.replace(found.cells.panels, measured_pg=others_pg)
    others_found = found._replace(cells=dataclasses.replace(found.cells, panels=others))
    new = np.setdiff1d(informative_genes(others_found, num_inputs - num_old), old)
    if len(new) < num_inputs - num_old:
        left = np.setdiff1d(np.arange(len(vocabulary)), np.concatenate([old, new]))
        detected = np.asarray((rows_ng[:, left] > 0).sum(axis=0)).ravel()
        best = left[np.argsort(-detected, kind="stable")[: num_inputs - num_old - len(new)]]
        new = np.sort(np.concatenate([new, best]))
    slots = np.concatenate([old_slots, np.full(len(vocabulary) - len(old_slots), -1)])
    in_order = np.argsort(slots[old])  # the gene of each slot
    slots[new] = num_old + np.arange(len(new))
    table = weights["additive.genes.weight"]
    new_id = _neighbour_means(rows_ng, old[in_order], new, table)
    panels = found.cells.panels
    measured_ni = panels.measured_pg[:, new][panels.panels_n]
    answers_nir = responses(torch.from_numpy(values_ng[:, new].toarray())).numpy()
    cells_i = np.maximum(measured_ni.sum(axis=0), 1)
    center_ir = (answers_nir * measured_ni[:, :, None]).sum(axis=0) / cells_i[:, None]
    weights["additive.slots"] = slots
    weights["additive.genes.weight"] = np.concatenate([table, new_id])
    weights["additive.center"] = np.concatenate([weights["additive.center"], center_ir.astype(np.float32)])
    inputs_g = vocabulary.inputs_g.copy()
    inputs_g[new] = True
    return dataclasses.replace(vocabulary, inputs_g=inputs_g)


def _neighbour_means(values_ng: Any, old: np.ndarray, new: np.ndarray, old_gd: np.ndarray) -> np.ndarray:
    """Mean embedding of the old genes that each new gene correlates with most, float32.

    Weighted by the square of the correlation.
    """
    x_ng = values_ng[:, old]
    mean_g, std_g = _moments(x_ng)
    found = []
    for first in range(0, len(new), _CHUNK):
        y_ng = values_ng[:, new[first : first + _CHUNK]]
        means, stds = _moments(y_ng)
        correlation = ((y_ng.T @ x_ng).toarray() / values_ng.shape[0] - np.outer(means, mean_g)) / np.outer(
            stds, std_g
        )
        nearest = np.argpartition(-correlation, min(NEIGHBOURS, len(old)) - 1, axis=1)[:, :NEIGHBOURS]
        strength = np.maximum(np.take_along_axis(correlation, nearest, axis=1), 1e-3) ** 2
        strength /= strength.sum(axis=1, keepdims=True)
        found.append(np.einsum("gk,gkd->gd", strength, old_gd[nearest]))
    return np.concatenate(found).astype(np.float32) if found else np.zeros((0, old_gd.shape[1]), np.float32)


def _moments(values_ng: Any) -> tuple[np.ndarray, np.ndarray]:
    mean_g = np.asarray(values_ng.mean(axis=0)).ravel()
    square_g = np.asarray(values_ng.multiply(values_ng).mean(axis=0)).ravel()
    return mean_g, np.sqrt(np.maximum(square_g - mean_g**2, 1e-12))


def known_part(cells: CellCounts, num_genes: int) -> CellCounts:
    """The counts of the first genes, as a network before its extension takes them."""
    panels = dataclasses.replace(cells.panels, measured_pg=cells.panels.measured_pg[:, :num_genes])
    counts_ng = sparse.csr_array(cells.counts_ng[:, :num_genes])
    return CellCounts(counts_ng, cells.total_n, panels)


def _padded(array: np.ndarray, more: int) -> np.ndarray:
    return np.concatenate([array, np.zeros((more, *array.shape[1:]), array.dtype)])
