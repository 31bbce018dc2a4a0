"""The report's map of cells: a two-dimensional layout and its section.

Axes: n cells, d model width.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from jobs.reports.figures import map_figure
from jobs.reports.page import Report

MOST_ON_MAP = 4_000
"""More cells do not improve the map, and from 4,096 cells UMAP spends 30 s compiling a neighbour search."""
HOW_TO_READ = "Similar cells are close together; distances between distant groups mean little."
_FEWEST_FOR_UMAP = 250
"""For fewer cells, UMAP is not worth the 20 s of CPU that it spends on compilation in each process."""


def add_cell_map(report: Report, cells: pd.DataFrame) -> None:
    """Add the section; `cells` as `jobs.reports.artifacts.log_test_cells` takes them."""
    if len(cells) < 3:
        return
    wrong = float((cells["label"] != cells["prediction"]).mean())
    unsure = float((cells["said"] != cells["prediction"]).mean())
    which = f"{len(cells):,} test cells"
    if len(cells) > MOST_ON_MAP:
        cells = cells.sample(MOST_ON_MAP, random_state=0).sort_index()
        which = f"{MOST_ON_MAP:,} of {which}, drawn at random"
    points_n2, how = layout(np.stack(cells["embedding"].to_list()))
    report.section("Map of the cells")
    report.text(f"{how} of the model's embeddings of {which}. {HOW_TO_READ}")
    views = {
        "label": ("By true type", "Each point is a cell."),
        "prediction": (
            "By prediction",
            f"The same cells by best label ({wrong:.1%} are wrong); {unsure:.1%} are labelled unknown"
            f" or with a broader term instead.",
        ),
        "donor_id": ("By donor", "If donors are separated within a type, that is a batch effect."),
    }
    for column, (title, caption) in views.items():
        counts = cells[column].value_counts()
        # True types and predictions share their colours.
        names = cells["label"].value_counts().index.tolist() if column == "prediction" else []
        names += [name for name in counts.index if name not in names]
        biggest = ", ".join(f"{name} {count:,}" for name, count in counts.head(5).items())
        figure = map_figure(points_n2, cells[column], names)
        report.figure(title, figure, caption, f"Map of cells {title.lower()}: {biggest}.")


def layout(embedding_nd: np.ndarray, *, seed: int = 0) -> tuple[np.ndarray, str]:
    """Place cells in two dimensions: by UMAP, or by principal components if there are too few cells.

    Args:
        embedding_nd: Cell embeddings, (n, d).
        seed: Of UMAP.

    Returns:
        Points (n, 2), and the name of the method.
    """
    if len(embedding_nd) < _FEWEST_FOR_UMAP:
        from sklearn.decomposition import PCA

        return PCA(n_components=2, random_state=seed).fit_transform(embedding_nd), "Principal components"
    from umap import UMAP

    return UMAP(init="pca", random_state=seed, n_jobs=1).fit_transform(embedding_nd), "UMAP"
