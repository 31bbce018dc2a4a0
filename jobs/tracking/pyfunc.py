"""MLflow pyfunc code of a registered model.

MLflow copies this file next to the weights and runs it wherever the model is loaded. From this repository, it
may import only `screformer` and `data_ingest.cells` (with its dependencies): both are copied with the model.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature, set_model
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc import PythonModel, PythonModelContext
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

from screformer.cells import AnnDataCells, CellSource, predictions
from screformer.genes import MIN_GENE_OVERLAP
from screformer.labelling import answers
from screformer.predictor import ANSWER_COLUMNS, Predictions, Predictor

_OUTPUT_KINDS = {
    "conf_score": "float",
    "unknown": "boolean",
    "unknown_score": "float",
}  # all other columns are strings


_PARAMS = (
    ("probabilities", "boolean", False),
    ("embedding", "boolean", False),
    ("min_gene_overlap", "double", MIN_GENE_OVERLAP),
    ("layer", "string", ""),
)


_TAKES = "a pandas DataFrame with a row per cell and a column per gene, or an AnnData"

FILES_ROOT = "files_root"
"""Model setting (`model_config`): folder or URI prefix of the .h5ad files that the model may read; empty for
none."""


class InputError(MlflowException, ValueError):
    """A ValueError that MLflow's server returns as status 400 with the message."""

    def __init__(self, message: str) -> None:
        MlflowException.__init__(self, message, error_code=INVALID_PARAMETER_VALUE)


