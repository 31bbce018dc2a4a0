"""Gene embeddings from the training cells, to start from."""

from __future__ import annotations

import numpy as np
from scipy import sparse
from sklearn.utils.extmath import randomized_svd

from screformer.model import EMBEDDING_STD


def svd_gene_embeddings(values_ng: sparse.csr_matrix, dim: int, seed: int) -> np.ndarray:
    """Right singular vectors of the truncated SVD, times the square root of the singular values.

    Args:
        values_ng: log1p of counts per 10,000 of training cells; a few thousand cells are enough.
        dim: Width of the embeddings.
        seed: Seeds the randomised SVD, and what fills dimensions beyond the rank of a small matrix.

    Returns:
        Embeddings float32 (g, dim), with the root mean square of random ones. Signs are fixed: the largest entry of a dimension is > 0.
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
