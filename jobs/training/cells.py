"""The cells of a training run: query, split, classes, genes.

Axes: n cells of the query, g genes of the vocabulary, k classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from scipy import sparse

from data_ingest.query import QueryResult, run_query
from data_ingest.split import Split, split_cells
from data_ingest.stream import CellStream, gene_of_var
from screformer.checkpoint import NO_LABELS, LoadedModel
from screformer.config import ExperimentConfig, Task
from screformer.cost import activation_bytes, state_bytes
from screformer.counts import Panels
from screformer.model import ScReformer
from screformer.tokenizer import GeneVocabulary

SAMPLE_CELLS = 4096
"""Training cells, at most, from which mean expression and the SVD start are taken."""


MIN_OVERLAP = 0.5
"""Least share of a given model's expected expression that the query's genes must carry."""


@dataclass(frozen=True, eq=False, kw_only=True)
class TrainingCells:
    """Cells, labels and parts of a run.

    The parts of one configuration are the same for pre-training and fine-tuning.
    """

    config: ExperimentConfig
    query: QueryResult
    labels: dict[str, Any]
    """`column`, `names` of the k classes, `cl_ids`; without names for pre-training."""
    codes_n: np.ndarray
    """Class of each cell of the query, int64; -1 where it has none."""
    parts: dict[str, np.ndarray]
    """Positions among the query's cells of `train`, `val` and `test`, increasing; a part may be empty,
    `train` is not."""
    vocabulary: GeneVocabulary
    notes: tuple[str, ...]
    """What a reader of the results must know: cells left out, a split that could not be as wished."""

    @property
    def class_counts_k(self) -> np.ndarray:
        """Training cells of each class, int64."""
        codes = self.codes_n[self.parts["train"]]
        return np.bincount(codes[codes >= 0], minlength=len(self.labels["names"]))

    def stream(self, part: str) -> CellStream:
        """The cells of one part as batches; those of `train` shuffled."""
        positions, config = self.parts[part], self.config
        return CellStream(
            self.query.atlas,
            self.query.obs_joinids[positions],
            self.codes_n[positions],
            self.vocabulary,
            config.tokens,
            config.stream,
            global_batch_size=config.train.global_batch_size,
            seed=config.train.seed,
            panels=self._panels.take(positions),
            shuffle=part == "train",
            read_cpus=config.cluster.cpus_per_read_task,
        )

    def groups(self, part: str) -> list[str]:
        """The split's groups (such as donors) in a part."""
        return sorted(
            set(self.query.obs[self.config.split.group_by].astype(str).to_numpy()[self.parts[part]])
        )

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
        return self.query.panels(gene_of_var(self.query.atlas, self.vocabulary), len(self.vocabulary))

    @cached_property
    def sample(self) -> sparse.csr_array:
        """log1p of counts per 10,000 of at most `SAMPLE_CELLS` training cells, float32 (cells, g).

        Ray must be running.
        """
        return self.stream("train").sample(SAMPLE_CELLS, self.config.train.seed).cells.normalised()


