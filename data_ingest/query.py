"""Select cells and genes of an atlas with SOMA value filters, and identify the result by a hash.

Axes: `n` cells of the query, `g` genes of the query.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from data_ingest.atlas import (
    MEASUREMENT,
    census_release,
    located,
    open_atlas,
    pinned,
    saved_atlas,
)
from data_ingest.filters import check_filter, full_obs_filter, read_filtered, require_column
from data_ingest.measured import measured_by_cells
from data_ingest.query_counts import summary_of
from data_ingest.query_labels import MAJOR, labels_of
from screformer.config import AtlasConfig, ExperimentConfig, QueryConfig
from screformer.counts import Panels
from screformer.settings import plain
from screformer.tokenizer import GeneVocabulary

OBS_COLUMNS = ("donor_id", "dataset_id", "cell_type", "cell_type_ontology_term_id")
RAW_SUM = "raw_sum"
FILTERS = ("obs_filter", "var_filter", "is_primary_data")
"""Settings that determine which cells and genes a query selects."""


@dataclass(frozen=True, eq=False)
class QueryResult:
    """The cells and genes of a query at one version of an atlas."""

    atlas: AtlasConfig
    query: QueryConfig
    label_column: str
    obs_joinids: np.ndarray
    """Shape (n,), int64, increasing."""
    obs: pd.DataFrame
    """n rows in the order of `obs_joinids`: donor_id, dataset_id, cell_type, cell_type_ontology_term_id, the
    requested columns, and `label` (categorical; missing if the atlas has no label)."""
    label_cl_ids: Mapping[str, str]
    """Cell Ontology term of each label, "" if the atlas has none."""
    var_joinids: np.ndarray
    """Shape (g,), int64, increasing."""
    feature_ids: tuple[str, ...]
    feature_names: tuple[str, ...]

    @property
    def hash(self) -> str:
        """Hexadecimal SHA-256 of the cell and gene joinids.

        Equal results have equal hashes, however the filter is written.
        """
        digest = hashlib.sha256(self.obs_joinids.astype("<i8").tobytes())
        digest.update(b"var" + self.var_joinids.astype("<i8").tobytes())
        return digest.hexdigest()

    def summary(self) -> dict[str, Any]:
        """The counts of `summary_of`, plus the number of genes."""
        return {"genes": len(self.var_joinids), **summary_of(self.obs, self.label_column)}

    def identity(self) -> dict[str, Any]:
        """Atlas, version, filters and hash, to store with everything made from these cells."""
        filters = {name: getattr(self.query, name) for name in FILTERS}
        return {"atlas": plain(self.atlas), **filters, "hash": self.hash}

    def save(self, path: str | Path) -> None:
        """Write identity and counts as JSON, to use as `query.file` in another job."""
        Path(path).write_text(
            json.dumps(self.identity() | {"counts": self.summary()}, indent=2, ensure_ascii=False) + "\n"
        )

    def vocabulary(self, kept_g: np.ndarray | None = None) -> GeneVocabulary:
        """The query's genes in joinid order, with zeros for their mean expression, which is not yet known.

        Args:
            kept_g: Genes to include, bool (g,); None includes all.
        """
        kept = range(len(self.feature_ids)) if kept_g is None else np.flatnonzero(kept_g).tolist()
        ids, names = (
            tuple(column[gene] for gene in kept) for column in (self.feature_ids, self.feature_names)
        )
        return GeneVocabulary(ids, names, np.zeros(len(ids), dtype=np.float32))

    def measured_share(self, positions: np.ndarray) -> np.ndarray:
        """Share of the given cells in which each gene was measured, float64 (g,), in [0, 1].

        Args:
            positions: Positions of the cells in the query; at least one.
        """
        dataset_n, measured_dv = self._measured
        cells_d = np.bincount(dataset_n[positions], minlength=len(measured_dv))
        return cells_d @ measured_dv[:, self.var_joinids] / cells_d.sum()

    def raw_sums(self, positions: np.ndarray) -> np.ndarray | None:
        """Total counts of the cells at these positions, from obs; None if obs does not have them."""
        return self.obs[RAW_SUM].to_numpy(np.float32)[positions] if RAW_SUM in self.obs else None

    def panels(self, gene_of_var: np.ndarray, num_genes: int) -> Panels:
        """Which genes of a vocabulary were measured in the query's cells.

        Args:
            gene_of_var: Vocabulary index of each var joinid, -1 for none; may include genes outside the
                query.
            num_genes: Size of the vocabulary; genes missing from the atlas count as never measured.
        """
        dataset_n, measured_dv = self._measured
        measured_dg = np.zeros((len(measured_dv), num_genes), bool)
        for measured_g, measured_v in zip(measured_dg, measured_dv, strict=True):
            measured_g[gene_of_var[(gene_of_var >= 0) & measured_v]] = True
        packed, panel_d = np.unique(np.packbits(measured_dg, axis=1), axis=0, return_inverse=True)
        return Panels(
            np.unpackbits(packed, axis=1, count=num_genes).astype(bool),
            panel_d.ravel()[dataset_n].astype(np.int64),
        )

    @cached_property
    def _measured(self) -> tuple[np.ndarray, np.ndarray]:
        """Panel of each cell, (n,), and the var joinids measured by each panel, bool (d, v).

        Read once for all folds.
        """
        return measured_by_cells(self.atlas, self.obs["dataset_id"], self.obs_joinids)


def load_query(path: str | Path) -> tuple[AtlasConfig, QueryConfig, str]:
    """The pinned atlas, the filters and the hash written by `QueryResult.save`.

    Raises:
        ValueError: The file is missing, is not JSON, or is not a saved query.
    """
    try:
        tree = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"query.file={str(path)!r} can't be read as JSON ({error}); write one with `python -m"
            f" jobs.query --out`"
        ) from error
    missing = [key for key in ("atlas", *FILTERS, "hash") if not isinstance(tree, dict) or key not in tree]
    if missing:
        raise ValueError(
            f"query.file={str(path)!r} is not a saved query: it lacks {', '.join(missing)}; write one with"
            f" `python -m jobs.query --out`"
        )
    return saved_query(tree)


def saved_query(identity: Mapping[str, Any]) -> tuple[AtlasConfig, QueryConfig, str]:
    """The atlas, filters and hash from `QueryResult.identity`, possibly of an earlier version."""
    filters = QueryConfig(**{key: identity[key] for key in FILTERS})
    return saved_atlas(identity["atlas"]), filters, identity["hash"]


def find_cells(
    atlas: AtlasConfig,
    query: QueryConfig,
    label_column: str = MAJOR,
    columns: Iterable[str] = (),
    *,
    optional_columns: Iterable[str] = (),
    expected_hash: str = "",
) -> QueryResult:
    """Find the cells and genes that match a query's filters.

    Args:
        atlas: The atlas; pin it first if the result must be reproducible.
        query: The filters; `file` and `min_measured` are not used.
        label_column: obs column that becomes `label`. If the atlas has no `cell_type_major` (Census has
            none), it is rolled up from `cell_type_ontology_term_id`.
        columns: Additional obs columns to read.
        optional_columns: Additional obs columns to read if the atlas has them.
        expected_hash: Hash that the result must have; empty to skip the check.

    Returns:
        The result, with at least one cell and one gene.

    Raises:
        ValueError: SOMA does not understand a filter, a column or value does not exist (the message lists
            those that do), the result is empty, or its hash is not `expected_hash`.
    """
    atlas = located(atlas)
    with open_atlas(atlas) as experiment:
        obs_table = experiment.obs
        var_table = experiment.ms[MEASUREMENT].var
        names = set(obs_table.schema.names)
        wanted = {*OBS_COLUMNS, *columns, *({RAW_SUM, *optional_columns} & names)}
        if label_column == MAJOR and MAJOR not in names:
            wanted |= {"cell_type_ontology_term_id"}
        else:
            wanted |= {label_column} | ({f"{label_column}_ontology_term_id"} & names)
        for column in sorted(wanted):
            field = "labels.column" if column == label_column else "obs column"
            require_column(column, obs_table, field)
        if query.is_primary_data:
            require_column(
                "is_primary_data", obs_table, "query.is_primary_data=false would leave it out; obs column"
            )
        check_filter(query.obs_filter, obs_table, "query.obs_filter")
        check_filter(query.var_filter, var_table, "query.var_filter")
        obs = read_filtered(
            obs_table,
            full_obs_filter(query),
            ["soma_joinid", *sorted(wanted)],
            f"query.obs_filter={query.obs_filter!r}",
        )
        var = read_filtered(
            var_table,
            query.var_filter,
            ["soma_joinid", "feature_id", "feature_name"],
            f"query.var_filter={query.var_filter!r}",
        )
    for rows, what, text in ((obs, "cell", full_obs_filter(query)), (var, "gene", query.var_filter)):
        if rows.empty:
            raise ValueError(
                f"no {what} in the atlas {atlas.uri} matches {text!r}"
                if text
                else f"the atlas {atlas.uri} has no {what}s"
            )
    labels, label_cl_ids = labels_of(obs, label_column)
    result = QueryResult(
        atlas=atlas,
        query=query,
        label_column=label_column,
        obs_joinids=obs["soma_joinid"].to_numpy(np.int64),
        obs=obs.drop(columns="soma_joinid").assign(label=labels),
        label_cl_ids=label_cl_ids,
        var_joinids=var["soma_joinid"].to_numpy(np.int64),
        feature_ids=tuple(var["feature_id"].astype(str)),
        feature_names=tuple(var["feature_name"].astype(str)),
    )
    if expected_hash not in ("", result.hash):
        raise ValueError(
            f"the query selects different cells or genes than when it was saved: hash {result.hash} instead"
            f" of {expected_hash}"
            f" (atlas {atlas.uri} at timestamp_ms={atlas.timestamp_ms}); the atlas has changed, so"
            f" save the query again"
        )
    return result


def resolve_query(config: ExperimentConfig) -> tuple[AtlasConfig, QueryConfig, str]:
    """The pinned atlas, filters and expected hash of a configuration, read from `query.file` if it is set.

    Raises:
        ValueError: `atlas.uri` differs from the atlas in `query.file`, the file is not a saved query, or the
            atlas can't be pinned.
    """
    if not config.query.file:
        return pinned(config.atlas), config.query, ""
    atlas, query, expected_hash = load_query(config.query.file)
    if config.atlas.uri:
        given = located(config.atlas)
        if given.uri not in (atlas.uri, "census" if census_release(atlas) else atlas.uri):
            raise ValueError(
                f"atlas.uri={given.uri!r} is not the atlas in query.file={config.query.file!r},"
                f" {atlas.uri!r}; drop one"
            )
    settings = {**atlas.tiledb_config, **config.atlas.tiledb_config}
    return dataclasses.replace(atlas, tiledb_config=settings), query, expected_hash


def run_query(config: ExperimentConfig, columns: Iterable[str] = ()) -> QueryResult:
    """The result of a configuration's query, with its label column and the column its split groups by."""
    atlas, query, expected_hash = resolve_query(config)
    columns = (config.split.group_by, *columns)
    return find_cells(atlas, query, config.labels.column, columns, expected_hash=expected_hash)
