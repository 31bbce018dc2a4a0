"""scBERT's architecture, as a baseline and as the peer in the step benchmark."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy import sparse
from torch import Tensor, nn

from jobs.studies.baseline_cells import BaselineCells, Candidate, Candidates, Cells, Labels, variable_genes

NUM_GENES, DIM, STEPS, BATCH, STEPS_PER_CANDIDATE = 200, 32, 150, 32, 50


def scbert(cells: BaselineCells, seed: int) -> Candidates:
    """A small scBERT without its pre-trained weights; a candidate after every 50 steps.

    Performer over binned expression of the most variable genes. Its classifier is a convolution over
    features, then two layers over all genes. Gene embeddings are fixed, like scBERT's gene2vec:
    they come from a truncated SVD of the training cells.
    """
    from screformer.start import svd_gene_embeddings

    columns = variable_genes(cells.train.x_ng, NUM_GENES)
    train_ng = cells.train.x_ng[:, columns].toarray()
    counts_k = np.bincount(cells.train.labels_n, minlength=cells.num_classes)
    rng = np.random.default_rng([seed, 14])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        body = ScBert(len(columns), DIM, 2, 2)
        with torch.no_grad():
            body.gene.weight[: len(columns)] = torch.from_numpy(
                svd_gene_embeddings(sparse.csr_array(sparse.csr_matrix(train_ng)), DIM, seed)
            )
        head = nn.Sequential(nn.Linear(len(columns), 128), nn.ReLU(), nn.Linear(128, cells.num_classes))
        conv = nn.Linear(DIM, 1)
        network = nn.ModuleList([body, conv, head])

        def logits(values_ng: np.ndarray) -> Tensor:
            # scBERT's bins: integer part of log2(1 + counts per 10,000), values of 5 and above in one bin.
            bins = np.clip(np.floor(values_ng / np.log(2)), 0, NUM_BINS - 2).astype(np.int64)
            return head(torch.relu(conv(body.encode(torch.from_numpy(bins))).squeeze(-1)))

        weights = torch.from_numpy((1 / np.sqrt(np.maximum(counts_k, 1))).astype(np.float32))
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        num_trained = sum(parameter.numel() for parameter in trained)
        optimizer = torch.optim.Adam(trained, lr=1e-3)
        for step in range(1, STEPS + 1):
            rows = rng.choice(len(train_ng), min(BATCH, len(train_ng)), replace=False)
            loss = nn.functional.cross_entropy(
                logits(train_ng[rows]), torch.from_numpy(cells.train.labels_n[rows]), weight=weights
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % STEPS_PER_CANDIDATE == 0:
                state = {name: weight.clone() for name, weight in network.state_dict().items()}

                def label(found: Cells, state: dict[str, Tensor] = state) -> Labels:
                    network.load_state_dict(state)
                    return _label(network, logits, found.x_ng[:, columns].toarray(), counts_k)

                setting = {"genes": len(columns), "steps": step}
                yield Candidate(setting, label, lambda: num_trained)


def _label(
    network: nn.Module,
    logits: Callable[[np.ndarray], Tensor],
    values_ng: np.ndarray,
    counts_k: np.ndarray,
) -> Labels:
    network.eval()
    with torch.no_grad():
        found = [
            logits(values_ng[start : start + 256]).softmax(1).numpy()
            for start in range(0, len(values_ng), 256)
        ]
    network.train()
    probabilities_nk = np.concatenate(found) if found else np.zeros((0, len(counts_k)), np.float32)
    # A class without training cells still has an output, but must not be predicted.
    probabilities_nk[:, counts_k == 0] = 0
    share_nk = probabilities_nk / np.maximum(probabilities_nk.sum(1, keepdims=True), 1e-12)
    return Labels(probabilities_nk.argmax(1), share_nk)


NUM_BINS = 7
"""scBERT's expression classes: bins 0 to 5 and the mask."""


class ScBert(nn.Module):
    """scBERT's network, built with performer-pytorch.

    A Performer over expression and gene embeddings, with bin scores for every token.

    Source: `performer_pytorch.PerformerLM` as called in scBERT's `pretrain.py`, without its weights.
    """

    def __init__(self, num_genes: int, dim: int, depth: int, heads: int) -> None:
        super().__init__()
        from performer_pytorch import Performer

        self.expression, self.gene = nn.Embedding(NUM_BINS, dim), nn.Embedding(num_genes + 1, dim)
        # gene2vec vectors are looked up, not learned.
        self.gene.requires_grad_(False)
        self.performer = Performer(
            dim=dim, depth=depth, heads=heads, dim_head=64, causal=False, qkv_bias=False, attn_out_bias=True
        )
        self.norm, self.to_out = nn.LayerNorm(dim), nn.Linear(dim, NUM_BINS)

    def forward(self, bin_ids_nl: Tensor) -> Tensor:
        """Bin scores of every token, (n, l, bins)."""
        return self.to_out(self.encode(bin_ids_nl))

    def encode(self, bin_ids_nl: Tensor) -> Tensor:
        """Vectors of all tokens, (n, l, d)."""
        x = self.expression(bin_ids_nl) + self.gene(
            torch.arange(bin_ids_nl.shape[1], device=bin_ids_nl.device)
        )
        return self.norm(self.performer(x))
