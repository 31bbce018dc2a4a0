"""Predict cell types from raw counts: the only inference path. Needs no Ray, MLflow or SOMA.

Axes: n cells, g genes of the vocabulary, d model width, k classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from screformer.answers import ANSWER_COLUMNS
from screformer.calibration import LEVELS, REASONS, UNKNOWN
from screformer.checkpoint import LoadedModel, load_model
from screformer.counts import CellCounts, Panels
from screformer.genes import GeneMatcher
from screformer.model import HASH_SEED
from screformer.tokenizer import CellTokenizer, GeneVocabulary

TOKENS_PER_BATCH = {
    "cpu": 8_192,
    "cuda": 131_072,
}  # small batches fit in a CPU's cache: 25 % faster than 32,768


_CELLS_PER_BATCH = 256


@dataclass(frozen=True, eq=False)
class AnswerNames:
    """The possible answers of a model."""

    labels: np.ndarray
    """The labels, object (k,)."""
    answers: np.ndarray
    """The labels, the broader terms above them, and `unknown`, object (a,)."""
    cl_ids: np.ndarray
    """Cell Ontology id of each answer, object (a,); `unknown` if it has none."""

    @cached_property
    def dtypes(self) -> dict[str, pd.CategoricalDtype]:
        """Categorical types of the text columns in a table of answers."""
        categories: dict[str, Any] = {
            "predicted_labels": self.answers,
            "cell_type_ontology_term_id": np.unique(self.cl_ids.astype(str)),
            "label_level": LEVELS,
            "best_label": self.labels,
            "unknown_reason": REASONS,
        }
        return {
            name: pd.CategoricalDtype([str(text) for text in texts]) for name, texts in categories.items()
        }


@dataclass(frozen=True, eq=False, kw_only=True)
class Predictions:
    """Predictions for n cells, in input order.

    A model without calibration always answers with its best label.
    """

    names: AnswerNames
    answer_codes: np.ndarray
    """The answer as an index into `names.answers`, int64 (n,): a label, a broader Cell Ontology term if no
    label is likely enough, or `unknown`."""
    confidence: np.ndarray
    """Calibrated probability, float32 (n,), in [0, 1]: of the label, of all labels below the term, or of an
    unknown cell's best label; 0 for a cell with too few counts."""
    level_codes: np.ndarray
    """Index into `screformer.calibration.LEVELS`: a label, a broader term or `unknown`; int8 (n,)."""
    unknown_score: np.ndarray
    """How unlike the training cells each cell is, float32 (n,); unknown above the calibration's threshold."""
    reason_codes: np.ndarray
    """Why a cell is unknown: index into `screformer.calibration.REASONS`, int8 (n,)."""
    label_codes: np.ndarray
    """The best label, whatever the answer, as an index into `names.labels`, int64 (n,)."""
    probabilities_nk: np.ndarray
    """Calibrated probability of every label, float32 (n, k)."""
    embedding_nd: np.ndarray
    """Cell embedding, float32 (n, d)."""

    def __len__(self) -> int:
        return len(self.label_codes)

    @property
    def labels(self) -> np.ndarray:
        """The answer, object (n,)."""
        return self.names.answers[self.answer_codes]

    @property
    def cl_ids(self) -> np.ndarray:
        """Cell Ontology id of the answer, object (n,)."""
        return self.names.cl_ids[self.answer_codes]

    @property
    def best_labels(self) -> np.ndarray:
        """The best label, object (n,)."""
        return self.names.labels[self.label_codes]

    @property
    def unknown(self) -> np.ndarray:
        """Which cells are unknown, bool (n,)."""
        return self.level_codes == LEVELS.index(UNKNOWN)

    def table(self) -> pd.DataFrame:
        """The columns that every way of applying a model writes, `ANSWER_COLUMNS`; one row per cell."""
        levels = np.array(LEVELS, dtype=object)[self.level_codes]
        columns = (
            self.labels,
            self.confidence,
            self.cl_ids,
            levels,
            self.unknown,
            self.unknown_score,
            self.best_labels,
            np.array(REASONS, dtype=object)[self.reason_codes],
        )
        return pd.DataFrame(dict(zip(ANSWER_COLUMNS, columns, strict=True))).astype(self.names.dtypes)


