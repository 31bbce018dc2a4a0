"""Read and write model directories: weights and everything needed to use them, without pickles.

A directory contains `weights.safetensors`, `config.json`, `vocabulary.json`, `labels.json` and `meta.json`,
plus `calibration.json` after fine-tuning with validation cells.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from screformer.calibration import Calibration
from screformer.config import ExperimentConfig
from screformer.model import ScReformer
from screformer.model_checks import check_finite, check_sizes, check_weights, checked_labels
from screformer.reference import TrainingReference
from screformer.tokenizer import GeneVocabulary

FORMAT = "1"
WEIGHTS, CONFIG, VOCABULARY, LABELS, META = (
    "weights.safetensors",
    "config.json",
    "vocabulary.json",
    "labels.json",
    "meta.json",
)
CALIBRATION = "calibration.json"
WEIGHTS_HASH = "weights_sha256"
"""Key in the metadata; missing in models of earlier versions."""
NO_LABELS: dict[str, Any] = {"column": "", "names": [], "cl_ids": []}
"""Labels of a pre-trained model."""


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model directory in memory."""

    model: ScReformer
    config: ExperimentConfig
    vocabulary: GeneVocabulary
    labels: dict[str, Any]
    """`column` of obs, `names` of the k classes in the order of the logits, and their `cl_ids` ("" where
    unknown)."""
    meta: dict[str, Any]
    """Provenance: atlas, query hash, versions, metrics."""
    calibration: Calibration = Calibration()
    """Turns logits into answers; the default if the model has none, for example from an earlier version."""
    reference: TrainingReference | None = None
    """Some training cells as the model sees them; None for models of earlier versions."""


