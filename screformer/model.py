"""The network: tokens of a cell in; cell vector, label logits and hidden expression out.

Axes: n cells, l token slots, g genes, p gene panels, d model width, k classes, h pooling heads, b expression
bins.

    gene and expression embedding -> reversible encoder -> pooling -> cell vector -> label logits  (+ linear
    part on the values)
                                                        -> hidden slots + cell vector -> their expression

Parameters are only reached through calls of the modules that own them, because ZeRO-3 fetches them there and
nowhere else.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from screformer.attention import settle_attention
from screformer.config import ModelConfig, TokensConfig
from screformer.reversible import ReversibleEncoder
from screformer.tokenizer import NUM_SPECIAL, PAD

HASH_SEED = 0
"""Seed of the LSH hashes in inference; fixed, so that a cell has one prediction."""


ModelTask = Literal["pretrain", "finetune", "embed"]


class ModelOutput(NamedTuple):
    """What one forward pass gives."""

    embedding_nd: Tensor
    """Cell vectors."""
    logits_nk: Tensor | None
    """Label scores; only of the task `finetune`."""
    expression: Tensor | None
    """Of the task `pretrain`: at the hidden slots, in row-major order, bin scores (num_hidden, b) or values
    (num_hidden,)."""


class ScReformer(nn.Module):
    """scReformer-BERT.

    In eval mode the result is a function of the input, the weights and `hash_seed`; padding and the other
    cells of a batch change a cell's result by rounding only.

    Args:
        model: Architecture.
        tokens: Encoding of expression, as the tokenizer's.
        num_genes: Size of the vocabulary.
        num_classes: Labels; 0 builds no classification head.
        seed: Seeds the weights; the global generator is neither read nor changed.
    """

    def __init__(
        self, model: ModelConfig, tokens: TokensConfig, *, num_genes: int, num_classes: int, seed: int
    ):
        super().__init__()
        self.num_genes, self.num_classes = num_genes, num_classes
        model, _ = settle_attention(model, tokens.most_slots(num_genes))
        with torch.random.fork_rng(devices=[]):
            self.gene_embedding = nn.Embedding(
                (1 if model.gene_embedding == "none" else num_genes) + NUM_SPECIAL, model.dim
            )
            self.expression_embedding = _ExpressionEmbedding(model.dim, tokens)
            self.encoder = ReversibleEncoder(model)
            self.pooling = _Pooling(model)
            self.expression_head = _ExpressionHead(model.dim, tokens)
            self.classification_head = nn.Linear(model.dim, num_classes) if num_classes else None
            self.linear_skip = (
                _LinearSkip(num_genes, num_classes) if num_classes and model.linear_skip else None
            )
        _draw_weights(self, seed)

    def forward(
        self, batch: dict[str, Tensor], *, task: ModelTask, hidden: Tensor | None = None, hash_seed: int = 0
    ) -> ModelOutput:
        """Run the network.

        Args:
            batch: `token_ids` int64 (n, l), real tokens first, then PAD; `values` float32 (n, l); `bin_ids`
                int64 (n, l). Cells of PAD only are allowed and get finite results without meaning. `measured`
                bool (p, g) and `panels` int64 (n,) say which genes were measured in which cells; without them
                all were in all.
            task: Which heads run. Every rank calls the same modules, whatever its cells.
            hidden: For `pretrain`, the slots whose expression the network must not see, bool (n, l); it may
                be False everywhere.
            hash_seed: Seeds the LSH hashes, and the dropout in training.
        """
        x_nld = self.embed_tokens(batch["token_ids"], batch["values"], batch["bin_ids"], hidden)
        return self.forward_embedded(x_nld, batch, task=task, hidden=hidden, hash_seed=hash_seed)

    def forward_embedded(
        self,
        x_nld: Tensor,
        batch: dict[str, Tensor],
        *,
        task: ModelTask,
        hidden: Tensor | None = None,
        hash_seed: int = 0,
        presence_nl: Tensor | None = None,
    ) -> ModelOutput:
        """Run the network behind the token embeddings.

        Args:
            x_nld: What `embed_tokens` gives.
            batch: As `forward` takes it; `bin_ids` is not read.
            task: As `forward`.
            hidden: As `forward`.
            hash_seed: As `forward`.
            presence_nl: How far each token is there, in [0, 1], shape (n, l): its weight as a key of
                attention and in the pooling, for explanations. At 0 and 1 the result is that of the network
                without the absent tokens, up to the room that these take in LSH's buckets. None is 1.
        """
        assert (hidden is not None) == (task == "pretrain"), f"task {task} with hidden={hidden}"
        real_nl = batch["token_ids"] != PAD
        x_nld = self.encoder(x_nld, real_nl, hash_seed=hash_seed, key_weight_nl=presence_nl)
        embedding_nd = self.pooling(x_nld, real_nl, presence_nl)

        if task == "pretrain" and hidden is not None:
            return ModelOutput(embedding_nd, None, self.expression_head(x_nld, embedding_nd, hidden))
        if task == "embed":
            return ModelOutput(embedding_nd, None, None)
        assert self.classification_head is not None, "a network without classes cannot classify"
        logits_nk = self.classification_head(embedding_nd)
        if self.linear_skip is not None:
            panels = (batch.get("measured"), batch.get("panels"))
            logits_nk = logits_nk + self.linear_skip(
                batch["token_ids"], batch["values"].to(x_nld.dtype), *panels
            )
        return ModelOutput(embedding_nd, logits_nk, None)

    def embed_tokens(
        self, token_ids_nl: Tensor, values_nl: Tensor, bin_ids_nl: Tensor, hidden_nl: Tensor | None = None
    ) -> Tensor:
        """Gene and expression of each token as one vector, (n, l, d): what the encoder reads."""
        # Where all genes share one vector, it is the last one.
        x_nld = self.gene_embedding(token_ids_nl.clamp(max=self.gene_embedding.num_embeddings - 1))
        shift_nld, gain_nld = self.expression_embedding(values_nl.to(x_nld.dtype), bin_ids_nl, hidden_nl)
        return x_nld * (1 + gain_nld) + shift_nld

    @torch.no_grad()
    def set_gene_embeddings(self, matrix_gd: Tensor) -> None:
        """Start from given gene embeddings, such as those of `svd_gene_embeddings`.

        Before an engine is built.

        Raises:
            ValueError: Another shape.
        """
        weight = self.gene_embedding.weight[NUM_SPECIAL:]
        if matrix_gd.shape != weight.shape:
            raise ValueError(
                f"gene embeddings have shape {tuple(matrix_gd.shape)}, the network needs"
                f" {tuple(weight.shape)}"
            )
        weight.copy_(matrix_gd)

    @torch.no_grad()
    def set_linear_start(self, weights_gk: Tensor, bias_k: Tensor, center_g: Tensor) -> None:
        """Start as a given linear classifier (`screformer.linear`), to which the encoder adds nothing yet.

        Before an engine is built.

        Raises:
            ValueError: Another shape, or a network without a linear part.
        """
        if self.linear_skip is None or self.classification_head is None:
            raise ValueError("a linear start needs model.linear_skip=true and labels")
        weight = self.linear_skip.weight.weight[NUM_SPECIAL:]
        given = [tuple(part.shape) for part in (weights_gk, bias_k, center_g)]
        needed = [
            tuple(part.shape) for part in (weight, self.classification_head.bias, self.linear_skip.center)
        ]
        if given != needed:
            raise ValueError(f"linear start has shapes {given}, the network needs {needed}")
        weight.copy_(weights_gk)
        self.classification_head.bias.copy_(bias_k)
        self.linear_skip.center.copy_(center_g)
        self.classification_head.weight.zero_()


class _ExpressionEmbedding(nn.Module):
    """How strongly a gene is expressed, as a shift and a gain of its embedding.

    The gain lets a sum over tokens be a weighted sum of gene embeddings, which with an SVD start is the
    cell's place in the SVD.
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
            )  # soft bins alone go flat beyond the values seen in training
        else:
            self.bins = nn.Embedding(tokens.num_bins, 2 * dim)
        self.hidden = nn.Embedding(1, 2 * dim)

    def forward(
        self, values_nl: Tensor, bin_ids_nl: Tensor, hidden_nl: Tensor | None
    ) -> tuple[Tensor, Tensor]:
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


