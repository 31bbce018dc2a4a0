"""Prepare the cells of a training run: query, split, classes, genes, attention.

Axes: n cells of the query, g genes, k classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from data_ingest.query import QueryResult, run_query
from data_ingest.split import Split, split_cells
from jobs.training.cells import Move, TrainingCells
from jobs.training.replay import Replay, replay
from screformer.attention import resolve_attention
from screformer.checkpoint import NO_LABELS, LoadedModel
from screformer.config import ExperimentConfig, ModelConfig, Task
from screformer.extension import extended_vocabulary
from screformer.tokenizer import GeneVocabulary

MIN_OVERLAP = 0.5
"""Minimum share of a start model's expected expression that the query's genes must cover."""


def prepare_cells(
    config: ExperimentConfig,
    task: Task,
    *,
    start: LoadedModel | None = None,
    query: QueryResult | None = None,
    split: Split | None = None,
) -> TrainingCells:
    """Run the query, split its cells, and choose classes, genes and attention.

    The split covers all cells of the query, labelled or not. Pre-training and fine-tuning with the same
    configuration therefore hold out the same groups. Ray is not needed.

    Args:
        config: The run's settings.
        task: `finetune` needs labels.
        start: Model to start from; its genes and attention are kept.
        query: Result of the query, if already known.
        split: A given split, for example of a fold, whose cells alone are used; None splits by
            `config.split`, and adds cells that are replayed.

    Raises:
        ValueError: The query, the split, the labels or the overlap with the start model's genes does not
            allow training.
    """
    if task == "pretrain" and config.tokens.expression == "binary":
        raise ValueError(
            "tokens.expression='binary' leaves pre-training nothing to learn, because all detected genes have"
            " the same expression; choose another encoding, or fine-tune without pre-training"
        )
    if task == "pretrain" and config.model.encoder == "additive":
        raise ValueError("model.encoder=additive cannot be pre-trained; fine-tune it directly")
    query = query or run_query(config)
    move, replayed, notes = None, None, list[str]()
    if task == "finetune" and start is not None and is_other_query(query, start):
        if split is None:
            replayed, notes = replay(config, query, start)
        move = Move(new_n=np.ones(len(query.obs), bool), old_test_groups=())
        if replayed is not None:
            query, split = replayed.query, replayed.split
            move = Move(new_n=replayed.new_n, old_test_groups=replayed.old_test_groups)
    config = config.merge({"atlas.uri": query.atlas.uri, "atlas.timestamp_ms": query.atlas.timestamp_ms})
    codes_n = query.obs["label"].cat.codes.to_numpy().astype(np.int64)
    if split is None:
        split = split_cells(query.obs[config.split.group_by], codes_n, config.split, config.train.seed)
    parts = dict(split)
    notes += split.notes
    if task == "finetune":
        known = start.labels if start is not None and move is not None else NO_LABELS
        if known["names"] and known["column"] != config.labels.column:
            notes.append(
                f"the labels of the start model are those of {known['column']}; its head is trained anew for"
                f" labels.column={config.labels.column}"
            )
            known = NO_LABELS
        labels, codes_n, label_notes = _classes(config, query, parts["train"], codes_n, known)
        notes += label_notes
        parts = {part: positions[codes_n[positions] >= 0] for part, positions in parts.items()}
        natural_counts_k = _natural_counts(parts["train"], codes_n, len(labels["names"]), replayed)
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
        if move is not None:
            own = parts["train"][move.new_n[parts["train"]]]
            genes = extended_vocabulary(genes, _measured_genes(config, query, own)[0])
            config, more = _extended_model(config, start, len(genes), len(labels["names"]))
            notes += more
        notes += _leaks(config, query, parts["test"], start)
        if config.model.attention == "auto":  # its weights do not fit any other
            config = config.merge({"model.attention": start.config.model.attention})
    model, attention = resolve_attention(config.model, config.tokens.most_slots(len(genes)))
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
        move=move,
    )


def _natural_counts(
    train: np.ndarray, codes_n: np.ndarray, num_labels: int, replayed: Replay | None
) -> np.ndarray:
    """Training cells of each label; those of replayed cells as frequent as in all that could be replayed."""
    if replayed is None:
        return np.bincount(codes_n[train], minlength=num_labels)
    new = train[replayed.new_n[train]]
    old_k = np.bincount(codes_n[replayed.old_train], minlength=num_labels)
    scale = (len(train) - len(new)) / max(old_k.sum(), 1)
    return np.bincount(codes_n[new], minlength=num_labels) + scale * old_k


def is_other_query(query: QueryResult, start: LoadedModel) -> bool:
    """Whether a model was trained on other cells than those of a query; True where that is not known."""
    return bool(start.meta.get("query", {}).get("hash") != query.hash)


def _extended_model(
    config: ExperimentConfig, start: LoadedModel, num_genes: int, num_labels: int
) -> tuple[ExperimentConfig, list[str]]:
    """Settings of a network with more genes and labels than the start model's, and notes."""
    more_genes, more_labels = num_genes - len(start.vocabulary), num_labels - start.model.num_classes
    notes = []
    if more_genes:
        notes.append(f"{more_genes:,} genes are added to the start model's {len(start.vocabulary):,}")
    if more_labels > 0:
        notes.append(f"{more_labels} labels are added to the start model's {start.model.num_classes}")
    inputs_g = start.vocabulary.inputs_g
    if inputs_g is not None and (more_genes or more_labels):
        num_inputs = int(inputs_g.sum())
        wanted = config.model.input_genes
        if wanted <= num_inputs:
            wanted = num_inputs + ModelConfig().input_genes
        wanted = min(wanted, num_genes)
        config = config.merge({"model.input_genes": wanted})
        notes.append(f"{wanted - num_inputs:,} genes become inputs next to the start model's {num_inputs:,}")
    return config, notes


