"""scReformer-BERT: tokens, model, training, metrics and prediction; no Ray, MLflow or SOMA.

`screformer.annotate(adata)` labels the cells of an AnnData; see `screformer.labelling.annotate`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from screformer.labelling import annotate

__all__ = ["__version__", "annotate"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import `annotate` on first use, because it needs torch."""
    if name == "annotate":
        from screformer.labelling import annotate

        return annotate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
