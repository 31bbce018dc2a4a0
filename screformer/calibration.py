"""Turn logits into answers: a calibrated label, a broader term, or "unknown".

`screformer.calibration_fit` learns the calibration on the validation cells after training; it is saved in the
model directory as `calibration.json`. A temperature scales the logits so that about 80 % of the cells with
probability 0.8 are correct. Cells unlike the training data are detected by the logit of their best label: the
calibration stores the usual logit of each label for its own cells, and a threshold on the shortfall that only
a small share of the validation cells exceeds. Where training augments cells, temperature and usual logits
depend on the number of detected genes. If no label is more likely right than wrong, the answer is the nearest
broader Cell Ontology term whose labels together are likely enough.

Axes: n cells, d model width, k classes, a answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import softmax

from screformer.lineage import Lineage

FORMAT, DEPTH_FORMAT = "1", "2"
"""Format of a calibration, and of one whose temperature depends on the detected genes."""
USUAL_DETECTED = 100
"""Detected genes at which `Calibration.temperature` holds."""
UNKNOWN = "unknown"
LABEL, BROADER = "label", "broader term"
LEVELS = (LABEL, BROADER, UNKNOWN)
"""Level of an answer: the best label, a broader term above it, or unknown."""
FEW_COUNTS, UNLIKE, UNSURE = "too few counts", "unlike the training cells", "no label likely enough"
REASONS = ("", FEW_COUNTS, UNLIKE, UNSURE)
"""Why a cell is unknown."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Answers:
    """Answers for n cells. Codes index the list from `answer_names`."""

    codes_n: np.ndarray
    """int64."""
    probability_n: np.ndarray
    """Calibrated probability of the label, or of all labels below the term. For an unknown cell, the
    probability of its best label, or 0 if it has too few counts. float32."""
    levels_n: np.ndarray
    """Index into `LEVELS`, int8."""
    reasons_n: np.ndarray
    """Why a cell is unknown: index into `REASONS`, int8."""


