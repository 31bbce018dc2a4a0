"""Turn logits into answers: a calibrated label, a broader term, or "unknown".

The calibration is learned on the validation cells after training and saved in the model directory as
`calibration.json`. A temperature scales the logits so that about 80 % of the cells with probability 0.8 are
correct. Cells unlike the training data are detected by the logit of their best label: the calibration stores
the usual logit of each label for its own cells, and a threshold on the shortfall that only a small share of
the validation cells (`FALSE_ALARM_RATE`) exceeds. If no label is more likely right than wrong, the answer is
the nearest broader Cell Ontology term whose labels together are likely enough.

Axes: n cells, d model width, k classes, a answers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import logsumexp, softmax

from screformer.lineage import Lineage
from screformer.metrics import CellOutputs, expected_calibration_error

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
FALSE_ALARM_RATE = 0.05
"""Share of validation cells (all of known types) that the unknown threshold marks as unknown."""
MIN_PROBABILITY = 0.5
"""Minimum calibrated probability of an answer (a label, or all labels below a term): more likely right than
wrong."""
_TEMPERATURES = (0.2, 20.0)
"""Bounds of the temperature."""
_PRIOR_CELLS = 10
"""Weight, in cells, of the mean over all labels when estimating one label's usual logit. Rare labels have few
or no validation cells."""


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
    logit_slope: float = 0.0
    """With d detected genes, usual logits are those above times (d / `USUAL_DETECTED`)^logit_slope."""
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
            scaled_nk /= _depth_factor(detected_n, self.depth_slope)[:, None]
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
        if self.logit_slope and detected_n is not None:
            logit = logit / _depth_factor(detected_n, self.logit_slope)
        return ((np.array(self.logit_mean_k)[best] - logit) / np.array(self.logit_std_k)[best]).astype(
            np.float32
        )

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
        by_depth = self.depth_slope != 0 or self.logit_slope != 0
        return {
            "format": DEPTH_FORMAT if by_depth else FORMAT,
            "temperature": self.temperature,
            **({"depth_slope": self.depth_slope, "logit_slope": self.logit_slope} if by_depth else {}),
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
        for name in ("depth_slope", "logit_slope"):
            if not np.isfinite(getattr(self, name)):
                raise ValueError(f"{name} {getattr(self, name)} must be finite")
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
            logit_slope=float(tree.get("logit_slope", 0.0)),
            logit_mean_k=tuple(tree["logit_mean"]),
            logit_std_k=tuple(tree["logit_std"]),
            unknown_threshold=float(tree["unknown_threshold"]),
            min_probability=float(tree["min_probability"]),
            lineage=Lineage.from_json(tree["lineage"]),
            prior_k=tuple(tree.get("prior", ())),  # older models have none
            measured=dict(tree["measured"]),
        )


def fit_calibration(
    outputs: CellOutputs,
    lineage: Lineage,
    *,
    varied: CellOutputs | None = None,
    prior_k: Sequence[float] | np.ndarray = (),
    false_alarm_rate: float = FALSE_ALARM_RATE,
) -> Calibration:
    """Learn the temperature, the usual logits and the unknown threshold.

    Args:
        outputs: Outputs of at least one validation cell; none of the cells was used for training.
        lineage: Terms above the labels.
        varied: Outputs of the same cells at other depths and with fewer genes, which show how temperature and
            usual logits depend on the detected genes. None: they do not.
        prior_k: Share of each label in the training data, weighted as in the loss.
        false_alarm_rate: Share of all these cells that the threshold marks as unknown, in (0, 1).

    Returns:
        The calibration; `measured` has `cells`, `false_alarm_rate`, `ece_before`, `ece_after`, `accuracy`.

    Source: Guo et al., On calibration of modern neural networks, ICML 2017.
    """
    assert len(outputs), "calibration needs cells"
    logits, labels = outputs.logits_nk.astype(np.float64), outputs.labels_n
    every, temperature, depth_slope, logit_slope = outputs, _temperature(outputs), 0.0, 0.0
    if varied is not None and len(varied):
        every = _joined(outputs, varied)
        temperature, depth_slope = _temperature_by_depth(every)
        logit_slope = _logit_slope(every)
    own_n = _own_logits(every) / _depth_factor(every.detected_n, logit_slope)
    mean_k, std_k = _usual_logits(own_n, every.labels_n, logits.shape[1])
    fitted = Calibration(
        temperature=temperature,
        depth_slope=depth_slope,
        logit_mean_k=mean_k,
        logit_std_k=std_k,
        logit_slope=logit_slope,
    )
    scores_n = fitted.unknown_scores(every.logits_nk, every.detected_n)
    threshold = np.quantile(scores_n, 1 - false_alarm_rate, method="higher")
    return dataclasses.replace(
        fitted,
        unknown_threshold=float(threshold),
        min_probability=MIN_PROBABILITY,
        lineage=lineage,
        prior_k=tuple(float(share) for share in prior_k),
        measured={
            "cells": float(len(labels)),
            "false_alarm_rate": false_alarm_rate,
            "accuracy": float((logits.argmax(axis=1) == labels).mean()),
            "ece_before": expected_calibration_error(softmax(logits, axis=1), labels),
            "ece_after": expected_calibration_error(
                fitted.probabilities(outputs.logits_nk, outputs.detected_n), labels
            ),
        },
    )


def _temperature(outputs: CellOutputs) -> float:
    """The temperature with the smallest cross-entropy."""
    from scipy.optimize import minimize_scalar  # imported here: not needed to use a model

    # Bounded: if a handful of cells are all predicted correctly, the best temperature would be 0.
    bounds = tuple(np.log(_TEMPERATURES))
    found = minimize_scalar(lambda log: _loss(outputs, np.exp(log)), bounds=bounds, method="bounded")
    return float(np.exp(found.x))


def _joined(one: CellOutputs, other: CellOutputs) -> CellOutputs:
    return CellOutputs(
        logits_nk=np.concatenate([one.logits_nk, other.logits_nk]),
        labels_n=np.concatenate([one.labels_n, other.labels_n]),
        detected_n=np.concatenate([one.detected_n, other.detected_n]),
    )


def _temperature_by_depth(outputs: CellOutputs) -> tuple[float, float]:
    """The temperature and its `depth_slope` with the smallest cross-entropy."""
    from scipy.optimize import minimize

    def loss(point: np.ndarray) -> float:
        factor_n = _depth_factor(outputs.detected_n, point[1])
        return _loss(outputs, np.clip(np.exp(point[0]) * factor_n, *_TEMPERATURES)[:, None])

    start = [np.log(_temperature(outputs)), 0.0]
    log_temperature, slope = minimize(loss, start, method="Nelder-Mead", options={"xatol": 1e-3}).x
    return float(np.clip(np.exp(log_temperature), *_TEMPERATURES)), float(slope)


def _logit_slope(outputs: CellOutputs) -> float:
    """The `logit_slope` with which the own logits of each label vary least, relative to their mean."""
    from scipy.optimize import minimize_scalar

    own_n = _own_logits(outputs)

    def spread(slope: float) -> float:
        scaled_n = own_n / _depth_factor(outputs.detected_n, slope)
        groups = [scaled_n[outputs.labels_n == label] for label in np.unique(outputs.labels_n)]
        return sum(len(group) * group.var() / max(group.mean() ** 2, 1e-12) for group in groups)

    return float(minimize_scalar(spread, bounds=(0.0, 1.0), method="bounded").x)


def _own_logits(outputs: CellOutputs) -> np.ndarray:
    """Each cell's logit of its true label, float64 (n,)."""
    return outputs.logits_nk[np.arange(len(outputs)), outputs.labels_n].astype(np.float64)


