"""The registered model, as code: MLflow copies this file beside the weights and runs it wherever the model is loaded.

It may import `screformer` (a copy of which travels with the model) but nothing else of this repository.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from mlflow.models import ModelSignature, set_model
from mlflow.pyfunc import PythonModel, PythonModelContext
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

from screformer.predictor import MIN_GENE_OVERLAP, Predictor

_OUTPUTS = {"predicted_labels": "string", "conf_score": "float", "cell_type_ontology_term_id": "string"}
_PARAMS = (
    ("probabilities", "boolean", False),
    ("embedding", "boolean", False),
    ("min_gene_overlap", "double", MIN_GENE_OVERLAP),
)


class CellTypeModel(PythonModel):
    """Labels cells given as a table of raw counts."""

    def load_context(self, context: PythonModelContext) -> None:
        """Read the model directory that was registered as the artifact `model`."""
        self.predictor = Predictor.load(context.artifacts["model"])

    def predict(self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Label cells.

        Args:
            context: Not used.
            model_input: One row per cell and one column per gene, named by Ensembl id or symbol; raw counts. All measured genes
                should be there, also those that the model does not know: they belong to the cell's library size.
            params: `probabilities` adds a column `probability: LABEL` per label; `embedding` adds `embedding_0`, ...; `min_gene_overlap` is
                the least share of the model's expected expression that the columns must carry.

        Returns:
            `predicted_labels`, `conf_score` in [0, 1] and `cell_type_ontology_term_id` (`unknown` where the label has none),
            indexed as the input.

        Raises:
            ValueError: Too few genes, or values that are no raw counts.
        """
        given = {name: default for name, _, default in _PARAMS} | (params or {})
        if not isinstance(model_input, pd.DataFrame):
            raise ValueError(f"input is a {type(model_input).__name__}; give a pandas DataFrame with a row per cell and a column per gene")
        text = next((name for name, kind in model_input.dtypes.items() if not pd.api.types.is_numeric_dtype(kind)), None)
        if text is not None:
            raise ValueError(
                f"input: column {text!r} holds {model_input[text].dtype}, not counts; only genes may be columns, cell names go to the index"
            )
        match = self.predictor.match_genes([str(name) for name in model_input.columns])
        match.require(given["min_gene_overlap"], source="input")
        found = self.predictor.predict_counts(model_input.to_numpy(), match)
        table = pd.DataFrame(
            {"predicted_labels": found.labels, "conf_score": found.confidence, "cell_type_ontology_term_id": found.cl_ids},
            index=model_input.index,
        )
        if given["probabilities"]:
            names = [f"probability: {name}" for name in self.predictor.label_names]
            table = table.join(pd.DataFrame(found.probabilities_nk, columns=names, index=table.index))
        if given["embedding"]:
            names = [f"embedding_{i}" for i in range(found.embedding_nd.shape[1])]
            table = table.join(pd.DataFrame(found.embedding_nd, columns=names, index=table.index))
        return table


def signature_and_example(model_dir: str | Path) -> tuple[ModelSignature, pd.DataFrame]:
    """What the registry stores about input and output of a model directory.

    The signature leaves the input open on purpose: MLflow would drop every column that it does not list, so symbols, and the genes that
    make up the library size, would be lost before the model sees them. The model checks its input itself.

    Returns:
        The signature, and two cells that `predict` accepts: the genes with the highest expected expression, small whole counts.

    Raises:
        ValueError: Not a model directory, or a model without labels.
    """
    vocabulary = Predictor.load(model_dir, device="cpu").vocabulary
    weight = np.asarray(vocabulary.mean_expression_g, dtype=np.float64)
    weight = weight if weight.any() else np.ones(len(vocabulary))
    order = np.argsort(-weight, kind="stable")
    enough = int(np.searchsorted(np.cumsum(weight[order]), 1.5 * MIN_GENE_OVERLAP * weight.sum())) + 1
    genes = [vocabulary.feature_ids[i] for i in order[: max(enough, 20)]]
    counts = np.random.default_rng(0).poisson(2.0, size=(2, len(genes)))
    signature = ModelSignature(
        outputs=Schema([ColSpec(kind, name) for name, kind in _OUTPUTS.items()]),
        params=ParamSchema([ParamSpec(name, kind, default) for name, kind, default in _PARAMS]),
    )
    return signature, pd.DataFrame(counts, columns=genes)


set_model(CellTypeModel())
