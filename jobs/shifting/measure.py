"""The numbers that compare cells with a model's training cells, and the verdict.

Axes: n cells, k classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from jobs.shifting.cells import ComparedCells
from jobs.shifting.two_samples import CellSample, two_sample_auroc, usual_auroc
from screformer.composition import composition
from screformer.metrics import expected_calibration_error
from screformer.predictor import Predictor
from screformer.reference import TrainingReference

LEAST_GENES = 0.8
"""Smallest share of the model's expected expression in the measured genes for use as it is."""
MOST_UNKNOWN = 0.15
"""Largest share of unknown cells. Calibration makes 0.05 of the validation cells unknown."""
MOST_NEW = 0.05
"""Largest share of labelled cells of types new to the model."""
LEAST_ACCURACY = 0.8
"""Smallest accuracy on labelled cells of the model's types."""
LEAST_COUNTS = 0.5
"""Smallest share of the cells' counts in the model's genes. Below it, the model cannot see most of the
expression, and more labels do not help."""
AS_IT_IS, FINE_TUNE, PRETRAIN, TRAIN_NEW = "use as it is", "fine-tune", "pre-train further", "train a new one"
_QUANTILES = (0.1, 0.5, 0.9)


@dataclass(frozen=True, eq=False, kw_only=True)
class Shift:
    """The result of a comparison."""

    numbers: dict[str, Any]
    """Plain values; None if unknown."""
    depth: pd.DataFrame
    """`measure`, `cells` (training or new), and quantiles of counts and detected genes per cell."""
    composition: pd.DataFrame
    """`label`, `cells` (best label), `estimated share`; most frequent first."""
    types: pd.DataFrame | None
    """By known label: `label`, `cells`, `in model`, `accuracy`, `unknown`, `most frequent answer`."""
    verdict: str
    """One of `AS_IT_IS`, `FINE_TUNE`, `PRETRAIN`, `TRAIN_NEW`."""
    reasons: tuple[str, ...]
    """The thresholds that were not met."""

    @property
    def sentence(self) -> str:
        """The verdict in plain words."""
        does = {
            AS_IT_IS: "the model can be used as it is",
            FINE_TUNE: "fine-tune the model on these cells before using it",
            PRETRAIN: "pre-train the model further on these cells, then fine-tune it",
            TRAIN_NEW: "train a new model: this one lacks too many of the expressed genes",
        }[self.verdict]
        why = f", because {_and(self.reasons)}" if self.reasons else ": no threshold is exceeded"
        return f"{does[0].upper()}{does[1:]}{why}."


def measure_shift(predictor: Predictor, cells: ComparedCells, reference: TrainingReference | None) -> Shift:
    """Compare cells with the training cells of a model.

    Args:
        predictor: The model.
        cells: The cells, with the model's predictions.
        reference: The model's training cells; None skips what needs them.
    """
    said, names = cells.predictions, list(predictor.label_names)
    weight_g = predictor.vocabulary.weight_g.astype(np.float64)
    counted = float(cells.counts.total_n.sum(dtype=np.float64))
    numbers: dict[str, Any] = {
        "cells": cells.num_cells,
        "cells_compared": len(said),
        "donors": len(set(cells.donors_n)),
        "genes_of_model": len(weight_g),
        "genes_measured": int(cells.measured_g.sum()),
        "expression_share": float(weight_g[cells.measured_g].sum() / weight_g.sum()),
        "counts_share": float(cells.counts.counts_ng.sum(dtype=np.float64)) / max(counted, 1.0),
        "unknown_share": float(said.unknown.mean()),
        "auroc": None,
        "usual_auroc": None,
        "new_types_share": None,
        "accuracy": None,
        "calibration_error": None,
    }
    if reference:
        numbers |= _distances(said.embedding_nd, said.label_codes, cells.donors_n, reference)
    types = None
    labelled = cells.labels_n != ""
    if labelled.any():
        known = labelled & np.isin(cells.labels_n, names)
        numbers["new_types_share"] = float(1 - known.sum() / labelled.sum())
        numbers["new_types"] = sorted(set(cells.labels_n[labelled & ~known]))
        if known.any():
            codes = np.array([names.index(label) for label in cells.labels_n[known]])
            numbers["accuracy"] = float((said.label_codes[known] == codes).mean())
            numbers["calibration_error"] = expected_calibration_error(said.probabilities_nk[known], codes)
        types = _types(cells, names)
    verdict, reasons = verdict_of(numbers, additive=predictor.model.additive is not None)
    return Shift(
        numbers=numbers,
        depth=_depth(cells, reference),
        composition=_composition(predictor, cells),
        types=types,
        verdict=verdict,
        reasons=tuple(reasons),
    )