def _capped(
    config: ExperimentConfig, query: QueryResult, train: np.ndarray, codes_n: np.ndarray
) -> tuple[np.ndarray, list[str]]:
    """Keep at most `labels.max_cells` training cells per label and data set; also returns notes."""
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
        f"{len(train) - len(kept)} of {len(train)} training cells are excluded: at most"
        f" labels.max_cells={most} cells are used per label and data set"
    ]


def _classes(
    config: ExperimentConfig,
    query: QueryResult,
    train: np.ndarray,
    codes_n: np.ndarray,
    known: Mapping[str, Any],
) -> tuple[dict[str, Any], np.ndarray, list[str]]:
    """Labels of the start model, then those with at least `labels.min_cells` training cells.

    Also returns the class of each cell, and notes.
    """
    all_names = [str(name) for name in query.obs["label"].cat.categories]
    train_codes = codes_n[train]
    counts = np.bincount(train_codes[train_codes >= 0], minlength=len(all_names))
    old = list(known["names"])
    left_out = [name for name in config.labels.exclude if name in all_names and name not in old]
    possible = [code for code in range(len(all_names)) if all_names[code] not in left_out]
    enough = [code for code in possible if counts[code] >= config.labels.min_cells]
    kept = [code for code in range(len(all_names)) if code in enough or all_names[code] in old]
    rare = {all_names[code]: int(counts[code]) for code in possible if code not in kept}
    if len(enough) < 2:
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
        notes.append(f"labels with fewer than {config.labels.min_cells} training cells are excluded: {rare}")
    if left_out:
        few = {name: int(counts[all_names.index(name)]) for name in left_out}
        notes.append(f"training cells of labels.exclude are left out: {few}")
    unlabelled = int((codes_n < 0).sum())
    if unlabelled:
        notes.append(f"{unlabelled} cells without a label are excluded")
    names = old + [all_names[code] for code in kept if all_names[code] not in old]
    new_code = np.full(len(all_names) + 1, -1, dtype=np.int64)
    new_code[kept] = [names.index(all_names[code]) for code in kept]
    cl_id_of = {**query.label_cl_ids, **dict(zip(old, known["cl_ids"], strict=True))}
    labels = {
        "column": config.labels.column,
        "names": names,
        "cl_ids": [cl_id_of.get(name, "") for name in names],
    }
    return labels, new_code[codes_n], notes


def _measured_genes(
    config: ExperimentConfig, query: QueryResult, train: np.ndarray
) -> tuple[GeneVocabulary, list[str]]:
    """Genes measured in enough training cells, and notes."""
    share_g = query.measured_share(train)
    measured_g = (share_g > 0) & (share_g >= config.query.min_measured)
    if not measured_g.any():
        raise ValueError(
            f"no gene was measured in query.min_measured={config.query.min_measured} of the training"
            f" cells; lower it, or query datasets that share genes"
        )
    notes = []
    if not measured_g.all():
        notes.append(
            f"{int((~measured_g).sum())} of {len(measured_g)} genes are excluded: they were measured in no"
            f" training cell, or in less than {config.query.min_measured:.0%} of them (query.min_measured)"
        )
    return query.vocabulary(measured_g), notes


def _leaks(config: ExperimentConfig, query: QueryResult, test: np.ndarray, start: LoadedModel) -> list[str]:
    """A note if the start model was trained on test groups."""
    theirs = start.meta.get("split", {})
    if theirs.get("group_by") != config.split.group_by:
        return []
    held_out = set(query.obs[config.split.group_by].iloc[test].astype(str))
    leaked = sorted(set(theirs["groups"]["train"]) & held_out)
    if not leaked:
        return []
    return [
        f"the start model was trained on {len(leaked)} of the test groups ({', '.join(leaked[:5])}):"
        f" the test scores are too optimistic"
    ]


def check_overlap(query: QueryResult, start: LoadedModel) -> None:
    """Reject a start model if the query has too few of its genes."""
    found_g = np.isin(start.vocabulary.feature_ids, query.feature_ids)
    weight_g = start.vocabulary.weight_g
    share = float(weight_g[found_g].sum() / weight_g.sum())
    text = (
        f"{int(found_g.sum())} of the start model's {len(found_g)} genes are in the query"
        f" ({share:.0%} of its expected expression)"
    )
    if share < MIN_OVERLAP:
        raise ValueError(
            f"{text}, less than {MIN_OVERLAP:.0%}; check query.var_filter, or train without --from"
        )
    print(text, flush=True)
