"""Explain cells with a registered model, as a tracked run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cluster.connect import connect
from data_ingest.atlas_cells import query_cells
from data_ingest.cells import H5adCells
from jobs.explaining.explanations import explain
from jobs.explaining.shards import PLAN
from jobs.reports.artifacts import log_explanations
from jobs.reports.run_report import write_report
from jobs.tracking.logged import logged_run
from jobs.tracking.models import pinned_model, resolve_model
from jobs.tracking.naming import cells_of
from jobs.tracking.runs import start_run
from screformer.cells import CellSource
from screformer.config import ExperimentConfig
from screformer.explain import NUM_NODES
from screformer.genes import MIN_GENE_OVERLAP
from screformer.predictor import Predictor


def explain_run(
    model: str,
    settings: ExperimentConfig,
    out: Path,
    *,
    h5ad: Path | None,
    layer: str | None,
    raw: bool,
    min_gene_overlap: float | None,
    num_cells: int,
    num_background: int,
    num_nodes: int | None,
    seed: int,
) -> dict[str, Any]:
    """Explain a sample of cells, log the results to an MLflow run, and write its report.

    Args:
        model: Any model URI that `resolve_model` accepts.
        settings: `atlas`, `query.obs_filter` and `tracking` are used.
        out: Output folder.
        h5ad: File with the cells; None uses the atlas query.
        layer: Layer of the file that holds the counts.
        raw: The counts are in `raw.X`.
        min_gene_overlap: As for `GeneMatch.require`; None means `MIN_GENE_OVERLAP`.
        num_cells: Number of cells to explain.
        num_background: Number of background cells.
        num_nodes: Points on each integration path; None means `NUM_NODES`.
        seed: Seeds the choice of cells.

    Returns:
        The summary of `explain`, with `out` and `run` (the run's id).

    Raises:
        ValueError: The model does not exist, the cells cannot be used, or `out` holds other explanations.
    """
    pinned = pinned_model(model, settings.tracking)
    model_dir = resolve_model(pinned, settings.tracking)
    predictor = Predictor.load(model_dir)
    overlap = MIN_GENE_OVERLAP if min_gene_overlap is None else min_gene_overlap
    source: CellSource
    if h5ad is not None:
        source = H5adCells.open(
            predictor,
            h5ad,
            min_gene_overlap=overlap,
            layer=layer,
            raw=raw,
            label_column=predictor.label_column,
        )
    else:
        source = query_cells(
            predictor,
            settings.atlas,
            settings.query.obs_filter,
            min_gene_overlap=overlap,
            resumed=out / PLAN,
        )
    connect()
    config = predictor.config.merge({"tracking.uri": settings.tracking.uri, "tracking.run_name": ""})
    what = h5ad.name if h5ad is not None else cells_of(settings)
    with start_run(config, "explain", what=what) as run:
        run.log_identity({"model": pinned, "source": source.identity()})
        out = out.resolve()
        summary = explain(
            predictor,
            model_dir,
            source,
            out,
            num_cells=num_cells,
            num_background=num_background,
            num_nodes=num_nodes or NUM_NODES,
            seed=seed,
        )
        numbers = {
            "explain/additivity_error": summary["additivity_error"]["median"],
            "explain/deletion_area": summary["curves"]["deletion"],
            "explain/deletion_area_random": summary["curves"]["deletion, random"],
            "explain/insertion_area": summary["curves"]["insertion"],
            "explain/correlation_other_hash_seed": summary["correlation_other_hash_seed"],
            "explain/correlation_random_weights": summary["correlation_random_weights"],
        }
        run.log_metrics(numbers, step=0)
        log_explanations(run, out)
    write_report(logged_run(run.run_id, settings.tracking), (), out / "report.html")
    return {"out": str(out), "run": run.run_id, **summary}
