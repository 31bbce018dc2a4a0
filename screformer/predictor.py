"""The only inference path: raw counts of cells in, cell types out. No Ray, MLflow or SOMA.

Axes: n cells, g genes of the vocabulary, d model width, k classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy import sparse

from screformer.calibration import LEVELS, UNKNOWN
from screformer.checkpoint import LoadedModel, load_model
from screformer.genes import _FOREIGN_ID, _MOUSE_SYMBOL, _SPECIES, GeneMatch, check_counts
from screformer.model import HASH_SEED
from screformer.tokenizer import CellTokenizer, GeneVocabulary, Panels

ANSWER_COLUMNS = (
    "predicted_labels",
    "conf_score",
    "cell_type_ontology_term_id",
    "label_level",
    "unknown",
    "unknown_score",
    "best_label",
)
"""What is said of a cell, as columns: made by `Predictions.table`."""


_TOKENS_PER_BATCH = {
    "cpu": 8_192,
    "cuda": 131_072,
}  # small batches stay in a CPU's cache: a quarter less time than 32,768


_CELLS_PER_BATCH = 256


@dataclass(frozen=True, eq=False, kw_only=True)
class Predictions:
    """What the model says of n cells, in the order of the input.

    A model without calibration always says its best label.
    """

    answer_codes: np.ndarray
    """Index of what is said among the predictor's `answer_names`, int64 (n,)."""
    labels: np.ndarray
    """What is said, object (n,): a label, a more general Cell Ontology term where no label is likely enough,
    or `unknown`."""
    cl_ids: np.ndarray
    """Cell Ontology id of what is said, object (n,), `unknown` where it has none."""
    confidence: np.ndarray
    """Calibrated probability, float32 (n,), in [0, 1]: of the label, of all labels below the term, of an
    unknown cell's best label."""
    level_codes: np.ndarray
    """Index into `screformer.calibration.LEVELS`: whether a label, a broader term or `unknown` is said, int8
    (n,)."""
    unknown_score: np.ndarray
    """How unlike the training cells, float32 (n,); above the calibration's threshold a cell is unknown."""
    label_codes: np.ndarray
    """Index of the best label, int64 (n,), whatever is said."""
    best_labels: np.ndarray
    """The best label, object (n,)."""
    probabilities_nk: np.ndarray
    """Calibrated probability of every label, float32 (n, k)."""
    embedding_nd: np.ndarray
    """Cell embedding, float32 (n, d)."""

    def __len__(self) -> int:
        return len(self.label_codes)

    @property
    def unknown(self) -> np.ndarray:
        """Which cells are said to be unknown, bool (n,)."""
        return self.level_codes == LEVELS.index(UNKNOWN)

    def table(self, index: pd.Index | None = None) -> pd.DataFrame:
        """The columns that every way of applying a model gives: `ANSWER_COLUMNS`, one row per cell."""
        levels = np.array(LEVELS, dtype=object)[self.level_codes]
        columns = (
            self.labels,
            self.confidence,
            self.cl_ids,
            levels,
            self.unknown,
            self.unknown_score,
            self.best_labels,
        )
        return pd.DataFrame(dict(zip(ANSWER_COLUMNS, columns, strict=True)), index=index)


