"""Attention over the tokens of a cell: LSH (as in Reformer), full, local, random buckets, or none.

Axes: n cells, l token slots, h heads, e head width, d model width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from screformer.config import ModelConfig
from screformer.lsh import SortedTokens, hash_buckets, lsh_attention, random_buckets, sort_tokens

_LEAST_WEIGHT = 1e-6
"""Used instead of key weights of 0, to avoid division by 0."""
CROSSOVER_TOKENS = 1536
"""Tokens per cell at which a training step of the base recipe becomes faster with lsh than with full
attention, on a CPU (docs/log/2026-11-24-speed.md)."""


@dataclass
class HashMemo:
    """Hashes of an attention layer in a forward pass, kept for recomputation in the backward pass."""

    sorted_tokens: SortedTokens | None = None


class SelfAttention(Protocol):
    """The interface of an attention layer."""

    def __call__(
        self,
        x_nld: Tensor,
        key_mask_nl: Tensor,
        *,
        hash_seed: int,
        memo: HashMemo | None = None,
        key_weight_nl: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        `hash_seed` seeds the hashes, `memo` keeps them for recomputation, and `key_weight_nl` in [0, 1] is
        the weight of each token as a key (explanations vary it between absent and present).
        """


class LSHSelfAttention(nn.Module):
    """Reformer's self-attention, with the parameters of reformer_pytorch.LSHSelfAttention.

    Args:
        dim: Width.
        heads: Number of heads; divides the width.
        bucket_size: Tokens per bucket.
        n_hashes: Number of hash rounds; can be changed at any time, because no parameter depends on it.
        eval_n_hashes: Number of hash rounds in eval mode; 0 uses `n_hashes`.
        random: Shuffle the tokens into buckets instead of hashing them; a control to measure the benefit of
            hashing.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        bucket_size: int,
        n_hashes: int,
        eval_n_hashes: int = 0,
        random: bool = False,
    ) -> None:
        super().__init__()
        self.random = random
        self.heads, self.bucket_size, self.n_hashes, self.eval_n_hashes = (
            heads,
            bucket_size,
            n_hashes,
            eval_n_hashes or n_hashes,
        )
        self.toqk = nn.Linear(dim, dim, bias=False)
        self.tov = nn.Linear(dim, dim, bias=False)
        self.to_out = nn.Linear(dim, dim)

    def forward(
        self,
        x_nld: Tensor,
        key_mask_nl: Tensor,
        *,
        hash_seed: int,
        memo: HashMemo | None = None,
        key_weight_nl: Tensor | None = None,
    ) -> Tensor:
        """Attend to the tokens that share a bucket.

        Args:
            x_nld: Tokens, shape (n, l, d).
            key_mask_nl: True for tokens, which come first in each cell; bool, shape (n, l).
            hash_seed: Seeds the rotations; equal seeds give equal results.
            memo: Stores the hashes of this call, or supplies those of an earlier one.
            key_weight_nl: Weight of each token as a key, in [0, 1], shape (n, l); None is 1.

        Returns:
            Attended tokens, shape (n, l, d).
        """
        qk, v = (layer(x_nld).unflatten(-1, (self.heads, -1)) for layer in (self.toqk, self.tov))
        tokens = memo.sorted_tokens if memo is not None else None
        if tokens is None:
            tokens = self.sort(qk, key_mask_nl, hash_seed=hash_seed)
            if memo is not None:
                memo.sorted_tokens = tokens
        attend = partial(lsh_attention, qk, tokens=tokens, bucket_size=self.bucket_size)
        if key_weight_nl is None:
            return self.to_out(attend(v).flatten(2))
        # With softmax weights w over all keys, the weights for keys of weight p are w p / sum(w p). This
        # takes two calls of the same attention: one on p times the values and one on p.
        weight = key_weight_nl[..., None, None].expand_as(v).contiguous()
        return self.to_out((attend(v * weight) / attend(weight).clamp(min=_LEAST_WEIGHT)).flatten(2))

    @torch.no_grad()
    def sort(self, qk_nlhe: Tensor, key_mask_nl: Tensor, *, hash_seed: int) -> SortedTokens:
        """Hash and sort the tokens, as `forward` does.

        Args:
            qk_nlhe: Shared queries and keys, shape (n, l, h, e).
            key_mask_nl: True for tokens, which come first in each cell; bool, shape (n, l).
            hash_seed: Seeds the rotations, or the random buckets.
        """
        lengths, n_hashes = (
            key_mask_nl.sum(1).tolist(),
            self.n_hashes if self.training else self.eval_n_hashes,
        )
        if self.random:
            bucket = random_buckets(qk_nlhe, n_hashes=n_hashes, seed=hash_seed)
        else:
            bucket = hash_buckets(
                qk_nlhe, lengths, bucket_size=self.bucket_size, n_hashes=n_hashes, seed=hash_seed
            )
        return sort_tokens(bucket, lengths)


class FullSelfAttention(nn.Module):
    """PyTorch's fused attention from every token to every token."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.to_out = nn.Linear(dim, dim)

    def _split(self, x_nld: Tensor) -> tuple[Tensor, ...]:
        return tuple(
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.to_qkv(x_nld).chunk(3, -1)
        )

    def forward(
        self,
        x_nld: Tensor,
        key_mask_nl: Tensor,
        *,
        hash_seed: int,
        memo: HashMemo | None = None,
        key_weight_nl: Tensor | None = None,
    ) -> Tensor:
        """Attend; shapes as in `LSHSelfAttention.forward`.

        Cells without tokens get finite, meaningless rows.
        """
        q, k, v = self._split(x_nld)
        mask = None
        if key_weight_nl is not None:
            mask = (key_weight_nl * key_mask_nl).clamp(min=_LEAST_WEIGHT**2).log()[:, None, None]
        elif not bool(key_mask_nl.all()):
            mask = (key_mask_nl | ~key_mask_nl.any(1, keepdim=True))[:, None, None]
        return self.to_out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


