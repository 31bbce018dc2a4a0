"""What a network starts from: SVD gene embeddings and a logistic regression."""

from __future__ import annotations

import numpy as np
from scipy import sparse
from scipy.optimize import minimize
from sklearn.preprocessing import normalize
from sklearn.utils.extmath import randomized_svd

from screformer.model import EMBEDDING_STD, LINEAR_SCALE
from screformer.tokenizer import Panels

INVERSE_PENALTY = 1.0
"""C of Fan et al., LIBLINEAR, 2008. Chosen on validation cells of real blood data, where 0.01 to 1 differ
little (docs/log/2026-11-24-accuracy-trials.md)."""


_MAX_ITERATIONS = 100


_TOLERANCE = 1e-4
"""Of the largest gradient; a start need not be converged."""


_NEVER = -8.0
"""Bias of a class that the sample does not hold."""


def logistic_start(
    values_ng: sparse.csr_array, labels_n: np.ndarray, class_weights_k: np.ndarray, panels: Panels
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fit what `ScReformer.set_linear_start` takes.

    Args:
        values_ng: Expression values as the tokenizer makes them.
        labels_n: Class of each cell, int64 in [0, k); at least two classes.
        class_weights_k: Weight of a cell of each class in the loss, (k,).
        panels: Which genes were measured in these cells.

    Returns:
        Weights float32 (g, k) and bias float32 (k,) of the L2-penalised multinomial regression, and the mean
        of each gene's scaled value over the cells that measured it, float32 (g,), 0 where none did.
    """
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
    weights_gk, bias_k = (
        np.zeros((shape[0], len(class_weights_k)), np.float32),
        np.full(len(class_weights_k), _NEVER, np.float32),
    )
    weights_gk[:, present], bias_k[present] = flat[: -shape[1]].reshape(shape), flat[-shape[1] :]
    return weights_gk, bias_k, center_g.astype(np.float32)


def svd_gene_embeddings(values_ng: sparse.csr_matrix, dim: int, seed: int) -> np.ndarray:
    """Right singular vectors of the truncated SVD, times the square root of the singular values.

    Args:
        values_ng: log1p of counts per 10,000 of training cells; a few thousand cells are enough.
        dim: Width of the embeddings.
        seed: Seeds the randomised SVD, and what fills dimensions beyond the rank of a small matrix.

    Returns:
        Embeddings float32 (g, dim), with the root mean square of random ones. Signs are fixed: the largest
        entry of a dimension is > 0.
    """
    num_genes = values_ng.shape[1]
    rank = min(dim, *values_ng.shape)
    _, singular, vectors = randomized_svd(values_ng, rank, n_iter=4, random_state=seed, flip_sign=False)
    vectors = vectors * np.sign(vectors[np.arange(rank), np.abs(vectors).argmax(axis=1)])[:, None]
    embeddings = np.zeros((num_genes, dim))
    embeddings[:, :rank] = (vectors * np.sqrt(singular)[:, None]).T
    embeddings *= EMBEDDING_STD / max(np.sqrt(np.mean(embeddings**2)), np.finfo(float).tiny)
    embeddings[:, rank:] = np.random.default_rng(seed).normal(0, EMBEDDING_STD, (num_genes, dim - rank))
    return embeddings.astype(np.float32)
