"""Check that explanations are faithful to the model: deletion, insertion, hashes, weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from jobs.explaining.shards import SHARDS, shards_of, tokens_of
from jobs.reports.artifacts import write_explained
from screformer.cell_tokens import CellTokens, without_genes
from screformer.cells import CellSource
from screformer.explain import Attribution, Explainer
from screformer.model import HASH_SEED, ScReformer
from screformer.predictor import Predictor
from screformer.tokenizer import CLS, NUM_SPECIAL

_CHECKED_CELLS = 24
_REPEATED_CELLS = 6
_FRACTIONS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def curves(predictor: Predictor, source: CellSource, out: Path) -> dict[str, Any]:
    """Areas under the deletion and insertion curves.

    A curve gives the predicted label's probability against the share of genes removed (deletion) or the share
    of genes present (insertion). Genes are taken by value, largest first, and in random order for comparison.
    """
    rng = np.random.default_rng(0)
    every = np.ones(len(predictor.vocabulary), bool)
    nothing = CellTokens(
        token_ids=np.array([CLS]), values=np.zeros(1, np.float32), bin_ids=np.zeros(1, int), measured_g=every
    )
    explainer = Explainer(predictor.model, [nothing])
    cells = _some_rows(out)
    found: dict[str, list[np.ndarray]] = {
        "deletion": [],
        "deletion, random": [],
        "insertion": [],
        "insertion, random": [],
    }
    for (_, row), tokens in zip(
        cells.iterrows(), tokens_of(predictor, source, cells["position"].to_numpy()), strict=True
    ):
        code, own = predictor.label_names.tolist().index(row["class"]), tokens.token_ids[1:] - NUM_SPECIAL
        value_of = dict(zip(row["genes"].tolist(), row["values"].tolist(), strict=True))
        ranked = own[np.argsort([-value_of.get(gene, 0.0) for gene in own.tolist()], kind="stable")]
        for suffix, order in (("", ranked), (", random", rng.permutation(own))):
            steps = [round(fraction * len(order)) for fraction in _FRACTIONS]
            for kind, removed in (
                ("deletion", [order[:step] for step in steps]),
                ("insertion", [order[step:] for step in steps]),
            ):
                logits = explainer.logits([without_genes(tokens, genes) for genes in removed])
                found[kind + suffix].append(predictor.calibration.probabilities(logits)[:, code])
    means = {name: np.mean(values, axis=0) for name, values in found.items()}
    frame = pd.DataFrame(means, index=pd.Index(_FRACTIONS, name="share_of_genes"))
    write_explained(out, "curves", frame.reset_index())
    return {name: float(np.trapezoid(values, _FRACTIONS)) for name, values in means.items()}


def _some_rows(out: Path) -> pd.DataFrame:
    """Evenly spaced rows that explain a cell's predicted class.

    For the other rows, only the positions are kept in memory.
    """
    positions = []
    for path in sorted((out / SHARDS).glob("*.parquet")):
        table = pd.read_parquet(path, columns=["position", "class", "predicted"])
        positions.append(table["position"][table["class"] == table["predicted"]].to_numpy())
    every = np.concatenate(positions)
    wanted = set(every[np.unique(np.linspace(0, len(every) - 1, _CHECKED_CELLS).astype(int))].tolist())
    kept = [
        table[(table["class"] == table["predicted"]) & table["position"].isin(wanted)]
        for table in shards_of(out)
    ]
    return pd.concat(kept, ignore_index=True).sort_values("position")


def sanity(
    predictor: Predictor, source: CellSource, out: Path, background: list[CellTokens], num_nodes: int
) -> dict[str, float]:
    """Correlation of a few cells' values with those from another hash seed and from random weights.

    The first should be near 1, the second near 0.
    """
    table = next(shards_of(out))
    positions = np.unique(table["position"])[:_REPEATED_CELLS]
    tokens = tokens_of(predictor, source, positions)
    explainer = Explainer(predictor.model, background, num_nodes=num_nodes)
    other_hashes = Explainer(predictor.model, background, num_nodes=num_nodes, hash_seed=HASH_SEED + 1)
    random_weights = Explainer(untrained(predictor), background, num_nodes=num_nodes)
    hashes, weights = [], []
    for cell in tokens:
        code = int(explainer.logits([cell])[0].argmax())
        own = explainer.attribute(cell, [code])[0]
        hashes.append(_correlation(own, other_hashes.attribute(cell, [code])[0]))
        weights.append(_correlation(own, random_weights.attribute(cell, [code])[0]))
    return {
        "correlation_other_hash_seed": float(np.mean(hashes)),
        "correlation_random_weights": float(np.mean(weights)),
    }


def untrained(predictor: Predictor) -> ScReformer:
    """A network like the model's with random weights, on the same input genes."""
    config, seed = predictor.config, predictor.config.train.seed + 1
    network = ScReformer(
        config.model,
        config.tokens,
        num_genes=len(predictor.vocabulary),
        num_classes=len(predictor.label_names),
        seed=seed,
    )
    if network.additive is not None:  # it starts with a head of zeros, which gives every gene the value 0
        assert predictor.model.additive is not None and network.classification_head is not None
        network.additive.load_state_dict(dict(predictor.model.additive.named_buffers()), strict=False)
        generator = torch.Generator().manual_seed(seed)
        torch.nn.init.normal_(network.classification_head.weight, generator=generator)
    return network.to(predictor.device).eval()


def _correlation(one: Attribution, other: Attribution) -> float:
    values = pd.concat([pd.Series(found.values, index=found.genes) for found in (one, other)], axis=1).fillna(
        0
    )
    return float(np.corrcoef(values.to_numpy().T)[0, 1])
