"""LSH attention, in one long file because its parts share a buffer layout.

Axes: n cells, l token slots, h heads, e head width, d model width, r hash rounds, m slots of a bucket, w
windows (a bucket of queries and two buckets of keys), s slots of the sorted buffer.

For each cell, head and round, tokens are sorted by hash, and a query sees the keys of its own bucket of
`bucket_size` sorted slots and of the previous bucket (the first bucket of a round looks back at the last one
of the previous round, as in Reformer). All sorted sequences of a batch are in a single buffer of rows
[q | k | v], one after another, filled by one gather. Each sequence starts with a copy of its last bucket, so
the keys of every window are a *view*: two adjacent buckets. All windows can then be processed alike, except
the first one of a round (a token may meet itself again there) and those with padded slots; these are attended
once more with a mask. The rounds form one softmax over all keys of all rounds, so the backward pass needs
only the combined output and log-sum-exp, and no gradient through the combination.

A cell's result depends only on its own tokens: its numbers of hash buckets and windows depend on its length,
and the rotations do not depend on the batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import cache, partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

SELF_SCORE = -5e4
"""Score of a token with itself, which matters only if there is nothing else to attend to. Same value as in
reformer-pytorch; safe in half precision."""
_MAX_COLUMNS = 64
"""Number of rotation columns drawn per hash factor, regardless of length, so a cell's rotations do not depend
on the other cells."""
_WINDOWS_AT_ONCE = 512
_ROWS_AT_ONCE = 2**16
"""Releasing and reallocating memory costs more than the arithmetic; blocks of this size stay in the allocator
and the cache."""


class SortedTokens(NamedTuple):
    """The result of hashing, and all that the backward pass needs: a few bytes per token, head and round."""

    order_nhrl: Tensor
    """Positions of each cell's tokens in sorted order, padding last; int32."""
    lengths: tuple[int, ...]
    """Number of tokens of each cell."""


