"""Plan an ingest: the new cells, their sums, the joined genes, and the parts that tasks write.

Axes: `n` cells, `g` genes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from data_ingest.ingest_base import Base
from data_ingest.ingest_counts import Counts, NewCells, count_files
from data_ingest.ingest_files import CheckedFile, file_sha256, ids_of
from data_ingest.ingest_identity import new_rows
from data_ingest.ingest_journal import Target
from data_ingest.ingest_options import IngestOptions
from data_ingest.ingest_panels import Measured, measured_by

FEWEST_VALUES = 1 << 21
"""Minimum number of stored counts worth a separate task and fragment."""
_PARTS_AT_LEAST = 8


@dataclass(frozen=True, kw_only=True)
class Plan:
    """An ingest that is ready to write."""

    target: Target
    options: IngestOptions
    base: Base
    files: tuple[NewCells, ...]
    var: pd.DataFrame
    """The var table after the ingest."""
    measured: Measured
    digest: str
    """Hash of everything that affects the outcome: equal digests write equal atlases."""

    @property
    def num_new_cells(self) -> int:
        """Number of cells to add."""
        return sum(len(new.rows) for new in self.files)

    @property
    def resumes(self) -> bool:
        """Whether this completes an unfinished ingest of the same files."""
        return self.base.journal.writing and self.base.journal.digest == self.digest

    @property
    def rolls_back(self) -> bool:
        """Whether an unfinished ingest of other files must be rolled back first."""
        return self.base.journal.writing and not self.resumes


@dataclass(frozen=True, kw_only=True)
class Part:
    """Cells that one task writes."""

    file: CheckedFile
    rows: np.ndarray
    first_joinid: int


def plan_ingest(
    target: Target,
    files: Sequence[CheckedFile],
    labels: Mapping[tuple[str, str], str],
    base: Base,
    options: IngestOptions,
) -> Plan:
    """Find the new cells, check and sum their counts, and join the genes."""
    known = set(base.datasets["dataset_id"])
    rows_of = [new_rows(target, file, known, base.var, options) for file in files]
    counted = iter(
        count_files([file for file, rows in zip(files, rows_of, strict=True) if len(rows)], options)
    )
    new = []
    for file, rows in zip(files, rows_of, strict=True):
        counts = next(counted) if len(rows) else Counts.none()
        full = rows[counts.nnz_n[rows] > 0] if len(rows) else rows
        new.append(NewCells(file=file, rows=full, counts=counts, num_empty=len(rows) - len(full)))
    var = _joined_var(new, base)
    at_ms = base.journal.timestamp_ms if base.journal.writing else None
    return Plan(
        target=target,
        options=options,
        base=base,
        files=tuple(new),
        var=var,
        measured=measured_by(target, new, base, var, at_ms),
        digest=_digest(new, labels, options, base),
    )


def refuse_unrelated_genes(files: Sequence[CheckedFile], base: Base) -> None:
    """Reject a file that shares no gene with the atlas or with the other files."""
    known = set(base.var["feature_id"]) or set(files[0].feature_ids_g)
    for file in files:
        if known.isdisjoint(file.feature_ids_g[file.feature_ids_g != ""]):
            there = "the atlas" if len(base.var) else files[0].path
            raise ValueError(
                f"{file.path}: none of its {int((file.feature_ids_g != '').sum())} genes is among the"
                f" {len(known)} of {there}; "
                "check the gene ids (--feature-id-column), or create a separate atlas"
            )
        known.update(file.feature_ids_g)


def _joined_var(files: Sequence[NewCells], base: Base) -> pd.DataFrame:
    """The var table with the new files' genes: known genes keep their joinids; new ones follow by id."""
    known = dict(zip(base.var["feature_id"], base.var["soma_joinid"], strict=True))
    used = [new for new in files if len(new.rows)]
    added = sorted({str(feature_id) for new in used for feature_id in ids_of(new.file)} - set(known))
    details: dict[str, tuple[str, int]] = {}
    for file in (new.file for new in used):
        for feature_id, name, length in zip(file.feature_ids_g, file.names_g, file.lengths_g, strict=True):
            details.setdefault(feature_id, (str(name), int(length)))
    fresh = pd.DataFrame(
        {
            "soma_joinid": np.arange(len(known), len(known) + len(added), dtype=np.int64),
            "feature_id": added,
            "feature_name": [details[feature_id][0] for feature_id in added],
            "feature_length": np.array([details[feature_id][1] for feature_id in added], dtype=np.int64),
            "nnz": 0,
            "n_measured_obs": 0,
        }
    )
    var = pd.concat([base.var, fresh], ignore_index=True) if len(base.var) else fresh
    position = pd.Series(np.arange(len(var)), index=var["feature_id"])
    nnz = var["nnz"].to_numpy(np.int64, copy=True)
    measured = var["n_measured_obs"].to_numpy(np.int64, copy=True)
    for new in used:
        where = position[ids_of(new.file)].to_numpy()
        nnz[where] += new.counts.cells_g
        measured[where] += len(new.rows)
    return var.assign(nnz=nnz, n_measured_obs=measured)


def parts_of(plan: Plan, first_joinid: int) -> Iterator[Part]:
    """Divide the new cells into one part per task.

    Parts are large, because each leaves a fragment, but numerous enough to be written in parallel.
    """
    total = sum(int(new.counts.nnz_n[new.rows].sum()) for new in plan.files)
    most = min(plan.options.values_per_fragment, max(total // _PARTS_AT_LEAST, FEWEST_VALUES))
    for new in plan.files:
        group = (np.cumsum(new.counts.nnz_n[new.rows]) - 1) // most
        for rows in np.split(new.rows, np.flatnonzero(np.diff(group)) + 1) if len(new.rows) else ():
            yield Part(file=new.file, rows=rows, first_joinid=first_joinid)
            first_joinid += len(rows)


def _digest(
    files: Sequence[NewCells], labels: Mapping[tuple[str, str], str], options: IngestOptions, base: Base
) -> str:
    tables = [file_sha256(path) if path else "" for path in (options.symbol_table, options.major_types)]
    settings = {
        name: value
        for name, value in dataclasses.asdict(options).items()
        if name not in ("tiledb_config", "dry_run", "labels", "symbol_table", "major_types")
    }
    content = {
        "files": [(Path(new.file.path).name, new.file.sha256, len(new.rows)) for new in files],
        "labels": sorted((*key, value) for key, value in labels.items()),
        "tables": tables,
        "settings": settings,
        "base": (base.n_cells, len(base.var)),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
