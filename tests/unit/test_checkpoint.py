import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from screformer.checkpoint import NO_LABELS, load_model, read_weights, save_model
from screformer.config import ExperimentConfig
from screformer.model import ScReformer
from screformer.tokenizer import GeneVocabulary
from screformer.training_checkpoint import damage

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


def test_a_model_from_before_panels_treats_unmeasured_genes_as_zeros(saved: Path) -> None:
    weights = read_weights(saved)
    _resave(saved, drop="linear_skip.center")
    loaded = load_model(saved).model
    assert loaded.linear_skip is not None and not loaded.linear_skip.center.any()
    assert torch.equal(loaded.linear_skip.weight.weight, weights["linear_skip.weight.weight"])


def test_weights_of_a_bf16_run_are_kept_in_fp32(tmp_path: Path) -> None:
    model = ScReformer(CONFIG.model, CONFIG.tokens, num_genes=6, num_classes=0, seed=3)
    save_model(tmp_path, model.bfloat16(), CONFIG, _vocabulary(), NO_LABELS, {})
    assert {tensor.dtype for tensor in load_model(tmp_path).model.state_dict().values()} == {torch.float32}


def _resave(
    folder: Path, metadata: dict[str, str] | None = None, drop: str = "", cut: str = "", spoil: str = ""
) -> None:
    """Replace the weights in a directory without a digest, as in earlier versions."""
    path = folder / "weights.safetensors"
    meta = json.loads((folder / "meta.json").read_text())
    meta.pop("weights_sha256", None)
    (folder / "meta.json").write_text(json.dumps(meta))
    with safe_open(path, framework="pt") as file:
        tensors, old = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    tensors.pop(drop, None)
    if cut:
        tensors[cut] = tensors[cut][:-1].clone()
    if spoil:
        tensors[spoil][1] = float("nan")
    save_file(tensors, path, metadata={**old, **(metadata or {})})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda d: (d / "vocabulary.json").unlink(),
            r"has no vocabulary.json; use a directory written by training",
        ),
        (lambda d: (d / "weights.safetensors").unlink(), r"has no weights.safetensors"),
        (
            lambda d: (d / "weights.safetensors").write_bytes((d / "weights.safetensors").read_bytes()[:-40]),
            r"is not a complete safetensors",
        ),
        (lambda d: _resave(d, {"format": "99"}), r"has format 99, but this screformer reads 1"),
        (lambda d: _resave(d, {"kind": "dog"}), r"does not contain the weights of a screformer model"),
        (
            lambda d: _resave(d, drop="pooling.norm.bias"),
            r"weight pooling.norm.bias has shape none, but .* has \(8,\)",
        ),
        (
            lambda d: _resave(d, cut="pooling.score.bias"),
            r"pooling.score.bias has shape \(1,\), but .* has \(2,\)",
        ),
        (
            lambda d: (d / "vocabulary.json").write_text(
                (d / "vocabulary.json").read_text().replace("ENSG00000000001", "ENSG00000000009")
            ),
            r"vocabulary.json is not the file saved with these weights",
        ),
        (
            lambda d: (d / "labels.json").write_text(json.dumps({**LABELS, "names": ["T cell", "B cell"]})),
            r"labels.json is not the file",
        ),
        (lambda d: (d / "meta.json").write_text("{"), r"meta.json is not valid JSON"),
    ],
)
def test_errors_are_described(saved: Path, spoil: Callable[[Path], object], message: str) -> None:
    spoil(saved)
    with pytest.raises(ValueError, match=message):
        load_model(saved)


def test_a_checkpoint_is_complete_only_with_every_byte(tmp_path: Path) -> None:
    part, manifest = tmp_path / "part.bin", tmp_path / "manifest.json"

    def sealed(entry: object) -> None:
        manifest.write_text(json.dumps({"format": "1", "files": {"part.bin": entry}}))

    part.write_bytes(b"12345")
    assert damage(tmp_path) == "it has no complete manifest.json", "killed before it was sealed"
    sealed({"size": 5, "sha256": hashlib.sha256(b"12345").hexdigest()})
    assert damage(tmp_path) == ""
    part.write_bytes(b"12349")
    assert damage(tmp_path) == "part.bin was changed: its SHA-256 differs"
    part.write_bytes(b"1234")
    assert damage(tmp_path) == "part.bin has 4 bytes, not 5"
    part.unlink()
    assert damage(tmp_path) == "part.bin is missing"
    manifest.write_text("{")
    assert damage(tmp_path)
    sealed(5)  # manifests of earlier versions only have sizes
    part.write_bytes(b"12349")
    assert damage(tmp_path) == ""


def test_weights_that_predict_nothing_are_neither_saved_nor_loaded(saved: Path, tmp_path: Path) -> None:
    loaded = load_model(saved)
    weights = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    weights["pooling.norm.bias"][1] = float("nan")
    with pytest.raises(ValueError, match="weight pooling.norm.bias is NaN or infinite"):
        save_model(tmp_path / "other", weights, loaded.config, loaded.vocabulary, loaded.labels, {})
    assert not (tmp_path / "other" / "weights.safetensors").exists()
    _resave(saved, spoil="pooling.norm.bias")
    with pytest.raises(ValueError, match="weight pooling.norm.bias is NaN or infinite"):
        load_model(saved)


def test_a_flipped_byte_in_the_weights_is_found(saved: Path) -> None:
    path = saved / "weights.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="weights.safetensors was changed after it was saved"):
        load_model(saved)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("config.json", {"model": {"dim": 200_000}}, r"model.dim is 200000, but the weights have 8"),
        ("config.json", {"model": {"depth": 1_000_000}}, r"model.depth is 1000000, but the weights have 1"),
        ("config.json", {"model": {"ff_mult": 10**9}}, r"model.dim x model.ff_mult is"),
        ("config.json", {"model": 3}, r"config.json cannot be used"),
        ("labels.json", {"names": ["a"] * 10**6}, r"labels.json cannot be used: names and cl_ids must be"),
        ("labels.json", {"names": 7}, r"labels.json cannot be used"),
        (
            "labels.json",
            {"names": ["a"], "cl_ids": [""]},
            r"the number of labels is 1, but the weights have 2",
        ),
        ("vocabulary.json", {"feature_ids": None}, r"vocabulary.json cannot be used"),
    ],
)
def test_an_untrusted_directory_is_rejected_before_a_network_is_built(
    saved: Path, name: str, change: dict[str, object], message: str
) -> None:
    """Files and hashes are consistent, as an author can arrange, but the weights do not match."""
    tree = json.loads((saved / name).read_text())
    for key, value in change.items():
        tree[key] = {**tree[key], **value} if isinstance(value, dict) else value
    (saved / name).write_text(json.dumps(tree))
    _resave(saved, {name: hashlib.sha256((saved / name).read_bytes()).hexdigest()})
    with pytest.raises(ValueError, match=message):
        load_model(saved)
