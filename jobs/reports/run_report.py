"""The report of a run: its data and settings, its results next to the baselines, and figures.

Everything comes from the run's artifacts, so a report can be made again at any time. Sections without
artifacts are left out.
"""

from __future__ import annotations

import tempfile
import textwrap
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from shutil import copyfile
from typing import Any

import pandas as pd

from jobs.reports.artifacts import (
    ANNOTATED,
    read_config,
    read_identity,
    read_reliability,
    read_test_cells,
    study_page,
)
from jobs.reports.cell_map import add_cell_map
from jobs.reports.explained import add_explanations
from jobs.reports.figures import LEAST_CELLS, calibration_error, learning_figure, reliability_figure
from jobs.reports.page import Report
from jobs.reports.provenance import add_provenance, listed, split_of
from jobs.reports.results import SCORES, add_results
from jobs.tracking.logged import LoggedRun
from jobs.tracking.runs import TrackedRun
from screformer.files import read_csv
from screformer.metrics import reliability_rows

_JOBS = {
    "pretrain": "Pre-training",
    "finetune": "Fine-tuning",
    "crossval": "Cross-validation",
    "ablate": "Ablation",
    "explain": "Explanations",
}
_CURVES = {"loss": "Loss", "macro_f1": "Macro-F1 on validation cells", "lr": "Learning rate"}
_MOST_ROWS, _MOST_LETTERS = 40, 80


def write_report(run: LoggedRun, others: Sequence[LoggedRun], out: Path) -> None:
    """Write the report of a run as one HTML file, and log it to the run.

    A study (cross-validation or ablation) already has a report, which is copied.

    Args:
        run: The run.
        others: Further runs whose artifacts belong in the same report, for example a run of `jobs.explain`.
        out: The file.
    """
    page = study_page(run)
    if page is not None:
        copyfile(page, out)
        return
    run_report(run, *others).write_html(out)
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(copyfile(out, Path(scratch) / "report.html"))
        TrackedRun(tracking_uri=run.store, run_id=run.run_id).log_file(copy)


def run_report(run: LoggedRun, *others: LoggedRun) -> Report:
    """Build the report of a run; see `write_report`."""
    identity, config = read_identity(run), read_config(run)
    job = run.tags.get("job", "run")
    name = config.get("tracking", {}).get("model_name") or run.name
    report = Report(f"{_JOBS.get(job, job.capitalize())}: {name}", subtitle=_subtitle(run))
    _add_summary(report, run, identity)
    add_results(report, run)
    _add_curves(report, run)
    _add_calibration(report, run)
    cells = read_test_cells(run)
    if cells is not None:
        add_cell_map(report, cells)
    for source in (run, *others):
        add_explanations(report, source)
        _add_folder(report, source, ANNOTATED, "Annotated cells")
    add_provenance(report, run)
    return report


