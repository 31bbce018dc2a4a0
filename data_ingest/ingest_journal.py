"""Read and write the journal of an ingest, which is part of the atlas's metadata."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa
import tiledbsoma as soma

from data_ingest import schema

_JOURNAL = "screformer_ingest"
_JOURNAL_PARTS = "screformer_ingest_parts"


@dataclass(frozen=True)
class Target:
    """The atlas being written: its location and TileDB context."""

    uri: str
    context: soma.SOMATileDBContext

    def root(self, mode: str = "r", *, timestamp_ms: int | None = None) -> soma.Collection:
        """Open the root collection, by default at its newest version."""
        return soma.Collection.open(self.uri, mode, context=self.context, tiledb_timestamp=timestamp_ms)

    def table(self, place: str, mode: str = "r", *, timestamp_ms: int | None = None) -> soma.DataFrame:
        """Open a table such as `schema.OBS`, by default at its newest version."""
        return soma.DataFrame.open(
            f"{self.uri}/{place}", mode, context=self.context, tiledb_timestamp=timestamp_ms
        )

    def matrix(self, place: str, mode: str = "r", *, timestamp_ms: int | None = None) -> soma.SparseNDArray:
        """Open `schema.X` or `schema.PRESENCE`, by default at its newest version."""
        return soma.SparseNDArray.open(
            f"{self.uri}/{place}", mode, context=self.context, tiledb_timestamp=timestamp_ms
        )


@dataclass(frozen=True, kw_only=True)
class Journal:
    """The current or last ingest of an atlas."""

    digest: str = ""
    writing: bool = False
    timestamp_ms: int = 0
    first_joinid: int = 0
    end_joinid: int = 0
    num_fragments: int = 0
    """Number of fragments of X since they were last merged."""
    num_commits: int = 0
    """Number of ingests since the fragments of obs and var were last merged."""


def read_journal(target: Target, *, timestamp_ms: int | None = None) -> Journal:
    """The journal of an atlas; empty if nothing was ever ingested."""
    with target.root(timestamp_ms=timestamp_ms) as root:
        return Journal(**json.loads(root.metadata.get(_JOURNAL, "{}")))


def finished_parts(target: Target) -> list[int]:
    """Numbers of the parts that an unfinished ingest has written."""
    with target.root() as root:
        return list(json.loads(root.metadata.get(_JOURNAL_PARTS, "[]")))


def write_journal(target: Target, journal: Journal, finished: Iterable[int] = ()) -> None:
    """Replace the journal and the list of finished parts."""
    with target.root("w") as root:
        root.metadata[_JOURNAL] = json.dumps(dataclasses.asdict(journal))
        root.metadata[_JOURNAL_PARTS] = json.dumps(sorted(finished))


def close_ingest(target: Target, journal: Journal) -> None:
    """Finish after the cells became visible: write the summary and close the journal."""
    obs = obs_ids(target, None, ("donor_id", "is_primary_data"))
    rows = {
        "census_schema_version": "2.1.0",
        "census_build_date": time.strftime("%Y-%m-%d", time.gmtime(journal.timestamp_ms / 1000)),
        "dataset_schema_version": "5.2.0",
        "total_cell_count": str(obs.num_rows),
        "unique_cell_count": str(int(np.count_nonzero(obs["is_primary_data"].to_numpy()))),
        "number_donors_homo_sapiens": str(len(obs["donor_id"].unique())),
    }
    summary = pd.DataFrame(
        {"soma_joinid": range(len(rows)), "label": list(rows), "value": list(rows.values())}
    )
    write_table(target, schema.SUMMARY, summary, schema.SUMMARY_COLUMNS)
    write_journal(target, dataclasses.replace(journal, writing=False))


def obs_ids(target: Target, value_filter: str | None, columns: Sequence[str]) -> pa.Table:
    """Joinids and given columns of the atlas's cells that match a filter."""
    with target.table(schema.OBS) as obs:
        return obs.read(value_filter=value_filter, column_names=["soma_joinid", *columns]).concat()


def write_table(target: Target, place: str, rows: pd.DataFrame, columns: Mapping[str, pa.DataType]) -> None:
    """Write rows of a SOMA table."""
    fields = pa.schema([("soma_joinid", pa.int64()), *columns.items()])
    with target.table(place, "w") as table:
        table.write(pa.Table.from_pandas(rows[fields.names], schema=fields, preserve_index=False))


def now_ms() -> int:
    """Milliseconds since 1970, later than every earlier write of this process."""
    # Wait for the next millisecond: reading the atlas at this time then shows all earlier writes and no
    # later ones.
    time.sleep(0.005)
    return int(time.time() * 1000)
