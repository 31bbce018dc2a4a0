"""Time, memory and utilisation of LSH attention, reformer-pytorch's, and fused full attention.

Peers take turns in one process, so other load affects all of them equally; medians are compared.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
import torch.nn.functional as F

from jobs.benchmark.timing import alternate, peak_activation_mb, peak_flops, utilisation
from screformer.cost import attention_flops
from screformer.lsh import hash_buckets, lsh_attention, sort_tokens

LINEAR_LENGTHS = (5_000, 10_000, 20_000)
"""Lengths at which memory per token is compared."""


def _attention_steps(length: int, args: argparse.Namespace) -> dict[str, Callable[[], None]]:
    from reformer_pytorch.reformer_pytorch import LSHAttention

    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    generator = torch.Generator().manual_seed(length)
    shape = (args.cells, length, args.heads, args.head_width)
    qk, v, grad = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3))
    lengths = [length] * args.cells
    library = LSHAttention(bucket_size=args.bucket_size, n_hashes=args.n_hashes)
    padded = -(-length // (2 * args.bucket_size)) * 2 * args.bucket_size
    leaves = [part.requires_grad_() for part in (qk, v)]
    # Each peer gets its preferred layout: heads folded into the batch for the library, before the tokens
    # for full attention.
    library_leaves = [
        F.pad(part.detach().transpose(1, 2).flatten(0, 1), (0, 0, 0, padded - length))
        .contiguous()
        .requires_grad_()
        for part in leaves
    ]
    library_grad = F.pad(grad.transpose(1, 2).flatten(0, 1), (0, 0, 0, padded - length)).contiguous()
    library_mask = (
        None
        if padded == length
        else (torch.arange(padded, device=device) < length).expand(len(library_grad), -1)
    )
    full_leaves = [part.detach().transpose(1, 2).contiguous().requires_grad_() for part in (qk, qk, v)]
    full_grad = grad.transpose(1, 2).contiguous()

    def ours() -> None:
        with torch.no_grad():
            buckets = hash_buckets(qk, lengths, bucket_size=args.bucket_size, n_hashes=args.n_hashes, seed=0)
            tokens = sort_tokens(buckets, lengths)
        torch.autograd.grad(
            lsh_attention(leaves[0], leaves[1], tokens, bucket_size=args.bucket_size), leaves, grad
        )

    def reformer_pytorch() -> None:
        out, _, _ = library(*library_leaves, input_mask=library_mask)
        torch.autograd.grad(out, library_leaves, library_grad)

    def full() -> None:
        torch.autograd.grad(
            F.scaled_dot_product_attention(full_leaves[0], full_leaves[1], full_leaves[2]),
            full_leaves,
            full_grad,
        )

    return {"lsh": ours, "reformer_pytorch": reformer_pytorch, "full": full}


def _equal_hash_steps(length: int, args: argparse.Namespace) -> dict[str, Callable[[], None]]:
    """The same without hashing: both get the same precomputed hashes and sort them."""
    from reformer_pytorch.reformer_pytorch import LSHAttention

    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    generator = torch.Generator().manual_seed(length)
    qk, v, grad = (
        torch.randn(args.cells, length, args.heads, args.head_width, generator=generator).to(device, dtype)
        for _ in range(3)
    )
    lengths, most = [length] * args.cells, length // args.bucket_size
    buckets = hash_buckets(qk, lengths, bucket_size=args.bucket_size, n_hashes=args.n_hashes, seed=0).clamp(
        max=most - 1
    )
    library = LSHAttention(bucket_size=args.bucket_size, n_hashes=args.n_hashes)
    given = (
        (buckets.long() + torch.arange(args.n_hashes, device=device)[:, None] * most).flatten(0, 1).flatten(1)
    )
    library.hash_vectors = lambda *_args, **_kwargs: given
    leaves = [part.requires_grad_() for part in (qk, v)]
    library_leaves = [
        part.detach().transpose(1, 2).flatten(0, 1).contiguous().requires_grad_() for part in leaves
    ]
    library_grad = grad.transpose(1, 2).flatten(0, 1).contiguous()

    def ours() -> None:
        torch.autograd.grad(
            lsh_attention(leaves[0], leaves[1], sort_tokens(buckets, lengths), bucket_size=args.bucket_size),
            leaves,
            grad,
        )

    def reformer_pytorch() -> None:
        torch.autograd.grad(library(*library_leaves)[0], library_leaves, library_grad)

    return {"lsh": ours, "reformer_pytorch": reformer_pytorch}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Time all lengths, print tables, and return the numbers; `args` are those of the command."""
    torch.set_num_threads(args.threads or torch.get_num_threads())
    device = torch.device(args.device)
    peak = peak_flops(device, getattr(torch, args.dtype), args.peak_tflops)
    ratio_keys = (
        "lsh_vs_reformer_pytorch",
        "lsh_vs_reformer_pytorch_equal_hashes",
        "lsh_vs_full",
        "model_flops_utilisation",
    )
    result: dict[str, Any] = {name: {} for name in ratio_keys}
    seconds: dict[str, dict[str, float]] = {}
    print(
        f"{'tokens':>8}{'lsh s':>10}{'library s':>12}{'full s':>10}"
        f"{'vs library':>12}{'equal hash':>12}{'vs full':>10}{'GFLOP/s':>10}"
    )
    for length in args.lengths:
        times = alternate(_attention_steps(length, args), rounds=args.rounds, device=device)
        ratios = {name: times.ratio(name, "lsh") for name in ("reformer_pytorch", "full")}
        equal = math.nan
        if length % (2 * args.bucket_size) == 0:
            pair = alternate(_equal_hash_steps(length, args), rounds=args.rounds, device=device)
            equal = pair.ratio("reformer_pytorch", "lsh")
            result["lsh_vs_reformer_pytorch_equal_hashes"][str(length)] = round(equal, 2)
        flops = args.cells * attention_flops(
            length,
            heads=args.heads,
            head_width=args.head_width,
            n_hashes=args.n_hashes,
            bucket_size=args.bucket_size,
        )
        print(
            f"{length:>8}{times.seconds('lsh'):>10.4f}{times.seconds('reformer_pytorch'):>12.4f}"
            f"{times.seconds('full'):>10.4f}"
            f"{ratios['reformer_pytorch']:>12.2f}{equal:>12.2f}{ratios['full']:>10.2f}"
            f"{flops / times.seconds('lsh') / 1e9:>10.1f}",
            flush=True,
        )
        result["lsh_vs_reformer_pytorch"][str(length)] = round(ratios["reformer_pytorch"], 2)
        result["lsh_vs_full"][str(length)] = round(ratios["full"], 2)
        result["model_flops_utilisation"][str(length)] = utilisation(flops, times.seconds("lsh"), peak)
        seconds[str(length)] = {name: round(times.seconds(name), 5) for name in times.rounds}
    print(
        "model FLOPs: 6 products x 2 x heads x head width x tokens x rounds x 2 buckets of keys, for forward"
        " and backward"
    )
    if args.memory_length:
        dtype = getattr(torch, args.dtype)
        peaks = {
            depth: peak_activation_mb(depth=depth, length=args.memory_length, device=device, dtype=dtype)
            for depth in (2, 12)
        }
        per_token = {
            length: peak_activation_mb(depth=2, length=length, device=device, dtype=dtype) * 1024 / length
            for length in LINEAR_LENGTHS
        }
        result["memory_depth_12_vs_2"] = round(peaks[12] / peaks[2], 3)
        result["memory_kib_per_token"] = {str(length): round(kib, 2) for length, kib in per_token.items()}
        print(
            f"encoder of width 128, forward and backward, {args.memory_length} tokens: {peaks[2]:.0f} MiB at"
            f" depth 2,"
            f" {peaks[12]:.0f} MiB at depth 12; depth 2, KiB per token: "
            + ", ".join(f"{kib:.1f} at {length:,} tokens" for length, kib in per_token.items())
        )
    return result | {
        "seconds": seconds,
        "shape": {
            name: getattr(args, name) for name in ("cells", "heads", "head_width", "n_hashes", "bucket_size")
        },
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "dtype": args.dtype,
        "threads": torch.get_num_threads(),
        "rounds": args.rounds,
        "versions": {name: version(name) for name in ("torch", "reformer-pytorch")},
    }
