"""Starting values of a network: given weights, SVD gene embeddings, or a logistic regression.

Axes: n cells, g genes, p gene panels, d model width, k classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from scipy import sparse

from screformer.additive_start import AdditiveStart
from screformer.counts import Panels
from screformer.layers import LINEAR_SCALE
from screformer.model import EMBEDDING_STD, ScReformer

INVERSE_PENALTY = 1.0
"""C in Fan et al., LIBLINEAR, 2008. Chosen on validation cells of real blood data, where 0.01 to 1 differ
little (docs/log/2026-11-24-accuracy-trials.md)."""
_MAX_ITERATIONS = 100
_TOLERANCE = 1e-4
"""Tolerance on the largest gradient; starting values need not be converged."""
_NEVER = -8.0
"""Bias of a class that is missing from the sample."""


class LinearStart(NamedTuple):
    """A linear classifier for `ScReformer.set_linear_start`; float32."""

    weights_gk: np.ndarray
    bias_k: np.ndarray
    center_g: np.ndarray
    """Mean of each gene's scaled value over the cells that measured it; 0 if none did."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Start:
    """Starting values for a new network; anything missing stays random."""

    weights: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Weights of another network by name; may be incomplete."""
    gene_embeddings_gd: np.ndarray | None = None
    linear: LinearStart | None = None
    additive: AdditiveStart | None = None

    def put_into(self, model: ScReformer) -> None:
        """Set the weights of a network, before building an engine.

        Raises:
            ValueError: A shape does not match the network.
        """
        if self.gene_embeddings_gd is not None:
            model.set_gene_embeddings(_tensor(self.gene_embeddings_gd))
        if self.additive is not None:
            assert model.additive is not None
            model.additive.set_start(*(_tensor(array) for array in self.additive))
        if self.weights:
            given = {name: _tensor(array) for name, array in self.weights.items()}
            model.load_state_dict({**model.state_dict(), **given})
        if self.linear is not None:
            model.set_linear_start(*(_tensor(array) for array in self.linear))


def logistic_start(
    values_ng: sparse.csr_array, labels_n: np.ndarray, class_weights_k: np.ndarray, panels: Panels
) -> LinearStart:
    """Fit a logistic regression for the network's linear part.

    Args:
        values_ng: Expression values as produced by the tokenizer.
        labels_n: Class of each cell, int64 in [0, k); at least two classes.
        class_weights_k: Weight of a cell of each class in the loss, (k,).
        panels: The genes measured in these cells.

    Returns:
        The L2-penalised multinomial regression.
    """
    # Imported here, because every worker imports this module for `Start`, and these load as slowly as torch.
    from scipy.optimize import minimize
    from sklearn.preprocessing import normalize

    x_ng = sparse.csr_matrix(normalize(sparse.csr_matrix(values_ng, dtype=np.float64)) * LINEAR_SCALE)
    cells_p = np.bincount(panels.panels_n, minlength=len(panels.measured_pg))
    center_g = np.asarray(x_ng.sum(axis=0)).ravel() / np.maximum(cells_p @ panels.measured_pg, 1)
    usual_pg = panels.measured_pg * center_g

    present, codes_n = np.unique(labels_n, return_inverse=True)
    weight_n = class_weights_k[labels_n].astype(np.float64)
    rows, penalty = np.arange(len(labels_n)), 1 / (INVERSE_PENALTY * weight_n.sum())
    of_panel_pn = sparse.csr_matrix(
        (np.ones(len(rows)), (panels.panels_n, rows)), shape=(len(cells_p), len(rows))
    )
    shape = (x_ng.shape[1], len(present))

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights_gc, bias_c = flat[: -shape[1]].reshape(shape), flat[-shape[1] :]
        logits_nc = x_ng @ weights_gc - (usual_pg @ weights_gc)[panels.panels_n] + bias_c
        logits_nc -= logits_nc.max(axis=1, keepdims=True)
        exp_nc = np.exp(logits_nc)
        sum_n = exp_nc.sum(axis=1)
        loss = weight_n @ (np.log(sum_n) - logits_nc[rows, codes_n]) / weight_n.sum()
        error_nc = exp_nc / sum_n[:, None]
        error_nc[rows, codes_n] -= 1
        error_nc *= (weight_n / weight_n.sum())[:, None]
        gradient_gc = x_ng.T @ error_nc - usual_pg.T @ (of_panel_pn @ error_nc) + penalty * weights_gc
        return loss + penalty / 2 * float((weights_gc**2).sum()), np.append(gradient_gc, error_nc.sum(axis=0))

    limits = {"maxiter": _MAX_ITERATIONS, "gtol": _TOLERANCE, "ftol": 0.0}
    flat = minimize(
        objective, np.zeros(shape[0] * shape[1] + shape[1]), jac=True, method="L-BFGS-B", options=limits
    ).x
    weights_gk = np.zeros((shape[0], len(class_weights_k)), np.float32)
    bias_k = np.full(len(class_weights_k), _NEVER, np.float32)
    weights_gk[:, present] = flat[: -shape[1]].reshape(shape)
    bias_k[present] = flat[-shape[1] :]
    return LinearStart(weights_gk, bias_k, center_g.astype(np.float32))


def svd_gene_embeddings(values_ng: sparse.csr_matrix, dim: int, seed: int) -> np.ndarray:
    """Right singular vectors of the truncated SVD, times the square root of the singular values.

    Args:
        values_ng: log1p of counts per 10,000 of training cells; a few thousand cells are enough.
        dim: Width of the embeddings.
        seed: Seed of the randomised SVD and of the random values in dimensions beyond its rank.

    Returns:
        Embeddings, float32 (g, dim), scaled to the root mean square of random ones. Signs are fixed: the
        largest entry of each dimension is > 0.
    """
    from sklearn.utils.extmath import randomized_svd  # imported here, as above

    num_genes = values_ng.shape[1]
    rank = min(dim, *values_ng.shape)
    _, singular, vectors = randomized_svd(values_ng, rank, n_iter=4, random_state=seed, flip_sign=False)
    vectors = vectors * np.sign(vectors[np.arange(rank), np.abs(vectors).argmax(axis=1)])[:, None]
    embeddings = np.zeros((num_genes, dim))
    embeddings[:, :rank] = (vectors * np.sqrt(singular)[:, None]).T
    embeddings *= EMBEDDING_STD / max(np.sqrt(np.mean(embeddings**2)), np.finfo(float).tiny)
    embeddings[:, rank:] = np.random.default_rng(seed).normal(0, EMBEDDING_STD, (num_genes, dim - rank))
    return embeddings.astype(np.float32)


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(array))  # a copy: arrays from Ray's object store are read-only
