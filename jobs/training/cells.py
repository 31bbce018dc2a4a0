"""The cells of a training run: query, split, classes, genes.

Axes: n cells of the query, g genes, k classes.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from data_ingest.datasource import gene_of_var
from data_ingest.query import QueryResult, run_query
from data_ingest.split import Split, split_cells
from data_ingest.stream import CellStream, Sample
from screformer.attention import settle_attention
from screformer.augmentation import Augmentation
from screformer.checkpoint import NO_LABELS, LoadedModel
from screformer.config import ExperimentConfig, Task
from screformer.cost import activation_bytes, state_bytes
from screformer.counts import Panels
from screformer.model import ScReformer
from screformer.objective import dataset_weights, label_prior, prior_shift
from screformer.tokenizer import GeneVocabulary

MIN_OVERLAP = 0.5
"""Least share of a given model's expected expression that the query's genes must carry."""


@dataclass(frozen=True, eq=False, kw_only=True)
class TrainingCells:
    """Cells, labels, genes and parts of a run.

    The parts of one configuration are the same for pre-training and fine-tuning.
    """

    config: ExperimentConfig
    """The run's settings, with the atlas pinned and the attention named."""
    query: QueryResult
    labels: dict[str, Any]
    """`column`, `names` of the k classes, `cl_ids`; without names for pre-training."""
    codes_n: np.ndarray
    """Class of each cell of the query, int64; -1 where it has none."""
    parts: dict[str, np.ndarray]
    """Positions among the query's cells of `train`, `val` and `test`, increasing; a part may be empty,
    `train` is not."""
    genes: GeneVocabulary
    """Which genes the model knows. Their mean expression is read later, by `starting_point`."""
    attention: str
    """Which attention was taken and why, for the log."""
    natural_counts_k: np.ndarray
    """As `class_counts_k`, before `labels.max_cells` left cells out."""
    notes: tuple[str, ...]
    """What a reader of the results must know: cells left out, a split that could not be as wished."""

    @property
    def class_counts_k(self) -> np.ndarray:
        """Training cells of each class, int64."""
        codes = self.codes_n[self.parts["train"]]
        return np.bincount(codes[codes >= 0], minlength=len(self.labels["names"]))

    @property
    def datasets_n(self) -> np.ndarray:
        """Code of the data set of each cell of the query, int64."""
        return pd.factorize(self.query.obs["dataset_id"])[0].astype(np.int64)

    @property
    def prior_k(self) -> np.ndarray:
        """Share of each class that the finished network takes for granted, float64 (k,); sums to 1."""
        shares_k, shift_k = self._loss_shares_k, self.prior_shift_k
        if shift_k is None:
            return shares_k
        shifted_k = shares_k * np.exp(shift_k)
        return shifted_k / shifted_k.sum()

    @property
    def prior_shift_k(self) -> np.ndarray | None:
        """What is added to the logits of the trained network; None where nothing is."""
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
        """Weight of each training cell in the loss; None where its class alone decides."""
        if not self.labels["names"] or self.config.train.class_weighting != "sqrt_dataset":
            return None
        train = self.parts["train"]
        return dataset_weights(self.codes_n[train], self.datasets_n[train])

    def streams(self, vocabulary: GeneVocabulary) -> dict[str, CellStream]:
        """Part to its cells as batches of tokens; those of `train` shuffled; without empty parts.

        Args:
            vocabulary: `genes` with their mean expression, which chooses the tokens of a long cell.
        """
        return {part: self._stream(part, vocabulary) for part, cells in self.parts.items() if len(cells)}

    def sample(self, part: str, most_cells: int, *, even_labels: bool = False) -> Sample:
        """Raw counts of at most `most_cells` cells of a part, as `CellStream.sample`. Ray must be running."""
        stream = self._stream(part, self.genes)
        return stream.sample(most_cells, self.config.train.seed, even_labels=even_labels)

    def groups(self, part: str) -> list[str]:
        """The split's groups (such as donors) in a part."""
        groups_n = self.query.obs[self.config.split.group_by].astype(str).to_numpy()
        return sorted(set(groups_n[self.parts[part]]))

    def identity(self) -> dict[str, Any]:
        """What has to be kept with a model of these cells."""
        return {
            "query": self.query.identity(),
            "split": {
                "group_by": self.config.split.group_by,
                "cells": {part: len(positions) for part, positions in self.parts.items()},
                "groups": {part: self.groups(part) for part in self.parts},
            },
            "notes": list(self.notes),
        }

    @cached_property
    def _panels(self) -> Panels:
        """Which genes were measured in which cells of the query."""
        return self.query.panels(gene_of_var(self.query.atlas, self.genes), len(self.genes))

    def _stream(self, part: str, vocabulary: GeneVocabulary) -> CellStream:
        positions, config = self.parts[part], self.config
        trains = part == "train" and bool(self.labels["names"])
        augmentation = None
        if trains and config.train.thinned_share + config.train.panel_share > 0:
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
        )


