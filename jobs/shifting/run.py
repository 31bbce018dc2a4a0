"""Compare cells with a model's training cells, and write the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jobs.shifting.cells import compared_file, compared_query
from jobs.shifting.measure import Shift, measure_shift
from jobs.tracking.models import pinned_model, resolve_model
from screformer.config import ExperimentConfig
from screformer.predictor import Predictor
from screformer.reference import TrainingReference


def run_shift(
    model: str,
    settings: ExperimentConfig,
    *,
    h5ad: Path | None = None,
    layer: str | None = None,
    raw: bool = False,
    label_column: str | None = None,
    out: Path | None = None,
) -> tuple[Shift, dict[str, Any]]:
    """Compare cells with a model's training cells.

    Args:
        model: URI of the model.
        settings: `tracking` locates models; `atlas` and `query` select the cells if `h5ad` is None.
        h5ad: A file of cells.
        layer: As `compared_file`.
        raw: As `compared_file`.
        label_column: As `compared_file`.
        out: Report to write (.html); its numbers are written next to it (.json).

    Returns:
        The shift, and a summary of plain values.

    Raises:
        ValueError: There is no such model, or it cannot use the cells.
    """
    pinned = pinned_model(model, settings.tracking)
    predictor = Predictor.load(resolve_model(pinned, settings.tracking))
    reference = TrainingReference.load(predictor.directory)
    if h5ad is not None:
        cells = compared_file(predictor, h5ad, layer=layer, raw=raw, label_column=label_column)
    else:
        cells = compared_query(predictor, settings)
    shift = measure_shift(predictor, cells, reference)
    summary = {"model": pinned, "of": cells.name, "verdict": shift.verdict, **shift.numbers}
    if out is not None:
        from jobs.shifting.page import shift_report

        whole = {**summary, "sentence": shift.sentence}
        for name in ("depth", "composition", "types"):
            table = getattr(shift, name)
            whole[name] = None if table is None else json.loads(table.to_json(orient="records"))
        report = shift_report(shift, model=pinned, cells=cells, predictor=predictor, reference=reference)
        report.write_html(out)
        out.with_suffix(".json").write_text(json.dumps(whole, indent=2) + "\n")
        summary["report"] = str(out)
    return shift, summary
