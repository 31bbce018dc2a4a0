"""Turn .h5ad files into an atlas, or append them to one: checked first, written in parallel, safe to kill.

Every file is checked before anything is written. Then X is written by parallel tasks, each a contiguous range
of new joinids, and at the end one write of obs makes the new cells visible: that write is the commit. A
journal in the atlas's metadata says what was going on, so that the same command, run again after a kill, goes
on where it stopped, and another command takes the unfinished one back first.
Axes: `n` cells, `g` genes.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from data_ingest import schema
from data_ingest.h5ad import read_symbol_table
from data_ingest.ingest_files import (
    CheckedFile,
    IngestOptions,
    check_file,
    distinct_paths,
    label,
    read_labels,
    refuse_shared_cells,
)
from data_ingest.ingest_journal import Journal, now_ms, write_journal
from data_ingest.ingest_plan import (
    count_values,
    ingest_digest,
    joined_var,
    new_rows_of,
    parts_of,
    read_base,
    refuse_unrelated_genes,
)
from data_ingest.ingest_write import commit, grow, take_back, tidy, write_x
from data_ingest.ontology import MajorTypes, Outcome
from data_ingest.tasks import map_tasks


@dataclass(frozen=True, kw_only=True)
class FileReport:
    """What one file gave."""

    path: str
    dataset_ids: tuple[str, ...]
    cells: int
    """Cells in the file."""
    new_cells: int
    """Cells that the atlas did not have."""
    genes: int
    genes_joined: int
    genes_repeated: int
    """Genes that share their id with another gene of the file."""
    gene_source: str
    major_types: dict[str, int]
    """Cells per major type, `unknown` included."""
    unmapped: dict[str, dict[str, int]]
    """Why labels have no major type: `missing` (no term), `none` (broader than every major type), `ambiguous`
    -> label -> cells."""

    def lines(self) -> list[str]:
        """The report in words."""
        known = (
            f", {self.cells - self.new_cells} of them already in the atlas"
            if self.new_cells < self.cells
            else ""
        )
        repeated = f", {self.genes_repeated} of them share an id" if self.genes_repeated else ""
        text = [
            f"{self.path}: {self.cells} cells{known} (dataset {', '.join(self.dataset_ids)})",
            f"  genes: {self.genes_joined} of {self.genes} joined by {self.gene_source}{repeated}; "
            f"{self.genes - self.genes_joined} not joined",
            "  major types: "
            + ", ".join(
                f"{name} {count}"
                for name, count in sorted(self.major_types.items(), key=lambda item: -item[1])
            ),
        ]
        reasons = {
            "missing": "no Cell Ontology term",
            "none": "a term broader than every major type",
            "ambiguous": "several major types",
        }
        for outcome, labels in self.unmapped.items():
            shown = ", ".join(f"{label} ({count})" for label, count in list(labels.items())[:8]) + (
                ", ..." if len(labels) > 8 else ""
            )
            text.append(f"  {sum(labels.values())} cells stay unknown, {reasons[outcome]}: {shown}")
        return text


@dataclass(frozen=True, kw_only=True)
class IngestReport:
    """What an ingest did."""

    atlas_uri: str
    files: tuple[FileReport, ...]
    cells_added: int
    cells_total: int
    genes_added: int
    genes_total: int
    resumed: bool
    """An unfinished ingest of the same files was completed."""
    took_back: bool
    """An unfinished ingest of other files was taken back first."""
    dry_run: bool
    seconds: float


def ingest(files: Sequence[str | Path], atlas_uri: str, options: IngestOptions | None = None) -> IngestReport:
    """Check the files, and write their cells into an atlas.

    Work goes to Ray tasks when this process is connected to Ray, else it runs here. Cells are known by
    (dataset_id, obs_id): those that the atlas already has are left as they are, so that running twice adds
    nothing. One ingest at a time per atlas.

    Args:
        files: .h5ad files, visible to every node.
        atlas_uri: A path or `s3://...`; made if there is none.
        options: How files are read and joined.

    Raises:
        ValueError: A file, a table, an option or the atlas is not usable; nothing was written.
    """
    options = options or IngestOptions()
    started = time.monotonic()
    context = schema.soma_context(options.tiledb_config, threads=os.cpu_count() or 1)
    uri = (
        atlas_uri.rstrip("/")
        if schema.is_remote(atlas_uri)
        else os.path.abspath(atlas_uri.removeprefix("file://"))
    )
    paths = distinct_paths(files)
    labels = read_labels(options.labels) if options.labels else {}
    majors = MajorTypes.from_table(options.major_types) if options.major_types else MajorTypes()
    symbols = read_symbol_table(options.symbol_table) if options.symbol_table else None
    base = read_base(uri, context, options)
    checked = map_tasks(
        partial(check_file, options=options, symbols=symbols),
        [(path,) for path in paths],
        "checking files",
    )
    refuse_shared_cells(checked)
    refuse_unrelated_genes(checked, base)
    reasons = [label(file, labels, majors) for file in checked]
    new_rows = new_rows_of(uri, context, checked, base)
    counts = count_values(checked, new_rows, options)
    n_new = sum(len(rows) for rows in new_rows)
    reports = [_report(*item) for item in zip(checked, new_rows, reasons, strict=True)]

    journal = base.journal
    digest = ingest_digest(checked, new_rows, labels, options, base)
    resumes = journal.writing and journal.digest == digest
    took_back = journal.writing and not resumes
    var = joined_var(checked, new_rows, base, counts)
    result = partial(
        IngestReport,
        atlas_uri=atlas_uri,
        files=tuple(reports),
        cells_added=n_new,
        cells_total=base.n_cells + n_new,
        genes_added=len(var) - len(base.var),
        genes_total=len(var),
        resumed=resumes,
        took_back=took_back,
        dry_run=options.dry_run,
    )
    if options.dry_run:
        return result(seconds=time.monotonic() - started)

    if not base.exists:
        schema.create_atlas(uri, context)
    if took_back:
        take_back(uri, context, journal)
    if n_new:
        first = journal.first_joinid if resumes else journal.end_joinid
        parts = list(parts_of(new_rows, counts, first, options))
        if not resumes:
            n_datasets = len(
                set(base.datasets["dataset_id"]).union(*(file.obs["dataset_id"] for file in checked))
            )
            grow(uri, context, n_cells=first + n_new, n_genes=len(var), n_datasets=n_datasets)
            journal = Journal(
                digest=digest,
                writing=True,
                timestamp_ms=now_ms(),
                first_joinid=first,
                end_joinid=first + n_new,
                num_fragments=journal.num_fragments + len(parts),
                num_commits=journal.num_commits + 1,
            )
            write_journal(uri, context, journal, [])
        write_x(uri, context, checked, parts, var, options, journal)
        commit(uri, context, checked, new_rows, counts, var, base, journal)
    tidy(uri, context)
    return result(seconds=time.monotonic() - started)


def _report(file: CheckedFile, rows: np.ndarray, unmapped: Mapping[Outcome, Counter[str]]) -> FileReport:
    return FileReport(
        path=file.path,
        dataset_ids=tuple(file.obs["dataset_id"].cat.categories),
        cells=file.n_cells,
        new_cells=len(rows),
        genes=len(file.feature_ids_g),
        genes_joined=int((file.feature_ids_g != "").sum()),
        genes_repeated=file.num_repeated,
        gene_source=file.gene_source,
        major_types={
            str(name): int(count) for name, count in file.obs["cell_type_major"].value_counts().items()
        },
        unmapped={str(outcome): dict(labels.most_common()) for outcome, labels in unmapped.items()},
    )
