"""The registered model, as code.

MLflow copies this file beside the weights and runs it wherever the model is loaded.

It may import `screformer` and `data_ingest.h5ad` (copies of which travel with the model) but nothing else of
this repository.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from mlflow.models import ModelSignature, set_model
from mlflow.pyfunc import PythonModel, PythonModelContext
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

from screformer.genes import MIN_GENE_OVERLAP, GeneMatch
from screformer.predictor import ANSWER_COLUMNS, Predictions, Predictor

_OUTPUT_KINDS = {
    "conf_score": "float",
    "unknown": "boolean",
    "unknown_score": "float",
}  # the others are strings


_PARAMS = (
    ("probabilities", "boolean", False),
    ("embedding", "boolean", False),
    ("min_gene_overlap", "double", MIN_GENE_OVERLAP),
    ("layer", "string", ""),
)


_CELLS_PER_CHUNK = 2048


_TAKES = (
    "a pandas DataFrame with a row per cell and a column per gene, the path or URI of an .h5ad"
    " file, or an AnnData"
)


class CellTypeModel(PythonModel):
    """Labels cells given as a table of raw counts, an .h5ad file or an AnnData."""

    def load_context(self, context: PythonModelContext) -> None:
        """Read the model directory that was registered as the artifact `model`."""
        self.predictor = Predictor.load(context.artifacts["model"])

    # Of the hints for what it takes, this is the one that MLflow neither warns of nor makes a schema of.
    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Label cells.

        Args:
            context: Not used.
            model_input: Raw counts of cells. A table: one row per cell and one column per gene, named by
                Ensembl id or symbol. A path or URI of an .h5ad file, as a string or a table of one column of
                them, read where the model runs. In Python also an AnnData. All measured genes should be
                there, also those that the model does not know: they belong to the cell's library size.
            params: `probabilities` adds a column `probability: LABEL` per label; `embedding` adds
                `embedding_0`, ...; `min_gene_overlap` is the least share of the model's expected expression
                that the genes must carry; `layer` takes the counts of an .h5ad or AnnData from that layer, or
                from `raw`, instead of X.

        Returns:
            The columns of `screformer.predictor.Predictions.table`, indexed as the input; cells of several
            files one after another.

        Raises:
            ValueError: Too few genes, genes of another species, or values that are no raw counts.
        """
        given = {name: default for name, _, default in _PARAMS} | (params or {})
        overlap, layer = given["min_gene_overlap"], given["layer"]
        files = _files(model_input)
        if files:
            parts = [part for name in files for part in self._of_file(name, overlap, layer)]
        elif type(model_input).__name__ == "AnnData":
            parts = list(self._of_anndata(model_input, overlap, layer))
        else:
            parts = [self._of_table(model_input, overlap)]
        return pd.concat([self._table(found, index, given) for index, found in parts])

    def _of_table(self, table: Any, overlap: float) -> tuple[pd.Index, Predictions]:
        if not isinstance(table, pd.DataFrame):
            raise ValueError(f"input is a {type(table).__name__}; give {_TAKES}")
        text = next(
            (name for name, kind in table.dtypes.items() if not pd.api.types.is_numeric_dtype(kind)), None
        )
        if text is not None:
            raise ValueError(
                f"input: column {text!r} holds {table[text].dtype}, not counts; only genes may be columns,"
                f" cell names go to the index"
            )
        match = self.predictor.match_genes([str(name) for name in table.columns])
        match.require(overlap, source="input")
        return table.index, self.predictor.predict_counts(table.to_numpy(), match)

    def _of_anndata(self, adata: Any, overlap: float, layer: str) -> Iterator[tuple[pd.Index, Predictions]]:
        if layer and layer != "raw" and layer not in adata.layers:
            raise ValueError(f"input has no layer {layer!r}; it has {', '.join(adata.layers) or 'none'}")
        if layer == "raw" and adata.raw is None:
            raise ValueError("input has no raw; leave params['layer'] empty to take X")
        owner = adata.raw if layer == "raw" else adata
        counts = adata.layers[layer] if layer and layer != "raw" else owner.X
        match: GeneMatch = self.predictor.match_var(owner.var)
        match.require(overlap, source="input")
        for start in range(0, adata.n_obs, _CELLS_PER_CHUNK):
            rows = slice(start, start + _CELLS_PER_CHUNK)
            yield adata.obs_names[rows], self.predictor.predict_counts(counts[rows], match)

    def _of_file(self, name: str, overlap: float, layer: str) -> Iterator[tuple[pd.Index, Predictions]]:
        from data_ingest.h5ad import H5adFile, check_counts

        with tempfile.TemporaryDirectory(prefix="screformer-") as scratch:
            with H5adFile.open(
                _local(name, scratch), layer=layer if layer != "raw" else None, raw=layer == "raw"
            ) as file:
                match = self.predictor.match_var(file.var)
                match.require(overlap, source=f"{name} ({file.source})")
                for start, counts in file.chunks(_CELLS_PER_CHUNK):
                    check_counts(counts, file=file, start=start)
                    yield (
                        file.obs.index[start : start + counts.shape[0]],
                        self.predictor.predict_counts(counts, match, source=name),
                    )

    def _table(self, found: Predictions, index: pd.Index, given: dict[str, Any]) -> pd.DataFrame:
        table = found.table(index)
        if given["probabilities"]:
            names = [f"probability: {name}" for name in self.predictor.label_names]
            table = table.join(pd.DataFrame(found.probabilities_nk, columns=names, index=index))
        if given["embedding"]:
            names = [f"embedding_{i}" for i in range(found.embedding_nd.shape[1])]
            table = table.join(pd.DataFrame(found.embedding_nd, columns=names, index=index))
        return table


def _files(model_input: Any) -> list[str]:
    """The .h5ad files that an input names: a string, or a table of one column of strings; else nothing."""
    if isinstance(model_input, str | Path):
        return [str(model_input)]
    if isinstance(model_input, pd.DataFrame) and model_input.shape[1] == 1 and len(model_input):
        values = model_input.iloc[:, 0].tolist()
        if all(isinstance(value, str) for value in values):
            return values
    return []


def _local(name: str, scratch: str) -> str:
    """A file on this machine.

    As it is, or downloaded by MLflow's artifact stores (s3://, gs://, http://, runs:/, ...).
    """
    if "://" not in name and not name.startswith(("runs:/", "models:/")):
        return name
    if name.startswith("file://"):
        return name.removeprefix("file://")
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    try:
        return download_artifacts(artifact_uri=name, dst_path=scratch)
    except (MlflowException, OSError) as error:
        raise ValueError(
            f"{name} cannot be fetched ({error}); give a path or URI that the machine of the model can read"
        ) from error


def signature_and_example(model_dir: str | Path) -> tuple[ModelSignature, pd.DataFrame]:
    """What the registry stores about input and output of a model directory.

    The signature leaves the input open on purpose: MLflow would drop every column that it does not list, so
    symbols, and the genes that make up the library size, would be lost before the model sees them. The model
    checks its input itself.

    Returns:
        The signature, and two cells that `predict` accepts: the genes with the highest expected expression,
        small whole counts.

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
        outputs=Schema([ColSpec(_OUTPUT_KINDS.get(name, "string"), name) for name in ANSWER_COLUMNS]),
        params=ParamSchema([ParamSpec(name, kind, default) for name, kind, default in _PARAMS]),
    )
    return signature, pd.DataFrame(counts, columns=genes)


set_model(CellTypeModel())
