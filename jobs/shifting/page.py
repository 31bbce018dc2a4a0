"""The report of a shift, as text and as an HTML page."""

from __future__ import annotations

import numpy as np
import pandas as pd

from jobs.reports.cell_map import layout
from jobs.reports.figures import map_figure
from jobs.reports.page import Report
from jobs.shifting import measure
from jobs.shifting.cells import ComparedCells
from jobs.shifting.measure import Shift
from screformer.predictor import Predictor
from screformer.reference import TrainingReference

_ON_MAP = 2_000
"""Most cells of each kind on the map."""
_ROWS = {
    "genes of the model that were measured": ("genes_measured", "{:,}"),
    "their share of the expression that the model expects": ("expression_share", "{:.1%}"),
    "share of the counts in the model's genes": ("counts_share", "{:.1%}"),
    "unknown cells": ("unknown_share", "{:.1%}"),
    "AUROC of new against training cells": ("auroc", "{:.3f}"),
    "the same between parts of the training cells": ("usual_auroc", "{:.3f}"),
    "labelled cells of types new to the model": ("new_types_share", "{:.1%}"),
    "accuracy on labelled cells of the model's types": ("accuracy", "{:.3f}"),
    "expected calibration error on these": ("calibration_error", "{:.3f}"),
}
_THRESHOLDS = {
    "expression_share": f"at least {measure.LEAST_GENES:.0%}",
    "counts_share": f"at least {measure.LEAST_COUNTS:.0%}",
    "unknown_share": f"at most {measure.MOST_UNKNOWN:.0%}",
    "new_types_share": f"at most {measure.MOST_NEW:.0%}",
    "accuracy": f"at least {measure.LEAST_ACCURACY:.0%}",
}


def shift_table(shift: Shift) -> pd.DataFrame:
    """One row per number: `what`, `found`, `threshold`."""
    rows = []
    for what, (name, form) in _ROWS.items():
        value = shift.numbers[name]
        found = "not known" if value is None else form.format(value)
        rows.append({"what": what, "found": found, "threshold": _THRESHOLDS.get(name, "")})
    return pd.DataFrame(rows)


def shift_words(shift: Shift) -> str:
    """The tables as text, and the verdict."""
    parts = [
        shift_table(shift).to_string(index=False),
        shift.depth.to_string(index=False, float_format="{:,.0f}".format),
    ]
    parts.append(shift.composition.to_string(index=False, float_format="{:.3f}".format))
    if shift.types is not None:
        parts.append(shift.types.to_string(index=False, float_format="{:.3f}".format, na_rep="-"))
    return "\n\n".join([*parts, shift.sentence])


def shift_report(
    shift: Shift,
    *,
    model: str,
    cells: ComparedCells,
    predictor: Predictor,
    reference: TrainingReference | None,
) -> Report:
    """The report of a shift.

    Args:
        shift: The numbers.
        model: URI of the model.
        cells: The new cells.
        predictor: The model.
        reference: Its training cells.
    """
    numbers = shift.numbers
    report = Report("Shift: how far these cells are from the training", subtitle=f"{model} on {cells.name}")
    report.facts(
        {
            "verdict": shift.verdict,
            "unknown cells": f"{numbers['unknown_share']:.1%}",
            "AUROC": "not known" if numbers["auroc"] is None else f"{numbers['auroc']:.3f}",
            "cells": f"{numbers['cells']:,}",
        }
    )
    report.text(f"**{shift.sentence}**")
    compared = numbers["cells_compared"]
    which = "all cells" if compared == numbers["cells"] else f"{compared:,} cells, drawn at random"
    report.section("Numbers")
    report.table(
        "",
        shift_table(shift),
        f"For {which} of {numbers['donors']:,} donors. AUROC: how well a classifier separates new from"
        f" training cells by their embeddings, on held-out donors, with labels equally frequent in both;"
        f" 0.5 is chance, 1 is perfect. Compare it with the AUROC between parts of the training cells"
        f" (data sets, or donors), each against the others.",
    )
    report.table(
        "Depth",
        shift.depth,
        "Quantiles over cells. Training cells are those stored with the model, equally many per type.",
    )
    report.table(
        "Composition",
        shift.composition,
        "Cells by best label, and the share estimated from all cells together. Types new to the model are not"
        " included.",
    )
    if shift.types is not None:
        report.table("Known labels", shift.types, "Accuracy of the best labels.")
    if reference:
        _add_map(report, cells, predictor, reference)
    return report


def _add_map(
    report: Report, cells: ComparedCells, predictor: Predictor, reference: TrainingReference
) -> None:
    rng = np.random.default_rng(0)
    new, old = (np.sort(rng.permutation(size)[:_ON_MAP]) for size in (len(cells.predictions), len(reference)))
    points_n2, how = layout(
        np.concatenate([cells.predictions.embedding_nd[new], reference.embedding_nd[old].astype(np.float32)])
    )
    source = pd.Series(["new"] * len(new) + ["training"] * len(old))
    labels = pd.Series(
        [f"new: {label}" for label in cells.predictions.labels[new]]
        + list(predictor.label_names[reference.labels_n[old]])
    )
    report.section("Map of the cells")
    report.text(f"{how} of the embeddings of {len(new):,} new and {len(old):,} training cells.")
    report.figure(
        "New and training cells",
        map_figure(points_n2, source, ["training", "new"]),
        "New cells in areas without training cells are unlike the training data.",
        f"Map of {len(new)} new and {len(old)} training cells.",
    )
    report.figure(
        "By label",
        map_figure(points_n2, labels, labels.value_counts().index.tolist()),
        "Training cells by their label, new cells by the model's answer.",
        "The same map, by label or answer.",
    )
