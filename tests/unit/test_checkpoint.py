import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from screformer.checkpoint import NO_LABELS, load_model, save_model
from screformer.config import ExperimentConfig
from screformer.model import ScReformer
from screformer.tokenizer import GeneVocabulary
from screformer.training_checkpoint import is_complete

LABELS = {"column": "cell_type", "names": ["B cell", "T cell"], "cl_ids": ["CL:0000236", ""]}
CONFIG = ExperimentConfig().merge(
    {"model.dim": 8, "model.depth": 1, "model.heads": 2, "model.attention": "lsh", "model.bucket_size": 4}
)


def _vocabulary() -> GeneVocabulary:
    names = tuple(f"ENSG{i:011d}" for i in range(6))
    return GeneVocabulary(names, tuple("ABCDEF"), np.linspace(0, 1, 6, dtype=np.float32))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = ScReformer(CONFIG.model, CONFIG.tokens, num_genes=6, num_classes=2, seed=3)
    save_model(tmp_path / "model", model, CONFIG, _vocabulary(), LABELS, {"task": "finetune"})
    return tmp_path / "model"


def test_a_model_comes_back_as_it_was(saved: Path) -> None:
    loaded = load_model(saved)
    expected = ScReformer(CONFIG.model, CONFIG.tokens, num_genes=6, num_classes=2, seed=3).state_dict()
    found = loaded.model.state_dict()
    assert found.keys() == expected.keys() and all(
        torch.equal(found[name], expected[name]) for name in expected
    )
    assert not loaded.model.training
    assert loaded.config == CONFIG and loaded.labels == LABELS and loaded.meta == {"task": "finetune"}
    assert loaded.vocabulary.feature_ids == _vocabulary().feature_ids
    np.testing.assert_array_equal(loaded.vocabulary.mean_expression_g, _vocabulary().mean_expression_g)


def test_a_model_from_before_panels_takes_genes_that_were_not_measured_as_zeros(saved: Path) -> None:
    with safe_open(saved / "weights.safetensors", framework="pt") as file:
        weights, metadata = (
            {name: file.get_tensor(name) for name in file.keys() if not name.endswith(".center")},
            file.metadata(),
        )
    save_file(weights, saved / "weights.safetensors", metadata=metadata)
    loaded = load_model(saved).model
    assert loaded.linear_skip is not None and not loaded.linear_skip.center.any()
    assert torch.equal(loaded.linear_skip.weight.weight, weights["linear_skip.weight.weight"])


def test_weights_of_a_bf16_run_are_kept_in_fp32(tmp_path: Path) -> None:
    model = ScReformer(CONFIG.model, CONFIG.tokens, num_genes=6, num_classes=0, seed=3)
    save_model(tmp_path, model.bfloat16(), CONFIG, _vocabulary(), NO_LABELS, {})
    assert {tensor.dtype for tensor in load_model(tmp_path).model.state_dict().values()} == {torch.float32}


def _resave(folder: Path, metadata: dict[str, str] | None = None, drop: str = "", cut: str = "") -> None:
    path = folder / "weights.safetensors"
    with safe_open(path, framework="pt") as file:
        tensors, old = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    tensors.pop(drop, None)
    if cut:
        tensors[cut] = tensors[cut][:-1].clone()
    save_file(tensors, path, metadata={**old, **(metadata or {})})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda d: (d / "vocabulary.json").unlink(),
            r"has no vocabulary.json; give a directory written by training",
        ),
        (lambda d: (d / "weights.safetensors").unlink(), r"has no weights.safetensors"),
        (
            lambda d: (d / "weights.safetensors").write_bytes((d / "weights.safetensors").read_bytes()[:-40]),
            r"is not a whole safetensors",
        ),
        (lambda d: _resave(d, {"format": "99"}), r"has format 99, this screformer reads 1"),
        (lambda d: _resave(d, {"kind": "dog"}), r"something else than a screformer model"),
        (
            lambda d: _resave(d, drop="pooling.norm.bias"),
            r"weight pooling.norm.bias has shape none, but .* has \(8,\)",
        ),
        (
            lambda d: _resave(d, cut="classification_head.bias"),
            r"classification_head.bias has shape \(1,\), but .* has \(2,\)",
        ),
        (
            lambda d: (d / "vocabulary.json").write_text(
                (d / "vocabulary.json").read_text().replace("ENSG00000000001", "ENSG00000000009")
            ),
            r"vocabulary.json is not the file that was saved with these weights",
        ),
        (
            lambda d: (d / "labels.json").write_text(json.dumps({**LABELS, "names": ["T cell", "B cell"]})),
            r"labels.json is not the file",
        ),
        (lambda d: (d / "meta.json").write_text("{"), r"meta.json is not valid JSON"),
    ],
)
def test_what_is_wrong_is_said(saved: Path, spoil: Callable[[Path], object], message: str) -> None:
    spoil(saved)
    with pytest.raises(ValueError, match=message):
        load_model(saved)


def test_a_checkpoint_is_complete_only_with_every_byte(tmp_path: Path) -> None:
    assert not is_complete(tmp_path)
    (tmp_path / "part.bin").write_bytes(b"12345")
    assert not is_complete(tmp_path), "no manifest: killed before it was sealed"
    (tmp_path / "manifest.json").write_text(json.dumps({"format": "1", "files": {"part.bin": 5}}))
    assert is_complete(tmp_path)
    (tmp_path / "part.bin").write_bytes(b"1234")
    assert not is_complete(tmp_path), "a file that was cut"
    (tmp_path / "part.bin").unlink()
    assert not is_complete(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    assert not is_complete(tmp_path)