class _Pooling(nn.Module):
    """One vector per cell from its real tokens."""

    def __init__(self, model: ModelConfig):
        super().__init__()
        self.kind, self.heads = model.pooling, model.heads
        if self.kind == "attention":
            self.score_norm = nn.LayerNorm(model.dim)
            self.score = nn.Linear(model.dim, model.heads)
        self.norm = nn.LayerNorm(model.dim)

    def forward(self, x_nld: Tensor, real_nl: Tensor, presence_nl: Tensor | None = None) -> Tensor:
        """Pool; `presence_nl` in [0, 1] weighs the tokens, for explanations."""
        if self.kind == "cls":
            return self.norm(x_nld[:, 0])
        if self.kind == "mean":
            weights_nlh = real_nl.unsqueeze(-1) / real_nl.sum(1).clamp(min=1)[:, None, None]
        else:
            scores_nlh = self.score(self.score_norm(x_nld))
            # The lowest finite number, not -inf: the softmax over a cell of PAD only must not be NaN.
            weights_nlh = scores_nlh.masked_fill(
                ~real_nl.unsqueeze(-1), torch.finfo(scores_nlh.dtype).min
            ).softmax(1)
        if presence_nl is not None:
            weights_nlh = weights_nlh * presence_nl.unsqueeze(-1)
            weights_nlh = weights_nlh / weights_nlh.sum(1, keepdim=True)
        parts_nlhe = x_nld.unflatten(-1, (weights_nlh.shape[-1], -1))
        return self.norm(torch.einsum("nlh,nlhe->nhe", weights_nlh.to(x_nld.dtype), parts_nlhe).flatten(1))


