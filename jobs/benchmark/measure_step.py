"""Time a training step (forward, backward, update) of our network and of scBERT's.

scBERT has 16,906 genes and a [CLS] token, width 200, depth 6 and 10 heads of 64 features of Performer
attention, and predicts the bins of masked genes. Ours has the same width, depth and heads, first on the same
tokens (all genes), then on detected genes only, its normal use. The base recipe is timed with LSH and with
full attention; `screformer.attention.CROSSOVER_TOKENS` is where LSH becomes faster.
"""

from __future__ import annotations

import argparse
import typing
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from jobs.benchmark.timing import alternate, peak_flops, peak_memory_mb, utilisation
from jobs.studies.scbert import NUM_BINS, ScBert
from screformer.config import ModelConfig, TokensConfig
from screformer.cost import step_flops
from screformer.model import ScReformer, expression_loss
from screformer.tokenizer import CLS, NUM_SPECIAL

Kind = Literal["lsh", "full"]


def _draw_cells(
    cells: int, num_genes: int, num_detected: int, device: torch.device
) -> tuple[dict[str, Tensor], Tensor]:
    """Tokens of all genes after a [CLS], and the slots to hide: 15 % of the detected genes."""
    generator = torch.Generator().manual_seed(0)
    detected = torch.rand(cells, num_genes, generator=generator).argsort(1) < num_detected
    values = F.pad(torch.rand(cells, num_genes, generator=generator).mul_(4).add_(0.5) * detected, (1, 0))
    token_ids = (
        torch.cat([torch.tensor([CLS]), torch.arange(num_genes) + NUM_SPECIAL]).expand(cells, -1).contiguous()
    )
    batch = {"token_ids": token_ids, "values": values, "bin_ids": values.ceil().long().clamp(max=5)}
    hidden = (torch.rand(cells, num_genes + 1, generator=generator) < 0.15) & (values > 0)
    return {name: part.to(device) for name, part in batch.items()}, hidden.to(device)


def _detected_only(
    batch: dict[str, Tensor], hidden: Tensor, num_detected: int
) -> tuple[dict[str, Tensor], Tensor]:
    keep = batch["values"] > 0
    keep[:, 0] = True
    return {name: part[keep].view(-1, num_detected + 1) for name, part in batch.items()}, hidden[keep].view(
        -1, num_detected + 1
    )


