"""Check that settings meant to leave results unchanged do so."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from screformer.config import ExperimentConfig
from screformer.model import ScReformer, classification_loss
from screformer.tokenizer import NUM_SPECIAL

_CHUNKS = 4
"""Number of feed-forward slices used in the check."""


def exactness(config: ExperimentConfig, *, num_genes: int, num_classes: int) -> dict[str, Any]:
    """Check that feed-forward slices and recomputation do not change results.

    Uses the reference's network and random cells of different lengths.

    Returns:
        `ff_chunks_bit_equal`: whether feed-forward in slices gives the same bits;
        `reversible_gradient_error`: the largest difference, over all parameters, between gradients with and
        without recomputation, relative to the norm of the latter.
    """
    longest = config.tokens.most_slots(num_genes) - 1
    generator, slots = torch.Generator().manual_seed(config.train.seed), torch.arange(longest)
    lengths_n = torch.tensor([longest, max(1, longest // 2), max(1, longest // 3)])
    token_ids = (
        torch.stack(
            [torch.randperm(num_genes, generator=generator)[:longest].sort().values for _ in lengths_n]
        )
        + NUM_SPECIAL
    )
    real_nl = slots < lengths_n[:, None]
    batch = {
        "token_ids": token_ids * real_nl,
        "values": torch.rand(token_ids.shape, generator=generator) * 4 * real_nl,
        "bin_ids": torch.ones_like(token_ids) * real_nl,
        "labels": torch.arange(len(lengths_n)) % num_classes,
    }

    def network(**changes: Any) -> ScReformer:
        model = dataclasses.replace(config.model, dropout=0.0, **changes)
        return ScReformer(
            model, config.tokens, num_genes=num_genes, num_classes=num_classes, seed=config.train.seed
        )

    def gradients(model: ScReformer) -> list[torch.Tensor]:
        logits_nk = model.train()(batch, task="finetune", hash_seed=0).logits_nk
        classification_loss(logits_nk, batch["labels"], None)[0].backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    with torch.no_grad():
        whole, sliced = (
            network(ff_chunks=chunks).eval()(batch, task="finetune").logits_nk for chunks in (1, _CHUNKS)
        )
    ours, theirs = (gradients(network(reversible=reversible)) for reversible in (True, False))
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(ours, theirs, strict=True) if b.norm() > 0]
    return {"ff_chunks_bit_equal": bool(torch.equal(whole, sliced)), "reversible_gradient_error": max(errors)}


def exact_lines(exact: Mapping[str, Any]) -> list[str]:
    """The result of `exactness` as text."""
    same = "the same bits as" if exact["ff_chunks_bit_equal"] else "**different bits from**"
    return [
        f"Feed-forward in {_CHUNKS} slices gives {same} one slice.",
        f"Gradients with recomputation (reversible) differ from those without by at most"
        f" {exact['reversible_gradient_error']:.1e} of their norm.",
    ]