class LocalSelfAttention(FullSelfAttention):
    """Attention from each token to its own window of `bucket_size` tokens and both neighbouring windows."""

    def __init__(self, dim: int, heads: int, *, bucket_size: int) -> None:
        super().__init__(dim, heads)
        self.bucket_size = bucket_size

    def forward(
        self,
        x_nld: Tensor,
        key_mask_nl: Tensor,
        *,
        hash_seed: int,
        memo: HashMemo | None = None,
        key_weight_nl: Tensor | None = None,
    ) -> Tensor:
        """Attend; shapes as in `LSHSelfAttention.forward`. Key weights are not supported."""
        assert key_weight_nl is None, "local attention does not support key weights"
        m, length = self.bucket_size, x_nld.shape[1]
        fill = -length % m
        q, k, v = (F.pad(part, (0, 0, 0, fill)) for part in self._split(x_nld))
        k, v = (F.pad(part, (0, 0, m, m)).unfold(2, 3 * m, m).transpose(-1, -2) for part in (k, v))
        mask = F.pad(key_mask_nl, (m, m + fill)).unfold(1, 3 * m, m)
        mask = (mask | ~mask.any(-1, keepdim=True))[:, None, :, None].expand(-1, self.heads, -1, -1, -1)
        q = q.unflatten(2, (-1, m)).flatten(0, 2)[:, None]
        k, v, mask = (part.flatten(0, 2)[:, None] for part in (k, v, mask))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).view(
            x_nld.shape[0], self.heads, length + fill, -1
        )
        return self.to_out(out[:, :, :length].transpose(1, 2).flatten(2))


class NoAttention(nn.Module):
    """A control without attention: tokens do not see each other."""

    def forward(
        self,
        x_nld: Tensor,
        key_mask_nl: Tensor,
        *,
        hash_seed: int,
        memo: HashMemo | None = None,
        key_weight_nl: Tensor | None = None,
    ) -> Tensor:
        """Return zeros that depend on x, so earlier parameters still get a gradient, as ZeRO expects."""
        return x_nld * 0


def make_attention(config: ModelConfig) -> nn.Module:
    """Build the `SelfAttention` named by `model.attention`."""
    assert config.attention != "auto", "resolve `auto` first with resolve_attention"
    if config.attention in ("lsh", "random"):
        return LSHSelfAttention(
            config.dim,
            config.heads,
            bucket_size=config.bucket_size,
            n_hashes=config.n_hashes,
            eval_n_hashes=config.eval_n_hashes,
            random=config.attention == "random",
        )
    if config.attention == "full":
        return FullSelfAttention(config.dim, config.heads)
    if config.attention == "local":
        return LocalSelfAttention(config.dim, config.heads, bucket_size=config.bucket_size)
    return NoAttention()


def resolve_attention(config: ModelConfig, most_slots: int) -> tuple[ModelConfig, str]:
    """Replace `auto` with the faster of `lsh` and `full`, and describe the choice.

    Args:
        config: The architecture; attention other than `auto` is kept.
        most_slots: Number of tokens of the longest cell.

    Returns:
        The architecture with its attention resolved, and a log line that also lists settings without effect.
    """
    if config.encoder == "additive":
        return replace(config, attention="none"), "encoder: additive, without attention"
    why = ""
    if config.attention == "auto":
        config = replace(config, attention="lsh" if most_slots >= CROSSOVER_TOKENS else "full")
        why = (
            f" (auto: cells have up to {most_slots:,} tokens; lsh is faster from {CROSSOVER_TOKENS:,} tokens)"
        )
    idle = [
        f"model.{name}={getattr(config, name)}"
        for name, kinds in (
            ("n_hashes", ("lsh", "random")),
            ("eval_n_hashes", ("lsh", "random")),
            ("bucket_size", ("lsh", "random", "local")),
        )
        if config.attention not in kinds and getattr(config, name) != getattr(ModelConfig(), name)
    ]
    return config, f"attention: {config.attention}{why}" + (
        f"; {' and '.join(idle)} without effect" if idle else ""
    )
