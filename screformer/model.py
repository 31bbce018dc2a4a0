"""The network: map the tokens of a cell to a cell vector, label logits and hidden expression.

Axes: n cells, l token slots, g genes, p gene panels, d model width, k classes, b expression bins.

    gene and expression embedding -> reversible encoder -> pooling -> cell vector -> label logits  (+ linear
    part on the values)
                                                        -> hidden slots + cell vector -> their expression

or, with `model.encoder=additive`, the sum of `screformer.additive` -> cell vector -> label logits.

Parameters are used only by calling the modules that own them, because ZeRO-3 fetches them only there.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from screformer.additive import AdditiveEncoder
from screformer.config import ModelConfig, TokensConfig
from screformer.layers import ExpressionEmbedding, ExpressionHead, LinearSkip, Pooling
from screformer.reversible import ReversibleEncoder
from screformer.tokenizer import NUM_SPECIAL, PAD

HASH_SEED = 0
"""Seed of the LSH hashes in inference; fixed, so predictions are reproducible."""
EMBEDDING_STD = 0.1
"""Standard deviation of random gene embeddings, and root mean square of SVD ones."""
ModelTask = Literal["pretrain", "finetune", "embed"]


class ModelOutput(NamedTuple):
    """Output of one forward pass."""

    embedding_nd: Tensor
    """Cell vectors."""
    logits_nk: Tensor | None
    """Label scores; only for the task `finetune`."""
    expression: Tensor | None
    """Only for the task `pretrain`: bin scores (num_hidden, b) or values (num_hidden,) of hidden slots, in
    row-major order."""


class ScReformer(nn.Module):
    """scReformer-BERT.

    In eval mode, the result is a function of the input, the weights and `hash_seed`. Padding and the other
    cells of a batch change a cell's result only by rounding.

    Args:
        model: Architecture, with `auto` attention already resolved by `resolve_attention`.
        tokens: Encoding of expression, same as the tokenizer's.
        num_genes: Size of the vocabulary.
        num_classes: Labels; 0 builds no classification head.
        seed: Seed of the weights; the global generator is not used.
    """

    def __init__(
        self, model: ModelConfig, tokens: TokensConfig, *, num_genes: int, num_classes: int, seed: int
    ):
        super().__init__()
        self.num_genes, self.num_classes = num_genes, num_classes
        with torch.random.fork_rng(devices=[]):
            self.additive = AdditiveEncoder(model, num_genes) if model.encoder == "additive" else None
            if self.additive is None:
                self.gene_embedding = nn.Embedding(
                    (1 if model.gene_embedding == "none" else num_genes) + NUM_SPECIAL, model.dim
                )
                self.expression_embedding = ExpressionEmbedding(model.dim, tokens)
                self.encoder = ReversibleEncoder(model)
                self.pooling = Pooling(model)
                self.expression_head = ExpressionHead(model.dim, tokens)
            self.classification_head = nn.Linear(model.dim, num_classes) if num_classes else None
            self.linear_skip = (
                LinearSkip(num_genes, num_classes) if num_classes and model.linear_skip else None
            )
        if not next(self.parameters()).is_meta:  # parameters that are only counted have no values
            _draw_weights(self, seed)

    def forward(
        self, batch: dict[str, Tensor], *, task: ModelTask, hidden: Tensor | None = None, hash_seed: int = 0
    ) -> ModelOutput:
        """Run the network.

        Args:
            batch: `token_ids` int64 (n, l), real tokens first, then PAD; `values` float32 (n, l); `bin_ids`
                int64 (n, l). Cells with only PAD are allowed and get finite, meaningless results. `measured`
                bool (p, g) and `panels` int64 (n,) give the genes measured in each cell; without them, all
                genes count as measured in all cells.
            task: Determines which heads run. All ranks call the same modules, regardless of their cells.
            hidden: For `pretrain`, the slots whose expression the network must not see, bool (n, l); may be
                False everywhere.
            hash_seed: Seed of the LSH hashes and, in training, of dropout.
        """
        if self.additive is not None:
            panels = (batch.get("measured"), batch.get("panels"))
            return self._labelled(self.additive(batch["token_ids"], batch["values"], *panels), task)
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
        """Run the network after the token embeddings.

        Args:
            x_nld: Output of `embed_tokens`.
            batch: As in `forward`; `bin_ids` is not used.
            task: As in `forward`.
            hidden: As in `forward`.
            hash_seed: As in `forward`.
            presence_nl: Presence of each token in [0, 1], shape (n, l): its weight as a key and in pooling,
                for explanations. If all are 0 or 1, the result is that of the network without the absent
                tokens, except that these take up space in LSH buckets. None is 1.
        """
        assert (hidden is not None) == (task == "pretrain"), f"task {task} with hidden={hidden}"
        panels = (batch.get("measured"), batch.get("panels"))
        if self.additive is not None:
            return self._labelled(self.additive.pool(x_nld, presence_nl, *panels), task)
        real_nl = batch["token_ids"] != PAD
        x_nld = self.encoder(x_nld, real_nl, hash_seed=hash_seed, key_weight_nl=presence_nl)
        embedding_nd = self.pooling(x_nld, real_nl, presence_nl)

        if task == "pretrain" and hidden is not None:
            return ModelOutput(embedding_nd, None, self.expression_head(x_nld, embedding_nd, hidden))
        if task == "embed":
            return ModelOutput(embedding_nd, None, None)
        assert self.classification_head is not None, "this network has no classes and cannot classify"
        logits_nk = self.classification_head(embedding_nd)
        if self.linear_skip is not None:
            logits_nk = logits_nk + self.linear_skip(
                batch["token_ids"], batch["values"].to(x_nld.dtype), *panels
            )
        return ModelOutput(embedding_nd, logits_nk, None)

    def _labelled(self, embedding_nd: Tensor, task: ModelTask) -> ModelOutput:
        """The output of an additive encoder."""
        assert task != "pretrain", "an additive encoder is never pre-trained"
        if task == "embed":
            return ModelOutput(embedding_nd, None, None)
        assert self.classification_head is not None, "a network without classes cannot classify"
        return ModelOutput(embedding_nd, self.classification_head(embedding_nd), None)

    def embed_tokens(
        self, token_ids_nl: Tensor, values_nl: Tensor, bin_ids_nl: Tensor, hidden_nl: Tensor | None = None
    ) -> Tensor:
        """Gene and expression of each token as one vector, (n, l, d): the input of the encoder."""
        if self.additive is not None:
            return self.additive.tokens(token_ids_nl, values_nl)
        # If all genes share one vector, it is the last.
        x_nld = self.gene_embedding(token_ids_nl.clamp(max=self.gene_embedding.num_embeddings - 1))
        shift_nld, gain_nld = self.expression_embedding(values_nl.to(x_nld.dtype), bin_ids_nl, hidden_nl)
        return x_nld * (1 + gain_nld) + shift_nld

    @torch.no_grad()
    def set_gene_embeddings(self, matrix_gd: Tensor) -> None:
        """Start from given gene embeddings, for example from `svd_gene_embeddings`.

        Call this before building an engine.

        Raises:
            ValueError: The shape differs.
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
        """Start as a given linear classifier, without any contribution from the encoder.

        Call this before building an engine.

        Raises:
            ValueError: The shapes differ, or the network has no linear part.
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
    if network.additive is not None:
        network.additive.draw(generator)
        if network.classification_head is not None:
            nn.init.zeros_(network.classification_head.weight)
    for module in network.modules():
        # The borders of soft bins cover the range of log1p(counts per 10,000), about 0 to 6, instead of all
        # starting at 0.
        if isinstance(module, ExpressionEmbedding) and module.continuous:
            first = module.to_bins[0]
            assert isinstance(first, nn.Linear)
            with torch.no_grad():
                first.bias.copy_(-first.weight[:, 0] * torch.linspace(0, 6, len(first.bias)))


def classification_loss(
    logits_nk: Tensor, labels_n: Tensor, class_weights_k: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Weighted cross-entropy as a sum, so it can be combined exactly over ranks and micro-batches.

    Args:
        logits_nk: Label scores.
        labels_n: Label codes, int64; -1 is ignored.
        class_weights_k: Weight of the cells of each label; None is 1.

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
