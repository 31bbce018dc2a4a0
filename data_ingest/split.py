"""Divide cells into training, validation and test parts.

Axes: `n` cells, `d` groups (for example donors), `k` labels.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import pandas as pd

from screformer.config import SplitConfig

logger = logging.getLogger(__name__)
_TRIALS = 256
"""Number of random orders of the groups to try for each part."""
_LARGEST_MISS = 0.5
"""Tolerated relative error in the size of a part made of whole groups; beyond it, single cells are used."""


class Split(dict[str, np.ndarray]):
    """Indices of the cells of `train`, `val` and `test`, increasing, int64.

    `notes` lists what could not be done as requested.
    """

    def __init__(self, parts: dict[str, np.ndarray], notes: Sequence[str]) -> None:
        """Store the parts and the notes."""
        super().__init__(parts)
        self.notes = tuple(notes)


def split_cells(
    groups: Sequence[str] | np.ndarray | pd.Series, labels: np.ndarray, config: SplitConfig, seed: int
) -> Split:
    """Divide cells without splitting a group between training and test.

    Labels are distributed as evenly as whole groups allow.

    The validation part consists of whole groups too. If there are too few groups (no choice is close to the
    requested share of cells, or each would remove a label from training), it consists of random cells of the
    training groups instead, a share of each label. Validation scores are then optimistic, which `notes` and
    the log report. The test part always consists of whole groups.

    Args:
        groups: Shape (n,), group of each cell; categories take least memory.
        labels: Shape (n,), label code of each cell, -1 for none.
        config: Shares and groups to hold out.
        seed: Random seed.

    Returns:
        The three parts, disjoint and together covering all cells.

    Raises:
        ValueError: A test group does not exist (the message lists those that do), or nothing would be left
            to train on.
    """
    names, group_n = named_codes(groups)
    label_n = np.asarray(labels, np.int64) + 1
    counts_dk = np.zeros((len(names), int(label_n.max(initial=0)) + 1), np.int64)
    np.add.at(counts_dk, (group_n, label_n), 1)
    rng, notes = np.random.default_rng([seed, 11]), []
    held_out = np.zeros(len(names), bool)
    if config.test_groups:
        held_out = _named(names, config)
    elif config.test_fraction:
        chosen = _choose(counts_dk, config.test_fraction, rng)
        if chosen is None:
            raise ValueError(
                f"split.group_by={config.group_by!r} has only one group, {str(names[0])!r}, so none can be"
                f" held out for testing; group"
                " by another column, query more cells, or set split.test_fraction=0"
            )
        held_out = chosen
    test = held_out[group_n]
    val = np.zeros(len(test), bool)
    if config.val_fraction:
        val, note = choose_validation(group_n, label_n - 1, ~test, config.val_fraction, rng)
        notes += [note] if note else []
    for note in notes:
        logger.warning("split: %s", note)
    return Split(
        {"train": np.flatnonzero(~test & ~val), "val": np.flatnonzero(val), "test": np.flatnonzero(test)},
        notes,
    )


def named_codes(values: Sequence[str] | np.ndarray | pd.Series) -> tuple[np.ndarray, np.ndarray]:
    """The distinct values as text, sorted, and the position of each value among them.

    Args:
        values: Shape (n,). The text of a categorical column is not repeated for each cell.
    """
    code_n, distinct = pd.factorize(pd.Series(values), use_na_sentinel=False)
    names, position = np.unique(np.array([str(value) for value in distinct], dtype=str), return_inverse=True)
    return names, position[code_n]


def choose_validation(
    group_n: np.ndarray, label_n: np.ndarray, among_n: np.ndarray, fraction: float, rng: np.random.Generator
) -> tuple[np.ndarray, str]:
    """Choose whole groups for validation, or a share of each label's cells if whole groups do not work.

    Args:
        group_n: Group code of each cell, int (n,).
        label_n: Label code of each cell, int (n,), -1 for none.
        among_n: The cells to choose from, bool (n,).
        fraction: Share of them to choose, above 0.
        rng: Random generator.

    Returns:
        The chosen cells, bool (n,), and a note if they are not whole groups.
    """
    _, own_n = np.unique(group_n[among_n], return_inverse=True)
    counts_dk = np.zeros((int(own_n.max(initial=-1)) + 1, int(label_n.max(initial=-1)) + 2), np.int64)
    np.add.at(counts_dk, (own_n, label_n[among_n] + 1), 1)
    chosen = _choose(counts_dk, fraction, rng)
    problem = _problem(counts_dk, chosen, fraction)
    val_n = np.zeros(len(group_n), bool)
    if chosen is not None and not problem:
        val_n[np.flatnonzero(among_n)[chosen[own_n]]] = True
        return val_n, ""
    val_n[random_cells(np.flatnonzero(among_n), label_n, fraction, rng)] = True
    return (
        val_n,
        f"validation cells are random cells of the training groups because {problem}; scores are optimistic",
    )


def _named(names: np.ndarray, config: SplitConfig) -> np.ndarray:
    known = set(names.tolist())
    for group in config.test_groups:
        if group not in known:
            listed = ", ".join(names[:20].tolist()) + (
                f" and {len(names) - 20} more" if len(names) > 20 else ""
            )
            raise ValueError(
                f"split.test_groups: no cell has {config.group_by} {group!r}; choose from {listed}"
            )
    held_out = np.isin(names, config.test_groups)
    if held_out.all():
        raise ValueError(
            f"split.test_groups holds out every {config.group_by} ({', '.join(names.tolist())});"
            f" leave some for training"
        )
    return held_out


def _choose(counts_dk: np.ndarray, fraction: float, rng: np.random.Generator) -> np.ndarray | None:
    """Mask of the groups whose cells are closest to `fraction` of each label; None for a single group."""
    num_groups = len(counts_dk)
    if num_groups < 2:
        return None
    total_k = counts_dk.sum(0)
    best, best_cost = None, np.inf
    for _ in range(_TRIALS):
        order = rng.permutation(num_groups)
        taken_dk = np.cumsum(counts_dk[order], axis=0)[:-1]
        size_cost = np.abs(taken_dk.sum(1) / total_k.sum() - fraction) / fraction
        label_cost = np.abs(taken_dk / np.maximum(total_k, 1) - fraction)[:, total_k > 0].mean(1)
        lost = ((taken_dk == total_k) & (total_k > 0))[:, 1:].sum(1)
        cost = lost + size_cost + label_cost
        cut = int(cost.argmin())
        if cost[cut] < best_cost:
            best, best_cost = order[: cut + 1], cost[cut]
    chosen = np.zeros(num_groups, bool)
    chosen[best] = True
    return chosen


def _problem(counts_dk: np.ndarray, chosen: np.ndarray | None, fraction: float) -> str:
    """Why a choice of whole groups is unsuitable; empty if it is fine."""
    if chosen is None:
        return "there is only one training group"
    total_k, taken_k = counts_dk.sum(0), counts_dk[chosen].sum(0)
    if ((taken_k == total_k) & (total_k > 0))[1:].any():
        return "whole groups would remove a label from training"
    share = taken_k.sum() / total_k.sum()
    if abs(share - fraction) > _LARGEST_MISS * fraction:
        return f"the whole groups closest to {fraction:.0%} of the cells have {share:.0%}"
    return ""


def random_cells(
    cells: np.ndarray, label_n: np.ndarray, fraction: float, rng: np.random.Generator
) -> np.ndarray:
    """A random share of each label's cells, in any order; at least one cell per label is left out."""
    shuffled = rng.permutation(cells)
    labels = label_n[shuffled] + 1
    by_label = np.argsort(labels, kind="stable")
    counts = np.bincount(labels)
    rank = np.arange(len(cells)) - np.repeat(np.cumsum(counts) - counts, counts)
    wanted = np.minimum(np.round(counts * fraction), np.maximum(counts - 1, 0))
    return shuffled[by_label[rank < wanted[labels[by_label]]]]


