"""Check the parts of a model directory before building a network from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from screformer.config import ExperimentConfig
from screformer.tokenizer import NUM_SPECIAL


def check_weights(model: nn.Module, weights: Mapping[str, torch.Tensor], *, source: str) -> None:
    """Compare names and shapes of weights with a network.

    Raises:
        ValueError: A weight is missing, unexpected, or has the wrong shape; the message names the first one.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    for name in [*expected, *found]:
        if expected.get(name) != found.get(name):
            raise ValueError(
                f"{source}: weight {name} has shape {found.get(name, 'none')}, but the network of this"
                f" configuration has"
                f" {expected.get(name, 'none')}; use the configuration that the weights were trained with"
            )


def check_finite(weights: Mapping[str, torch.Tensor], *, source: str) -> None:
    """Reject weights that are not finite.

    Raises:
        ValueError: A weight is NaN or infinite; the message names the first one.
    """
    for name, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{source}: weight {name} is NaN or infinite; use an earlier model")


def check_sizes(
    config: ExperimentConfig,
    num_genes: int,
    num_classes: int,
    weights: Mapping[str, torch.Tensor],
    *,
    source: str,
) -> None:
    """Compare the settings that determine a network's size with its weights, before building it.

    Raises:
        ValueError: The configuration implies a different size; the message names the setting.
    """
    model = config.model
    names: tuple[tuple[str, int, str], ...] = (
        ("the number of labels", num_classes, "classification_head.bias"),
    )
    found: dict[str, tuple[int, int]] = {}
    if model.encoder == "additive":
        names += (
            ("model.dim", model.dim, "additive.affine.gain"),
            ("model.input_genes", min(model.input_genes, num_genes), "additive.genes.weight"),
            ("the size of the vocabulary", num_genes, "additive.slots"),
        )
    else:
        blocks = {name.split(".")[2] for name in weights if name.startswith("encoder.blocks.")}
        found["model.depth"] = (model.depth, len(blocks))
        genes = 1 if model.gene_embedding == "none" else num_genes
        names += (
            ("model.dim", model.dim, "pooling.norm.weight"),
            ("model.dim x model.ff_mult", model.dim * model.ff_mult, "encoder.blocks.0.g.w1.bias"),
            ("the size of the vocabulary", genes + NUM_SPECIAL, "gene_embedding.weight"),
        )
    for setting, wanted, name in names:
        found[setting] = (wanted, len(weights[name]) if name in weights and weights[name].ndim else 0)
    for setting, (wanted, has) in found.items():
        if wanted != has:
            raise ValueError(
                f"{source}: {setting} is {wanted}, but the weights have {has}; use the configuration that the"
                f" weights were trained with"
            )


def checked_labels(labels: dict[str, Any]) -> dict[str, Any]:
    """Return the labels unchanged; raises ValueError if they are invalid."""
    names, cl_ids = labels["names"], labels["cl_ids"]
    texts = isinstance(names, list) and all(isinstance(name, str) for name in [*names, *cl_ids])
    if not texts or len(names) != len(cl_ids) or len(set(names)) != len(names):
        raise ValueError("names and cl_ids must be lists of strings of equal length, and names unique")
    return labels