def prepare_cells(
    config: ExperimentConfig,
    task: Task,
    *,
    start: LoadedModel | None = None,
    query: QueryResult | None = None,
    split: Split | None = None,
) -> TrainingCells:
    """Run the query, split its cells, and choose classes and genes. Ray is not needed.

    All cells of the query are split, labelled or not, so that pre-training and fine-tuning of one
    configuration hold out the same groups. For fine-tuning, cells without a label, and labels with fewer than
    `labels.min_cells` training cells, are then left out.

    Args:
        config: The run's settings.
        task: `finetune` needs labels.
        start: A model to start from, whose vocabulary is kept.
        query: The query's result, where it is known.
        split: Parts of the query's cells, such as those of a fold; None splits as `config.split` says.

    Raises:
        ValueError: The query, the split, the labels or the overlap with the start model's genes do not allow
            training.
    """
    if task == "pretrain" and config.tokens.expression == "binary":
        raise ValueError(
            "tokens.expression='binary' leaves pre-training nothing to learn, as every detected gene has the"
            " same expression; choose"
            " another encoding, or fine-tune without pre-training"
        )
    query = query or run_query(config)
    label_codes_n = query.obs["label"].cat.codes.to_numpy().astype(np.int64)
    all_names = [str(name) for name in query.obs["label"].cat.categories]
    if split is None:
        split = split_cells(
            query.obs[config.split.group_by].astype(str).to_numpy(),
            label_codes_n,
            config.split,
            config.train.seed,
        )
    parts, notes = dict(split), list(split.notes)

    labels, codes_n = dict(NO_LABELS), np.full(len(label_codes_n), -1, dtype=np.int64)
    if task == "finetune":
        counts = np.bincount(
            label_codes_n[parts["train"]][label_codes_n[parts["train"]] >= 0], minlength=len(all_names)
        )
        kept = [code for code in range(len(all_names)) if counts[code] >= config.labels.min_cells]
        rare = {all_names[code]: int(counts[code]) for code in range(len(all_names)) if code not in kept}
        if len(kept) < 2:
            listed = (
                ", ".join(f"{name} ({count})" for name, count in zip(all_names, counts.tolist(), strict=True))
                or "none"
            )
            raise ValueError(
                f"fine-tuning needs at least 2 labels with labels.min_cells={config.labels.min_cells}"
                f" training cells; labels.column="
                f"{config.labels.column!r} has {listed}; widen the query or lower labels.min_cells"
            )
        if rare:
            notes.append(
                f"labels with fewer than {config.labels.min_cells} training cells are left out: {rare}"
            )
        new_code = np.full(len(all_names) + 1, -1, dtype=np.int64)
        new_code[kept] = np.arange(len(kept))
        codes_n = new_code[label_codes_n]
        names = [all_names[code] for code in kept]
        labels = {
            "column": config.labels.column,
            "names": names,
            "cl_ids": [query.label_cl_ids.get(name, "") for name in names],
        }
        for part, positions in parts.items():
            parts[part] = positions[codes_n[positions] >= 0]
        unlabelled = int((label_codes_n < 0).sum())
        if unlabelled:
            notes.append(f"{unlabelled} cells without a label are left out")
    for part in ("val", "test"):
        if not len(parts[part]):
            notes.append(f"no {part} cells")
    if start is None:
        share_g = query.measured_share(parts["train"])
        measured_g = (share_g > 0) & (share_g >= config.query.min_measured)
        if not measured_g.any():
            raise ValueError(
                f"no gene was measured for query.min_measured={config.query.min_measured} of the training"
                f" cells; lower it, or query"
                " datasets that have genes in common"
            )
        if not measured_g.all():
            notes.append(
                f"{int((~measured_g).sum())} of {len(measured_g)} genes are left out, which were not measured"
                f" for any training cell, or for"
                f" less than {config.query.min_measured:.0%} of them (query.min_measured)"
            )
        vocabulary = query.vocabulary(measured_g)
    else:
        vocabulary = start.vocabulary
        check_overlap(query, start)
        theirs = start.meta.get("split", {})
        seen = set(theirs["groups"]["train"]) if theirs.get("group_by") == config.split.group_by else set()
        held_out = query.obs[config.split.group_by].astype(str).to_numpy()[parts["test"]]
        leaked = sorted(seen & set(held_out))
        if leaked:
            notes.append(
                f"the start model was trained on {len(leaked)} of the test groups ({', '.join(leaked[:5])}):"
                f" the test flatters it"
            )
    return TrainingCells(
        config=config,
        query=query,
        labels=labels,
        codes_n=codes_n,
        parts=parts,
        vocabulary=vocabulary,
        notes=tuple(notes),
    )


def describe(config: ExperimentConfig, cells: TrainingCells) -> dict[str, Any]:
    """What a run will take: cells, steps, parameters, and a rough estimate of memory per worker in GB."""
    tokens, model, train = config.tokens, config.model, config.train
    network = ScReformer(
        model,
        tokens,
        num_genes=len(cells.vocabulary),
        num_classes=len(cells.labels["names"]),
        seed=train.seed,
    )
    num_parameters = sum(param.numel() for param in network.parameters())
    slots = tokens.most_slots(len(cells.vocabulary))
    num_train = len(cells.parts["train"])
    return {
        "cells": {part: len(positions) for part, positions in cells.parts.items()},
        "groups": {part: len(cells.groups(part)) for part in cells.parts},
        "genes": len(cells.vocabulary),
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
    mean_g = start.vocabulary.mean_expression_g
    weight_g = mean_g if mean_g.any() else np.ones(len(found_g))
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