class Predictor:
    """A trained model that is ready to label cells.

    The same cell gets the same result in every call, up to rounding whatever the cells beside it.
    """

    def __init__(
        self, loaded: LoadedModel, directory: str | Path, *, device: str | torch.device | None = None
    ):
        self.directory = Path(directory)
        self.config = loaded.config
        self.vocabulary: GeneVocabulary = loaded.vocabulary
        self.meta = loaded.meta
        self.label_names = np.array(loaded.labels["names"], dtype=object)
        self.label_cl_ids = np.array([cl_id or "unknown" for cl_id in loaded.labels["cl_ids"]], dtype=object)
        self.label_column: str = loaded.labels["column"]
        self.calibration = loaded.calibration
        answers = self.calibration.answer_names(list(self.label_names), list(self.label_cl_ids))
        self.answer_names, self.answer_cl_ids = (np.array(texts, dtype=object) for texts in answers)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model = loaded.model.to(self.device).eval()
        self.tokenizer = CellTokenizer(loaded.config.tokens, loaded.vocabulary)

    @classmethod
    def load(cls, directory: str | Path, device: str | torch.device | None = None) -> Predictor:
        """Load a model directory.

        Args:
            directory: Written by `screformer.checkpoint.save_model` after fine-tuning.
            device: Such as `cpu` or `cuda:1`; None takes a GPU where there is one.

        Raises:
            ValueError: Not a model directory, or a model without labels.
        """
        loaded = load_model(directory)
        if not loaded.labels["names"]:
            raise ValueError(
                f"model {directory} knows no labels, because it was only pre-trained; fine-tune it with"
                f" `python -m jobs.finetune --from {directory}`"
            )
        return cls(loaded, directory, device=device)

    def match_genes(self, feature_ids: Sequence[str], names: Sequence[str] | None = None) -> GeneMatch:
        """Find the model's genes among the columns of an input.

        By id first, without its version (`ENSG00000156738.18`); columns whose id is unknown are then looked
        up by exact name. Columns with one id are one gene, as older files have it under two symbols; a name
        that occurs twice is left out rather than guessed.

        Args:
            feature_ids: Ensembl id of each column; anything else that stands there is simply not found.
            names: Gene symbol of each column; None takes `feature_ids` for both.
        """
        ids = np.array(
            [
                str(text).partition(".")[0] if str(text).startswith("ENS") else str(text)
                for text in feature_ids
            ],
            dtype=object,
        )
        symbols = ids if names is None else np.array([str(text) for text in names], dtype=object)
        if len(ids) != len(symbols):
            raise ValueError(
                f"genes have {len(ids)} ids but {len(symbols)} names; give one of each for every column"
            )
        by_id = self.vocabulary.index(ids.tolist())
        unique, doubled = self._names
        taken = set(by_id[by_id >= 0].tolist())
        by_name = np.full(len(ids), -1, dtype=np.int32)
        num_ambiguous = 0
        for column in np.flatnonzero(by_id < 0):
            index = unique.get(symbols[column], -1)
            by_name[column] = -1 if index in taken else index
            num_ambiguous += symbols[column] in doubled
        values, times = np.unique(by_name[by_name >= 0], return_counts=True)
        repeated = np.isin(by_name, values[times > 1])
        by_name[repeated] = -1

        found = np.where(by_id >= 0, by_id, by_name)
        weight = self.vocabulary.mean_expression_g
        if not weight.any():
            weight = np.ones(len(self.vocabulary), dtype=np.float32)
        return GeneMatch(
            vocabulary_index=found,
            num_by_id=len(taken),
            num_by_name=int((by_name >= 0).sum()),
            num_ambiguous=num_ambiguous + int(repeated.sum()),
            num_model_genes=len(self.vocabulary),
            expression_share=float(
                weight[np.unique(found[found >= 0])].sum(dtype=np.float64) / weight.sum(dtype=np.float64)
            ),
            species=self._species(ids, symbols),
        )

    def match_var(self, var: pd.DataFrame) -> GeneMatch:
        """Find the model's genes in a table of genes.

        Ids and names are each taken from where most of them stand, index or text column.

        Args:
            var: A row per column of the counts, as `AnnData.var`.
        """
        places = [var.index] + [
            column for _, column in var.items() if not pd.api.types.is_numeric_dtype(column.dtype)
        ]
        texts = [["" if pd.isna(value) else str(value) for value in place] for place in places]
        nothing = [""] * len(var)
        ids = max(texts, key=lambda text: self.match_genes(text, nothing).num_by_id)
        names = max(texts, key=lambda text: self.match_genes(nothing, text).num_by_name)
        return self.match_genes(ids, names)

    def _species(self, ids: np.ndarray, symbols: np.ndarray) -> str:
        """What most genes look like, if not human.

        Ids with a species in them, or symbols in the case of mouse and rat ("Cd3d").
        """
        foreign = [text for text in ids if _FOREIGN_ID.match(text)]
        if 2 * len(foreign) > len(ids):
            prefix = foreign[0].rstrip("0123456789")
            return f"ids such as {foreign[0]} ({_SPECIES.get(prefix, 'not human')})"
        known = {name.upper() for name in self.vocabulary.feature_names}
        mouse = [text for text in symbols if _MOUSE_SYMBOL.match(text) and text.upper() in known]
        if len(mouse) > sum(text in known for text in symbols):
            return f"symbols such as {mouse[0]} instead of {mouse[0].upper()} (mouse or rat)"
        return ""

    @cached_property
    def _names(self) -> tuple[dict[str, int], set[str]]:
        """Vocabulary index of names that one gene has, and the names that several have."""
        names, first, times = np.unique(
            np.array(self.vocabulary.feature_names, dtype=object), return_index=True, return_counts=True
        )
        unique = {
            name: int(index)
            for name, index, count in zip(names, first, times, strict=True)
            if count == 1 and name
        }
        return unique, set(names[times > 1])

    def predict_counts(
        self, counts: sparse.spmatrix | np.ndarray, match: GeneMatch, *, source: str = "input"
    ) -> Predictions:
        """Label cells given as a matrix of raw counts over the columns that `match_genes` saw.

        The library size of a cell is its sum over all columns, also those that the model does not know.

        Args:
            counts: Raw counts, cells by columns, dense or sparse; whole numbers >= 0 of any dtype.
            match: What `match_genes` said of the columns.
            source: Where they come from, for messages.

        Raises:
            ValueError: Another number of columns, or a value that is no raw count.
        """
        matrix = sparse.csr_matrix(counts)
        if matrix.shape[1] != len(match.vocabulary_index):
            raise ValueError(
                f"{source}: counts have {matrix.shape[1]} columns, but genes were matched for"
                f" {len(match.vocabulary_index)}"
            )
        check_counts(matrix.data, source=source)
        total = np.asarray(matrix.sum(axis=1, dtype=np.float64)).ravel()
        known = np.flatnonzero(match.vocabulary_index >= 0)
        entries = (np.ones(len(known), dtype=matrix.dtype), (known, match.vocabulary_index[known]))
        matrix = sparse.csr_matrix(
            matrix @ sparse.csr_matrix(entries, shape=(matrix.shape[1], len(self.vocabulary)))
        )
        matrix.eliminate_zeros()
        offsets, panels = matrix.indptr.astype(np.int64), Panels.one(match.measured_g, matrix.shape[0])
        return self.predict(
            matrix.indices, matrix.data.astype(np.float32), offsets, total_counts=total, panels=panels
        )

    def predict(
        self,
        gene_ids: np.ndarray,
        counts: np.ndarray,
        offsets: np.ndarray,
        total_counts: np.ndarray | None = None,
        panels: Panels | None = None,
    ) -> Predictions:
        """Label cells given as flat lists of detected genes.

        Args:
            gene_ids: Vocabulary indices, int32, of all cells one after another, unique within a cell.
            counts: Raw counts, float32, > 0, aligned with `gene_ids`.
            offsets: Cell i has the entries `offsets[i]:offsets[i + 1]`; int64 (n + 1,).
            total_counts: Library size (n,) over all genes that were measured; None sums the given counts.
            panels: Which genes were measured in which cells; None is all in all.

        Returns:
            Predictions in the order of the cells.
        """
        num_cells = len(offsets) - 1
        lengths = np.diff(offsets)
        panels = panels or Panels.one(np.ones(len(self.vocabulary)), num_cells)
        logits = np.zeros((num_cells, len(self.label_names)), dtype=np.float32)
        embedding = np.zeros((num_cells, self.config.model.dim), dtype=np.float32)
        for cells in self._batches(lengths):
            starts = np.concatenate([[0], np.cumsum(lengths[cells])])
            entries = np.repeat(offsets[cells] - starts[:-1], lengths[cells]) + np.arange(starts[-1])
            total = None if total_counts is None else total_counts[cells]
            tokens = self.tokenizer(gene_ids[entries], counts[entries], starts, total_counts=total)
            logits[cells], embedding[cells] = self._forward(tokens, panels.take(cells))
        probabilities = self.calibration.probabilities(logits)
        scores = self.calibration.unknown_scores(logits)
        answers = self.calibration.answer(probabilities, scores, list(self.label_cl_ids))
        best = probabilities.argmax(axis=1)
        return Predictions(
            answer_codes=answers.codes_n,
            labels=self.answer_names[answers.codes_n],
            cl_ids=self.answer_cl_ids[answers.codes_n],
            confidence=answers.probability_n,
            level_codes=answers.levels_n,
            unknown_score=scores,
            label_codes=best,
            best_labels=self.label_names[best],
            probabilities_nk=probabilities,
            embedding_nd=embedding,
        )

    def _forward(self, tokens: dict[str, np.ndarray], panels: Panels) -> tuple[np.ndarray, np.ndarray]:
        batch = {
            "token_ids": torch.from_numpy(tokens["token_ids"].astype(np.int64)),
            "values": torch.from_numpy(tokens["values"]),
            "bin_ids": torch.from_numpy(tokens["bin_ids"].astype(np.int64)),
            "measured": torch.from_numpy(panels.measured_pg),
            "panels": torch.from_numpy(panels.panels_n),
        }
        batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
        with torch.inference_mode():
            output = self.model(batch, task="finetune", hidden=None, hash_seed=HASH_SEED)
            return output.logits_nk.float().cpu().numpy(), output.embedding_nd.float().cpu().numpy()

    def _batches(self, lengths: np.ndarray) -> Iterator[np.ndarray]:
        """Cells of like length together, so that little is padded; each batch within a bound on tokens."""
        if self.config.tokens.input_mode == "all":
            slots = np.full(len(lengths), 1 + len(self.vocabulary))
        else:
            slots = 1 + np.minimum(lengths, self.config.tokens.max_genes)
        order = np.argsort(slots, kind="stable")
        budget = _TOKENS_PER_BATCH.get(self.device.type, 32_768)
        start = 0
        while start < len(order):
            window = slots[order[start : start + _CELLS_PER_BATCH]]
            size = max(1, int(np.searchsorted(window * np.arange(1, len(window) + 1), budget, side="right")))
            yield order[start : start + size]
            start += size


@lru_cache(maxsize=2)
def loaded_predictor(directory: str) -> Predictor:
    """The model of a directory, loaded once in this process: for tasks that label one shard each."""
    return Predictor.load(directory)