def _num_buckets(length: int, bucket_size: int) -> int:
    """Number of buckets per round for a cell, with its length rounded up to an even number of buckets."""
    return -(-length // (2 * bucket_size)) * 2


def hash_buckets(
    qk_nlhe: Tensor, lengths: Sequence[int], *, bucket_size: int, n_hashes: int, seed: int
) -> Tensor:
    """Hash each token by factorised random rotations: two small hashes instead of one over all buckets.

    A cell with B buckets has about B hash values, f1 x f2 with an even f1 near the square root of B. Each
    factor is Reformer's cross-polytope hash: the index of the largest of [x R, -x R]. So a token needs about
    sqrt(B) columns per round instead of B.

    Args:
        qk_nlhe: Shared queries and keys, shape (n, l, h, e).
        lengths: Number of tokens of each cell.
        bucket_size: Number of slots per bucket.
        n_hashes: Number of rounds.
        seed: Seed of the rotations, which all cells and heads share.

    Returns:
        Hash values, shape (n, h, r, l), int16, at least 0.
    """
    n, length, h, width = qk_nlhe.shape
    generator = torch.Generator().manual_seed(seed)
    rotations = torch.randn(_MAX_COLUMNS, 2 * n_hashes, width, generator=generator).to(
        qk_nlhe.device, qk_nlhe.dtype
    )
    columns = [_hash_columns(_num_buckets(cell, bucket_size)) for cell in lengths]
    bucket_nlhr = torch.empty(n, length, h, n_hashes, dtype=torch.int16, device=qk_nlhe.device)
    for cells in _cell_groups([length * h] * n, _ROWS_AT_ONCE if qk_nlhe.device.type == "cpu" else None):
        widest = max(max(pair) for pair in columns[cells])
        # With columns last in memory, the maximum is over a few adjacent values in one cache line.
        turned = qk_nlhe[cells] @ rotations[:widest].transpose(0, 1).reshape(-1, width).T
        turned = turned.unflatten(-1, (2, n_hashes, widest))
        count_nf = torch.tensor(columns[cells], device=turned.device).view(-1, 1, 1, 2, 1)
        size = turned.abs()
        if any(pair != (widest, widest) for pair in columns[cells]):
            size.masked_fill_(torch.arange(widest, device=turned.device) >= count_nf[..., None], -1.0)
        best = size.argmax(-1, keepdim=True)
        index = best[..., 0] + (turned.gather(-1, best)[..., 0] < 0) * count_nf
        bucket_nlhr[cells] = index[..., 0, :] * (2 * count_nf[..., 1, :]).clamp(min=1) + index[..., 1, :]
    return bucket_nlhr.permute(0, 2, 3, 1)


def random_buckets(qk_nlhe: Tensor, *, n_hashes: int, seed: int) -> Tensor:
    """Random numbers with the shape of `hash_buckets`' hashes, to shuffle the tokens.

    They depend only on seed, slot and round, so a cell does not depend on other cells or padding.
    """
    n, length, h, _ = qk_nlhe.shape
    generator = torch.Generator().manual_seed(seed)
    drawn_lr = torch.randint(
        torch.iinfo(torch.int16).max, (length, n_hashes), generator=generator, dtype=torch.int16
    )
    return drawn_lr.T.to(qk_nlhe.device).expand(n, h, -1, -1)


def _hash_columns(num_buckets: int) -> tuple[int, int]:
    """Factorise about `num_buckets` hash values.

    Returns half of the first factor and half of the second (0: no second factor).
    """
    first = min(max(round(num_buckets**0.5 / 2), 1), _MAX_COLUMNS)
    return first, min(round(num_buckets / first / 4), _MAX_COLUMNS)


def _cell_groups(sizes: Sequence[int], most: int | None) -> list[slice]:
    """Group consecutive cells; each group has at most `most` rows, or is a single cell."""
    groups, start, total = [], 0, 0
    for cell, size in enumerate(sizes):
        if most is not None and cell > start and total + size > most:
            groups.append(slice(start, cell))
            start, total = cell, 0
        total += size
    return [*groups, slice(start, len(sizes))]


def sort_tokens(bucket_nhrl: Tensor, lengths: Sequence[int]) -> SortedTokens:
    """Sort the tokens of each cell, head and round by bucket, then by position; padding last.

    Args:
        bucket_nhrl: Hash of each token, from 0 to 32,766, shape (n, h, r, l); padded slots are ignored.
        lengths: Number of tokens of each cell; tokens come first.
    """
    bucket = bucket_nhrl.to(torch.int16)
    if min(lengths) < bucket.shape[-1]:
        length_n = torch.tensor(lengths, device=bucket.device).view(-1, 1, 1, 1)
        bucket = bucket.masked_fill(
            torch.arange(bucket.shape[-1], device=bucket.device) >= length_n, torch.iinfo(torch.int16).max
        )
    if bucket.device.type == "cpu":
        # NumPy uses radix sort for 16-bit integers, which takes a twentieth of the time of torch.sort.
        order = torch.from_numpy(np.argsort(bucket.contiguous().numpy(), axis=-1, kind="stable"))
    else:
        order = bucket.argsort(dim=-1, stable=True)
    return SortedTokens(order.int(), tuple(lengths))


class _Slots(NamedTuple):
    """Positions of the sorted tokens of some cells and heads in the buffer.

    Rows are tokens, flat (cell, head, slot of the cell).
    """

    row_s: Tensor
    """Token row of each slot; one past the last row is the empty token."""
    slot_tr: Tensor
    """Query slot (flattened window and position) of each token row in each round; 0 for padding."""
    head_w: Tensor
    """First window of each sequence."""
    tail_w: Tensor
    """The window after each sequence, whose result is unused."""
    special_w: Tensor
    """Windows in which a token may meet itself twice, or that contain padding."""
    pad_t: Tensor | None
    """True for padded token rows; None if there are none."""


def _place(order_brl: Tensor, lengths: Sequence[int], bucket_size: int) -> _Slots:
    """Lay out the sorted sequences of cells and heads, each preceded by a copy of its last bucket."""
    b, r, length = order_brl.shape
    m, device, empty = bucket_size, order_brl.device, b * length
    arange = partial(torch.arange, device=device)
    length_b = torch.tensor(lengths, device=device)
    buckets = [_num_buckets(cell, m) for cell in lengths]
    starts = [0, *itertools.accumulate(r * count + 1 for count in buckets)]
    num_windows = starts.pop()
    start_b, buckets_b = torch.tensor(starts, device=device), torch.tensor(buckets, device=device)
    first_br = start_b[:, None] + buckets_b[:, None] * arange(r)
    slot_brl = ((first_br + 1) * m)[..., None] + arange(length)
    order_brl = order_brl.long()
    row_brl = order_brl + (arange(b) * length)[:, None, None]
    pad_bl = None
    if min(lengths) < length:
        pad_bl = arange(length) >= length_b[:, None]
        slot_brl = slot_brl.masked_fill(pad_bl[:, None], (num_windows + 1) * m)
    row_s = torch.full(((num_windows + 1) * m + 1,), empty, device=device)
    row_s[slot_brl.flatten()] = row_brl.flatten()
    row_s = row_s[:-1]
    slot_tr = torch.empty_like(order_brl).scatter_(-1, order_brl, slot_brl - m).transpose(1, 2)
    slot_tr = (slot_tr if pad_bl is None else slot_tr.masked_fill(pad_bl[..., None], 0)).reshape(-1, r)
    head_w, tail_w = start_b, start_b + r * buckets_b
    row_wm = row_s.view(-1, m)
    row_wm[head_w] = row_wm[tail_w]
    special = [first_br.flatten()]
    for back in (1, 2):
        special.append(
            (first_br + buckets_b[:, None] - back)[length_b <= (buckets_b - back + 1) * m - 1].flatten()
        )
    pad_t = None if pad_bl is None else pad_bl.flatten()
    return _Slots(row_s, slot_tr, head_w, tail_w, torch.cat(special).unique(), pad_t)


def _special_mask(slots: _Slots, bucket_size: int, like: Tensor) -> Tensor:
    """Additive masks of the special windows, (special windows, 1, m, 2 m)."""
    row_wm = slots.row_s.view(-1, bucket_size)
    query_wm, key_wm = (
        row_wm[slots.special_w + 1],
        torch.cat([row_wm[slots.special_w], row_wm[slots.special_w + 1]], 1),
    )
    mask = like.new_zeros(len(query_wm), bucket_size, 2 * bucket_size)
    mask.masked_fill_(query_wm[:, :, None] == key_wm[:, None], SELF_SCORE)
    return mask.masked_fill_((key_wm == len(slots.slot_tr))[:, None], torch.finfo(mask.dtype).min / 2)[
        :, None
    ]


def _sum_rows(table: Tensor, rows_tr: Tensor, weights_tr: Tensor | None = None) -> Tensor:
    """Sum (weighted) rows of a table for each token, without materialising them and in a fixed order."""
    return F.embedding_bag(
        rows_tr, table.reshape(-1, table.shape[-1]), mode="sum", per_sample_weights=weights_tr
    )


def _windows(rows: Tensor, width: int, bucket_size: int) -> list[Tensor]:
    """Split gathered rows of parts [q | k | v | ...] into windows, without a copy.

    Windows have two buckets of k and v, and one bucket of the other parts.
    """
    m, (row, col) = bucket_size, rows.stride()
    count = rows.shape[0] // m - 1
    parts = []
    for index, start in enumerate(range(0, rows.shape[1], width)):
        buckets = 2 if index in (1, 2) else 1
        offset = rows.storage_offset() + start * col + (2 - buckets) * m * row
        parts.append(rows.as_strided((count, 1, buckets * m, width), (m * row, m * row, row, col), offset))
    return parts


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask)


