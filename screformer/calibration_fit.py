"""Learn a calibration from the outputs of validation cells.

Axes: n cells, k classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy.special import logsumexp, softmax

from screformer.calibration import Calibration, DepthLogits, depth_factor
from screformer.lineage import Lineage
from screformer.metrics import CellOutputs, expected_calibration_error

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
    mean_k, std_k = _usual_logits(_own_logits(outputs), labels, logits.shape[1])
    fitted = Calibration(temperature=_temperature(outputs), logit_mean_k=mean_k, logit_std_k=std_k)
    threshold = _quantile(fitted.unknown_scores(outputs.logits_nk), false_alarm_rate)
    if varied is not None and len(varied):
        every = _joined(outputs, varied)
        temperature, slope = _temperature_by_depth(every)
        by_depth = _depth_logits(every, threshold, false_alarm_rate)
        fitted = dataclasses.replace(fitted, temperature=temperature, depth_slope=slope, by_depth=by_depth)
        threshold = _quantile(fitted.unknown_scores(every.logits_nk, every.detected_n), false_alarm_rate)
    return dataclasses.replace(
        fitted,
        unknown_threshold=threshold,
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
        factor_n = depth_factor(outputs.detected_n, point[1])
        return _loss(outputs, np.clip(np.exp(point[0]) * factor_n, *_TEMPERATURES)[:, None])

    start = [np.log(_temperature(outputs)), 0.0]
    log_temperature, slope = minimize(loss, start, method="Nelder-Mead", options={"xatol": 1e-3}).x
    return float(np.clip(np.exp(log_temperature), *_TEMPERATURES)), float(slope)


def _quantile(scores_n: np.ndarray, false_alarm_rate: float) -> float:
    """The score that this share of the cells exceeds."""
    return float(np.quantile(scores_n, 1 - false_alarm_rate, method="higher"))


def _depth_logits(outputs: CellOutputs, threshold: float, false_alarm_rate: float) -> DepthLogits:
    """Usual logits by detected genes, with scores shifted so that `threshold` is exceeded as often as said.

    The slope is the one with which the own logits of each label vary least, relative to their mean.
    """
    from scipy.optimize import minimize_scalar

    own_n = _own_logits(outputs)

    def spread(slope: float) -> float:
        scaled_n = own_n / depth_factor(outputs.detected_n, slope)
        groups = [scaled_n[outputs.labels_n == label] for label in np.unique(outputs.labels_n)]
        return sum(len(group) * group.var() / max(group.mean() ** 2, 1e-12) for group in groups)

    slope = float(minimize_scalar(spread, bounds=(0.0, 1.0), method="bounded").x)
    scaled_n = own_n / depth_factor(outputs.detected_n, slope)
    mean_k, std_k = _usual_logits(scaled_n, outputs.labels_n, outputs.logits_nk.shape[1])
    found = DepthLogits(slope=slope, mean_k=mean_k, std_k=std_k, shift=0.0)
    best_n = outputs.logits_nk.argmax(axis=1)
    scores_n = found.scores(outputs.logits_nk.max(axis=1), best_n, outputs.detected_n)
    return dataclasses.replace(found, shift=threshold - _quantile(scores_n, false_alarm_rate))


def _own_logits(outputs: CellOutputs) -> np.ndarray:
    """Each cell's logit of its true label, float64 (n,)."""
    return outputs.logits_nk[np.arange(len(outputs)), outputs.labels_n].astype(np.float64)


def _loss(outputs: CellOutputs, temperature: float | np.ndarray) -> float:
    """Mean cross-entropy of logits over a temperature, or one for each cell (n, 1)."""
    scaled = outputs.logits_nk.astype(np.float64) / temperature
    return float((logsumexp(scaled, axis=1) - scaled[np.arange(len(outputs)), outputs.labels_n]).mean())


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