class _ExpressionHead(nn.Module):
    """Expression of hidden genes, from the token and from the cell.

    With the cell it can be learned without attention too.
    """

    def __init__(self, dim: int, tokens: TokensConfig):
        super().__init__()
        self.continuous = tokens.expression == "continuous"
        self.cell = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.inner = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, 1 if self.continuous else tokens.num_bins)

    def forward(self, x_nld: Tensor, embedding_nd: Tensor, hidden_nl: Tensor) -> Tensor:
        cells, slots = hidden_nl.nonzero(as_tuple=True)
        mixed = self.norm(x_nld[cells, slots]) * (1 + self.cell(embedding_nd)[cells])
        out = self.out(F.gelu(self.inner(mixed)))
        return out.squeeze(-1) if self.continuous else out


class _LinearSkip(nn.Module):
    """A linear classifier on the cell's expression values, scaled to one length.

    Which evens out depth and size of gene panels.

    Values count from their usual one, `center`, over the genes that were measured in the cell. So a gene that
    was measured and not found speaks against the labels that have it, and one that was not measured says
    nothing.

    Sums over hundreds of genes are taken in float64: in float32 their last digits would hang on the padding
    and on the cells beside.
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
        found_nk = self.weight(token_ids_nl, F.normalize(values_nl.double(), dim=1) * LINEAR_SCALE)
        usual_pg = self.center.expand(1, -1) if measured_pg is None else measured_pg * self.center
        genes = torch.arange(NUM_SPECIAL, NUM_SPECIAL + usual_pg.shape[1], device=usual_pg.device)
        usual_pk = self.weight(genes.expand(usual_pg.shape), usual_pg.double())
        return (found_nk - (usual_pk if panels_n is None else usual_pk[panels_n])).to(values_nl.dtype)


class _SumFloat64(nn.EmbeddingBag):
    def forward(self, ids: Tensor, weights: Tensor) -> Tensor:  # type: ignore[override]
        return F.embedding_bag(ids, self.weight.double(), mode="sum", per_sample_weights=weights)


def _draw_weights(network: ScReformer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.uniform_(module.weight, -(bound := module.in_features**-0.5), bound, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=EMBEDDING_STD, generator=generator)
        elif isinstance(module, nn.EmbeddingBag):
            nn.init.zeros_(module.weight)
    for module in network.modules():
        # Soft bins whose borders spread over the range of log1p(counts per 10,000), about 0 to 6, instead of
        # all lying at 0.
        if isinstance(module, _ExpressionEmbedding) and module.continuous:
            first = module.to_bins[0]
            assert isinstance(first, nn.Linear)
            with torch.no_grad():
                first.bias.copy_(-first.weight[:, 0] * torch.linspace(0, 6, len(first.bias)))


LINEAR_SCALE = 16.0
"""Length of the values that the linear part sees, about that of a cell's log1p values."""


EMBEDDING_STD = 0.1
"""Of random gene embeddings, and the root mean square of SVD ones."""


def classification_loss(
    logits_nk: Tensor, labels_n: Tensor, class_weights_k: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Weighted cross-entropy as a sum, so that ranks and micro-batches can be joined exactly.

    Args:
        logits_nk: Label scores.
        labels_n: Label codes, int64; -1 takes no part.
        class_weights_k: Weight of a cell of each label; None is 1.

    Returns:
        Sum of the weighted losses, and sum of the weights; float32 scalars.
    """
    loss = F.cross_entropy(
        logits_nk.float(), labels_n, weight=class_weights_k, ignore_index=-1, reduction="sum"
    )
    labelled = labels_n[labels_n >= 0]
    weight = (
        logits_nk.new_tensor(len(labelled), dtype=torch.float32)
        if class_weights_k is None
        else class_weights_k[labelled].sum()
    )
    return loss, weight


def expression_loss(
    output: ModelOutput, batch: dict[str, Tensor], hidden_nl: Tensor
) -> tuple[Tensor, Tensor]:
    """Error at the hidden slots as a sum: cross-entropy of bins, or squared error of values.

    Returns:
        Sum of the losses, and number of hidden slots; float32 scalars.
    """
    assert output.expression is not None
    predicted = output.expression.float()
    if predicted.ndim == 2:
        loss = F.cross_entropy(predicted, batch["bin_ids"][hidden_nl], reduction="sum")
    else:
        loss = F.mse_loss(predicted, batch["values"][hidden_nl], reduction="sum")
    return loss, hidden_nl.sum().float()
