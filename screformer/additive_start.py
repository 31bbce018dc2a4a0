"""Starting values of an additive encoder: input genes, reference profile and SVD embeddings.

Axes: n cells, g genes of the vocabulary, i input genes, p gene panels, d model width, r responses.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from scipy import sparse

from screformer.additive import responses
from screformer.counts import CellCounts, Panels

EMBEDDING_RMS = 0.05
_MIN_CELLS = 3
"""Minimum number of cells of a type in a data set to find its marker genes there."""
_ALIGNMENTS = 20


class AdditiveStart(NamedTuple):
    """Starting values for `AdditiveEncoder.set_start`."""

    slots_g: np.ndarray
    center_ir: np.ndarray
    genes_id: np.ndarray
    scale: np.ndarray


class Labelled(NamedTuple):
    """Training cells that determine the starting values."""

    cells: CellCounts
    labels_n: np.ndarray
    """Class of each cell, int64."""
    datasets_n: np.ndarray
    """Data set code of each cell, int64."""


def informative_genes(found: Labelled, most: int) -> np.ndarray:
    """The genes that best separate each label from the others within a data set.

    In each data set and for each label, genes are ranked by the difference in mean log expression from the
    other labels, divided by the spread within labels. A gene counts with its best rank, so a large panel
    does not crowd out a small one.

    Args:
        found: Training cells.
        most: Number of genes to keep.

    Returns:
        Vocabulary indices, increasing; all genes if there are at most `most`.
    """
    values_ng = found.cells.normalised()
    best_g = np.full(values_ng.shape[1], np.inf)
    for rows, measured_g in _datasets(found):
        means, spreads, sizes = [], [], []
        for label in np.unique(found.labels_n[rows]):
            x_ng = values_ng[rows[found.labels_n[rows] == label]]
            if x_ng.shape[0] < _MIN_CELLS:
                continue
            mean_g = np.asarray(x_ng.mean(axis=0)).ravel()
            square_g = np.asarray(x_ng.multiply(x_ng).mean(axis=0)).ravel()
            means.append(mean_g)
            spreads.append(np.maximum(square_g - mean_g**2, 0))
            sizes.append(x_ng.shape[0])
        if len(means) < 2:
            continue
        within_g = np.mean(spreads, axis=0)
        for index, mean_g in enumerate(means):
            rest_g = np.mean([other for at, other in enumerate(means) if at != index], axis=0)
            noise_g = within_g + 1e-2 + spreads[index] / sizes[index] * 4
            effect_g = np.abs(mean_g - rest_g) / np.sqrt(noise_g)
            rank_g = np.empty(len(effect_g))
            rank_g[np.argsort(-effect_g)] = np.arange(len(effect_g))
            rank_g[~measured_g | (effect_g <= 0)] = np.inf
            best_g = np.minimum(best_g, rank_g)
    return np.sort(np.argsort(best_g, kind="stable")[:most])


def reference_profile(found: Labelled) -> np.ndarray:
    """A mean profile over all genes, combined from data sets with different panels, float64 (g,).

    A data set's profile is the mean over its labels, weighted by the square root of their cell counts.
    Profiles are scaled to agree on the genes shared with the largest panel, whose genes sum to 1.
    """
    profiles, panels = [], []
    for rows, measured_g in _datasets(found):
        shares, weights = [], []
        for label in np.unique(found.labels_n[rows]):
            of_label = rows[found.labels_n[rows] == label]
            sum_g = np.asarray(found.cells.counts_ng[of_label].sum(axis=0, dtype=np.float64)).ravel()
            if sum_g.sum() > 0:
                shares.append(sum_g / sum_g.sum())
                weights.append(len(of_label) ** 0.5)
        if shares:
            profiles.append(np.average(shares, axis=0, weights=weights))
            panels.append(measured_g)
    profile_pg, measured_pg = np.array(profiles), np.array(panels)
    size_p = measured_pg.sum(axis=1).astype(np.float64)
    largest, factor_p = int(size_p.argmax()), np.ones(len(profile_pg))
    reference_g = profile_pg[largest]
    for _ in range(_ALIGNMENTS):
        for index in range(len(profile_pg)):
            shared_g = measured_pg[index] & measured_pg[largest] & (reference_g > 0)
            if index != largest and shared_g.any():
                factor_p[index] = reference_g[shared_g].sum() / max(profile_pg[index][shared_g].sum(), 1e-9)
        weight_g = size_p @ measured_pg
        sum_g = (size_p * factor_p) @ (profile_pg * measured_pg)
        reference_g = np.divide(sum_g, weight_g, out=np.zeros_like(sum_g), where=weight_g > 0)
        reference_g /= reference_g[measured_pg[largest]].sum()
    return reference_g


def additive_start(
    values_ng: sparse.csr_array,
    panels: Panels,
    weights_n: np.ndarray,
    inputs: np.ndarray,
    dim: int,
    seed: int,
) -> AdditiveStart:
    """Starting values: usual responses, SVD of the centred values, and spread of the initial cell vectors.

    Args:
        values_ng: Expression values of training cells, as produced by the tokenizer.
        panels: The genes measured in these cells.
        weights_n: Weight of each cell in the loss.
        inputs: Vocabulary indices of the input genes, increasing.
        dim: Model width.
        seed: Seeds the randomised SVD and the random values in dimensions beyond its rank.
    """
    from sklearn.utils.extmath import randomized_svd  # imported here, as in `start.py`

    values_ni = torch.from_numpy(values_ng[:, inputs].toarray())
    measured_ni = torch.from_numpy(panels.measured_pg[:, inputs])[torch.from_numpy(panels.panels_n)].float()
    weight_n = torch.from_numpy((weights_n / weights_n.sum()).astype(np.float32))
    cells_i = (weight_n @ measured_ni).clamp(min=1e-9)
    center_ir = torch.stack(
        [weight_n @ (of_gene * measured_ni) / cells_i for of_gene in responses(values_ni).unbind(-1)], dim=-1
    )
    centred_ni = ((values_ni - center_ir[:, 0]) * measured_ni).numpy()
    rank = min(dim, *centred_ni.shape)
    scaled_ni = centred_ni * np.sqrt(weights_n / weights_n.mean())[:, None]
    _, singular, vectors = randomized_svd(scaled_ni, rank, n_iter=3, random_state=seed, flip_sign=False)
    vectors = vectors * np.sign(vectors[np.arange(rank), np.abs(vectors).argmax(axis=1)])[:, None]
    genes_id = np.random.default_rng(seed).normal(0, EMBEDDING_RMS, (len(inputs), dim))
    genes_id[:, :rank] = (vectors * np.sqrt(singular)[:, None]).T
    genes_id[:, :rank] *= EMBEDDING_RMS / max(np.sqrt(np.mean(genes_id[:, :rank] ** 2)), 1e-12)
    genes_id = genes_id.astype(np.float32)
    slots_g = np.full(values_ng.shape[1], -1, dtype=np.int64)
    slots_g[inputs] = np.arange(len(inputs))
    scale = max(float((centred_ni @ genes_id).std()), 1e-6)
    return AdditiveStart(slots_g, center_ir.numpy(), genes_id, np.array(scale, dtype=np.float32))


def _datasets(found: Labelled) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the rows of each data set's cells and the genes it measured, bool (g,)."""
    for code in np.unique(found.datasets_n):
        rows = np.flatnonzero(found.datasets_n == code)
        yield rows, found.cells.panels.measured_pg[found.cells.panels.panels_n[rows[0]]]