class Predictor:
    """A trained model, ready to label cells.

    A cell's result does not depend on the other cells of a call, up to rounding.
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
        self.names = AnswerNames(self.label_names, *(np.array(texts, dtype=object) for texts in answers))
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model = loaded.model.to(self.device).eval()
        self.tokenizer = CellTokenizer(loaded.config.tokens, loaded.vocabulary)

    @classmethod
    def load(cls, directory: str | Path, device: str | torch.device | None = None) -> Predictor:
        """Load a model directory.

        Args:
            directory: Written by `screformer.checkpoint.save_model` after fine-tuning.
            device: For example `cpu` or `cuda:1`; None uses a GPU if available.

        Raises:
            ValueError: It is not a model directory, or the model has no labels.
        """
        loaded = load_model(directory)
        if not loaded.labels["names"]:
            raise ValueError(
                f"model {directory} has no labels because it was only pre-trained; fine-tune it with"
                f" `python -m jobs.finetune --from {directory}`"
            )
        return cls(loaded, directory, device=device)

    @cached_property
    def genes(self) -> GeneMatcher:
        """Matches the genes of an input to the model's."""
        return GeneMatcher(self.vocabulary)

    def predict(self, cells: CellCounts) -> Predictions:
        """Label cells; results are in input order."""
        logits, embedding = self.outputs(cells)
        detected_n = self.tokenizer.lengths(cells)
        probabilities = self.calibration.probabilities(logits, detected_n)
        scores = self.calibration.unknown_scores(logits, detected_n)
        answers = self.calibration.answer(probabilities, scores, list(self.label_cl_ids), cells.informative_n)
        return Predictions(
            names=self.names,
            answer_codes=answers.codes_n,
            confidence=answers.probability_n,
            level_codes=answers.levels_n,
            unknown_score=scores,
            reason_codes=answers.reasons_n,
            label_codes=probabilities.argmax(axis=1),
            probabilities_nk=probabilities,
            embedding_nd=embedding,
        )

    def outputs(self, cells: CellCounts) -> tuple[np.ndarray, np.ndarray]:
        """Logits (n, k) and embeddings (n, d) of cells, float32, before calibration."""
        logits = np.zeros((len(cells), len(self.label_names)), dtype=np.float32)
        embedding = np.zeros((len(cells), self.config.model.dim), dtype=np.float32)
        with _torch_threads(1 if self._is_additive else torch.get_num_threads()):
            for batch in self.batches(self.tokenizer.lengths(cells)):
                part = cells.take(batch)
                logits[batch], embedding[batch] = self._forward(self.tokenizer(part), part.panels)
        return logits, embedding

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

    @property
    def _is_additive(self) -> bool:
        return self.config.model.encoder == "additive"

    def batches(self, lengths_n: np.ndarray) -> Iterator[np.ndarray]:
        """Group cells of similar length to reduce padding, with a limit on tokens per batch.

        Args:
            lengths_n: Number of tokens of each cell, shape (n,).

        Yields:
            Positions of the cells of one batch, by increasing length.
        """
        if self._is_additive:  # its cost does not depend on the length
            yield from np.split(
                np.arange(len(lengths_n)), range(_CELLS_PER_BATCH, len(lengths_n), _CELLS_PER_BATCH)
            )
            return
        slots = 1 + lengths_n
        order = np.argsort(slots, kind="stable")
        budget = TOKENS_PER_BATCH.get(self.device.type, 32_768)
        start = 0
        while start < len(order):
            window = slots[order[start : start + _CELLS_PER_BATCH]]
            size = max(1, int(np.searchsorted(window * np.arange(1, len(window) + 1), budget, side="right")))
            yield order[start : start + size]
            start += size


@contextmanager
def _torch_threads(number: int) -> Iterator[None]:
    """Limit torch's threads.

    The additive encoder's products are so small that threads mostly wait for each other: with two threads on
    two busy cores it took ten times as long as with one, and on idle cores it was hardly faster.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@lru_cache(maxsize=2)
def loaded_predictor(directory: str) -> Predictor:
    """The model of a directory, loaded once per process, for tasks that label one shard each."""
    return Predictor.load(directory)