def sample_cells(donors: np.ndarray, labels: np.ndarray, most: int, seed: int) -> np.ndarray:
    """Choose an equal share of the cells of each (donor, label).

    Args:
        donors: Shape (n,).
        labels: Shape (n,), label code of each cell, -1 for none.
        most: Approximate number of cells; at least one per donor and label is chosen.
        seed: Random seed.

    Returns:
        Positions of the chosen cells, increasing.
    """
    pair_n = np.unique(
        np.stack([np.unique(donors, return_inverse=True)[1], labels]), axis=1, return_inverse=True
    )[1].ravel()
    order = np.random.default_rng([seed, 15]).permutation(len(pair_n))
    ranked = order[np.argsort(pair_n[order], kind="stable")]
    counts = np.bincount(pair_n)
    rank = np.arange(len(pair_n)) - np.repeat(np.cumsum(counts) - counts, counts)
    wanted = np.maximum(1, np.round(counts * most / len(pair_n)))
    return np.sort(ranked[rank < wanted[pair_n[ranked]]])


def few_of_each(cells: np.ndarray, labels: np.ndarray, most: int, seed: int) -> np.ndarray:
    """At most `most` random ones of some cells for each label; those for a smaller number are among them.

    Args:
        cells: Positions of cells.
        labels: Shape (n,), label code of each cell of the query, -1 for none; those without are left out.
        most: Number per label.
        seed: Random seed.

    Returns:
        Positions, increasing.
    """
    shuffled = np.random.default_rng([seed, 21]).permutation(np.sort(cells[labels[cells] >= 0]))
    ranked = shuffled[np.argsort(labels[shuffled], kind="stable")]
    _, first, label_n = np.unique(labels[ranked], return_index=True, return_inverse=True)
    return np.sort(ranked[np.arange(len(ranked)) - first[label_n] < most])
