"""A training step (forward, backward, update) of our network beside one of scBERT's configuration on the same tokens.

    python -m jobs.benchmark step
    python -m jobs.benchmark step --profile                  # where our step spends its time
    python -m jobs.benchmark step --device cuda --dtype bfloat16 --cells 8

scBERT has 16,906 genes and a [CLS] token, width 200, depth 6 and 10 heads of 64 features of Performer attention, and predicts the bin of
masked genes. Ours has the same width, depth and heads, first on the same tokens (all genes), then as one would use it: detected genes only.
Prints a table and, last, one JSON line.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from jobs.benchmark.attention import alternate, peak_memory_mb
from screformer.config import ModelConfig, TokensConfig
from screformer.model import ScReformer, expression_loss
from screformer.tokenizer import CLS, NUM_SPECIAL

NUM_BINS = 7
"""scBERT's expression classes: bins 0 to 5 and the mask."""


class ScBert(nn.Module):
    """scBERT's network by performer-pytorch: Performer over expression and gene embeddings, bin scores of every token.

    Source: `performer_pytorch.PerformerLM` as scBERT's `pretrain.py` calls it, without its weights.
    """

    def __init__(self, num_genes: int, dim: int, depth: int, heads: int) -> None:
        super().__init__()
        from performer_pytorch import Performer

        self.expression, self.gene = nn.Embedding(NUM_BINS, dim), nn.Embedding(num_genes + 1, dim)
        # gene2vec vectors are looked up, not learned.
        self.gene.requires_grad_(False)
        self.performer = Performer(dim=dim, depth=depth, heads=heads, dim_head=64, causal=False, qkv_bias=False, attn_out_bias=True)
        self.norm, self.to_out = nn.LayerNorm(dim), nn.Linear(dim, NUM_BINS)

    def forward(self, bin_ids_nl: Tensor) -> Tensor:
        """Scores of bins at every token, (n, l, bins)."""
        return self.to_out(self.encode(bin_ids_nl))

    def encode(self, bin_ids_nl: Tensor) -> Tensor:
        """Vectors of all tokens, (n, l, d)."""
        x = self.expression(bin_ids_nl) + self.gene(torch.arange(bin_ids_nl.shape[1], device=bin_ids_nl.device))
        return self.norm(self.performer(x))


def _draw_cells(cells: int, num_genes: int, num_detected: int, device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
    """Tokens of all genes, a [CLS] first, and the slots to hide: 15 % of the detected genes."""
    generator = torch.Generator().manual_seed(0)
    detected = torch.rand(cells, num_genes, generator=generator).argsort(1) < num_detected
    values = F.pad(torch.rand(cells, num_genes, generator=generator).mul_(4).add_(0.5) * detected, (1, 0))
    token_ids = torch.cat([torch.tensor([CLS]), torch.arange(num_genes) + NUM_SPECIAL]).expand(cells, -1).contiguous()
    batch = {"token_ids": token_ids, "values": values, "bin_ids": values.ceil().long().clamp(max=5)}
    hidden = (torch.rand(cells, num_genes + 1, generator=generator) < 0.15) & (values > 0)
    return {name: part.to(device) for name, part in batch.items()}, hidden.to(device)


def _detected_only(batch: dict[str, Tensor], hidden: Tensor, num_detected: int) -> tuple[dict[str, Tensor], Tensor]:
    keep = batch["values"] > 0
    keep[:, 0] = True
    return {name: part[keep].view(-1, num_detected + 1) for name, part in batch.items()}, hidden[keep].view(-1, num_detected + 1)


def _step(network: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW([parameter for parameter in network.parameters() if parameter.requires_grad], lr=1e-4)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table and one JSON line."""
    parser = argparse.ArgumentParser(prog="python -m jobs.benchmark step", description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--genes", type=int, default=16906, help="genes of the vocabulary; with the [CLS] scBERT's 16,907 tokens")
    parser.add_argument("--detected", type=int, default=1500, help="detected genes of a cell")
    parser.add_argument("--cells", type=int, default=1, help="cells per step")
    parser.add_argument("--dim", type=int, default=200)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--heads", type=int, default=10)
    parser.add_argument("--n-hashes", type=int, default=4)
    parser.add_argument("--bucket-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds after one to warm up")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--profile", action="store_true", help="profile our step on all genes instead of comparing")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    model = ModelConfig(
        dim=args.dim, depth=args.depth, heads=args.heads, n_hashes=args.n_hashes, bucket_size=args.bucket_size, gene_embedding="random"
    )
    tokens = TokensConfig(input_mode="all", expression="log2_bins", num_bins=NUM_BINS)
    batch, hidden = _draw_cells(args.cells, args.genes, args.detected, device)
    short_batch, short_hidden = _detected_only(batch, hidden, args.detected)

    def ours(inputs: dict[str, Tensor], masked: Tensor) -> Callable[[], None]:
        network = ScReformer(model, tokens, num_genes=args.genes, num_classes=0, seed=0).to(device, dtype)

        def loss() -> Tensor:
            total, count = expression_loss(network(inputs, task="pretrain", hidden=masked, hash_seed=0), inputs, masked)
            return total / count

        return _step(network, loss)

    if args.profile:
        step = ours(batch, hidden)
        step()
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        with profile(activities=activities) as profiler:
            step()
        print(profiler.key_averages().table(sort_by=f"self_{device.type}_time_total", row_limit=25, max_name_column_width=60))
        return 0

    scbert = ScBert(args.genes, args.dim, args.depth, args.heads).to(device, dtype)
    shown = batch["bin_ids"].masked_fill(hidden, NUM_BINS - 1)
    peers = {
        "scbert": _step(scbert, lambda: F.cross_entropy(scbert(shown)[hidden].float(), batch["bin_ids"][hidden])),
        "ours_all_genes": ours(batch, hidden),
        "ours_detected_genes": ours(short_batch, short_hidden),
    }
    seconds = alternate(peers, rounds=args.rounds, device=device)
    peaks = {name: peak_memory_mb(step, device) for name, step in peers.items()}
    print(f"{'step':<22}{'tokens':>8}{'seconds':>10}{'cells/s':>10}{'vs scBERT':>11}{'peak MiB':>10}")
    for name in peers:
        length = (short_batch if name == "ours_detected_genes" else batch)["values"].shape[1]
        ratio = seconds["scbert"] / seconds[name]
        print(f"{name:<22}{length:>8}{seconds[name]:>10.3f}{args.cells / seconds[name]:>10.3f}{ratio:>11.2f}{peaks[name]:>10.0f}")
    result: dict[str, Any] = {
        "step_vs_scbert": round(seconds["scbert"] / seconds["ours_all_genes"], 2),
        "step_detected_vs_scbert": round(seconds["scbert"] / seconds["ours_detected_genes"], 2),
        "memory_vs_scbert": round(peaks["ours_all_genes"] / peaks["scbert"], 3),
        "seconds": {name: round(value, 4) for name, value in seconds.items()},
        "peak_mib": {name: round(value) for name, value in peaks.items()},
        "shape": {name: getattr(args, name) for name in ("cells", "genes", "detected", "dim", "depth", "heads", "n_hashes", "bucket_size")},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "dtype": args.dtype,
        "threads": args.threads,
        "rounds": args.rounds,
        "versions": {name: version(name) for name in ("torch", "performer-pytorch")},
    }
    print(json.dumps(result))
    return 0
