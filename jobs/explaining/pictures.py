"""Draw figures of explanations: a beeswarm and bars for each label, and a heat map.

Axes: g genes, k classes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from jobs.explaining.shards import shards_of, values_matrix
from jobs.reports.gene_figures import bar_figure, beeswarm_figure, heat_figure


def draw(
    out: Path, names: list[str], gene_names: np.ndarray, mean_kg: np.ndarray, top: dict[int, list[int]]
) -> None:
    """Draw a beeswarm and a bar plot of each class, and a heat map of classes by top genes."""
    pictures = out / "pictures"
    pictures.mkdir(exist_ok=True)
    for code, genes in top.items():
        rows = []
        for table in shards_of(out):
            own = table[(table["class"] == names[code]) & (table["predicted"] == names[code])]
            if len(own):
                rows.append(values_matrix(own, len(gene_names))[:, genes].toarray())
        # The number separates names that differ only in signs ("CD14+ CD16-" and "CD14- CD16+").
        stem = f"{code + 1:02d}_" + "".join(letter if letter.isalnum() else "_" for letter in names[code])
        bar = bar_figure(gene_names[genes], mean_kg[code, genes], names[code])
        bar.savefig(pictures / f"bar_{stem}.png", dpi=100)
        beeswarm = beeswarm_figure(gene_names[genes], np.concatenate(rows), names[code])
        beeswarm.savefig(pictures / f"beeswarm_{stem}.png", dpi=100)
    shown = list(dict.fromkeys(int(gene) for genes in top.values() for gene in genes[:8]))
    heat = heat_figure(mean_kg[np.ix_(list(top), shown)], [names[code] for code in top], gene_names[shown])
    heat.savefig(pictures / "heat.png", dpi=100)