def _loss(outputs: CellOutputs, temperature: float | np.ndarray) -> float:
    """Mean cross-entropy of logits over a temperature, or one for each cell (n, 1)."""
    scaled = outputs.logits_nk.astype(np.float64) / temperature
    return float((logsumexp(scaled, axis=1) - scaled[np.arange(len(outputs)), outputs.labels_n]).mean())


def _depth_factor(detected_n: np.ndarray, slope: float) -> np.ndarray:
    """What the temperature is multiplied by, float64 (n,)."""
    return ((1 + detected_n) / (1 + USUAL_DETECTED)) ** slope


def _usual_logits(
    own_n: np.ndarray, labels_n: np.ndarray, num_classes: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each label's logit over its own cells, shrunk to those of all labels."""
    groups = [own_n[labels_n == label] for label in range(num_classes)]
    mean = np.mean([group.mean() for group in groups if len(group)])
    variance = np.mean([group.var() for group in groups if len(group)])
    means = [(group.sum() + _PRIOR_CELLS * mean) / (len(group) + _PRIOR_CELLS) for group in groups]
    variances = [
        (((group - center) ** 2).sum() + _PRIOR_CELLS * variance) / (len(group) + _PRIOR_CELLS)
        for group, center in zip(groups, means, strict=True)
    ]
    return tuple(map(float, means)), tuple(float(max(value, 1e-12) ** 0.5) for value in variances)