def _attend_backward(parts: Sequence[Tensor], mask: Tensor) -> tuple[Tensor, ...]:
    q, k, v, grad, out, lse = parts
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, lse, 0.0, False, attn_mask=mask
    )


class _FusedBuckets(torch.autograd.Function):
    """LSH attention for given hashes with PyTorch's fused CPU attention.

    Works block by block, to keep memory use small and within the cache.
    """

    @staticmethod
    def forward(ctx: Any, qk_nlhe: Tensor, v_nlhe: Tensor, tokens: SortedTokens, bucket_size: int) -> Tensor:
        width, m = qk_nlhe.shape[3], bucket_size
        out_nlhe = torch.empty_like(v_nlhe, memory_format=torch.contiguous_format)
        lse_nlh = out_nlhe.new_empty(
            out_nlhe.shape[:3], dtype=torch.float64 if out_nlhe.dtype == torch.float64 else torch.float32
        )
        self_mask = _self_mask(m, qk_nlhe)
        blocks: list[tuple[slice, slice, _Slots, Tensor]] = []
        scratch = v_nlhe.new_empty(0)
        for cells, heads, slots in _blocks(tokens, m):
            mask = _special_mask(slots, m, qk_nlhe)
            blocks.append((cells, heads, slots, mask))
            q, k, v = _windows(
                _gather(scratch, _source(qk_nlhe[cells, :, heads], v_nlhe[cells, :, heads]), slots.row_s),
                width,
                m,
            )
            out, lse = _attend(q, k, v, self_mask)
            special = slots.special_w
            q, k, v = (part.index_select(0, special) for part in (q, k, v))
            out_special, lse_special = _attend(q, k, v, mask)
            out.index_copy_(0, special, out_special)
            lse.index_copy_(0, special, lse_special)
            lse_tr = lse.reshape(-1).take(slots.slot_tr)
            joined, joined_lse = (
                _sum_rows(out, slots.slot_tr, lse_tr.softmax(-1).to(out.dtype)),
                lse_tr.logsumexp(-1),
            )
            if slots.pad_t is not None:
                joined.masked_fill_(slots.pad_t[:, None], 0)
                joined_lse.masked_fill_(slots.pad_t, 0)
            _put(out_nlhe, cells, heads, joined)
            _put(lse_nlh, cells, heads, joined_lse)
        ctx.save_for_backward(qk_nlhe, v_nlhe, out_nlhe, lse_nlh)
        ctx.blocks, ctx.bucket_size = blocks, m
        return out_nlhe

    @staticmethod
    def backward(ctx: Any, grad_nlhe: Tensor) -> tuple[Tensor, Tensor, None, None]:
        # All rounds together form one softmax over their keys. Given the combined output and log-sum-exp, the
        # kernel's backward pass returns the full gradient; none has to pass through the combination.
        qk_nlhe, v_nlhe, out_nlhe, lse_nlh = ctx.saved_tensors
        width, m = qk_nlhe.shape[3], ctx.bucket_size
        grad_qk_nlhe, grad_v_nlhe = torch.empty_like(out_nlhe), torch.empty_like(out_nlhe)
        self_mask = _self_mask(m, qk_nlhe)
        scratch = v_nlhe.new_empty(0)
        for cells, heads, slots, mask in ctx.blocks:
            qk, v, grad, out = (part[cells, :, heads] for part in (qk_nlhe, v_nlhe, grad_nlhe, out_nlhe))
            source = _source(qk, v, grad, out)
            if slots.pad_t is not None:
                source[:-1, 3 * width :].masked_fill_(slots.pad_t[:, None], 0)
            lse = (
                F.pad(lse_nlh[cells, :, heads].transpose(1, 2).flatten(), (0, 1))
                .index_select(0, slots.row_s[m:])
                .view(-1, 1, m)
            )
            parts = [*_windows(_gather(scratch, source, slots.row_s), width, m), lse]
            grads = _attend_backward(parts, self_mask)
            special = slots.special_w
            parts = [part.index_select(0, special) for part in parts]
            for whole, part in zip(grads, _attend_backward(parts, mask), strict=True):
                whole.index_copy_(0, special, part)
            for whole in grads[1:]:
                whole[slots.tail_w, :, :m] = whole[slots.head_w, :, :m]
            own_tr = slots.slot_tr + (slots.slot_tr // m + 1) * m
            both_tr = torch.cat([own_tr, own_tr + m], 1)
            grad_q, grad_k, grad_v = (
                _sum_rows(*pair) for pair in zip(grads, (slots.slot_tr, both_tr, both_tr), strict=True)
            )
            unit = source[:-1, width : 2 * width]
            grad_k -= unit * (unit * grad_k).sum(-1, keepdim=True)
            grad_qk = grad_q.addcdiv_(grad_k, _norm(source[:-1, :width]))
            if slots.pad_t is not None:
                grad_qk.masked_fill_(slots.pad_t[:, None], 0)
                grad_v.masked_fill_(slots.pad_t[:, None], 0)
            _put(grad_qk_nlhe, cells, heads, grad_qk)
            _put(grad_v_nlhe, cells, heads, grad_v)
        return grad_qk_nlhe, grad_v_nlhe, None, None


def _norm(rows: Tensor) -> Tensor:
    return rows.norm(dim=-1, keepdim=True).clamp_(min=1e-12)


def _source(qk: Tensor, v: Tensor, *others: Tensor) -> Tensor:
    """Pack [q | normalised q | v | others] of each token into one row, (cells x heads x l + 1, parts x e).

    The last row is all zeros.
    """
    n, length, h, width = qk.shape
    source = qk.new_empty(n * h * length + 1, (3 + len(others)) * width)
    source[-1] = 0
    rows = source[:-1].view(n, h, length, -1)
    for index, part in enumerate((qk, None, v, *others)):
        if part is not None:
            rows[..., index * width : (index + 1) * width] = part.transpose(1, 2)
    torch.div(source[:-1, :width], _norm(source[:-1, :width]), out=source[:-1, width : 2 * width])
    return source


def _gather(scratch: Tensor, source: Tensor, rows: Tensor) -> Tensor:
    """Gather rows into memory that the next block reuses, because new pages cost more than the copy."""
    size = len(rows) * source.shape[1]
    if scratch.numel() < size:
        scratch.resize_(size)
    return torch.index_select(source, 0, rows, out=scratch[:size].view(len(rows), -1))


def _put(target_nlhx: Tensor, cells: slice, heads: slice, rows: Tensor) -> None:
    part = target_nlhx[cells, :, heads].transpose(1, 2)
    part.copy_(rows.view(part.shape))


def _self_mask(m: int, like: Tensor) -> Tensor:
    mask = like.new_zeros(1, 1, m, 2 * m)
    mask[..., m:].diagonal(dim1=-2, dim2=-1).fill_(SELF_SCORE)
    return mask


def _blocks(tokens: SortedTokens, bucket_size: int) -> Iterator[tuple[slice, slice, _Slots]]:
    """Split a batch into blocks of about `_WINDOWS_AT_ONCE` windows: whole cells, or heads of one cell."""
    heads, rounds = tokens.order_nhrl.shape[1:3]
    sizes = [rounds * _num_buckets(length, bucket_size) + 1 for length in tokens.lengths]
    for cells in _cell_groups([heads * size for size in sizes], _WINDOWS_AT_ONCE):
        together = max(_WINDOWS_AT_ONCE // max(sizes[cells]), 1)
        for start in range(0, heads, together) if cells.stop - cells.start == 1 else (0,):
            part = (
                slice(start, min(start + together, heads))
                if cells.stop - cells.start == 1
                else slice(0, heads)
            )
            lengths = [length for length in tokens.lengths[cells] for _ in range(part.stop - part.start)]
            yield cells, part, _place(tokens.order_nhrl[cells, part].flatten(0, 1), lengths, bucket_size)


def _flex_buckets(qk_nlhe: Tensor, v_nlhe: Tensor, tokens: SortedTokens, bucket_size: int) -> Tensor:
    """The same with FlexAttention, for GPUs.

    Processes the whole batch at once, masks self-attention and padding in the score function, and uses
    ordinary autograd.
    """
    n, length, h, width = qk_nlhe.shape
    m, empty = bucket_size, n * h * length
    slots = _place(tokens.order_nhrl.flatten(0, 1), [cell for cell in tokens.lengths for _ in range(h)], m)
    q, v = (
        F.pad(part.transpose(1, 2).reshape(-1, width), (0, 0, 0, 1)).index_select(0, slots.row_s)
        for part in (qk_nlhe, v_nlhe)
    )
    k = F.normalize(q, dim=-1)
    row_wm = slots.row_s.view(-1, m)
    windows = (
        torch.cat([part[:-m].view(-1, m, width), part[m:].view(-1, m, width)], 1)[:, None] for part in (k, v)
    )
    key_rows = torch.cat([row_wm[:-1], row_wm[1:]], 1)
    query_rows = row_wm[1:].contiguous()
    masked = torch.finfo(torch.float32).min / 2

    def score_mod(score: Tensor, window: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        score = torch.where(query_rows[window, query] == key_rows[window, key], SELF_SCORE, score)
        return torch.where(key_rows[window, key] == empty, masked, score)

    attend = _compiled_flex() if q.device.type == "cuda" else flex_attention
    out, aux = attend(
        q[m:].view(-1, 1, m, width), *windows, score_mod=score_mod, return_aux=AuxRequest(lse=True)
    )
    weight_tr = aux.lse.reshape(-1)[slots.slot_tr].softmax(-1).to(out.dtype)
    joined = torch.einsum("tre,tr->te", out.reshape(-1, width)[slots.slot_tr], weight_tr)
    if slots.pad_t is not None:
        joined = joined.masked_fill(slots.pad_t[:, None], 0)
    return joined.view(n, h, length, width).transpose(1, 2)


@cache
def _compiled_flex() -> Any:
    """FlexAttention, compiled once per process for any number of windows; only compiled, it is fused."""
    return torch.compile(flex_attention, dynamic=True)


def lsh_attention(
    qk_nlhe: Tensor,
    v_nlhe: Tensor,
    tokens: SortedTokens,
    *,
    bucket_size: int,
    kernel: Literal["auto", "fused", "flex"] = "auto",
) -> Tensor:
    """Attend within sorted buckets, like reformer_pytorch.LSHAttention with the same hashes.

    Args:
        qk_nlhe: Shared queries and keys, shape (n, l, h, e).
        v_nlhe: Values, same shape.
        tokens: Output of `sort_tokens`.
        bucket_size: Number of slots per bucket.
        kernel: `fused` (PyTorch's CPU attention), `flex` (FlexAttention), or `auto` (`fused` on CPU, `flex`
            elsewhere).

    Returns:
        Attended values, same shape; zeros at padded slots.

    Source: Kitaev et al. 2020, "Reformer", with the choices of reformer-pytorch 1.4.4 (normalised keys, self
    last, rounds combined by log-sum-exp).
    """
    if not any(tokens.lengths):
        # Depend on both: the backward pass of a rank with only padding must reach the same parameters as on
        # the other ranks, or ZeRO-3, which gathers parameters there, would wait forever.
        return (qk_nlhe + v_nlhe) * 0
    if kernel == "flex" or (kernel == "auto" and qk_nlhe.device.type != "cpu"):
        return _flex_buckets(qk_nlhe, v_nlhe, tokens, bucket_size)
    return _FusedBuckets.apply(qk_nlhe, v_nlhe, tokens, bucket_size)