def _distances(
    embedding_nd: np.ndarray, codes_n: np.ndarray, donors: np.ndarray, reference: TrainingReference
) -> dict[str, float | None]:
    training = CellSample(
        embedding_nd=reference.embedding_nd, labels_n=reference.labels_n, donors_n=reference.donors_n
    )
    ours = CellSample(
        embedding_nd=embedding_nd,
        labels_n=codes_n,
        donors_n=np.unique(donors.astype(str), return_inverse=True)[1],
    )
    several = len(np.unique(reference.datasets_n)) > 1
    parts = reference.datasets_n if several else reference.donors_n
    return {"auroc": two_sample_auroc(training, ours), "usual_auroc": usual_auroc(training, parts)}


def _depth(cells: ComparedCells, reference: TrainingReference | None) -> pd.DataFrame:
    rows = []
    for measure, new, training in (
        ("counts per cell", cells.counts.total_n, reference.total_n if reference else None),
        ("detected genes per cell", cells.counts.lengths_n, reference.detected_n if reference else None),
    ):
        for which, values in (("new", new), ("training", training)):
            if values is not None:
                found = np.quantile(values, _QUANTILES)
                quantiles = {
                    f"{share:.0%}": float(value) for share, value in zip(_QUANTILES, found, strict=True)
                }
                rows.append({"measure": measure, "cells": which, **quantiles})
    return pd.DataFrame(rows)


def _composition(predictor: Predictor, cells: ComparedCells) -> pd.DataFrame:
    probabilities_nk, prior = cells.predictions.probabilities_nk, predictor.calibration.prior_k
    cells_k = composition(probabilities_nk, prior) if prior else probabilities_nk.sum(axis=0)
    table = pd.DataFrame(
        {
            "label": predictor.label_names.astype(str),
            "cells": np.bincount(cells.predictions.label_codes, minlength=len(predictor.label_names)),
            "estimated share": cells_k / max(cells_k.sum(), 1e-12),
        }
    )
    return table.sort_values("estimated share", ascending=False, kind="stable", ignore_index=True)


def _types(cells: ComparedCells, names: Sequence[str]) -> pd.DataFrame:
    said = cells.predictions
    rows = []
    for label in sorted(set(cells.labels_n) - {""}):
        own = cells.labels_n == label
        answers = pd.Series(said.labels[own]).value_counts()
        rows.append(
            {
                "label": label,
                "cells": int(own.sum()),
                "in model": "yes" if label in names else "no",
                "accuracy": float((said.best_labels[own] == label).mean()) if label in names else None,
                "unknown": float(said.unknown[own].mean()),
                "most frequent answer": f"{answers.index[0]} ({answers.iloc[0]:,})",
            }
        )
    return pd.DataFrame(rows).sort_values("cells", ascending=False, kind="stable", ignore_index=True)


def verdict_of(numbers: Mapping[str, Any], *, additive: bool) -> tuple[str, list[str]]:
    """The verdict, and the thresholds that decided it.

    Args:
        numbers: As `Shift.numbers`.
        additive: Whether the model has an additive encoder, which is never pre-trained.
    """
    if numbers["counts_share"] < LEAST_COUNTS:
        why = (
            f"only {numbers['counts_share']:.0%} of the counts are in the model's genes (at least"
            f" {LEAST_COUNTS:.0%})"
        )
        return (TRAIN_NEW if additive else PRETRAIN), [why]
    reasons = []
    if numbers["expression_share"] < LEAST_GENES:
        reasons.append(
            f"the measured genes cover {numbers['expression_share']:.0%} of the expression that the model"
            f" expects (at least {LEAST_GENES:.0%})"
        )
    if numbers["unknown_share"] > MOST_UNKNOWN:
        reasons.append(
            f"{numbers['unknown_share']:.0%} of the cells are unknown to it (at most {MOST_UNKNOWN:.0%})"
        )
    if (numbers["new_types_share"] or 0) > MOST_NEW:
        reasons.append(
            f"{numbers['new_types_share']:.0%} of the labelled cells have types new to it (at most"
            f" {MOST_NEW:.0%})"
        )
    if numbers["accuracy"] is not None and numbers["accuracy"] < LEAST_ACCURACY:
        reasons.append(
            f"its best labels are right for {numbers['accuracy']:.0%} of the labelled cells of its types (at"
            f" least {LEAST_ACCURACY:.0%})"
        )
    return (FINE_TUNE if reasons else AS_IT_IS), reasons


def _and(parts: Sequence[str]) -> str:
    return ", and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
