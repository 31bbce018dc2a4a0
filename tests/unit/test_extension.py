"""A network that learns more genes and labels keeps what it knows."""

import dataclasses

import numpy as np
import pytest
import torch

from helpers.tiny_model import tiny_vocabulary, write_tiny_model
from screformer.additive_start import Labelled
from screformer.checkpoint import LoadedModel, load_model
from screformer.counts import CellCounts
from screformer.extension import extended, extended_vocabulary, fit_new_rows, known_part, new_rows
from screformer.model import ScReformer
from screformer.predictor import Predictor
from screformer.reference import TrainingReference
from screformer.tokenizer import GeneVocabulary

NEW = tiny_vocabulary([f"ENSG9{number:010d}" for number in range(6)])


@pytest.fixture(scope="module", params=["reformer", "additive"])
def known(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    vocabulary, settings = tiny_vocabulary(), {}
    if request.param == "additive":
        settings = {"model.encoder": "additive", "model.linear_skip": False, "model.input_genes": 20}
        inputs_g, reference_g = np.arange(40) < 20, np.full(40, 1 / 40, np.float32)
        vocabulary = dataclasses.replace(vocabulary, inputs_g=inputs_g, reference_g=reference_g)
    return load_model(write_tiny_model(tmp_path_factory.mktemp("model") / "m", vocabulary, **settings))


def cells(num: int, num_genes: int, seed: int = 0) -> CellCounts:
    """Gene 41 goes with gene 3; the genes from 40 on are of every other label."""
    rng = np.random.default_rng(seed)
    counts = rng.poisson(2.0, (num, num_genes)).astype(np.float32)
    counts[:, 3] = rng.poisson(20, num) * (np.arange(num) % 3 == 0)
    if num_genes > 41:
        counts[:, 41] = counts[:, 3]
    return CellCounts.of(counts)


def more(known: LoadedModel, vocabulary: GeneVocabulary) -> tuple[GeneVocabulary, dict, dict]:
    """The vocabulary and weights of an extension by six genes and two labels, and the settings."""
    additive = known.model.additive is not None
    config = known.config.merge({"model.input_genes": 24}) if additive else known.config
    found = Labelled(cells(60, len(vocabulary)), np.arange(60) % 6, np.zeros(60, np.int64))
    extension = extended(known, config, vocabulary, found, 6)
    return extension.vocabulary, extension.weights, config


def test_the_vocabulary_grows_at_its_end(known: LoadedModel) -> None:
    both = extended_vocabulary(known.vocabulary, NEW)
    assert both.feature_ids == known.vocabulary.feature_ids + NEW.feature_ids
    assert not both.mean_expression_g[40:].any()
    assert extended_vocabulary(both, NEW) is both
    if known.vocabulary.reference_g is not None:
        counts = cells(5, 46)
        ours, theirs = (
            counts.normalised(both.reference_g),
            known_part(counts, 40).normalised(known.vocabulary.reference_g),
        )
        np.testing.assert_array_equal(ours[:, :40].toarray(), theirs.toarray())


def test_old_weights_stay_and_new_genes_start_from_their_neighbours(known: LoadedModel) -> None:
    vocabulary, weights, config = more(known, extended_vocabulary(known.vocabulary, NEW))
    for name, tensor in known.model.state_dict().items():
        old, new = tensor.numpy(), weights[name]
        if name == "additive.slots":
            old, new = old[:20], new[:20]  # the genes behind them may become inputs
        np.testing.assert_array_equal(new[tuple(slice(size) for size in old.shape)], old, err_msg=name)
    model = ScReformer(config.model, config.tokens, num_genes=46, num_classes=6, seed=0)
    model.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
    if known.model.additive is not None:
        assert vocabulary.inputs_g is not None and vocabulary.inputs_g.sum() == 24
        assert vocabulary.inputs_g[:20].all()
        assert sorted(weights["additive.slots"][vocabulary.inputs_g]) == list(range(24))
    else:
        table = weights["gene_embedding.weight"][2:]
        nearest = np.linalg.norm(table[:40] - table[41], axis=1).argmin()
        assert nearest == 3 and not weights["linear_skip.weight.weight"][42:].any()
        assert (vocabulary.mean_expression_g[40:] > 0).all()


def test_cells_without_new_genes_get_the_old_logits(known: LoadedModel) -> None:
    both = extended_vocabulary(known.vocabulary, NEW)
    vocabulary, weights, config = more(known, both)
    model = ScReformer(config.model, config.tokens, num_genes=46, num_classes=6, seed=0)
    model.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
    counts = cells(8, 46)
    measured_pg = np.arange(46)[None] < (20 if known.model.additive is not None else 40)
    only_old = counts.counts_ng.multiply(measured_pg).tocsr()
    counts = CellCounts.of(only_old, panels=dataclasses.replace(counts.panels, measured_pg=measured_pg))
    labels = {**known.labels, "names": [*known.labels["names"], "x", "y"], "cl_ids": [""] * 6}
    loaded = LoadedModel(model=model.eval(), config=config, vocabulary=vocabulary, labels=labels, meta={})
    ours = Predictor(loaded, "", device="cpu").outputs(counts)[0]
    theirs = Predictor(known, "", device="cpu").outputs(known_part(counts, 40))[0]
    np.testing.assert_allclose(ours[:, :4], theirs, rtol=1e-5, atol=1e-5)


def test_new_rows_separate_new_labels_and_leave_old_cells_alone() -> None:
    rng = np.random.default_rng(0)
    labels_n = np.arange(300) % 3
    embedding_nd = rng.normal(size=(300, 5)) + 4 * np.eye(5)[labels_n]
    logits_nk = np.concatenate([6 * np.eye(3)[labels_n][:, :2], np.zeros((300, 1))], axis=1)
    rows_kd, bias_k = new_rows(embedding_nd, logits_nk, labels_n, np.ones(300), 2)
    logits_nk[:, 2] = embedding_nd @ rows_kd[0] + bias_k[0]
    assert rows_kd.shape == (1, 5) and (logits_nk.argmax(axis=1) == labels_n).mean() > 0.98


def test_fitted_rows_are_put_behind_the_old_ones(known: LoadedModel) -> None:
    vocabulary, weights, config = more(known, extended_vocabulary(known.vocabulary, NEW))
    old = weights["classification_head.weight"][:4].copy()
    labels = {"column": "x", "names": list("abcdef"), "cl_ids": [""] * 6}
    fit_new_rows(weights, config, vocabulary, labels, known, cells(60, 46), np.arange(60) % 6)
    np.testing.assert_array_equal(weights["classification_head.weight"][:4], old)
    assert np.abs(weights["classification_head.weight"][4:]).max() > 0


@pytest.mark.parametrize("known", ["additive"], indirect=True)  # logits of the other need counts too
def test_embeddings_of_old_cells_keep_new_labels_off_them(known: LoadedModel) -> None:
    vocabulary, weights, config = more(known, extended_vocabulary(known.vocabulary, NEW))
    labels = {"column": "x", "names": list("abcdef"), "cl_ids": [""] * 6}
    new_n = np.arange(60) % 2 + 4
    embedding_nd = np.random.default_rng(3).normal(5, 1, (80, 16)).astype(np.float32)
    head = known.model.classification_head
    old_n = head(torch.from_numpy(embedding_nd)).argmax(1).numpy()
    reference = TrainingReference(
        embedding_nd=embedding_nd,
        labels_n=old_n,
        donors_n=old_n,
        datasets_n=old_n,
        total_n=np.ones(80, np.float32),
        detected_n=old_n,
    )
    kept = {}
    for name, model in (("without", known), ("with", dataclasses.replace(known, reference=reference))):
        fitted = dict(weights)
        fit_new_rows(fitted, config, vocabulary, labels, model, cells(60, 46), new_n)
        logits = embedding_nd @ fitted["classification_head.weight"].T + fitted["classification_head.bias"]
        kept[name] = (logits.argmax(1) == old_n).mean()
    assert kept["with"] > 0.95 and kept["with"] >= kept["without"]
