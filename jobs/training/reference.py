"""Keep with a model how it sees some of its training cells.

Axes: n cells.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from jobs.training.cells import TrainingCells
from screformer.predictor import Predictor
from screformer.reference import TrainingReference

MOST_CELLS, MOST_TOKENS = 2000, 2_000_000
"""Most cells, and most tokens, that the driver puts through a finished model; it may have no GPU."""


def cells_to_show(cells: TrainingCells) -> int:
    """How many cells the driver can put through the network in a short time."""
    return min(MOST_CELLS, MOST_TOKENS // cells.config.tokens.most_slots(len(cells.genes)))


def keep_reference(cells: TrainingCells, predictor: Predictor) -> None:
    """Write the reference of a model into its directory. Ray must be running.

    Args:
        cells: The cells that it was trained on; some are drawn, as many of each label.
        predictor: The model, from the directory to write to.
    """
    found = cells.sample("train", cells_to_show(cells), even_labels=True)
    position = np.searchsorted(cells.query.obs_joinids, found.joinids_n)
    groups = cells.query.obs[cells.config.split.group_by].astype(str).to_numpy()[position]
    TrainingReference(
        embedding_nd=predictor.predict(found.cells).embedding_nd.astype(np.float16),
        labels_n=found.labels_n,
        donors_n=pd.factorize(groups, sort=True)[0].astype(np.int64),
        datasets_n=pd.factorize(cells.datasets_n[position], sort=True)[0].astype(np.int64),
        total_n=found.cells.total_n,
        detected_n=found.cells.lengths_n.astype(np.int64),
    ).save(predictor.directory)