def _step(network: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(
        [parameter for parameter in network.parameters() if parameter.requires_grad], lr=1e-4
    )

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _our_step(
    model: ModelConfig,
    tokens: TokensConfig,
    batch: dict[str, Tensor],
    hidden: Tensor,
    *,
    num_genes: int,
    dtype: torch.dtype,
) -> Callable[[], None]:
    network = ScReformer(model, tokens, num_genes=num_genes, num_classes=0, seed=0).to(hidden.device, dtype)

    def loss() -> Tensor:
        total, count = expression_loss(
            network(batch, task="pretrain", hidden=hidden, hash_seed=0), batch, hidden
        )
        return total / count

    return _step(network, loss)


def _base_step(attention: Kind, length: int, args: argparse.Namespace) -> Callable[[], None]:
    """A step of the base recipe, on enough cells of `length` tokens to make up `args.base_tokens`."""
    batch, hidden = _draw_cells(
        max(1, args.base_tokens // length), args.genes, length - 1, torch.device(args.device)
    )
    model, dtype = ModelConfig(attention=attention), getattr(torch, args.dtype)
    return _our_step(
        model, TokensConfig(), *_detected_only(batch, hidden, length - 1), num_genes=args.genes, dtype=dtype
    )


def _measure_base(args: argparse.Namespace) -> dict[str, Any]:
    """The base recipe with LSH and with full attention."""
    device, kinds = torch.device(args.device), typing.get_args(Kind)
    peak = peak_flops(device, getattr(torch, args.dtype), args.peak_tflops)
    result: dict[str, Any] = {"lsh_vs_full": {}, "model_flops_utilisation": {}, "base_seconds": {}}
    print(
        f"{'base recipe':<22}{'tokens':>8}{'lsh s':>10}{'full s':>10}"
        f"{'lsh vs full':>13}{'lsh GFLOP/s':>13}{'full GFLOP/s':>14}"
    )
    for length in args.base_lengths:
        times = alternate(
            {kind: _base_step(kind, length, args) for kind in kinds}, rounds=args.rounds, device=device
        )
        cells = max(1, args.base_tokens // length)
        flops = {kind: cells * step_flops(ModelConfig(attention=kind), length) for kind in kinds}
        seconds = {kind: times.seconds(kind) for kind in kinds}
        rate = {kind: flops[kind] / seconds[kind] / 1e9 for kind in kinds}
        ratio = times.ratio("full", "lsh")
        print(
            f"{f'{cells} cells':<22}{length:>8}{seconds['lsh']:>10.3f}{seconds['full']:>10.3f}{ratio:>13.2f}"
            f"{rate['lsh']:>13.1f}{rate['full']:>14.1f}",
            flush=True,
        )
        result["lsh_vs_full"][str(length)] = round(ratio, 2)
        result["model_flops_utilisation"][str(length)] = {
            kind: utilisation(flops[kind], seconds[kind], peak) for kind in kinds
        }
        result["base_seconds"][str(length)] = {kind: round(value, 4) for kind, value in seconds.items()}
    print(
        "model FLOPs: 3 x depth x tokens x (2 x (p + 2 ff_mult) x dim^2 + 4 x dim x keys); lsh: p 3, keys 2 x"
        " bucket x rounds; full: 4, all"
    )
    return result


def _measure_next_to_scbert(args: argparse.Namespace) -> dict[str, Any]:
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    model = ModelConfig(
        dim=args.dim,
        depth=args.depth,
        heads=args.heads,
        attention="lsh",
        n_hashes=args.n_hashes,
        bucket_size=args.bucket_size,
    )
    tokens = TokensConfig(input_mode="all", expression="log2_bins", num_bins=NUM_BINS)
    batch, hidden = _draw_cells(args.cells, args.genes, args.detected, device)
    scbert = ScBert(args.genes, args.dim, args.depth, args.heads).to(device, dtype)
    shown = batch["bin_ids"].masked_fill(hidden, NUM_BINS - 1)
    peers = {
        "scbert": _step(
            scbert, lambda: F.cross_entropy(scbert(shown)[hidden].float(), batch["bin_ids"][hidden])
        ),
        "ours_all_genes": _our_step(model, tokens, batch, hidden, num_genes=args.genes, dtype=dtype),
        "ours_detected_genes": _our_step(
            model, tokens, *_detected_only(batch, hidden, args.detected), num_genes=args.genes, dtype=dtype
        ),
    }
    times = alternate(peers, rounds=args.rounds, device=device)
    peaks = {name: peak_memory_mb(step, device) for name, step in peers.items()}
    print(
        f"{'next to scBERT':<22}{'tokens':>8}{'seconds':>10}{'cells/s':>10}{'vs scBERT':>11}{'peak MiB':>10}"
    )
    for name in peers:
        length, seconds = (
            1 + (args.detected if name == "ours_detected_genes" else args.genes),
            times.seconds(name),
        )
        ratio = times.ratio("scbert", name)
        print(
            f"{name:<22}{length:>8}{seconds:>10.3f}{args.cells / seconds:>10.3f}"
            f"{ratio:>11.2f}{peaks[name]:>10.0f}"
        )
    return {
        "step_vs_scbert": round(times.ratio("scbert", "ours_all_genes"), 2),
        "step_detected_vs_scbert": round(times.ratio("scbert", "ours_detected_genes"), 2),
        "memory_vs_scbert": round(peaks["ours_all_genes"] / peaks["scbert"], 3),
        "seconds": {name: round(times.seconds(name), 4) for name in peers},
        "peak_mib": {name: round(value) for name, value in peaks.items()},
        "shape": {
            name: getattr(args, name)
            for name in ("cells", "genes", "detected", "dim", "depth", "heads", "n_hashes", "bucket_size")
        },
    }


def measure(args: argparse.Namespace) -> dict[str, Any] | None:
    """Time the parts, print tables and return the numbers; or only print a profile.

    `args` are those of the command.
    """
    torch.set_num_threads(args.threads or torch.get_num_threads())
    torch.manual_seed(0)
    device = torch.device(args.device)
    if args.profile:
        step = _base_step("lsh", args.profile, args)
        step()
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        with profile(activities=activities) as profiler:
            step()
        print(
            profiler.key_averages().table(
                sort_by=f"self_{device.type}_time_total", row_limit=25, max_name_column_width=60
            )
        )
        return None
    return {
        **(_measure_next_to_scbert(args) if "scbert" in args.parts else {}),
        **(_measure_base(args) if "base" in args.parts else {}),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "dtype": args.dtype,
        "threads": torch.get_num_threads(),
        "rounds": args.rounds,
        "versions": {name: version(name) for name in ("torch", "performer-pytorch")},
    }
