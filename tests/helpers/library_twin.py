"""reformer_pytorch's network with our weights and hashes, for tests of equality."""

from collections.abc import Callable
from typing import Any

import torch
from reformer_pytorch import Reformer
from reformer_pytorch.reformer_pytorch import LSHAttention
from torch import Tensor, nn

import screformer.attention
from screformer.config import ModelConfig
from screformer.reversible import ReversibleEncoder

NAMES = {
    "f.norm": "f.net.norm",
    "f.attention": "f.net.fn",
    "g.norm": "g.net.norm",
    "g.w1": "g.net.fn.fn.w1",
    "g.w2": "g.net.fn.fn.w2",
}
"""Modules of our block and the matching ones of the library."""


class LibraryEncoder(nn.Module):
    """The library's `Reformer` with our encoder's interface, for cells of equal length, padded as the library
    needs."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.multiple = 2 * config.bucket_size
        self.reformer = Reformer(
            config.dim,
            config.depth,
            heads=config.heads,
            bucket_size=config.bucket_size,
            n_hashes=config.n_hashes,
            ff_chunks=1,
            attn_chunks=1,
            reverse_thres=0 if config.reversible else 10**6,
        )

    def forward(self, x_nld: Tensor, key_mask_nl: Tensor, *, hash_seed: int) -> Tensor:
        fill = -x_nld.shape[1] % self.multiple
        padded, mask = nn.functional.pad(x_nld, (0, 0, 0, fill)), nn.functional.pad(key_mask_nl, (0, fill))
        return self.reformer(padded, input_mask=mask)[:, : x_nld.shape[1]]

    def copy_weights(self, ours: ReversibleEncoder) -> None:
        for theirs, own in self.pairs(ours):
            theirs.load_state_dict(own.state_dict())

    def pairs(self, ours: ReversibleEncoder) -> list[tuple[nn.Module, nn.Module]]:
        """Pairs of the library's modules and ours."""
        blocks = zip(self.reformer.layers.blocks, ours.blocks, strict=True)
        return [
            (theirs.get_submodule(name), own.get_submodule(ours_name))
            for theirs, own in blocks
            for ours_name, name in NAMES.items()
        ]


def give_equal_hashes(
    set_attribute: Callable[[Any, str, Any], None], length: int, config: ModelConfig
) -> None:
    """Make both networks hash by position only, differently in each round, so their buckets are equal.

    Padding, which ours does not have, goes last.

    Args:
        set_attribute: For example `monkeypatch.setattr`.
        length: Number of tokens of every cell.
        config: Configuration of the encoders.
    """
    num_buckets = -(-length // (2 * config.bucket_size)) * 2
    rounds, slots = torch.arange(config.n_hashes)[:, None], torch.arange(num_buckets * config.bucket_size)
    buckets_rl = ((slots * 7 + rounds * 13) % 61 % num_buckets).masked_fill(slots >= length, num_buckets - 1)

    def theirs(self: LSHAttention, n_buckets: int, vectors: Tensor, **kwargs: Any) -> Tensor:
        assert (n_buckets, vectors.shape[1]) == (num_buckets, buckets_rl.shape[1])
        return (buckets_rl + rounds * n_buckets).flatten().expand(vectors.shape[0], -1)

    def ours(qk_nlhe: Tensor, lengths: list[int], **kwargs: Any) -> Tensor:
        assert set(lengths) == {length}
        n, slots, heads, _ = qk_nlhe.shape
        return nn.functional.pad(buckets_rl[:, :length], (0, slots - length)).expand(n, heads, -1, -1)

    set_attribute(LSHAttention, "hash_vectors", theirs)
    set_attribute(screformer.attention, "hash_buckets", ours)
