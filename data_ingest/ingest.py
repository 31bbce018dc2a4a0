"""Turn .h5ad files into an atlas, or append them to one.

Read `ingest` from top to bottom: the existing atlas (`ingest_base`), the contents of the files
(`ingest_files`, `ingest_obs`), the labels of their cells (`ingest_labels`), the plan of which cells are new
and where they go (`ingest_plan`, `ingest_counts`), and the writing (`ingest_write`). Nothing is written until
everything is checked. Parallel tasks write X, each a contiguous range of new joinids. A single write of obs
then makes the new cells visible: that is the commit. A journal in the atlas's metadata (`ingest_journal`)
records the work in progress. After a kill, the same command resumes it, and any other command first rolls it
back.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from data_ingest import schema
from data_ingest.atlas_lock import locked
from data_ingest.formats import as_h5ad
from data_ingest.ingest_base import Base, read_base
from data_ingest.ingest_counts import NewCells
from data_ingest.ingest_files import (
    CheckedFile,
    check_file,
    distinct_paths,
    refuse_shared_cells,
)
from data_ingest.ingest_journal import Target
from data_ingest.ingest_labels import label, read_labels
from data_ingest.ingest_obs import COMPARED, look_alikes
from data_ingest.ingest_options import IngestOptions
from data_ingest.ingest_plan import Plan, plan_ingest, refuse_unrelated_genes
from data_ingest.ingest_write import write
from data_ingest.ontology import MajorTypes
from data_ingest.tables import read_symbol_table
from data_ingest.tasks import map_tasks
from screformer.storage import writing


@dataclass(frozen=True, kw_only=True)
class FileReport:
    """Outcome of ingesting one file."""

    path: str
    dataset_ids: tuple[str, ...]
    cells: int
    """Number of cells in the file."""
    new_cells: int
    """Number of cells that the atlas did not have."""
    genes: int
    genes_joined: int
    genes_repeated: int
    """Number of genes that share their id with another gene of the file."""
    gene_source: str
    major_types: dict[str, int]
    """Cells per major type, including `unknown`."""
    unmapped: dict[str, dict[str, int]]
    """Reason why labels have no major type -> label -> cells. Reasons: `missing` (no term), `none` (broader
    than every major type), `ambiguous`, `newer` (than our ontology)."""
    empty_cells: int
    """Number of cells without counts, which are left out."""
    notes: tuple[str, ...]
    """Further remarks for the user."""

    def lines(self) -> list[str]:
        """The report as text."""
        known = (
            f", {self.cells - self.new_cells - self.empty_cells} of them already in the atlas"
            if self.new_cells + self.empty_cells < self.cells
            else ""
        )
        repeated = f", {self.genes_repeated} of them share an id" if self.genes_repeated else ""
        text = [
            f"{self.path}: {self.cells} cells{known} (dataset {', '.join(self.dataset_ids)})",
            f"  genes: {self.genes_joined} of {self.genes} matched by {self.gene_source}{repeated}; "
            f"{self.genes - self.genes_joined} not matched",
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
            "newer": "a term newer than the installed ontology",
        }
        for outcome, labels in self.unmapped.items():
            shown = ", ".join(f"{label} ({count})" for label, count in list(labels.items())[:8]) + (
                ", ..." if len(labels) > 8 else ""
            )
            text.append(f"  {sum(labels.values())} cells stay unknown, {reasons[outcome]}: {shown}")
        if self.empty_cells:
            text.append(f"  {self.empty_cells} cells have no counts and were left out")
        return text + [f"  {note}" for note in self.notes]


@dataclass(frozen=True, kw_only=True)
class IngestReport:
    """Outcome of an ingest."""

    atlas_uri: str
    files: tuple[FileReport, ...]
    cells_added: int
    cells_total: int
    genes_added: int
    genes_total: int
    resumed: bool
    """Whether an unfinished ingest of the same files was completed."""
    rolled_back: bool
    """Whether an unfinished ingest of other files was rolled back first."""
    notes: tuple[str, ...]
    """Remarks on the files as a whole and in relation to the atlas."""
    dry_run: bool
    seconds: float


def ingest(files: Sequence[str | Path], atlas_uri: str, options: IngestOptions | None = None) -> IngestReport:
    """Check the files, then write their cells into an atlas.

    Work runs in Ray tasks if this process is connected to Ray, otherwise in this process. Cells are
    identified by (dataset_id, obs_id). Cells already in the atlas are left unchanged, so ingesting a file
    twice adds nothing. Cells with the same id but different counts are rejected, and so are simultaneous
    ingests into one atlas.

    Args:
        files: .h5ad files, or others that `as_h5ad` converts; visible to every node.
        atlas_uri: A path or `s3://...`; created if it does not exist.
        options: How to read and join the files.

    Raises:
        ValueError: A file, table, option or the atlas is not usable; nothing was written.
        StorageError: The atlas cannot be written.
    """
    started = time.monotonic()
    options = options or IngestOptions()
    uri = schema.atlas_place(atlas_uri)
    target = Target(uri, schema.soma_context(options.tiledb_config, threads=os.cpu_count() or 1))
    labels = read_labels(options.labels) if options.labels else {}
    majors = MajorTypes.from_table(options.major_types) if options.major_types else MajorTypes()

    with (
        writing(atlas_uri, "run the same command again, which completes the ingest"),
        nullcontext() if options.dry_run else locked(uri, options.tiledb_config),
        as_h5ad(distinct_paths(files)) as paths,
    ):
        base = read_base(target, options)
        checked = _check_files(paths, base, options)
        labelled = [label(file, labels, majors) for file in checked]
        plan = plan_ingest(target, labelled, labels, base, options)
        if not options.dry_run:
            write(plan)
    return _report(plan, atlas_uri, time.monotonic() - started)


def _check_files(paths: Sequence[Path], base: Base, options: IngestOptions) -> list[CheckedFile]:
    """Check everything but the counts: each file, then all files together and with the atlas."""
    symbols = read_symbol_table(options.symbol_table) if options.symbol_table else None
    check = partial(check_file, options=options, symbols=symbols)
    checked = map_tasks(check, [(str(path),) for path in paths], "checking files")
    refuse_shared_cells(checked)
    refuse_unrelated_genes(checked, base)
    return checked


def _report(plan: Plan, atlas_uri: str, seconds: float) -> IngestReport:
    return IngestReport(
        atlas_uri=atlas_uri,
        files=tuple(_file_report(new) for new in plan.files),
        cells_added=plan.num_new_cells,
        cells_total=plan.base.n_cells + plan.num_new_cells,
        genes_added=len(plan.var) - len(plan.base.var),
        genes_total=len(plan.var),
        resumed=plan.resumes,
        rolled_back=plan.rolls_back,
        notes=tuple(_notes(plan)),
        dry_run=plan.options.dry_run,
        seconds=seconds,
    )


def _notes(plan: Plan) -> Iterator[str]:
    """Values that differ only in spelling between files, or between a file and the atlas."""
    for name in COMPARED:
        sources = [plan.base.values.get(name, frozenset())]
        sources += [frozenset(new.file.obs[name].cat.categories) for new in plan.files]
        within = {text for values in sources for text in look_alikes(values)}
        for text in look_alikes(frozenset().union(*sources), plan.base.values.get(name, ())):
            if text not in within:
                yield f"{name}: {text}"


def _file_report(new: NewCells) -> FileReport:
    file = new.file
    return FileReport(
        path=file.path,
        dataset_ids=tuple(file.obs["dataset_id"].cat.categories),
        cells=file.n_cells,
        new_cells=len(new.rows),
        genes=len(file.feature_ids_g),
        genes_joined=int((file.feature_ids_g != "").sum()),
        genes_repeated=file.num_repeated,
        gene_source=file.gene_source,
        major_types={
            str(name): int(count) for name, count in file.obs["cell_type_major"].value_counts().items()
        },
        empty_cells=new.num_empty,
        notes=file.notes,
        unmapped={str(outcome): dict(labels.most_common()) for outcome, labels in file.unmapped.items()},
    )
