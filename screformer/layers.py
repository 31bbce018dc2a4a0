"""Layers around the encoder: token embedding, pooling and heads.

Axes: n cells, l token slots, g genes, p gene panels, d model width, k classes, h pooling heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from screformer.config import ModelConfig, TokensConfig
from screformer.tokenizer import NUM_SPECIAL

LINEAR_SCALE = 16.0
"""Norm of the linear part's input; about the norm of a cell's log1p values."""


class ExpressionEmbedding(nn.Module):
    """Encodes the expression of a gene as a shift and a gain of its embedding.

    The gain makes a sum over tokens a weighted sum of gene embeddings; with an SVD start, that is the cell's
    position in the SVD.
    """

    def __init__(self, dim: int, tokens: TokensConfig):
        super().__init__()
        self.continuous = tokens.expression == "continuous"
        if self.continuous:
            self.to_bins = nn.Sequential(
                nn.Linear(1, tokens.num_bins), nn.LeakyReLU(), nn.Linear(tokens.num_bins, tokens.num_bins)
            )
            self.bins: nn.Module = nn.Linear(tokens.num_bins, 2 * dim, bias=False)
            self.magnitude = nn.Linear(
                1, 2 * dim, bias=False
            )  # soft bins alone would be flat beyond the values seen in training
        else:
            self.bins = nn.Embedding(tokens.num_bins, 2 * dim)
        self.hidden = nn.Embedding(1, 2 * dim)

    def forward(
        self, values_nl: Tensor, bin_ids_nl: Tensor, hidden_nl: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Shift and gain of each slot, both (n, l, d); the same for all hidden slots."""
        if self.continuous:
            values = values_nl.unsqueeze(-1)
            both = self.bins(self.to_bins(values).softmax(-1)) + self.magnitude(values)
        else:
            both = self.bins(bin_ids_nl)
        if hidden_nl is not None:
            both = torch.where(
                hidden_nl.unsqueeze(-1), self.hidden(torch.zeros_like(bin_ids_nl[:1, :1])), both
            )
        shift, gain = both.chunk(2, dim=-1)
        return shift, gain


class Pooling(nn.Module):
    """Pools the real tokens of a cell into one vector."""

    def __init__(self, model: ModelConfig):
        super().__init__()
        self.kind, self.heads = model.pooling, model.heads
        if self.kind == "attention":
            self.score_norm = nn.LayerNorm(model.dim)
            self.score = nn.Linear(model.dim, model.heads)
        self.norm = nn.LayerNorm(model.dim)

    def forward(self, x_nld: Tensor, real_nl: Tensor, presence_nl: Tensor | None = None) -> Tensor:
        """Pool; `presence_nl` in [0, 1] weights the tokens, for explanations."""
        if self.kind == "cls":
            return self.norm(x_nld[:, 0])
        if self.kind == "mean":
            weights_nlh = real_nl.unsqueeze(-1) / real_nl.sum(1).clamp(min=1)[:, None, None]
        else:
            scores_nlh = self.score(self.score_norm(x_nld))
            # The lowest finite number instead of -inf, so the softmax over a cell with only PAD is not NaN.
            weights_nlh = scores_nlh.masked_fill(
                ~real_nl.unsqueeze(-1), torch.finfo(scores_nlh.dtype).min
            ).softmax(1)
        if presence_nl is not None:
            weights_nlh = weights_nlh * presence_nl.unsqueeze(-1)
            weights_nlh = weights_nlh / weights_nlh.sum(1, keepdim=True)
        parts_nlhe = x_nld.unflatten(-1, (weights_nlh.shape[-1], -1))
        return self.norm(torch.einsum("nlh,nlhe->nhe", weights_nlh.to(x_nld.dtype), parts_nlhe).flatten(1))


class ExpressionHead(nn.Module):
    """Predicts the expression of hidden genes from token and cell vector.

    With the cell vector, it can learn even without attention.
    """

    def __init__(self, dim: int, tokens: TokensConfig):
        super().__init__()
        self.continuous = tokens.expression == "continuous"
        self.cell = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.inner = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, 1 if self.continuous else tokens.num_bins)

    def forward(self, x_nld: Tensor, embedding_nd: Tensor, hidden_nl: Tensor) -> Tensor:
        """Bin scores or values of the hidden slots, in row-major order."""
        cells, slots = hidden_nl.nonzero(as_tuple=True)
        mixed = self.norm(x_nld[cells, slots]) * (1 + self.cell(embedding_nd)[cells])
        out = self.out(F.gelu(self.inner(mixed)))
        return out.squeeze(-1) if self.continuous else out


class LinearSkip(nn.Module):
    """A linear classifier on the cell's expression values, scaled to a fixed norm.

    The scaling compensates for depth and panel size.

    Values are relative to the usual value of each gene, `center`, and only measured genes are included. So a
    gene that was measured but not detected counts against labels that express it, and an unmeasured gene has
    no influence.

    Sums over hundreds of genes use float64. In float32, their last digits would depend on padding and the
    other cells in the batch.
    """

    def __init__(self, num_genes: int, num_classes: int):
        super().__init__()
        self.weight = _SumFloat64(num_genes + NUM_SPECIAL, num_classes, mode="sum")
        self.center: Tensor
        self.register_buffer("center", torch.zeros(num_genes))

    def forward(
        self,
        token_ids_nl: Tensor,
        values_nl: Tensor,
        measured_pg: Tensor | None = None,
        panels_n: Tensor | None = None,
    ) -> Tensor:
        """Label scores (n, k); without `measured_pg` and `panels_n`, all genes count as measured."""
        found_nk = self.weight(token_ids_nl, F.normalize(values_nl.double(), dim=1) * LINEAR_SCALE)
        usual_pg = self.center.expand(1, -1) if measured_pg is None else measured_pg * self.center
        genes = torch.arange(NUM_SPECIAL, NUM_SPECIAL + usual_pg.shape[1], device=usual_pg.device)
        usual_pk = self.weight(genes.expand(usual_pg.shape), usual_pg.double())
        return (found_nk - (usual_pk if panels_n is None else usual_pk[panels_n])).to(values_nl.dtype)


class _SumFloat64(nn.EmbeddingBag):
    def forward(self, ids: Tensor, weights: Tensor) -> Tensor:  # type: ignore[override]
        return F.embedding_bag(ids, self.weight.double(), mode="sum", per_sample_weights=weights)
