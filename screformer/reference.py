"""Save a sample of a model's training cells, as seen by the model, to compare new cells with.

The sample is `training_cells.safetensors` in the model directory. It contains embeddings and totals, but no
counts of genes. Models of earlier versions have none.

Axes: n cells, d model width.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

FILE = "training_cells.safetensors"


@dataclass(frozen=True, eq=False, kw_only=True)
class TrainingReference:
    """A sample of training cells as seen by their model."""

    embedding_nd: np.ndarray
    """Embeddings, float16."""
    labels_n: np.ndarray
    """Index of each cell's label in the model's labels, int64."""
    donors_n: np.ndarray
    """Code of each cell's group in the split, for example its donor, int64; names are not saved."""
    datasets_n: np.ndarray
    """Code of each cell's data set, int64."""
    total_n: np.ndarray
    """Total counts of each cell, float32."""
    detected_n: np.ndarray
    """Number of model genes detected in each cell, int64."""

    def __len__(self) -> int:
        return len(self.labels_n)

    def save(self, model_dir: str | Path) -> None:
        """Write the file into a model directory."""
        arrays = {name: np.ascontiguousarray(array) for name, array in vars(self).items()}
        save_file(arrays, Path(model_dir) / FILE)

    @classmethod
    def load(cls, model_dir: str | Path) -> TrainingReference | None:
        """Read the file of a model directory; None if there is none.

        Raises:
            ValueError: It is damaged, or contains something else.
        """
        path = Path(model_dir) / FILE
        if not path.is_file():
            return None
        try:
            arrays = load_file(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is not a complete safetensors file ({error}); copy it again") from error
        if set(arrays) != set(cls.__dataclass_fields__) or len({len(array) for array in arrays.values()}) > 1:
            raise ValueError(f"{path} does not contain training cells; restore it, or train again")
        return cls(**arrays)
