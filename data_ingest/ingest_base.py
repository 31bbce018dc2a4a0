"""Read the state of an atlas before an ingest."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

import pandas as pd
import pyarrow.compute as pc

from data_ingest import schema
from data_ingest.atlas import CLOCK_AHEAD, END_OF_TIME_MS
from data_ingest.ingest_journal import Journal, Target, close_ingest, now_ms, obs_ids, read_journal
from data_ingest.ingest_obs import COMPARED
from data_ingest.ingest_options import IngestOptions
from data_ingest.measured import Panel, panels_of

_CLOCKS_DIFFER_MS = 60_000


@dataclass(frozen=True, kw_only=True)
class Base:
    """State of the atlas before this ingest."""

    exists: bool
    journal: Journal = Journal()
    var: pd.DataFrame
    datasets: pd.DataFrame
    panels: tuple[Panel, ...] = ()
    values: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """Values of the columns whose spelling is compared, `ingest_obs.COMPARED`."""
    n_cells: int = 0


def read_base(target: Target, options: IngestOptions) -> Base:
    """Read the state of the atlas, ignoring unfinished work."""
    empty = Base(
        exists=False,
        var=pd.DataFrame(columns=["soma_joinid", *schema.VAR_COLUMNS]),
        datasets=pd.DataFrame(columns=["soma_joinid", *schema.DATASET_COLUMNS]),
    )
    if not schema.find_atlas(target.uri, target.context):
        return empty
    if read_journal(target, timestamp_ms=END_OF_TIME_MS).timestamp_ms > now_ms() + _CLOCKS_DIFFER_MS:
        raise ValueError(f"--atlas {target.uri} {CLOCK_AHEAD}")
    journal = read_journal(target)
    if journal.writing and obs_ids(target, f"soma_joinid >= {journal.first_joinid}", ()).num_rows:
        # It was killed after its cells became visible; only bookkeeping is left to do.
        if not options.dry_run:
            close_ingest(target, journal)
        journal = dataclasses.replace(journal, writing=False)
    # Whatever an unfinished ingest has written is not part of the atlas.
    at = journal.timestamp_ms if journal.writing else None
    with target.table(schema.VAR, timestamp_ms=at) as table:
        var = table.read().concat().to_pandas()
    with target.table(schema.DATASETS, timestamp_ms=at) as table:
        datasets = table.read().concat().to_pandas()
    with target.root(timestamp_ms=at) as root:
        panels = panels_of(root)
    values: dict[str, set[str]] = {name: set() for name in COMPARED}
    with target.table(schema.OBS) as table:
        n_cells = table.count
        for part in table.read(column_names=list(COMPARED)):
            for name, found in values.items():
                found.update(pc.unique(part[name]).to_pylist())
    return Base(
        exists=True,
        journal=journal,
        var=var,
        datasets=datasets,
        panels=panels,
        values={name: frozenset(found) for name, found in values.items()},
        n_cells=n_cells,
    )
