"""Reformer encoder: reversible blocks of attention and feed-forward; memory independent of depth.

Axes: n cells, l token slots, d model width.

Two residual streams start as copies of the input. Each block computes y1 = x1 + f(x2), y2 = x2 + g(y1), with
attention f and feed-forward g; the result is the mean of both streams. The backward pass recovers each
block's input from its output. Streams are float32 even if weights are bfloat16, so the recovery is exact up
to float32 rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from screformer.attention import HashMemo, make_attention
from screformer.config import ModelConfig
from screformer.splitmix import derive_seed


def _dropout(x_nld: Tensor, p: float, seed: int) -> Tensor:
    """Dropout whose mask depends only on the seed, so recomputation drops the same elements."""
    generator = torch.Generator(x_nld.device).manual_seed(seed)
    keep = torch.empty_like(x_nld).bernoulli_(1 - p, generator=generator)
    return x_nld * keep.div_(1 - p)


class _Sublayer(nn.Module):
    """One branch of a block: norm, `_body`, dropout.

    Computes in the dtype of its weights and returns the dtype of the stream.
    """

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.dropout = dropout

    def forward(
        self,
        x_nld: Tensor,
        key_mask_nl: Tensor,
        *,
        seed: int,
        memo: HashMemo | None = None,
        key_weight_nl: Tensor | None = None,
    ) -> Tensor:
        normed = self.norm(x_nld.to(self.norm.weight.dtype))
        out = self._body(normed, key_mask_nl, seed, memo, key_weight_nl)
        if self.training and self.dropout > 0:
            out = _dropout(out, self.dropout, derive_seed(seed, 1))
        return out.to(x_nld.dtype)

    def _body(
        self,
        x_nld: Tensor,
        key_mask_nl: Tensor,
        seed: int,
        memo: HashMemo | None,
        key_weight_nl: Tensor | None,
    ) -> Tensor:
        raise NotImplementedError


class AttentionSublayer(_Sublayer):
    """Norm, attention, dropout."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.dim, config.dropout)
        self.attention = make_attention(config)

    def _body(
        self,
        x_nld: Tensor,
        key_mask_nl: Tensor,
        seed: int,
        memo: HashMemo | None,
        key_weight_nl: Tensor | None,
    ) -> Tensor:
        return self.attention(x_nld, key_mask_nl, hash_seed=seed, memo=memo, key_weight_nl=key_weight_nl)


class FeedForwardSublayer(_Sublayer):
    """Norm, two linear layers with GELU in between, dropout; processes the sequence in `ff_chunks` slices."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.dim, config.dropout)
        self.chunks = config.ff_chunks
        self.w1 = nn.Linear(config.dim, config.dim * config.ff_mult)
        self.w2 = nn.Linear(config.dim * config.ff_mult, config.dim)

    def _body(
        self,
        x_nld: Tensor,
        key_mask_nl: Tensor,
        seed: int,
        memo: HashMemo | None,
        key_weight_nl: Tensor | None,
    ) -> Tensor:
        if self.chunks == 1:
            return self.w2(F.gelu(self.w1(x_nld)))
        return torch.cat([self.w2(F.gelu(self.w1(part))) for part in x_nld.chunk(self.chunks, 1)], 1)


class Block(nn.Module):
    """The two branches of one reversible block."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.f = AttentionSublayer(config)
        self.g = FeedForwardSublayer(config)


class _ReversibleFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_nld: Tensor, key_mask_nl: Tensor, blocks: Sequence[tuple[nn.Module, nn.Module]], seed: int
    ) -> Tensor:
        y1, y2 = x_nld, x_nld
        memos = [HashMemo() for _ in blocks]
        for index, ((f, g), memo) in enumerate(zip(blocks, memos, strict=True)):
            y1 = y1 + f(y2, key_mask_nl, seed=derive_seed(seed, 2 * index), memo=memo)
            y2 = y2 + g(y1, key_mask_nl, seed=derive_seed(seed, 2 * index + 1))
        ctx.save_for_backward(y1, y2, key_mask_nl)
        ctx.blocks, ctx.memos, ctx.seed = blocks, memos, seed
        return (y1 + y2) / 2

    @staticmethod
    def backward(ctx: Any, grad_nld: Tensor) -> tuple[Tensor, None, None, None]:
        y1, y2, key_mask_nl = ctx.saved_tensors
        d1 = d2 = grad_nld / 2
        for index in reversed(range(len(ctx.blocks))):
            f, g = ctx.blocks[index]
            y2, d1 = _undo(g, y2, y1, d2, d1, key_mask_nl, derive_seed(ctx.seed, 2 * index + 1), None)
            y1, d2 = _undo(f, y1, y2, d1, d2, key_mask_nl, derive_seed(ctx.seed, 2 * index), ctx.memos[index])
        return d1 + d2, None, None, None


def _undo(
    branch: nn.Module,
    out: Tensor,
    source: Tensor,
    grad_out: Tensor,
    grad_source: Tensor,
    mask: Tensor,
    seed: int,
    memo: HashMemo | None,
) -> tuple[Tensor, Tensor]:
    """Invert out = before + branch(source): return `before` and the full gradient of `source`."""
    with torch.enable_grad():
        leaf = source.detach().requires_grad_()
        change = branch(leaf, mask, seed=seed, memo=memo)
        if change.requires_grad:
            torch.autograd.backward(change, grad_out)
    return out - change.detach(), grad_source if leaf.grad is None else grad_source + leaf.grad


class ReversibleEncoder(nn.Module):
    """A stack of `depth` blocks.

    In training with `reversible`, the backward pass recomputes activations from the outputs, with the same
    hashes and dropout. In eval mode, or without `reversible`, ordinary autograd is used with the same
    parameters.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.reversible = config.reversible
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))

    def _branches(self) -> list[tuple[nn.Module, nn.Module]]:
        return [(block.f, block.g) for block in self.blocks if isinstance(block, Block)]

    def forward(
        self, x_nld: Tensor, key_mask_nl: Tensor, *, hash_seed: int, key_weight_nl: Tensor | None = None
    ) -> Tensor:
        """Encode cells.

        Args:
            x_nld: Tokens, shape (n, l, d).
            key_mask_nl: True for tokens, which come first in each cell; bool, shape (n, l).
            hash_seed: Seeds the hashes and the dropout of all layers.
            key_weight_nl: Weight of each token as a key, in [0, 1], shape (n, l); only in eval mode. None is
                1.

        Returns:
            Encoded tokens, shape (n, l, d), in the dtype of x; padded slots contain finite, meaningless
            values.
        """
        streams = x_nld.to(torch.promote_types(x_nld.dtype, torch.float32))
        if self.reversible and self.training and torch.is_grad_enabled():
            if not streams.requires_grad:
                # Without this, autograd would skip the function, and the blocks would not learn.
                streams = streams.detach().requires_grad_()
            assert key_weight_nl is None, "key weights are only supported in eval mode"
            return _ReversibleFunction.apply(streams, key_mask_nl, self._branches(), hash_seed).to(
                x_nld.dtype
            )
        y1 = y2 = streams
        for index, (f, g) in enumerate(self._branches()):
            seed = derive_seed(hash_seed, 2 * index)
            y1 = y1 + f(y2, key_mask_nl, seed=seed, key_weight_nl=key_weight_nl)
            y2 = y2 + g(y1, key_mask_nl, seed=derive_seed(hash_seed, 2 * index + 1))
        return ((y1 + y2) / 2).to(x_nld.dtype)
