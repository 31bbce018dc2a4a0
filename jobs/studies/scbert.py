"""scBERT's architecture as a baseline, and as the peer of the step benchmark."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy import sparse

if TYPE_CHECKING:
    pass
from torch import Tensor, nn

from jobs.studies.baseline_cells import Answer, BaselineCells, macro_f1, variable_genes


def scbert_baseline(cells: BaselineCells, seed: int) -> Answer:
    """The architecture of scBERT, small and without its pre-trained weights.

    Performer over binned expression of the most variable genes.

    Its classifier is a convolution over features, then two layers over all genes. Gene embeddings are fixed,
    as its gene2vec ones are: the truncated SVD of the training cells.
    """
    from screformer.start import svd_gene_embeddings

    num_genes, dim, steps, batch = 200, 32, 150, 32
    columns = variable_genes(cells.train.x_ng, num_genes)
    train, chooser, test = (
        x[:, columns].toarray() for x in (cells.train.x_ng, cells.chooser.x_ng, cells.test_x_ng)
    )
    rng = np.random.default_rng([seed, 14])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        body = ScBert(len(columns), dim, 2, 2)
        with torch.no_grad():
            body.gene.weight[: len(columns)] = torch.from_numpy(
                svd_gene_embeddings(sparse.csr_array(sparse.csr_matrix(train)), dim, seed)
            )
        head = torch.nn.Sequential(
            torch.nn.Linear(len(columns), 128), torch.nn.ReLU(), torch.nn.Linear(128, cells.num_classes)
        )
        conv = torch.nn.Linear(dim, 1)
        network = torch.nn.ModuleList([body, conv, head])

        def logits(values: np.ndarray) -> torch.Tensor:
            # Bins of scBERT: whole part of log2(1 + counts per 10,000), the highest five in one.
            bins = torch.from_numpy(np.clip(np.floor(values / np.log(2)), 0, NUM_BINS - 2).astype(np.int64))
            return head(torch.relu(conv(body.encode(bins))).squeeze(-1))

        def label(values: np.ndarray) -> np.ndarray:
            network.eval()
            with torch.no_grad():
                found = [
                    logits(values[start : start + 256]).softmax(1).numpy()
                    for start in range(0, len(values), 256)
                ]
            network.train()
            return np.concatenate(found) if found else np.zeros((0, cells.num_classes), np.float32)

        counts_k = np.bincount(cells.train.labels_n, minlength=cells.num_classes)
        weights = torch.from_numpy((1 / np.sqrt(np.maximum(counts_k, 1))).astype(np.float32))
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        optimizer = torch.optim.Adam(trained, lr=1e-3)
        best: tuple[float, int, dict[str, torch.Tensor]] | None = None
        for step in range(1, steps + 1):
            rows = rng.choice(len(train), min(batch, len(train)), replace=False)
            loss = torch.nn.functional.cross_entropy(
                logits(train[rows]), torch.from_numpy(cells.train.labels_n[rows]), weight=weights
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 50 == 0:
                score = macro_f1(cells.chooser.labels_n, label(chooser).argmax(1), cells.num_classes)
                if best is None or score > best[0]:
                    best = (
                        score,
                        step,
                        {name: weight.clone() for name, weight in network.state_dict().items()},
                    )
        assert best is not None
        _, step, state = best
        network.load_state_dict(state)
        probabilities = label(test)
    # A class without training cells still has an output; it must not be said.
    probabilities[:, counts_k == 0] = 0
    return Answer(
        predicted_n=probabilities.argmax(1),
        probabilities_nk=probabilities / np.maximum(probabilities.sum(1, keepdims=True), 1e-12),
        chosen={"genes": len(columns), "steps": step},
        parameters=sum(parameter.numel() for parameter in trained),
    )


NUM_BINS = 7
"""scBERT's expression classes: bins 0 to 5 and the mask."""


class ScBert(nn.Module):
    """scBERT's network by performer-pytorch.

    Performer over expression and gene embeddings, bin scores of every token.

    Source: `performer_pytorch.PerformerLM` as scBERT's `pretrain.py` calls it, without its weights.
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
        """Scores of bins at every token, (n, l, bins)."""
        return self.to_out(self.encode(bin_ids_nl))

    def encode(self, bin_ids_nl: Tensor) -> Tensor:
        """Vectors of all tokens, (n, l, d)."""
        x = self.expression(bin_ids_nl) + self.gene(
            torch.arange(bin_ids_nl.shape[1], device=bin_ids_nl.device)
        )
        return self.norm(self.performer(x))