@dataclass(frozen=True, kw_only=True)
class DepthLogits:
    """Usual logits for any number of detected genes.

    A cell of few genes has small logits, whatever its type; it is unknown only if they are small for that
    number too.
    """

    slope: float
    """With d detected genes, usual logits are those below times (d / `USUAL_DETECTED`)^slope."""
    mean_k: tuple[float, ...]
    std_k: tuple[float, ...]
    shift: float
    """Added to the scores, to compare them with those of `Calibration.logit_mean_k`."""

    def scores(self, logit_n: np.ndarray, best_n: np.ndarray, detected_n: np.ndarray) -> np.ndarray:
        """Unknown scores by the logits of the best labels, float64 (n,)."""
        scaled_n = logit_n / depth_factor(detected_n, self.slope)
        return (np.array(self.mean_k)[best_n] - scaled_n) / np.array(self.std_k)[best_n] + self.shift

    def check(self, num_classes: int) -> None:
        """Reject values for another number of classes, or unusable ones; raises ValueError."""
        values = (self.slope, self.shift, *self.mean_k, *self.std_k)
        if {len(self.mean_k), len(self.std_k)} != {num_classes} or not np.isfinite(values).all():
            raise ValueError(f"by_depth must contain finite numbers for {num_classes} labels")

    def to_json(self) -> dict[str, Any]:
        """Plain values; the inverse of `from_json`."""
        parts = {"mean": list(self.mean_k), "std": list(self.std_k)}
        return {"slope": self.slope, "shift": self.shift, **parts}

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> DepthLogits:
        """The inverse of `to_json`."""
        return cls(
            slope=float(tree["slope"]),
            shift=float(tree["shift"]),
            mean_k=tuple(tree["mean"]),
            std_k=tuple(tree["std"]),
        )


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Turns the logits of one model into answers.

    The default is for a model without calibration: softmax and the best label.
    """

    temperature: float = 1.0
    """Logits are divided by this."""
    depth_slope: float = 0.0
    """With d detected genes, they are divided by the temperature times (d / `USUAL_DETECTED`)^depth_slope.
    Cells of few genes have small logits, so one temperature for all would be wrong for panels and depths
    other than those of the validation cells."""
    logit_mean_k: tuple[float, ...] = ()
    """Mean of each label's logit over its own cells; empty if the model was not calibrated."""
    logit_std_k: tuple[float, ...] = ()
    """Standard deviation of each label's logit over its own cells."""
    by_depth: DepthLogits | None = None
    """Usual logits that depend on the detected genes."""
    unknown_threshold: float = float("inf")
    """Cells with a higher unknown score are unknown."""
    min_probability: float = 0.0
    """Minimum probability of an answer."""
    lineage: Lineage = Lineage()
    """Broader terms to fall back to."""
    prior_k: tuple[float, ...] = ()
    """Share of each label in the training data, weighted as in the loss; empty if unknown."""
    measured: Mapping[str, float] | None = None
    """Cells used and quality reached: see `fit_calibration`. None if the model was not calibrated."""

    def probabilities(self, logits_nk: np.ndarray, detected_n: np.ndarray | None = None) -> np.ndarray:
        """Calibrated probabilities, float32 (n, k).

        Args:
            logits_nk: Logits.
            detected_n: Genes of each cell that became tokens; None for the usual number.
        """
        scaled_nk = logits_nk.astype(np.float64) / self.temperature
        if self.depth_slope and detected_n is not None:
            scaled_nk /= depth_factor(detected_n, self.depth_slope)[:, None]
        return softmax(scaled_nk, axis=1).astype(np.float32)

    def unknown_scores(self, logits_nk: np.ndarray, detected_n: np.ndarray | None = None) -> np.ndarray:
        """How unlike the training cells each cell is, float32 (n,); zeros if the model was not calibrated.

        Arguments as of `probabilities`.

        The score is the number of standard deviations by which the logit of a cell's best label falls short
        of that label's usual value. A cell that fits no label has low logits throughout, even if its
        probabilities strongly favour the least bad label.

        In tests that left out each blood cell type in turn, this score beat the largest probability, energy
        (Liu et al., NeurIPS 2020), Mahalanobis distances to class centroids (of embeddings and of logits) and
        sums of these: docs/log/2026-11-25-confidence.md.
        """
        if not self.logit_mean_k or not len(logits_nk):
            return np.zeros(len(logits_nk), dtype=np.float32)
        best = logits_nk.argmax(axis=1)
        logit = logits_nk[np.arange(len(best)), best].astype(np.float64)
        score_n = (np.array(self.logit_mean_k)[best] - logit) / np.array(self.logit_std_k)[best]
        if self.by_depth is not None and detected_n is not None:
            score_n = np.minimum(score_n, self.by_depth.scores(logit, best, detected_n))
        return score_n.astype(np.float32)

    def answer_names(self, names: Sequence[str], cl_ids: Sequence[str]) -> tuple[list[str], list[str]]:
        """Names and CL ids of all possible answers: labels, broader terms, "unknown"."""
        new = [term for term in self.lineage.terms if term.cl_id not in cl_ids]
        names = [*names, *(term.name for term in new), UNKNOWN]
        return names, [*cl_ids, *(term.cl_id for term in new), UNKNOWN]

    def answer(
        self,
        probabilities_nk: np.ndarray,
        unknown_score_n: np.ndarray,
        cl_ids: Sequence[str],
        informative_n: np.ndarray | None = None,
    ) -> Answers:
        """Choose the best label, the nearest term above it that is likely enough, or "unknown".

        Args:
            probabilities_nk: Output of `probabilities`.
            unknown_score_n: Output of `unknown_scores`.
            cl_ids: CL ids of the labels.
            informative_n: Which cells have enough counts, bool; the others are unknown, whatever the network
                predicts. None if all have enough.
        """
        num_cells = len(probabilities_nk)
        codes = probabilities_nk.argmax(axis=1) if num_cells else np.zeros(0, dtype=np.int64)
        probability = probabilities_nk[np.arange(num_cells), codes]
        levels = np.zeros(num_cells, dtype=np.int8)
        _, all_ids = self.answer_names([""] * len(cl_ids), cl_ids)
        reasons = np.zeros(num_cells, dtype=np.int8)
        reasons[unknown_score_n > self.unknown_threshold] = REASONS.index(UNLIKE)
        if informative_n is not None:
            reasons[~informative_n] = REASONS.index(FEW_COUNTS)
            probability[~informative_n] = 0.0
        unknown = reasons > 0
        for cell in np.flatnonzero((probability < self.min_probability) & ~unknown):
            for index in self.lineage.above_k[codes[cell]] if self.lineage.above_k else ():
                term = self.lineage.terms[index]
                total = probabilities_nk[cell, list(term.labels)].sum(dtype=np.float64)
                if total >= self.min_probability:
                    codes[cell], probability[cell], levels[cell] = (
                        all_ids.index(term.cl_id),
                        min(total, 1.0),
                        LEVELS.index(BROADER),
                    )
                    break
            else:
                reasons[cell] = REASONS.index(UNSURE)
        unknown = reasons > 0
        codes[unknown], levels[unknown] = len(all_ids) - 1, LEVELS.index(UNKNOWN)
        return Answers(codes_n=codes, probability_n=probability, levels_n=levels, reasons_n=reasons)

    def to_json(self) -> dict[str, Any]:
        """Plain values; the inverse of `from_json`."""
        depth: dict[str, Any] = {}
        if self.by_depth is not None:
            depth = {"depth_slope": self.depth_slope, "by_depth": self.by_depth.to_json()}
        return {
            "format": DEPTH_FORMAT if depth else FORMAT,
            "temperature": self.temperature,
            **depth,
            "logit_mean": list(self.logit_mean_k),
            "logit_std": list(self.logit_std_k),
            "unknown_threshold": self.unknown_threshold,
            "min_probability": self.min_probability,
            "lineage": self.lineage.to_json(),
            "prior": list(self.prior_k),
            "measured": dict(self.measured or {}),
        }

    def check_classes(self, num_classes: int) -> None:
        """Reject a calibration for a different number of classes, or with unusable numbers.

        Raises:
            ValueError: Names the offending part.
        """
        for name in ("logit_mean_k", "logit_std_k", "prior_k"):
            values = getattr(self, name)
            if len(values) not in (0, num_classes) or not np.isfinite(values).all():
                raise ValueError(f"{name} must contain {num_classes} finite numbers")
        if not (np.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"temperature {self.temperature} must be positive")
        if not np.isfinite(self.depth_slope):
            raise ValueError(f"depth_slope {self.depth_slope} must be finite")
        if self.by_depth is not None:
            self.by_depth.check(num_classes)
        named = [label for term in self.lineage.terms for label in term.labels]
        above = [index for indices in self.lineage.above_k for index in indices]
        if not all(0 <= label < num_classes for label in named) or not all(
            0 <= index < len(self.lineage.terms) for index in above
        ):
            raise ValueError(f"its lineage refers to a label or term beyond the {num_classes} labels")

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> Calibration:
        """The inverse of `to_json`.

        Raises:
            ValueError: The format differs, or a part is missing.
        """
        if tree.get("format") not in (FORMAT, DEPTH_FORMAT):
            raise ValueError(
                f"calibration has format {tree.get('format')}, but this screformer reads {FORMAT} and"
                f" {DEPTH_FORMAT}; use the"
                f" version that wrote it"
            )
        missing = {
            "temperature",
            "logit_mean",
            "logit_std",
            "unknown_threshold",
            "min_probability",
            "lineage",
            "measured",
        } - set(tree)
        if missing:
            raise ValueError(
                f"calibration lacks {', '.join(sorted(missing))}; it was not written by screformer"
            )
        return cls(
            temperature=float(tree["temperature"]),
            depth_slope=float(tree.get("depth_slope", 0.0)),
            by_depth=DepthLogits.from_json(tree["by_depth"]) if "by_depth" in tree else None,
            logit_mean_k=tuple(tree["logit_mean"]),
            logit_std_k=tuple(tree["logit_std"]),
            unknown_threshold=float(tree["unknown_threshold"]),
            min_probability=float(tree["min_probability"]),
            lineage=Lineage.from_json(tree["lineage"]),
            prior_k=tuple(tree.get("prior", ())),  # older models have none
            measured=dict(tree["measured"]),
        )


def depth_factor(detected_n: np.ndarray, slope: float) -> np.ndarray:
    """What the temperature is multiplied by, float64 (n,)."""
    return ((1 + detected_n) / (1 + USUAL_DETECTED)) ** slope