def prepare_cells(
    config: ExperimentConfig,
    task: Task,
    *,
    start: LoadedModel | None = None,
    query: QueryResult | None = None,
    split: Split | None = None,
) -> TrainingCells:
    """Run the query, split its cells, choose classes and genes, and settle the attention.

    All cells of the query are split, labelled or not, so that pre-training and fine-tuning of one
    configuration hold out the same groups. Ray is not needed.

    Args:
        config: The run's settings.
        task: `finetune` needs labels.
        start: A model to start from, whose genes and attention are kept.
        query: The query's result, where it is known.
        split: Parts of the query's cells, such as those of a fold; None splits as `config.split` says.

    Raises:
        ValueError: The query, the split, the labels or the overlap with the start model's genes do not allow
            training.
    """
    if task == "pretrain" and config.tokens.expression == "binary":
        raise ValueError(
            "tokens.expression='binary' leaves pre-training nothing to learn, as every detected gene has the"
            " same expression; choose another encoding, or fine-tune without pre-training"
        )
    if task == "pretrain" and config.model.encoder == "additive":
        raise ValueError("model.encoder=additive is never pre-trained; fine-tune it right away")
    query = query or run_query(config)
    config = config.merge({"atlas.uri": query.atlas.uri, "atlas.timestamp_ms": query.atlas.timestamp_ms})
    codes_n = query.obs["label"].cat.codes.to_numpy().astype(np.int64)
    if split is None:
        groups_n = query.obs[config.split.group_by].astype(str).to_numpy()
        split = split_cells(groups_n, codes_n, config.split, config.train.seed)
    parts, notes = dict(split), list(split.notes)
    if task == "finetune":
        labels, codes_n, label_notes = _classes(config, query, parts["train"], codes_n)
        notes += label_notes
        parts = {part: positions[codes_n[positions] >= 0] for part, positions in parts.items()}
        natural_counts_k = np.bincount(codes_n[parts["train"]], minlength=len(labels["names"]))
        parts["train"], capped = _capped(config, query, parts["train"], codes_n)
        notes += capped
    else:
        labels, codes_n = dict(NO_LABELS), np.full(len(codes_n), -1, dtype=np.int64)
        natural_counts_k = np.zeros(0, dtype=np.int64)
    notes += [f"no {part} cells" for part in ("val", "test") if not len(parts[part])]
    if start is None:
        genes, gene_notes = _measured_genes(config, query, parts["train"])
        notes += gene_notes
    else:
        genes = start.vocabulary
        check_overlap(query, start)
        notes += _leaks(config, query, parts["test"], start)
        if config.model.attention == "auto":  # its weights fit no other
            config = config.merge({"model.attention": start.config.model.attention})
    model, attention = settle_attention(config.model, config.tokens.most_slots(len(genes)))
    return TrainingCells(
        config=dataclasses.replace(config, model=model),
        query=query,
        labels=labels,
        codes_n=codes_n,
        parts=parts,
        genes=genes,
        attention=attention,
        natural_counts_k=natural_counts_k,
        notes=tuple(notes),
    )


def _capped(
    config: ExperimentConfig, query: QueryResult, train: np.ndarray, codes_n: np.ndarray
) -> tuple[np.ndarray, list[str]]:
    """At most `labels.max_cells` training cells of each label in each data set; notes."""
    most = config.labels.max_cells
    if not most:
        return train, []
    shuffled = np.random.default_rng([config.train.seed, 5]).permutation(train)
    datasets = query.obs["dataset_id"].astype(str).to_numpy()[shuffled]
    place = pd.DataFrame({"label": codes_n[shuffled], "dataset": datasets}).groupby(["label", "dataset"])
    kept = np.sort(shuffled[place.cumcount().to_numpy() < most])
    if len(kept) == len(train):
        return train, []
    return kept, [
        f"{len(train) - len(kept)} of {len(train)} training cells are left out: no label takes more than"
        f" labels.max_cells={most} of one data set"
    ]


