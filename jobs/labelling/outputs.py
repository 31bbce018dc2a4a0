"""Outputs of the `annotate` command: labelled copies, Parquet folders and atlas columns."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from data_ingest.cells import H5adCells
from jobs.labelling.h5ad_copy import annotate, empty_cells_text
from jobs.labelling.shards import PLAN, label_cells
from jobs.tracking.models import pinned_model, resolve_model
from screformer.cells import CellSource
from screformer.config import ExperimentConfig
from screformer.genes import MIN_GENE_OVERLAP
from screformer.predictor import ANSWER_COLUMNS, Predictor
from screformer.storage import writing

_AGAIN = "run the same command again; it keeps the labels written so far"


@dataclass(frozen=True, eq=False, kw_only=True)
class Labeller:
    """A loaded model and the options of a labelling."""

    model: str
    """Model URI with version number."""
    predictor: Predictor
    settings: ExperimentConfig
    """`atlas` and `query` select the cells; `tracking` locates the model."""
    layer: str | None
    raw: bool
    min_gene_overlap: float
    probabilities: bool
    embedding: bool
    overwrite: bool

    @classmethod
    def load(
        cls,
        model: str,
        settings: ExperimentConfig,
        *,
        device: str | None = None,
        layer: str | None = None,
        raw: bool = False,
        min_gene_overlap: float | None = None,
        probabilities: bool = False,
        embedding: bool = False,
        overwrite: bool = False,
    ) -> Self:
        """Find and load a model; other arguments are as in `jobs.labelling.h5ad_copy.annotate`.

        Raises:
            ValueError: The model does not exist or has no labels.
        """
        pinned = pinned_model(model, settings.tracking)
        return cls(
            model=pinned,
            predictor=Predictor.load(resolve_model(pinned, settings.tracking), device=device),
            settings=settings,
            layer=layer,
            raw=raw,
            min_gene_overlap=MIN_GENE_OVERLAP if min_gene_overlap is None else min_gene_overlap,
            probabilities=probabilities,
            embedding=embedding,
            overwrite=overwrite,
        )

    def __str__(self) -> str:
        labels, genes = len(self.predictor.label_names), len(self.predictor.vocabulary)
        return f"model {self.model}: {labels} labels, {genes:,} genes"

    def copy(self, source: Path, target: Path, *, majority_vote: str = "", drop_absent: bool = False) -> str:
        """Write a labelled copy of a file; returns the summary."""
        with writing(target, _AGAIN):
            return str(
                annotate(
                    self.predictor,
                    self._file(source),
                    target,
                    model=self.model,
                    probabilities=self.probabilities,
                    embedding=self.embedding,
                    majority_vote=majority_vote,
                    drop_absent=drop_absent,
                    overwrite=self.overwrite,
                )
            )

    def parquet(self, source: Path, target: Path) -> str:
        """Label a file into a folder of Parquet files; returns the summary."""
        started = time.perf_counter()
        return self._label(self._file(source), target, started)

    def atlas(self, target: Path, *, write_obs: bool = False) -> str:
        """Label an atlas query into a folder of Parquet files, and optionally obs; returns the summary."""
        # Imported here because labelling files does not need TileDB-SOMA and its dependencies.
        from data_ingest.atlas_cells import query_cells
        from jobs.labelling.atlas_obs import OBS_PREFIX, write_to_atlas

        started = time.perf_counter()
        cells = query_cells(
            self.predictor,
            self.settings.atlas,
            self.settings.query.obs_filter,
            min_gene_overlap=self.min_gene_overlap,
            resumed=None if self.overwrite else target / PLAN,
        )
        summary = self._label(cells, target, started)
        if write_obs:
            with writing(cells.atlas.uri, _AGAIN):
                write_to_atlas(cells, target)
            added = ", ".join(OBS_PREFIX + name for name in ANSWER_COLUMNS)
            summary += f"\nadded columns to obs of {cells.atlas.uri}: {added}"
        return summary

    def report(self, source: Path, target: Path, out: Path) -> str:
        """Write the report of a labelled file; returns a line that says so."""
        from jobs.labelling.page import labels_page

        page = labels_page(self.predictor, self.model, source, target, layer=self.layer, raw=self.raw)
        with writing(out, _AGAIN):
            page.write_html(out)
        return f"report: {out}"

    def _file(self, path: Path) -> H5adCells:
        return H5adCells.open(
            self.predictor,
            path,
            min_gene_overlap=self.min_gene_overlap,
            layer=self.layer,
            raw=self.raw,
        )

    def _label(self, cells: CellSource, target: Path, started: float) -> str:
        with writing(target, _AGAIN):
            labelled = label_cells(
                self.predictor,
                cells,
                target,
                model=self.model,
                probabilities=self.probabilities,
                embedding=self.embedding,
                overwrite=self.overwrite,
            )
        seconds = time.perf_counter() - started
        lines = [
            f"{target}: {cells.num_cells:,} cells in {seconds:.1f} s"
            f" ({cells.num_cells / seconds:,.0f} cells/s)"
        ]
        if labelled.num_empty:
            lines.append(empty_cells_text(labelled.num_empty))
        return "\n".join([*lines, labelled.table.to_string(index=False)])