def save_model(
    directory: str | Path,
    model: nn.Module | Mapping[str, torch.Tensor],
    config: ExperimentConfig,
    vocabulary: GeneVocabulary,
    labels: Mapping[str, Any],
    meta: Mapping[str, Any],
    calibration: Calibration | None = None,
) -> None:
    """Write a model directory.

    Args:
        directory: Created if it does not exist.
        model: The network or its state dict; floating-point weights are written in fp32.
        config: The settings it was trained with.
        vocabulary: Its genes.
        labels: As in `LoadedModel.labels`; `NO_LABELS` for a pre-trained model.
        meta: Plain JSON values.
        calibration: Turns its logits into answers; None if there were no validation cells to learn it from.

    Raises:
        ValueError: A weight is NaN or infinite.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    vocabulary.save(directory / VOCABULARY)
    for name, tree in ((CONFIG, config.to_dict()), (LABELS, dict(labels))):
        (directory / name).write_text(json.dumps(tree, indent=2, default=str))
    hashed = [CONFIG, VOCABULARY, LABELS]
    (directory / CALIBRATION).unlink(missing_ok=True)  # belongs to earlier weights
    if calibration is not None:
        (directory / CALIBRATION).write_text(json.dumps(calibration.to_json(), indent=2))
        hashed.append(CALIBRATION)
    state = model.state_dict() if isinstance(model, nn.Module) else model
    weights = {
        name: tensor.detach()
        .to("cpu", torch.float32 if tensor.is_floating_point() else tensor.dtype, copy=True)
        .contiguous()
        for name, tensor in state.items()
    }
    check_finite(weights, source=f"model for {directory}")
    metadata = {
        "kind": "screformer model",
        "format": FORMAT,
        **{name: sha256(directory / name) for name in hashed},
    }
    save_file(weights, directory / WEIGHTS, metadata=metadata)
    whole_meta = {**meta, WEIGHTS_HASH: sha256(directory / WEIGHTS)}
    (directory / META).write_text(json.dumps(whole_meta, indent=2, default=str))


def add_meta(directory: str | Path, more: Mapping[str, Any]) -> None:
    """Add to the metadata of a model directory, without touching the weights.

    Args:
        directory: Model directory.
        more: Plain JSON values.
    """
    path = Path(directory) / META
    path.write_text(json.dumps(read_json(path) | dict(more), indent=2, default=str))


def load_model(directory: str | Path) -> LoadedModel:
    """Read a model directory onto the CPU, in eval mode.

    The directory may come from an untrusted source: nothing is unpickled, and sizes are checked before a
    network of that size is built.

    Raises:
        ValueError: A file is missing, unreadable or modified, the format is different, or weights have the
            wrong shape or are NaN or infinite. The message names the file.
    """
    directory = Path(directory)
    for name in (WEIGHTS, CONFIG, VOCABULARY, LABELS, META):
        if not (directory / name).is_file():
            raise ValueError(
                f"model directory {directory} has no {name}; use a directory written by training, or"
                f" models:/NAME@ALIAS"
            )
    weights, metadata = read_tensors(directory / WEIGHTS)
    if metadata.get("kind") != "screformer model":
        raise ValueError(f"{directory / WEIGHTS} does not contain the weights of a screformer model")
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"model directory {directory} has format {metadata.get('format')}, but this screformer reads"
            f" {FORMAT}; load it with"
            f" screformer {_writer(directory)}, which wrote it"
        )
    hashed = [CONFIG, VOCABULARY, LABELS] + [CALIBRATION] * (
        CALIBRATION in metadata or (directory / CALIBRATION).exists()
    )
    for name in hashed:
        if not (directory / name).is_file() or metadata.get(name) != sha256(directory / name):
            raise ValueError(
                f"{directory / name} is not the file saved with these weights; restore it, or train again"
            )
    meta = read_json(directory / META)
    if WEIGHTS_HASH in meta and meta.pop(WEIGHTS_HASH) != sha256(directory / WEIGHTS):
        raise ValueError(f"{directory / WEIGHTS} was changed after it was saved; restore it, or train again")
    check_finite(weights, source=str(directory / WEIGHTS))
    with _content_of(directory / CONFIG):
        config = ExperimentConfig.from_saved(read_json(directory / CONFIG))
    with _content_of(directory / VOCABULARY):
        vocabulary = GeneVocabulary.load(directory / VOCABULARY)
    with _content_of(directory / LABELS):
        labels = checked_labels(read_json(directory / LABELS))
    check_sizes(config, len(vocabulary), len(labels["names"]), weights, source=str(directory))
    model = ScReformer(
        config.model,
        config.tokens,
        num_genes=len(vocabulary),
        num_classes=len(labels["names"]),
        seed=config.train.seed,
    )
    if model.linear_skip is not None:  # earlier versions treated unmeasured genes as zero
        weights.setdefault("linear_skip.center", torch.zeros(len(vocabulary)))
    check_weights(model, weights, source=str(directory))
    model.load_state_dict(weights)
    calibration = Calibration()
    if CALIBRATION in hashed:
        with _content_of(directory / CALIBRATION):
            calibration = Calibration.from_json(read_json(directory / CALIBRATION))
            calibration.check_classes(len(labels["names"]))
    return LoadedModel(
        model=model.eval(),
        config=config,
        vocabulary=vocabulary,
        labels=labels,
        meta=meta,
        calibration=calibration,
        reference=TrainingReference.load(directory),
    )


def read_weights(directory: str | Path) -> dict[str, torch.Tensor]:
    """The state dict of a model directory, on the CPU."""
    return read_tensors(Path(directory) / WEIGHTS)[0]


@contextlib.contextmanager
def _content_of(path: Path) -> Iterator[None]:
    """Prefix errors about a file's content with its name."""
    try:
        yield
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} cannot be used: {text}; restore it, or train again") from error


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file; raises ValueError if it is incomplete."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a complete safetensors file ({error}); copy it again") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; raises ValueError if the file does not contain one."""
    try:
        tree = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); restore it") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path} contains {type(tree).__name__}, not a JSON object; restore it")
    return tree


def _writer(directory: Path) -> str:
    """The version of screformer that wrote a model directory, from its meta.json."""
    code = read_json(directory / META).get("code", {})
    return f"{code.get('screformer', '(version not recorded)')} (git {code.get('git', 'not recorded')})"


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
