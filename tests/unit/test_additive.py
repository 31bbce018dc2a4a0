"""The additive encoder: its formula, starting values, and augmentation of training cells."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import sparse

from screformer.additive import AdditiveEncoder, responses
from screformer.additive_start import Labelled, additive_start, informative_genes, reference_profile
from screformer.augmentation import LEAST_DEPTH, Augmentation
from screformer.checkpoint import load_model, save_model
from screformer.config import ExperimentConfig, ModelConfig
from screformer.counts import CellCounts, Panels
from screformer.explain import CellTokens, Explainer
from screformer.model import ScReformer
from screformer.objective import dataset_weights, prior_shift
from screformer.predictor import Predictor
from screformer.start import Start
from screformer.tokenizer import CellTokenizer, GeneVocabulary

GENES, CELLS, INPUTS, DIM = 60, 48, 24, 8
IDS = tuple(f"ENSG{i:011d}" for i in range(GENES))
LABELS = {"column": "cell_type", "names": ["a", "b", "c"], "cl_ids": ["", "", ""]}


def labelled(seed: int = 0) -> Labelled:
    """Cells of three labels in two data sets; the second measured half of the genes."""
    rng = np.random.default_rng(seed)
    labels, datasets = np.arange(CELLS) % 3, np.arange(CELLS) % 2
    rates = rng.gamma(0.4, 2.0, (3, GENES))
    measured = np.stack([np.ones(GENES, bool), np.arange(GENES) % 2 == 0])
    counts = rng.poisson(rates[labels] * rng.uniform(1, 4, (CELLS, 1))) * measured[datasets]
    return Labelled(CellCounts.of(counts, panels=Panels(measured, datasets)), labels, datasets)


def started() -> tuple[ExperimentConfig, GeneVocabulary, ScReformer, Labelled]:
    """A network with its starting values, but with nonzero head and hidden layer."""
    found = labelled()
    settings = {
        "model.encoder": "additive",
        "model.linear_skip": False,
        "model.dim": DIM,
        "model.input_genes": INPUTS,
        "model.attention": "none",
    }
    config = ExperimentConfig().merge(settings)
    inputs, reference = informative_genes(found, INPUTS), reference_profile(found).astype(np.float32)
    values = found.cells.normalised(reference)
    weights = dataset_weights(found.labels_n, found.datasets_n)
    start = additive_start(values, found.cells.panels, weights, inputs, DIM, 0)
    mean = np.asarray(values.mean(axis=0), dtype=np.float32).ravel()
    vocabulary = GeneVocabulary(IDS, IDS, mean, reference, np.isin(np.arange(GENES), inputs))
    model = ScReformer(config.model, config.tokens, num_genes=GENES, num_classes=3, seed=0)
    Start(additive=start).put_into(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return config, vocabulary, model.eval(), found


def dense_logits(model: ScReformer, cells: CellCounts, vocabulary: GeneVocabulary) -> torch.Tensor:
    """The formula on dense matrices, as written in the log."""
    encoder = model.additive
    assert encoder is not None and model.classification_head is not None and vocabulary.inputs_g is not None
    reference = vocabulary.reference_g
    assert reference is not None
    counts = cells.counts_ng.toarray()
    measured = cells.panels.measured_pg[cells.panels.panels_n]
    share = measured @ reference.astype(np.float64)
    values = np.log1p(counts * (1e4 * share / counts[:, reference > 0].sum(1))[:, None])
    v = torch.from_numpy(values[:, vocabulary.inputs_g]).float()
    m = torch.from_numpy(measured[:, vocabulary.inputs_g]).float()
    phi = [
        v,
        torch.tanh(2 * v),
        torch.sigmoid(4 * (v - 1.5)) - 0.0024726,
        torch.sigmoid(4 * (v - 3)) - 6.1e-6,
    ]
    h = torch.zeros(len(v), DIM)
    for b in range(4):
        h = h + (((phi[b] - encoder.center[:, b]) * m) @ encoder.genes.weight) * encoder.mix.weight[:, b]
    h = encoder.affine.gain * h / encoder.scale + encoder.affine.bias
    h = h + encoder.outer(torch.nn.functional.gelu(encoder.inner(h)))
    return model.classification_head(h)


def batch_of(
    config: ExperimentConfig, vocabulary: GeneVocabulary, cells: CellCounts
) -> dict[str, torch.Tensor]:
    tokens = CellTokenizer(config.tokens, vocabulary)(cells)
    batch = {name: torch.from_numpy(tokens[name]) for name in ("token_ids", "values", "bin_ids")}
    return {
        **{name: tensor if name == "values" else tensor.long() for name, tensor in batch.items()},
        "measured": torch.from_numpy(cells.panels.measured_pg),
        "panels": torch.from_numpy(cells.panels.panels_n),
    }


def test_responses_are_zero_at_zero() -> None:
    assert (responses(torch.zeros(3)) == 0).all()


def test_tokens_match_the_dense_formula_on_every_panel() -> None:
    config, vocabulary, model, found = started()
    with torch.no_grad():
        logits = model(batch_of(config, vocabulary, found.cells), task="finetune").logits_nk
        torch.testing.assert_close(logits, dense_logits(model, found.cells, vocabulary), rtol=1e-4, atol=1e-4)
        batch = batch_of(config, vocabulary, found.cells)
        tokens = model.embed_tokens(batch["token_ids"], batch["values"], batch["bin_ids"])
        explained = model.forward_embedded(tokens, batch, task="finetune").logits_nk
        torch.testing.assert_close(explained, logits, rtol=1e-4, atol=1e-4)


def test_an_undetected_gene_counts_unless_it_was_not_measured() -> None:
    config, vocabulary, model, found = started()
    assert vocabulary.inputs_g is not None
    gene = int(np.flatnonzero(vocabulary.inputs_g)[0])
    counts = found.cells.counts_ng.toarray()
    counts[:, gene] = 0
    everywhere = np.ones(GENES, bool)
    without = everywhere.copy()
    without[gene] = False
    with torch.no_grad():
        said = [
            model(
                batch_of(config, vocabulary, CellCounts.of(counts, panels=Panels.one(panel, CELLS))),
                task="finetune",
            ).logits_nk
            for panel in (everywhere, without)
        ]
    assert (said[0] - said[1]).abs().max() > 1e-3


def test_values_do_not_depend_on_the_panel() -> None:
    """A cell whose counts follow the reference has the same values on any panel."""
    reference = np.random.default_rng(3).dirichlet(np.ones(GENES))
    counts = np.rint(reference * 1e6)
    half = np.arange(GENES) < 30
    whole = CellCounts.of(counts[None]).normalised(reference).toarray()
    part = CellCounts.of((counts * half)[None], panels=Panels.one(half, 1)).normalised(reference).toarray()
    np.testing.assert_allclose(part[0, half], whole[0, half], rtol=1e-4)


def test_only_input_genes_become_tokens() -> None:
    config, vocabulary, _, found = started()
    tokenizer = CellTokenizer(config.tokens, vocabulary)
    tokens = tokenizer(found.cells)
    lengths = tokenizer.lengths(found.cells)
    np.testing.assert_array_equal((tokens["token_ids"] > 1).sum(1), lengths)
    assert vocabulary.inputs_g is not None
    assert vocabulary.inputs_g[tokens["token_ids"][tokens["token_ids"] > 1] - 2].all()


def test_a_saved_model_gives_the_same_results(tmp_path: Path) -> None:
    config, vocabulary, model, found = started()
    save_model(tmp_path, model, config, vocabulary, LABELS, {})
    loaded = load_model(tmp_path)
    np.testing.assert_array_equal(loaded.vocabulary.inputs_g, vocabulary.inputs_g)
    np.testing.assert_array_equal(loaded.vocabulary.reference_g, vocabulary.reference_g)
    said = Predictor(loaded, tmp_path, device="cpu").predict(found.cells)
    with torch.no_grad():
        expected = dense_logits(model, found.cells, vocabulary).softmax(1).numpy()
    np.testing.assert_allclose(said.probabilities_nk, expected, atol=1e-4)


def test_explanations_add_up_on_a_panel() -> None:
    config, vocabulary, model, found = started()
    cells = found.cells.take(np.flatnonzero(found.datasets_n == 1)[:6])
    tokens, lengths = (
        CellTokenizer(config.tokens, vocabulary)(cells),
        1 + CellTokenizer(config.tokens, vocabulary).lengths(cells),
    )
    parts = [
        CellTokens(
            **{name: tokens[name][row, : lengths[row]] for name in ("token_ids", "values", "bin_ids")},
            measured_g=cells.panels.measured_pg[cells.panels.panels_n[row]],
        )
        for row in range(len(cells))
    ]
    explained = Explainer(model, parts[1:], num_nodes=8).attribute(parts[0], [0, 1])
    for attribution in explained:
        assert attribution.additivity_error < 1e-3 * max(1, abs(attribution.output - attribution.base))


def test_starting_values_of_another_shape_are_rejected() -> None:
    encoder = AdditiveEncoder(ModelConfig(encoder="additive", linear_skip=False, input_genes=5), 9)
    parts = (torch.zeros(9, dtype=torch.int64), torch.zeros(4, 4), torch.zeros(5, 128), torch.ones(()))
    with pytest.raises(ValueError, match=r"start has shape \(4, 4\), the network needs \(5, 4\)"):
        encoder.set_start(*parts)


def test_informative_genes_are_those_that_differ() -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(90) % 3
    counts = rng.poisson(2.0, (90, GENES))
    for label in range(3):
        counts[labels == label, 10 + label] += 20
    found = Labelled(CellCounts.of(counts), labels, np.zeros(90, dtype=np.int64))
    assert {10, 11, 12} <= set(informative_genes(found, 6))


AUGMENTATION = Augmentation(thinned_share=0.6, panel_share=0.5, genes=np.arange(0, GENES, 2), seed=4)


def test_augmentation_depends_only_on_seed_epoch_and_cell() -> None:
    cells, joinids = labelled().cells, np.arange(100, 100 + CELLS)
    whole = AUGMENTATION(cells, joinids, 3)
    some = np.array([7, 3, 40])
    part = AUGMENTATION(cells.take(some), joinids[some], 3)
    np.testing.assert_array_equal(part.counts_ng.toarray(), whole.counts_ng.toarray()[some])
    np.testing.assert_array_equal(
        part.panels.measured_pg[part.panels.panels_n], whole.panels.measured_pg[whole.panels.panels_n[some]]
    )
    for other in (AUGMENTATION(cells, joinids, 4), replace(AUGMENTATION, seed=5)(cells, joinids, 3)):
        assert (other.counts_ng != whole.counts_ng).nnz


def test_augmentation_thins_counts_and_removes_genes() -> None:
    cells = labelled().cells
    before = cells.counts_ng.toarray()
    all_thinned = replace(AUGMENTATION, thinned_share=1.0, panel_share=0.0)(cells, np.arange(CELLS), 0)
    thinned = all_thinned.counts_ng.toarray()
    assert (thinned <= before).all() and thinned.sum() < before.sum()
    assert (all_thinned.total_n >= LEAST_DEPTH * cells.total_n).all()
    every = replace(AUGMENTATION, thinned_share=0.0, panel_share=1.0)(cells, np.arange(CELLS), 0)
    measured = every.panels.measured_pg[every.panels.panels_n]
    np.testing.assert_array_equal(every.counts_ng.toarray(), before * measured)
    lost = ~measured & cells.panels.measured_pg[cells.panels.panels_n]
    assert lost.any() and not lost[:, 1::2].any()
    padding = AUGMENTATION(cells, np.full(CELLS, -1), 0)
    np.testing.assert_array_equal(padding.counts_ng.toarray(), before)
    assert sparse.issparse(padding.counts_ng)


def test_cell_weights_and_prior_shift() -> None:
    weights = dataset_weights(np.array([0, 0, 0, 0, 1, 0]), np.array([0, 0, 0, 0, 0, 1]))
    np.testing.assert_allclose(weights / weights[4], [0.5, 0.5, 0.5, 0.5, 1, 1])
    assert weights.mean() == pytest.approx(1)
    shares, counts = np.array([0.5, 0.5, 0.0]), np.array([90, 10, 0])
    np.testing.assert_allclose(prior_shift(shares, counts, 0.0), 0)
    shifted = shares * np.exp(prior_shift(shares, counts, 1.0))
    np.testing.assert_allclose(shifted / shifted.sum(), [0.9, 0.1, 0])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model.encoder": "additive"}, "set model.linear_skip=false"),
        (
            {"model.encoder": "additive", "model.linear_skip": False, "tokens.input_mode": "all"},
            "needs tokens.input_mode=detected, not all",
        ),
        ({"train.weight_average": 0.9, "zero.stage": 3}, "set zero.stage to 2 or less"),
    ],
)
def test_incompatible_settings(overrides: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExperimentConfig().merge(overrides)
