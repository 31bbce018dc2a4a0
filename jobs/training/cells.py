"""The cells of a training run: query, split, classes, genes.

Axes: n cells of the query, g genes, k classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from data_ingest.datasource import gene_of_var
from data_ingest.query import QueryResult
from data_ingest.shard_cache import ShardCache
from data_ingest.split import named_codes
from data_ingest.stream import CellStream, Sample
from screformer.augmentation import Augmentation
from screformer.config import ExperimentConfig
from screformer.counts import Panels
from screformer.objective import dataset_weights, label_prior, prior_shift
from screformer.tokenizer import GeneVocabulary

VARIED = "varied"
"""Stream of the validation cells, augmented as in training."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Move:
    """A model that is trained further on cells of another query."""

    new_n: np.ndarray
    """Which cells the new query finds, bool (n,); the others are replayed ones."""
    old_test_groups: tuple[str, ...]
    """Groups of the model's own query that it held out and that are tested again."""


@dataclass(frozen=True, eq=False, kw_only=True)
class TrainingCells:
    """Cells, labels, genes and split of a run.

    Pre-training and fine-tuning with one configuration have the same split.
    """

    config: ExperimentConfig
    """The run's settings, with the atlas pinned and `model.attention` resolved."""
    query: QueryResult
    labels: dict[str, Any]
    """`column`, `names` of the k classes, `cl_ids`; no names for pre-training."""
    codes_n: np.ndarray
    """Class of each cell of the query, int64; -1 for none."""
    parts: dict[str, np.ndarray]
    """Positions of `train`, `val` and `test` cells in the query, increasing. Only `train` is never empty."""
    genes: GeneVocabulary
    """Genes of the model. Their mean expression is read later, by `starting_point`."""
    attention: str
    """The chosen attention and the reason, for the log."""
    natural_counts_k: np.ndarray
    """Like `class_counts_k`, but before `labels.max_cells` is applied."""
    notes: tuple[str, ...]
    """What a reader of the results must know, for example excluded cells or changes to the split."""

    move: Move | None = None
    """Set where the cells are of another query than the start model's."""

    @property
    def class_counts_k(self) -> np.ndarray:
        """Number of training cells per class, int64 (k,)."""
        codes = self.codes_n[self.parts["train"]]
        return np.bincount(codes[codes >= 0], minlength=len(self.labels["names"]))

    @property
    def datasets_n(self) -> np.ndarray:
        """Data set code of each cell of the query, int64."""
        return pd.factorize(self.query.obs["dataset_id"])[0].astype(np.int64)

    @property
    def prior_k(self) -> np.ndarray:
        """Class prior of the finished network, float64 (k,); sums to 1."""
        shares_k, shift_k = self._loss_shares_k, self.prior_shift_k
        if shift_k is None:
            return shares_k
        shifted_k = shares_k * np.exp(shift_k)
        return shifted_k / shifted_k.sum()

    @property
    def prior_shift_k(self) -> np.ndarray | None:
        """Shift to add to the logits of the trained network, or None."""
        strength = self.config.train.prior_shift
        if not (strength and self.labels["names"]):
            return None
        return prior_shift(self._loss_shares_k, self.natural_counts_k, strength)

    @property
    def _loss_shares_k(self) -> np.ndarray:
        if self.config.train.class_weighting != "sqrt_dataset":
            return label_prior(self.class_counts_k, self.config.train.class_weighting)
        shares_k = np.bincount(
            self.codes_n[self.parts["train"]], self.train_weights_n, minlength=len(self.labels["names"])
        )
        return shares_k / shares_k.sum()

    @property
    def train_weights_n(self) -> np.ndarray | None:
        """Loss weight of each training cell; None if weights depend only on the class."""
        if not self.labels["names"] or self.config.train.class_weighting != "sqrt_dataset":
            return None
        train = self.parts["train"]
        return dataset_weights(self.codes_n[train], self.datasets_n[train])

    def streams(self, vocabulary: GeneVocabulary) -> dict[str, CellStream]:
        """Token batches of each part that is not empty; `train` is shuffled.

        With augmentation also `VARIED`.

        Args:
            vocabulary: `genes` with mean expression, used to choose the tokens of cells with too many genes.
        """
        found = {part: self._stream(part, vocabulary) for part, cells in self.parts.items() if len(cells)}
        if "val" in found and found["train"].augmentation is not None:
            found[VARIED] = self._stream("val", vocabulary, augmented=True)
        return found

    def sample(self, part: str, most_cells: int, *, even_labels: bool = False) -> Sample:
        """Raw counts of at most `most_cells` cells of a part (`CellStream.sample`). Ray must be running."""
        stream = self._stream(part, self.genes)
        return stream.sample(most_cells, self.config.train.seed, even_labels=even_labels)

    def groups(self, part: str) -> list[str]:
        """The split's groups in a part, for example donors."""
        names, code_n = self._groups
        return sorted(names[np.unique(code_n[self.parts[part]])].tolist())

    def identity(self) -> dict[str, Any]:
        """Facts about these cells to store with a model: query, split and notes."""
        return {
            "query": self.query.identity(),
            "split": {
                "group_by": self.config.split.group_by,
                "cells": {part: len(positions) for part, positions in self.parts.items()},
                "groups": {part: self.groups(part) for part in self.parts},
            },
            "notes": list(self.notes),
            **({"move": {"old_test_groups": list(self.move.old_test_groups)}} if self.move else {}),
        }

    @cached_property
    def cache(self) -> ShardCache | None:
        """The shard cache of `stream.cache`, or None without that setting.

        Raises:
            ValueError: It is not complete, or was written from other cells.
        """
        if not self.config.stream.cache:
            return None
        cache = ShardCache.open(self.config.stream.cache)
        cache.require(self.query)
        return cache

    @cached_property
    def _groups(self) -> tuple[np.ndarray, np.ndarray]:
        """Names of the split's groups, and the group of each cell."""
        return named_codes(self.query.obs[self.config.split.group_by])

    @cached_property
    def _panels(self) -> Panels:
        """Which genes were measured in each cell of the query."""
        return self.query.panels(gene_of_var(self.query.atlas, self.genes), len(self.genes))

    def _stream(self, part: str, vocabulary: GeneVocabulary, *, augmented: bool = False) -> CellStream:
        positions, config = self.parts[part], self.config
        trains = part == "train" and bool(self.labels["names"])
        augmentation = None
        if (trains or augmented) and config.train.thinned_share + config.train.panel_share > 0:
            inputs_g = vocabulary.inputs_g
            augmentation = Augmentation(
                thinned_share=config.train.thinned_share,
                panel_share=config.train.panel_share,
                genes=np.arange(len(vocabulary)) if inputs_g is None else np.flatnonzero(inputs_g),
                seed=config.train.seed,
            )
        return CellStream(
            self.query.atlas,
            self.query.obs_joinids[positions],
            self.codes_n[positions],
            vocabulary,
            config.tokens,
            config.stream,
            global_batch_size=config.train.global_batch_size,
            seed=config.train.seed,
            panels=self._panels.take(positions),
            raw_sums=self.query.raw_sums(positions),
            weights=self.train_weights_n if trains else None,
            augmentation=augmentation,
            shuffle=part == "train",
            read_cpus=config.cluster.cpus_per_read_task,
            cache=self.cache if part == "train" else None,
        )