class CellTypeModel(PythonModel):
    """Labels cells from a table of raw counts, an .h5ad file or an AnnData object."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the model directory from the artifact `model`."""
        self.predictor = Predictor.load(context.artifacts["model"])
        self.files_root = str((context.model_config or {}).get(FILES_ROOT) or "")

    # Of the possible type hints for the input, MLflow only accepts this one without a warning or a schema.
    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Label cells.

        Args:
            context: Not used.
            model_input: Raw counts of cells: a table with one row per cell and one column per gene, named by
                Ensembl id or symbol. In Python, also an AnnData object. Include all measured genes, even
                those that the model does not know: they count towards the library size. If the model was
                loaded with `model_config={"files_root": FOLDER}`, also the path of an .h5ad file in that
                folder on the model's machine, or a one-column table of such paths. By default, text is
                rejected, so that clients cannot make the server read its files.
            params: `probabilities` adds a column `probability: LABEL` per label; `embedding` adds
                `embedding_0`, ...; `min_gene_overlap` is the minimum share of the model's expected expression
                that the genes must cover; `layer` reads the counts of an .h5ad file or AnnData object from
                that layer, or from `raw`, instead of X.

        Returns:
            The columns of `screformer.predictor.Predictions.table`, with the index of the input; the cells of
            several files are concatenated.

        Raises:
            ValueError: Too few genes, genes of another species, values that are not raw counts, or text when
                the model may not read files.
        """
        try:
            return self._predict(model_input, params)
        except ValueError as error:
            raise InputError(str(error)) from error

    def _predict(self, model_input: Any, params: dict[str, Any] | None) -> pd.DataFrame:
        given = {name: default for name, _, default in _PARAMS} | (params or {})
        files = _files(model_input)
        if files:
            tables = [self._of_file(name, given) for name in files]
        elif type(model_input).__name__ == "AnnData":
            tables = [self._of_source(self._anndata_cells(model_input, given), given)]
        else:
            tables = [self._of_table(model_input, given)]
        return pd.concat(tables)

    def _of_table(self, table: Any, given: dict[str, Any]) -> pd.DataFrame:
        if not isinstance(table, pd.DataFrame):
            raise ValueError(f"input is a {type(table).__name__}; give {_TAKES}")
        kinds = table.dtypes.reset_index(drop=True)
        text = next((i for i, kind in kinds.items() if not pd.api.types.is_numeric_dtype(kind)), None)
        if text is not None:
            raise ValueError(
                f"input: column {table.columns[text]!r} has type {kinds[text]}, not counts; every column must"
                f" be a gene, and cell names must be the index"
            )
        match = self.predictor.genes.match(list(table.columns))
        match.require(given["min_gene_overlap"], source="input")

        def place(row: int, column: int) -> str:
            return f"cell {table.index[row]!r}, gene {table.columns[column]!r}"

        counts = table.to_numpy(dtype=np.float64, na_value=np.nan)
        cells = match.select(counts, source="input", place=place)
        return self._table([self.predictor.predict(cells)], table.index, given)

    def _anndata_cells(self, adata: Any, given: dict[str, Any]) -> AnnDataCells:
        layer = given["layer"]
        raw = layer == "raw" and "raw" not in adata.layers
        return AnnDataCells.open(
            self.predictor,
            adata,
            min_gene_overlap=given["min_gene_overlap"],
            layer="" if raw else layer,
            raw=raw,
            source="input",
        )

    def _of_file(self, name: str, given: dict[str, Any]) -> pd.DataFrame:
        from data_ingest.cells import H5adCells

        with tempfile.TemporaryDirectory(prefix="screformer-") as scratch:
            raw = given["layer"] == "raw"
            cells = H5adCells.open(
                self.predictor,
                Path(_local(_allowed(name, self.files_root), scratch)),
                min_gene_overlap=given["min_gene_overlap"],
                layer=None if raw else given["layer"] or None,
                raw=raw,
            )
            return self._of_source(cells, given)

    def _of_source(self, cells: CellSource, given: dict[str, Any]) -> pd.DataFrame:
        index = pd.Index(cells.names(np.arange(cells.num_cells)))
        return self._table(list(predictions(self.predictor, cells)), index, given)

    def _table(self, parts: list[Predictions], index: pd.Index, given: dict[str, Any]) -> pd.DataFrame:
        """One row per cell, aligned by position, because cell names may repeat."""
        for part in parts:
            if not np.isfinite(part.probabilities_nk).all():
                raise ValueError("input: some cells have counts too large for the model; give raw counts")
        dtypes = dict.fromkeys(self.predictor.names.dtypes, object)  # plain text, as in the signature
        columns = [answers(self.predictor, parts).astype(dtypes)]
        if given["probabilities"]:
            names = [f"probability: {name}" for name in self.predictor.label_names]
            columns.append(pd.DataFrame(np.concatenate([p.probabilities_nk for p in parts]), columns=names))
        if given["embedding"]:
            embedding_nd = np.concatenate([part.embedding_nd for part in parts])
            names = [f"embedding_{i}" for i in range(embedding_nd.shape[1])]
            columns.append(pd.DataFrame(embedding_nd, columns=names))
        return pd.concat(columns, axis=1).set_axis(index)


def _files(model_input: Any) -> list[str]:
    """The .h5ad files named by an input (a string or a one-column table of strings), or none."""
    if isinstance(model_input, str | Path):
        return [str(model_input)]
    if isinstance(model_input, pd.DataFrame) and model_input.shape[1] == 1 and len(model_input):
        values = model_input.iloc[:, 0].tolist()
        if all(isinstance(value, str) for value in values):
            return values
    return []


def _allowed(name: str, root: str) -> str:
    """The path or address of a file that may be read.

    Raises:
        ValueError: It is not inside the root. The message does not reveal whether the file exists.
    """
    if not root:
        raise ValueError(
            f"input is text, but this model may not read files; give {_TAKES}, or load the model with"
            f" model_config={{'{FILES_ROOT}': FOLDER}} (mlflow models serve: the environment variable"
            f" SERVING_MODEL_CONFIG, as JSON)"
        )
    name = name.removeprefix("file://")
    is_address = "://" in name or name.startswith(("runs:/", "models:/"))
    if is_address and name.startswith(f"{root.rstrip('/')}/") and ".." not in name.split("/"):
        return name
    if not is_address and "://" not in root:
        path = Path(root, name).resolve()  # resolves links out of the folder too
        if path.is_relative_to(Path(root).resolve()):
            return str(path)
    raise ValueError(f"input names a file outside {FILES_ROOT}; this model may read only files in it")


def _local(name: str, scratch: str) -> str:
    """Local path of a file.

    A URI (s3://, gs://, http://, runs:/, ...) is downloaded through MLflow's artifact stores.
    """
    if "://" not in name and not name.startswith(("runs:/", "models:/")):
        return name
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    try:
        return download_artifacts(artifact_uri=name, dst_path=scratch)
    except (MlflowException, OSError) as error:
        raise ValueError(
            f"{name} cannot be fetched ({error}); give a path or URI that the model's machine can read"
        ) from error


def signature_and_example(model_dir: str | Path) -> tuple[ModelSignature, pd.DataFrame]:
    """Signature and input example of a model directory, for the registry.

    The signature deliberately does not list inputs. MLflow drops columns that are not listed, so gene symbols
    and the genes that count only towards the library size would never reach the model. The model checks its
    input itself.

    Returns:
        The signature, and an example of two cells that `predict` accepts: small integer counts of the genes
        with the highest expected expression.

    Raises:
        ValueError: Not a model directory, or a model without labels.
    """
    vocabulary = Predictor.load(model_dir, device="cpu").vocabulary
    weight = np.asarray(vocabulary.weight_g, dtype=np.float64)
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