def _classes(
    config: ExperimentConfig, query: QueryResult, train: np.ndarray, codes_n: np.ndarray
) -> tuple[dict[str, Any], np.ndarray, list[str]]:
    """Labels with at least `labels.min_cells` training cells; each cell's class among them; notes."""
    all_names = [str(name) for name in query.obs["label"].cat.categories]
    train_codes = codes_n[train]
    counts = np.bincount(train_codes[train_codes >= 0], minlength=len(all_names))
    kept = [code for code in range(len(all_names)) if counts[code] >= config.labels.min_cells]
    rare = {all_names[code]: int(counts[code]) for code in range(len(all_names)) if code not in kept}
    if len(kept) < 2:
        listed = ", ".join(
            f"{name} ({count})" for name, count in zip(all_names, counts.tolist(), strict=True)
        )
        raise ValueError(
            f"fine-tuning needs at least 2 labels with labels.min_cells={config.labels.min_cells}"
            f" training cells; labels.column={config.labels.column!r} has {listed or 'none'}; widen the query"
            f" or lower labels.min_cells"
        )
    notes = []
    if rare:
        notes.append(f"labels with fewer than {config.labels.min_cells} training cells are left out: {rare}")
    unlabelled = int((codes_n < 0).sum())
    if unlabelled:
        notes.append(f"{unlabelled} cells without a label are left out")
    new_code = np.full(len(all_names) + 1, -1, dtype=np.int64)
    new_code[kept] = np.arange(len(kept))
    names = [all_names[code] for code in kept]
    labels = {
        "column": config.labels.column,
        "names": names,
        "cl_ids": [query.label_cl_ids.get(name, "") for name in names],
    }
    return labels, new_code[codes_n], notes


def _measured_genes(
    config: ExperimentConfig, query: QueryResult, train: np.ndarray
) -> tuple[GeneVocabulary, list[str]]:
    """Genes that enough training cells measured, and notes."""
    share_g = query.measured_share(train)
    measured_g = (share_g > 0) & (share_g >= config.query.min_measured)
    if not measured_g.any():
        raise ValueError(
            f"no gene was measured for query.min_measured={config.query.min_measured} of the training"
            f" cells; lower it, or query datasets that have genes in common"
        )
    notes = []
    if not measured_g.all():
        notes.append(
            f"{int((~measured_g).sum())} of {len(measured_g)} genes are left out, which were not measured"
            f" for any training cell, or for less than {config.query.min_measured:.0%} of them"
            f" (query.min_measured)"
        )
    return query.vocabulary(measured_g), notes


def _leaks(config: ExperimentConfig, query: QueryResult, test: np.ndarray, start: LoadedModel) -> list[str]:
    """A note, where the start model was trained on test groups."""
    theirs = start.meta.get("split", {})
    if theirs.get("group_by") != config.split.group_by:
        return []
    held_out = set(query.obs[config.split.group_by].astype(str).to_numpy()[test])
    leaked = sorted(set(theirs["groups"]["train"]) & held_out)
    if not leaked:
        return []
    return [
        f"the start model was trained on {len(leaked)} of the test groups ({', '.join(leaked[:5])}):"
        f" the test flatters it"
    ]


def describe(cells: TrainingCells) -> dict[str, Any]:
    """What a run will take: cells, steps, parameters, and a rough estimate of memory per worker in GB."""
    config, train = cells.config, cells.config.train
    network = ScReformer(
        config.model,
        config.tokens,
        num_genes=len(cells.genes),
        num_classes=len(cells.labels["names"]),
        seed=train.seed,
    )
    num_parameters = sum(param.numel() for param in network.parameters())
    slots = config.tokens.most_slots(len(cells.genes))
    num_train = len(cells.parts["train"])
    return {
        "cells": {part: len(positions) for part, positions in cells.parts.items()},
        "groups": {part: len(cells.groups(part)) for part in cells.parts},
        "genes": len(cells.genes),
        "labels": dict(zip(cells.labels["names"], cells.class_counts_k.tolist(), strict=True)),
        "steps": {
            "max": train.max_steps,
            "epochs": round(train.max_steps * train.global_batch_size / max(num_train, 1), 2),
        },
        "most_tokens_per_cell": slots,
        "parameters": num_parameters,
        "memory_gb_per_worker": {
            "weights_and_optimizer": round(state_bytes(config, num_parameters) / 1e9, 3),
            "activations": round(activation_bytes(config, slots) / 1e9, 3),
        },
        "notes": list(cells.notes),
    }


def check_overlap(query: QueryResult, start: LoadedModel) -> None:
    """Refuse a start model whose genes the query lacks."""
    found_g = np.isin(start.vocabulary.feature_ids, query.feature_ids)
    weight_g = start.vocabulary.weight_g
    share = float(weight_g[found_g].sum() / weight_g.sum())
    text = (
        f"{int(found_g.sum())} of the start model's {len(found_g)} genes are in the query"
        f" ({share:.0%} of its expected expression)"
    )
    if share < MIN_OVERLAP:
        raise ValueError(
            f"{text}, fewer than {MIN_OVERLAP:.0%}; check query.var_filter, or train without --from"
        )
    print(text, flush=True)
