"""The cells that a start model was trained on, next to those of a new query.

Axes: n cells of both queries together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_ingest.epoch_plan import sampled_cells
from data_ingest.filters import full_obs_filter
from data_ingest.query import QueryResult, find_cells, saved_query
from data_ingest.split import Split, split_cells
from screformer.checkpoint import LoadedModel
from screformer.config import ExperimentConfig, QueryConfig

LEAST_REPLAYED = 2000
"""Old cells that are replayed in training even where the new query has few, if there are so many."""
MOST_OLD_TEST = 2000
"""Most cells of the start model's test groups that are tested."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Replay:
    """Two queries of one atlas as one, with their cells in parts."""

    query: QueryResult
    """Cells of both."""
    new_n: np.ndarray
    """Which cells the new query finds, bool (n,)."""
    split: Split
    """Of the new cells, with some old ones in each part."""
    old_test_groups: tuple[str, ...]
    """Groups that the start model held out."""
    old_train: np.ndarray
    """The start model's training cells, replayed or not, as positions among the n cells."""


def replay(
    config: ExperimentConfig, query: QueryResult, start: LoadedModel
) -> tuple[Replay | None, list[str]]:
    """Add cells of a start model's own query to a new one.

    Groups keep the part that they had in the start model's training; the other groups of the new query are
    split as `config.split` says.

    Args:
        config: The run's settings; `train.replay_share` limits the old cells.
        query: The new query.
        start: The model, whose meta data name its query and split.

    Returns:
        None where nothing is or can be replayed, and notes that say why.
    """
    share, meta = config.train.replay_share, start.meta
    if not share or not start.labels["names"] or meta.get("query", {}).get("hash") == query.hash:
        return None, []
    why = _obstacle(config, query, start)
    if why:
        return None, [
            f"no cells of the start model's training are replayed, because {why}; it may forget known types"
        ]
    atlas, filters, expected_hash = saved_query(meta["query"])
    columns, label_column = (config.split.group_by,), config.labels.column
    try:
        old = find_cells(atlas, filters, label_column, columns, expected_hash=expected_hash)
        both = find_cells(query.atlas, _either(query.query, filters), label_column, columns)
    except ValueError as error:
        return None, [f"no cells of the start model's training are replayed: {error}"]
    new_n = np.isin(both.obs_joinids, query.obs_joinids)
    old_n = np.isin(both.obs_joinids, old.obs_joinids) & ~new_n
    groups_n = both.obs[config.split.group_by].astype(str).to_numpy()
    codes_n = both.obs["label"].cat.codes.to_numpy().astype(np.int64)
    groups = {part: set(names) for part, names in meta["split"]["groups"].items()}
    known_n = np.isin(groups_n, sorted(set().union(*groups.values())))
    free = np.flatnonzero(new_n & ~known_n)
    if not len(free):
        return None, [
            "no cells of the start model's training are replayed, because it knows every"
            f" {config.split.group_by} of the query, and the test needs new ones"
        ]
    split = split_cells(groups_n[free], codes_n[free], config.split, config.train.seed)
    parts, pools = {}, {}
    for part in ("train", "val", "test"):
        own_n = np.isin(groups_n, sorted(groups.get(part, ())))
        new = np.sort(np.concatenate([free[split[part]], np.flatnonzero(new_n & own_n)]))
        pool = pools[part] = np.flatnonzero(old_n & own_n & (codes_n >= 0))
        most = {
            "train": max(round(share * len(new)), LEAST_REPLAYED),
            "val": max(round(share * len(new)), round(LEAST_REPLAYED * config.split.val_fraction)),
            "test": MOST_OLD_TEST,
        }[part]
        kept = pool[sampled_cells(codes_n[pool], most, config.train.seed, even_labels=part == "train")]
        parts[part] = np.sort(np.concatenate([new, kept]))
    notes = [
        f"{int(old_n[parts['train']].sum())} of the start model's {int(old_n.sum())} other cells are replayed"
        f" in training (train.replay_share={share:g})"
    ]
    found = Replay(
        query=both,
        new_n=new_n,
        split=Split(parts, split.notes),
        old_test_groups=tuple(sorted(groups.get("test", ()))),
        old_train=pools["train"],
    )
    return found, notes


def _obstacle(config: ExperimentConfig, query: QueryResult, start: LoadedModel) -> str:
    """Why no cell can be replayed; empty if some can."""
    meta = start.meta
    if "query" not in meta or "split" not in meta:
        return "it does not record an atlas"
    saved = saved_query(meta["query"])[0]
    if saved.uri != query.atlas.uri:
        return f"they are in another atlas, {saved.uri}; with both in one atlas they are"
    if start.labels["column"] != config.labels.column:
        return (
            f"its labels are those of {start.labels['column']}, not of labels.column={config.labels.column}"
        )
    if meta["split"]["group_by"] != config.split.group_by:
        return f"it was split by {meta['split']['group_by']}, not by split.group_by={config.split.group_by}"
    return ""


def _either(new: QueryConfig, old: QueryConfig) -> QueryConfig:
    """Cells of either query, genes of the new one."""
    queries: Sequence[QueryConfig] = (new, old)
    texts = [query.obs_filter.strip() for query in queries]
    primary = new.is_primary_data
    if new.is_primary_data != old.is_primary_data:
        texts, primary = [full_obs_filter(query) for query in queries], False
    either = " or ".join(f"({text})" for text in dict.fromkeys(texts)) if all(texts) else ""
    return dataclasses.replace(new, file="", obs_filter=either, is_primary_data=primary)