def _subtitle(run: LoggedRun) -> str:
    started = datetime.fromtimestamp(run.started_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M UTC")
    lasted = f", {_duration((run.ended_ms - run.started_ms) / 1000)}" if run.ended_ms else ""
    return f"Run {run.name}, {run.status.lower()}, {started}{lasted}"


def _add_summary(report: Report, run: LoggedRun, identity: dict[str, Any]) -> None:
    split = split_of(identity)
    cells, groups = split.get("cells", {}), split.get("groups", {})
    facts = {
        f"{SCORES[key]} on test cells": f"{run.metrics[f'test/{key}']:.3f}"
        for key in ("accuracy", "macro_f1")
        if f"test/{key}" in run.metrics
    }
    if not facts and "best_val/loss" in run.metrics:
        facts = {"loss on validation cells": f"{run.metrics['best_val/loss']:.4f}"}
    if cells:
        facts |= {"training cells": f"{cells.get('train', 0):,}", "test cells": f"{cells.get('test', 0):,}"}
    if facts:
        report.facts(facts)
    test_groups = groups.get("test", [])
    if test_groups:
        kind = _plural(split["group_by"].removesuffix("_id"))
        report.text(
            f"The model was tested on {cells['test']:,} cells of {len(test_groups)} {kind} it never saw"
            f" ({listed(test_groups)}). Its best step was chosen on {cells.get('val', 0):,} other cells."
        )
    if run.status in ("FAILED", "KILLED"):
        report.warning(f"The run failed: {run.tags.get('error', run.status)}")
    for note in identity.get("notes", []):
        report.warning(note)
    if 0 < len(test_groups) < 3 and split["group_by"] == "donor_id":
        report.warning(
            f"The test has only {len(test_groups)} donors; scores on other donors may be very different."
        )
    num_cut = run.metrics.get("data/cells_cut", 0)
    if num_cut:
        report.warning(
            f"{num_cut:,.0f} cells (counted each time they were read) have more genes than"
            f" `tokens.max_genes` and were cut to the genes furthest above their mean."
        )


def _add_curves(report: Report, run: LoggedRun) -> None:
    histories: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for key in run.metrics:
        part, _, name = key.rpartition("/")
        if name in _CURVES and part in ("train", "val"):
            points = run.history(key)
            if len(points) > 1:
                histories.setdefault(name, {})[key] = points
    if not histories:
        return
    report.section("Learning curves")
    best = run.metrics.get("best_step")
    for name, title in _CURVES.items():
        if name not in histories:
            continue
        figure, caption = learning_figure(name, histories[name]), "By optimizer step."
        if best is not None and name != "lr":
            figure.axes[0].axvline(best, color="grey", linewidth=1, linestyle=":")
            caption += f" The dotted line is step {best:.0f}, the best on the validation cells."
        ends = "; ".join(
            f"{key} goes from {points[0][1]:.4g} to {points[-1][1]:.4g}"
            for key, points in histories[name].items()
        )
        report.figure(title, figure, caption, f"{title} by step: {ends}.")


def _add_calibration(report: Report, run: LoggedRun) -> None:
    table, cells = read_reliability(run), read_test_cells(run)
    if table is None and cells is not None:  # a run without validation cells is not calibrated
        right_n = (cells["label"] == cells["prediction"]).to_numpy()
        rows = pd.DataFrame(reliability_rows(cells["confidence"].to_numpy(), right_n))
        table = rows.assign(part="test", calibration="without")
    if table is None:
        return
    report.section("Calibration")
    errors = "; ".join(
        f"{part} cells {state} calibration {calibration_error(rows):.3f}"
        for (part, state), rows in table.groupby(["part", "calibration"], sort=False)
    )
    report.figure(
        "Reliability",
        reliability_figure(table),
        "Share of correct predictions by confidence. On the dashed line, 90 of 100 cells with confidence 0.9"
        f" are correct; below it, the model is overconfident. Bins of fewer than {LEAST_CELLS} cells are not"
        f" drawn. Expected calibration error, over all bins: {errors}.",
        f"Share of correct predictions by confidence. Expected calibration error: {errors}.",
    )


def _add_folder(report: Report, run: LoggedRun, folder: str, title: str) -> None:
    paths = sorted(path for path in run.artifacts if path.startswith(f"{folder}/") and path.endswith(".csv"))
    if paths:
        report.section(title)
    for path in paths:
        name = path.removeprefix(f"{folder}/").removesuffix(".csv").replace("_", " ")
        table, note = read_csv(run.file(path)), ""
        if len(table) > _MOST_ROWS:
            note = f"The first {_MOST_ROWS} of {len(table):,} rows; all are in the artifact `{path}`."
        report.table(name, table.head(_MOST_ROWS).map(_shortened), note)


def _shortened(value: Any) -> Any:
    """Shorten long lists of names, which would fill the screen; the artifact has all of them."""
    return textwrap.shorten(value, _MOST_LETTERS, placeholder=" …") if isinstance(value, str) else value


def _plural(noun: str) -> str:
    return noun if noun.endswith("s") else f"{noun}s"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
